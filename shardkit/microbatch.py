"""The fixed grid of microbatches, and who computes which.

Owns the grid of a step: `num_microbatches` equal runs of rows of the global batch,
and its dealing to devices as contiguous runs, as long as the devices are fast.
Invariant: what a microbatch contains depends on its global index alone, so who
computes it enters no bit. It draws no data, and measures no speeds.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from shardkit.errors import ConfigError

__all__ = ["Grid", "checked_speeds"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """`num_microbatches` dealt to `num_devices`.

    Where a group of devices computes a microbatch together, it counts as one device.

    Attributes:
        num_microbatches: The size of the grid.
        num_devices: Over how many devices, or groups, it is dealt.
        speeds: How fast each device is beside the others, above 0; empty if they are
            all alike. The step then takes as long as it must: no other dealing of
            whole microbatches lets the last device be done earlier.

    Example:
        >>> Grid(num_microbatches=8, num_devices=3).counts
        array([3, 3, 2], dtype=int32)
        >>> Grid(num_microbatches=8, num_devices=3).starts
        array([0, 3, 6], dtype=int32)
        >>> Grid(num_microbatches=8, num_devices=3, speeds=(1.0, 1.0, 0.5)).counts
        array([4, 3, 1], dtype=int32)
    """

    num_microbatches: int
    num_devices: int
    speeds: tuple[float, ...] = ()

    @functools.cached_property
    def counts(self) -> Int[np.ndarray, " devices"]:
        """How many microbatches each device computes."""
        each, extra = divmod(self.num_microbatches, self.num_devices)
        if len(set(self.speeds)) < 2:
            return (each + (np.arange(self.num_devices) < extra)).astype(np.int32)
        counts = np.zeros(self.num_devices, np.int32)
        # The next one goes to whoever would be done with it first.
        done = [(1 / speed, device) for device, speed in enumerate(self.speeds)]
        heapq.heapify(done)
        for _ in range(self.num_microbatches):
            _, device = done[0]
            counts[device] += 1
            next_s = (int(counts[device]) + 1) / self.speeds[device]
            heapq.heapreplace(done, (next_s, device))
        return counts

    @property
    def starts(self) -> Int[np.ndarray, " devices"]:
        """The global index of each device's first microbatch."""
        return (np.cumsum(self.counts) - self.counts).astype(np.int32)

    @property
    def max_count(self) -> int:
        """The length of a device's slots: the most that any computes, and at least 2.

        Of a single one the compiler would drop the dim, and fuse the loss otherwise.
        """
        return max(2, int(self.counts.max()))

    @property
    def slots(self) -> Int[np.ndarray, " slots"]:
        """The global microbatch in every slot, `max_count` slots per device.

        A slot that a device does not use repeats the last microbatch; it is loaded
        and never counts.
        """
        index = self.starts[:, None] + np.arange(self.max_count)[None]
        return np.minimum(index.reshape(-1), self.num_microbatches - 1)


def checked_speeds(speeds: Mapping[int, float]) -> dict[int, float]:
    """Checks relative speeds of devices.

    Raises:
        ConfigError: If one is no positive number; names all of them.
    """
    wrong = {
        device: speed
        for device, speed in speeds.items()
        if isinstance(speed, bool)
        or not isinstance(speed, int | float)
        or not 0 < speed < math.inf
    }
    if wrong:
        raise ConfigError(f"speeds: expected numbers above 0, found {wrong}")
    return {device: float(speed) for device, speed in speeds.items()}
