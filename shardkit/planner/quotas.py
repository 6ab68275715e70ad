"""How long the last device computes, when microbatches are dealt out.

Owns rounds: the time of the last device, in microbatches of a device at speed 1, for
any number of devices, alike or not. Invariant: it is that of `microbatch.Grid`, whose
dealing no other beats.
"""

import numpy as np

from shardkit.microbatch import Grid
from shardkit.planner.meshes import Topology

__all__ = ["Quotas"]

_MAX_CLASSES = 64
_NEARLY = 1e-9
"""Of a microbatch, which a device may lack that has been found to be in time."""
_SURELY = 1e-6
"""More than that, so that none is left out where it is counted."""


class Quotas:
    """The rounds of groups of `inner` devices, the fastest first.

    Args:
        topology: The devices.
        inner: How many compute one microbatch together; a group is as fast as its
            slowest.

    Example:
        >>> quotas = Quotas(Topology(4, 4, (1.0, 1.0, 1.0, 0.5)), inner=1)
        >>> quotas.rounds(7, np.array([3, 4]))
        array([3., 2.])
    """

    def __init__(self, topology: Topology, inner: int) -> None:
        self.num_groups = topology.num_devices // inner
        speeds = np.sort(np.array(topology.speeds))[::-1]
        # Devices of a group are neighbours in the order of their speeds.
        speeds = speeds[: self.num_groups * inner][inner - 1 :: inner]
        if len(np.unique(speeds)) > _MAX_CLASSES:
            # So many differ by noise: each counts as the next slower of a few.
            edges = np.linspace(speeds.min(), speeds.max(), _MAX_CLASSES)
            speeds = edges[np.searchsorted(edges, speeds, "right") - 1]
        self._speeds = speeds
        classes, self._counts = np.unique(-speeds, return_counts=True)
        self._classes = -classes

    @property
    def is_even(self) -> bool:
        """Whether all groups are equally fast."""
        return len(self._classes) < 2

    def rounds(self, num_microbatches: int, num_groups: np.ndarray) -> np.ndarray:
        """How long the last of so many groups computes; an array like `num_groups`."""
        speed = self._speeds[0] if len(self._speeds) else 1.0
        if self.is_even:
            return -(-num_microbatches // num_groups) / speed
        return self._makespans(num_microbatches, np.asarray(num_groups))

    def most(self, num_microbatches: int, rounds: np.ndarray) -> np.ndarray:
        """How many microbatches the fastest group computes, or one more, then.

        Args:
            num_microbatches: How many there are.
            rounds: What `rounds` says; the array is like it.
        """
        speed = self._speeds[0] if len(self._speeds) else 1.0
        return np.minimum(np.floor(rounds * speed + _SURELY), num_microbatches)

    def counts(self, num_microbatches: int, num_groups: int) -> tuple[int, ...]:
        """How many microbatches each of so many groups computes."""
        speeds = tuple(self._speeds[:num_groups].tolist())
        return tuple(Grid(num_microbatches, num_groups, speeds).counts.tolist())

    def _makespans(self, num_microbatches: int, num_groups: np.ndarray) -> np.ndarray:
        """The least times in which so many groups are done with all microbatches."""
        speeds, counts = self._classes, self._counts
        starts = np.cumsum(counts) - counts
        # Of each speed, the fastest first, so many are among the groups in use.
        used = np.clip(num_groups[:, None] - starts, 0, counts)
        low = np.zeros(len(num_groups))
        high = np.full(len(num_groups), num_microbatches / speeds[0])
        for _ in range(60):
            middle = (low + high) / 2
            done = np.sum(used * np.floor(middle[:, None] * speeds + _NEARLY), axis=1)
            is_enough = done >= num_microbatches
            low = np.where(is_enough, low, middle)
            high = np.where(is_enough, middle, high)
        return high
