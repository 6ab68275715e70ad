"""How large the global batch is, as a function of the step.

Owns `BatchRamp`, a step function of the step. Invariant: it depends on the step alone,
so whoever resumes at a step, on whatever devices, finds the size and the first row that
it would have had. It cuts no batch and knows no rows' contents.

References:
    Smith et al., Don't Decay the Learning Rate, Increase the Batch Size (ICLR 2018).
"""

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex

from shardkit.errors import ConfigError, DataError

__all__ = ["BatchRamp", "as_ramp"]

# Steps are int32 on devices.
_MAX_STEP = 2**31 - 1


@dataclass(frozen=True, init=False)
class BatchRamp:
    """A number for every step: of microbatches, or of rows.

    The microbatches of a run stay as large as they are, and their number changes. So
    `sk.Trainer(num_microbatches=ramp)` goes with data of `ramp(step) × rows per
    microbatch` rows, which `ramp.rows` says: `global_batch_size=ramp.rows(4)`.

    Attributes:
        phases: Pairs of a first step and the number from there on; one that changes
            nothing is left out.

    Args:
        phases: First step → number; from step 0 on, in rising order. Or such pairs.

    Raises:
        ConfigError: If they do not begin at 0, do not rise, or a number is below 1.

    Example:
        >>> ramp = BatchRamp({0: 8, 100: 16, 300: 32})
        >>> ramp(0), ramp(99), ramp(100), ramp(10**6)
        (8, 8, 16, 32)
        >>> ramp.before(101)
        816
        >>> ramp.rows(4)
        BatchRamp({0: 32, 100: 64, 300: 128})
    """

    phases: tuple[tuple[int, int], ...]

    def __init__(self, phases: Mapping[int, int] | Iterable[tuple[int, int]]) -> None:
        found = _as_pairs(phases)
        kept = [
            pair for i, pair in enumerate(found) if i == 0 or pair[1] != found[i - 1][1]
        ]
        object.__setattr__(self, "phases", tuple(kept))

    @classmethod
    def parse(cls, text: str, first: int) -> "BatchRamp":
        """Reads `STEP:N` entries between commas, as configs have them.

        Args:
            text: Steps above 0, rising, and numbers from there on.
            first: The number before the first entry.

        Raises:
            ConfigError: If it cannot be read, or makes no ramp.

        Example:
            >>> BatchRamp.parse("100:16,300:32", first=8)
            BatchRamp({0: 8, 100: 16, 300: 32})
        """
        pairs = [(0, first)]
        for entry in text.split(","):
            match = re.fullmatch(r"\s*([1-9][0-9]*)\s*:\s*([0-9]+)\s*", entry)
            if match is None:
                raise ConfigError(
                    "expected STEP:N entries between commas with steps above 0, such "
                    f"as 100:16,300:32, found {entry.strip()!r} in {text!r}"
                )
            pairs.append((int(match[1]), int(match[2])))
        return cls(pairs)

    def __call__(self, step: SupportsIndex) -> int:
        """Returns the number of a step.

        Raises:
            DataError: If the step is negative.
        """
        if (number := operator.index(step)) < 0:
            raise DataError(f"Batches are numbered from step 0, found step {number}.")
        return next(count for start, count in self.phases[::-1] if start <= number)

    def before(self, step: SupportsIndex) -> int:
        """Returns the sum over all steps before this one.

        Of rows that is the index of its first row. Python's integers do not overflow.
        """
        number = operator.index(step)
        ends = [start for start, _ in self.phases[1:]] + [number]
        return sum(
            count * (min(end, number) - start)
            for (start, count), end in zip(self.phases, ends, strict=True)
            if start < number
        )

    def next_start(self, step: SupportsIndex) -> int | None:
        """Returns the first step after this one that has another number, if any."""
        number = operator.index(step)
        return next((start for start, _ in self.phases if start > number), None)

    def rows(self, rows_per_microbatch: int) -> "BatchRamp":
        """Returns the rows of every step, where this one counts microbatches."""
        each = operator.index(rows_per_microbatch)
        return BatchRamp((start, count * each) for start, count in self.phases)

    @property
    def is_constant(self) -> bool:
        """Whether all steps have the same number."""
        return len(self.phases) == 1

    @property
    def counts(self) -> list[int]:
        """The numbers that there are, each once, in the order of their steps."""
        return list(dict.fromkeys(count for _, count in self.phases))

    @property
    def record(self) -> int | str:
        """What to remember of it: the only number, or text such as `0:8,100:16`."""
        return self.phases[0][1] if self.is_constant else str(self)

    def __str__(self) -> str:
        return ",".join(f"{start}:{count}" for start, count in self.phases)

    def __repr__(self) -> str:
        return f"BatchRamp({dict(self.phases)})"


def as_ramp(number: "SupportsIndex | BatchRamp", where: str) -> BatchRamp:
    """Takes the same number for all steps, or a ramp.

    Raises:
        ConfigError: If it is neither; begins with `where`.

    Example:
        >>> as_ramp(8, "num_microbatches")(1000)
        8
    """
    if isinstance(number, BatchRamp):
        return number
    if not _is_whole(number, 1):
        raise ConfigError(
            f"{where}: expected a whole number of at least 1, or an sk.BatchRamp, "
            f"found {number!r}"
        )
    return BatchRamp({0: operator.index(number)})


def _as_pairs(phases: Any) -> list[tuple[int, int]]:
    shape = "expected first step → number, such as sk.BatchRamp({0: 8, 1000: 16})"
    try:
        listed = phases.items() if isinstance(phases, Mapping) else phases
        pairs = [(start, count) for start, count in listed]
    except (TypeError, ValueError):
        raise ConfigError(f"BatchRamp: {shape}, found {phases!r}") from None
    bad = [
        f"{start!r}: {count!r}"
        for start, count in pairs
        if not (_is_whole(start, 0) and start <= _MAX_STEP and _is_whole(count, 1))
    ]
    if bad:
        raise ConfigError(
            "BatchRamp: expected whole numbers, steps from 0 to 2³¹ - 1 and what they "
            f"begin of at least 1, found {', '.join(bad)}"
        )
    found = [(operator.index(start), operator.index(count)) for start, count in pairs]
    starts = [start for start, _ in found]
    if starts[:1] != [0] or starts != sorted(set(starts)):
        raise ConfigError(
            f"BatchRamp: expected steps that begin at 0 and rise, found "
            f"{', '.join(map(str, starts)) or 'none'}"
        )
    return found


def _is_whole(number: Any, least: int) -> bool:
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        return False
    return operator.index(number) >= least
