"""A calibration from beginning to end.

Owns its order: programs first, then whole steps, whose time beyond what the programs
explain is overhead. Invariant: what could not be measured in the time that there was
stays as it was, and the profile says so.
"""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shardkit.annotations import axes
from shardkit.errors import ConfigError
from shardkit.model import Model
from shardkit.planner.calibration import Sample, calibrated
from shardkit.planner.cost import predict
from shardkit.planner.measuring import experiments, measure
from shardkit.planner.meshes import Meshes, Topology
from shardkit.planner.profile import HardwareProfile, profile_of_kind, read_profile
from shardkit.planner.reading import read_model
from shardkit.planner.timed_step import TimedStep

__all__ = ["Calibration", "calibrate", "guess_base"]

_PROGRAMS = 0.75
"""The part of the time that is for programs; the rest is for steps."""
_NUM_ROUNDS = 7


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        table: The profile, as its file has it.
        samples: What was timed.
        kept: The figures under `measured` that nothing was measured of.
    """

    table: dict[str, Any]
    samples: list[Sample]
    kept: list[str]

    @property
    def profile(self) -> HardwareProfile:
        """The profile that the table makes."""
        return read_profile(self.table, "calibrate")


def guess_base(device: Any) -> str:
    """Returns the profile that has the datasheet of a device.

    Raises:
        ConfigError: If none has.
    """
    if (name := profile_of_kind(device.device_kind)) is not None:
        return name
    raise ConfigError(
        f"calibrate: no profile has a datasheet of {device.device_kind!r}. Write one "
        "like those in shardkit/planner/profiles/, and name it: --profile FILE.toml"
    )


def calibrate(
    base: Mapping[str, Any], base_name: str, devices: Sequence[Any], *, limit_s: float
) -> Calibration:
    """Measures what devices reach of a profile's datasheet.

    Args:
        base: The table of that profile.
        base_name: What it is called.
        devices: All on one host, of this process.
        limit_s: About how long it may take; what is being compiled is finished.

    Raises:
        ConfigError: If the base cannot be used.
    """
    start_s = time.monotonic()
    shared = read_profile(base, base_name).is_shared
    dtypes = [d for d in base["datasheet"]["peak_flops_s"] if d != "float16"]
    found = experiments(devices[0].platform, len(devices), dtypes)
    samples, alone = measure(
        found, devices, is_shared=shared, limit_s=_PROGRAMS * limit_s
    )
    table, _ = calibrated(base, samples, alone)
    left_s = limit_s - (time.monotonic() - start_s)
    profile = read_profile(table, base_name)
    samples += _steps(profile, devices, left_s)
    table, kept = calibrated(base, samples, alone)
    if shared:
        table["name"] = f"{len(devices)} emulated devices on {os.cpu_count()} cores"
        table["datasheet"]["devices_per_host"] = len(devices)
    table["measured"]["by"] = _who(devices, base_name, kept)
    return Calibration(table, samples, kept)


def _who(devices: Sequence[Any], base_name: str, kept: Sequence[str]) -> str:
    device = devices[0]
    kind = device.device_kind
    if device.platform == "cpu":
        kind = f"emulated device on {os.cpu_count()} cores, {platform.machine()}"
    words = f"shardkit calibrate on {len(devices)} × {kind}, jax {jax.__version__}"
    return f"{words}; as in profile {base_name}: {', '.join(kept)}" if kept else words


def _steps(
    profile: HardwareProfile, devices: Sequence[Any], limit_s: float
) -> list[Sample]:
    """Times steps that compute next to nothing; what is not explained is overhead."""
    start_s, num = time.monotonic(), len(devices)
    model, tx = _small_model(), optax.sgd(0.1)
    cases: list[tuple[dict[str, int], int]] = [({"fsdp": 1}, 2), ({"fsdp": 1}, 66)]
    cases += [({"fsdp": num}, 2 * num), ({"data": num}, 34 * num)] if num > 1 else []
    steps: list[tuple[dict[str, int], int, TimedStep, list[float]]] = []
    for sizes, count in cases:
        if time.monotonic() - start_s > limit_s:
            break
        batch = {"x": np.ones((count, 8), np.float32)}
        step = TimedStep(model, tx, batch, count, sizes, devices=devices)
        steps.append((sizes, count, step, []))
    for _ in range(_NUM_ROUNDS):
        for _, _, step, seconds in steps:
            seconds.append(step.clock(4))
    facts = read_model(model, {"x": jax.ShapeDtypeStruct((1, 8), jnp.float32)}, tx)
    topology = Topology(num, num)
    units = {"steps": (1.0, 0.0), "microbatches": (0.0, 1.0)}
    samples = []
    for sizes, count, _, seconds in steps:
        meshes, amounts, other_s = Meshes.of(sizes, count), {}, 0.0
        for name, (step_s, microbatch_s) in units.items():
            unit = dataclasses.replace(
                profile, step_overhead_s=step_s, microbatch_overhead_s=microbatch_s
            )
            parts = predict(facts, meshes, unit, topology).time_s
            amounts[name] = float(np.sum(parts.pop("overhead")))
            other_s = float(np.sum([np.sum(part) for part in parts.values()]))
        name = " ".join(f"{axis}={n}" for axis, n in sizes.items())
        label = f"step, {name}, {count} microbatches"
        seconds_s = statistics.median(seconds)
        samples.append(Sample(label, amounts, seconds_s, known_s=other_s))
    return samples


def _small_model() -> Model:
    def init(_: Any) -> Any:
        return {"w": axes(jnp.ones((8, 8)), "embed", None)}

    def loss(params: Any, microbatch: Any, _: Any) -> Any:
        return jnp.sum((microbatch["x"] @ params["w"]) ** 2)

    return Model(init=init, loss=loss, axis_rules={"embed": "fsdp"})
