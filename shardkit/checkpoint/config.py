"""Where, when and how long checkpoints are kept: the options of a run.

Owns `CheckpointConfig`, and nothing happens here.
"""

import dataclasses
from pathlib import Path

from shardkit.errors import ConfigError

__all__ = ["CheckpointConfig"]

_MODES = ("min", "max")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where and when a `Trainer` saves.

    Attributes:
        directory: Created if it is not there.
        every: Steps between saves; 0 saves only when asked, or when leaving.
        keep: How many of the newest checkpoints stay; None for all.
        keep_every: Checkpoints at multiples of so many steps stay too; None for none.
        keep_best: How many of the best stay too, by the last evaluation before each.
        best_metric: The metric of the evaluation that says which are best.
        best_mode: `"min"` or `"max"`.
        compress: Whether arrays are compressed (zstd); smaller, and slower to read.

    Raises:
        ConfigError: If a value cannot be used.
    """

    directory: str | Path
    every: int = 0
    keep: int | None = 2
    keep_every: int | None = None
    keep_best: int = 0
    best_metric: str = "loss"
    best_mode: str = "min"
    compress: bool = False

    def __post_init__(self) -> None:
        bad = [
            f"{name}: expected {least} or more, found {value!r}"
            for name, value, least in (
                ("every", self.every, 0),
                ("keep", self.keep, 1),
                ("keep_every", self.keep_every, 1),
                ("keep_best", self.keep_best, 0),
            )
            if value is not None and not (type(value) is int and value >= least)
        ]
        if self.best_mode not in _MODES:
            bad.append(f"best_mode: expected min or max, found {self.best_mode!r}")
        if bad:
            raise ConfigError("CheckpointConfig: " + "; ".join(bad))
