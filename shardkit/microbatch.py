"""The fixed grid of microbatches, and who computes which.

Owns the grid of a step: `num_microbatches` equal runs of rows of the global batch,
and its dealing to devices as contiguous runs that differ by at most one. Invariant:
what a microbatch contains depends on its global index alone. It draws no data.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

__all__ = ["Grid"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """`num_microbatches` dealt to `num_devices`.

    Example:
        >>> Grid(num_microbatches=8, num_devices=3).counts
        array([3, 3, 2], dtype=int32)
        >>> Grid(num_microbatches=8, num_devices=3).starts
        array([0, 3, 6], dtype=int32)
    """

    num_microbatches: int
    num_devices: int

    @property
    def counts(self) -> Int[np.ndarray, " devices"]:
        """How many microbatches each device computes."""
        each, extra = divmod(self.num_microbatches, self.num_devices)
        return (each + (np.arange(self.num_devices) < extra)).astype(np.int32)

    @property
    def starts(self) -> Int[np.ndarray, " devices"]:
        """The global index of each device's first microbatch."""
        return (np.cumsum(self.counts) - self.counts).astype(np.int32)

    @property
    def max_count(self) -> int:
        """The most microbatches any device computes: the length of a device's slots."""
        return -(-self.num_microbatches // self.num_devices)

    @property
    def slots(self) -> Int[np.ndarray, " slots"]:
        """The global microbatch in every slot, `max_count` slots per device.

        A slot that a device does not use repeats the last microbatch; it is loaded
        and never computed.
        """
        index = self.starts[:, None] + np.arange(self.max_count)[None]
        return np.minimum(index.reshape(-1), self.num_microbatches - 1)
