"""When snapshots are taken, and where they are kept: the options of a run.

Owns `SnapshotConfig`, and nothing happens here.
"""

import dataclasses
from typing import Any

from shardkit.errors import ConfigError

__all__ = ["SnapshotConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapshotConfig:
    """When a `Trainer` copies its state to host memory.

    Snapshots are taken beside the steps: a copy is made on the devices, and brought to
    host memory while the next step runs. The two newest are kept.

    Attributes:
        every: Steps between snapshots. With 1, what was computed before devices were
            lost can be certified, and no more is repeated than the step in flight.
        store: A `shardkit.snapshot.store.Store`; None for memory of this process, which
            survives the loss of devices, but not of the process.

    Raises:
        ConfigError: If `every` cannot be used.
    """

    every: int = 1
    store: Any = None

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise ConfigError(
                f"SnapshotConfig: every: expected 1 or more, found {self.every!r}. "
                "For no snapshots, give snapshot=None."
            )
