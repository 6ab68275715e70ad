"""From timed programs to what a machine reaches.

Owns the fit: seconds as a sum of known amounts of work, each times a coefficient that
is not known. Invariant: a coefficient is never negative, and what nothing was timed
for stays as it was in the profile that one began with, and is named. It times nothing.

References:
    Huber, Robust Estimation of a Location Parameter (1964).
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

from shardkit.planner.profile import ALONE, read_profile

__all__ = ["Sample", "calibrated", "fit", "predicted_s"]

_NUM_PASSES = 30
# An error of so many times the usual one counts as one of a disturbed program.
_USUAL = 1.345
_PLAIN = {
    "products": "product_overhead_s",
    "fresh": "fresh_byte_s",
    "steps": "step_overhead_s",
    "microbatches": "microbatch_overhead_s",
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """A program that was timed.

    Attributes:
        name: What it is.
        amounts: What it does, such as `"flops float32"` → how much.
        seconds: How long it took.
        known_s: What of that is explained by other work, and not to be fitted.
    """

    name: str
    amounts: Mapping[str, float]
    seconds: float
    known_s: float = 0.0


def fit(samples: Sequence[Sample]) -> dict[str, float]:
    """Finds seconds per unit of every amount that occurs.

    Errors count as parts of what was measured, so that a program of microseconds says
    as much as one of milliseconds; and large ones count linearly, so that a few that
    were disturbed say little.

    Example:
        >>> found = fit([
        ...     Sample("a", {"bytes": 100.0, "calls": 1.0}, 3.0),
        ...     Sample("b", {"bytes": 200.0, "calls": 1.0}, 5.0),
        ... ])
        >>> {name: round(value, 6) for name, value in sorted(found.items())}
        {'bytes': 0.02, 'calls': 1.0}
    """
    samples = [sample for sample in samples if sample.seconds > 0]
    names = sorted({name for x in samples for name, n in x.amounts.items() if n > 0})
    if not names:
        return {}
    rows = np.array(
        [[x.amounts.get(name, 0.0) / x.seconds for name in names] for x in samples]
    )
    # Units differ by many powers of ten.
    scale = rows.max(axis=0)
    rows, weights = rows / scale, np.ones(len(samples))
    wanted = np.array([1 - sample.known_s / sample.seconds for sample in samples])
    found = np.zeros(len(names))
    for _ in range(_NUM_PASSES):
        # The method by active sets ends at a bound, not near it.
        found = nnls(rows * weights[:, None], wanted * weights)[0]
        errors = np.abs(rows @ found - wanted)
        usual = max(1.4826 * float(np.median(errors)), 1e-9)
        weights = np.sqrt(np.minimum(1, _USUAL * usual / np.maximum(errors, 1e-12)))
    return dict(zip(names, (found / scale).tolist(), strict=True))


def predicted_s(sample: Sample, found: Mapping[str, float]) -> float:
    """What a sample takes by fitted coefficients."""
    fitted_s = sum(found.get(name, 0.0) * n for name, n in sample.amounts.items())
    return sample.known_s + fitted_s


def calibrated(
    base: Mapping[str, Any], samples: Sequence[Sample], alone: Sequence[Sample] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Puts what was measured into the table of a profile.

    The amounts that count: `"flops DTYPE"`; `"products"`, how many; `"bytes"` from and
    to memory; `"written"` by other operations, twice, as they are read too; `"fresh"`
    bytes, that a program is given anew; `"sent"` and `"hops"`, the calls of collectives
    times ⌈log₂⌉ of their devices; `"steps"` and `"microbatches"`.

    Args:
        base: The table whose datasheet holds, and all that was not measured.
        samples: What was timed.
        alone: What one device of a shared host took while no other was busy.

    Returns:
        The table, and the figures under `measured` that are still those of `base`.
    """
    table = copy.deepcopy(dict(base))
    sheet, measured = table["datasheet"], table["measured"]
    found, done = fit(samples), set[str]()

    def reached(speed: float, peaks: dict[str, float], key: str, name: str) -> None:
        # No datasheet tells of every machine that emulates devices.
        peaks[key] = max(peaks[key], speed)
        owner, _, part = name.partition(".")
        fraction = speed / peaks[key]
        if part:
            measured[owner][part] = fraction
        else:
            measured[owner] = fraction
        done.add(name)

    for dtype in sheet["peak_flops_s"]:
        if found.get(f"flops {dtype}"):
            speed = 1 / found[f"flops {dtype}"]
            reached(speed, sheet["peak_flops_s"], dtype, f"flops_fraction.{dtype}")
    if found.get("bytes"):
        reached(
            1 / found["bytes"], sheet, "memory_bandwidth_bytes_s", "memory_fraction"
        )
    is_shared = sheet.get("is_shared", False)
    # Between the hosts that one machine emulates lies nothing but its memory.
    for link in ("inside", "between") if is_shared else ("inside",):
        if found.get("sent"):
            speeds = sheet["bandwidth_bytes_s"]
            reached(1 / found["sent"], speeds, link, f"link_fraction.{link}")
        if "hops" in found:
            measured["latency_s"][link] = found["hops"]
            done.add(f"latency_s.{link}")
    profile = read_profile(table, "calibrate")
    plain = {key: found[name] for name, key in _PLAIN.items() if name in found}
    if "written" in found:
        plain["written_fraction"] = found["written"] * profile.memory_bytes_s
    measured.update(plain)
    alone_fractions = _alone(alone, found) if is_shared else dict.fromkeys(ALONE, 1.0)
    measured["alone_fraction"].update(alone_fractions)
    done |= {*plain, *(f"alone_fraction.{part}" for part in alone_fractions)}
    return table, [name for name in _figures(measured) if name not in done]


def _alone(samples: Sequence[Sample], found: Mapping[str, float]) -> dict[str, float]:
    """By how much products, and what is between them, are slower on a device alone."""
    parts = []
    for x in samples:
        seconds = {name: found.get(name, 0.0) * n for name, n in x.amounts.items()}
        products_s = sum(s for name, s in seconds.items() if name.startswith("flops"))
        others_s = sum(seconds.values()) - products_s
        amounts: dict[str, float] = {"products": products_s, "others": others_s}
        parts.append(Sample(x.name, amounts, x.seconds))
    return {part: 1 / max(slower, 1.0) for part, slower in fit(parts).items()}


def _figures(measured: Mapping[str, Any]) -> list[str]:
    """The names of all figures that are measured, but for who did."""
    names = []
    for key, value in measured.items():
        inner = value if isinstance(value, Mapping) else {}
        names += [f"{key}.{part}" for part in inner] or [key]
    return [name for name in names if name != "by"]
