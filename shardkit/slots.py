"""A global batch on a mesh: each device's microbatches.

Owns the cut of a batch into the slots of a grid, and where they lie. Invariant: a slot
holds what its microbatch has in the global batch, whoever computes it. It checks no
batch, and knows no step.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardkit.mesh import BATCH_AXES
from shardkit.microbatch import Grid
from shardkit.put import put

__all__ = ["Slots"]


@dataclasses.dataclass(frozen=True, eq=False)
class Slots:
    """How the batches of one grid lie on a mesh.

    Attributes:
        mesh: Where.
        grid: Who computes which microbatch.
    """

    mesh: Mesh
    grid: Grid

    @property
    def _sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

    def place(self, batch: Any) -> Any:
        """Gives each device its own part of a global batch.

        Args:
            batch: Arrays `[microbatches × rows, ...]`, in host memory.

        Returns:
            A tree of `[slots, rows, ...]`.
        """
        num = self.grid.num_microbatches

        def cut(x: Any) -> Array:
            x = np.asarray(x)
            slots = x.reshape(num, -1, *x.shape[1:])[self.grid.slots]
            return put(slots, self._sharding)

        return jax.tree.map(cut, batch)

    def abstract(self, batch: Any, num_microbatches: int | None = None) -> Any:
        """Returns what `place` makes of a batch, abstractly.

        Args:
            batch: A batch of any grid.
            num_microbatches: How many microbatches it has; None for this grid's.
        """
        num = num_microbatches or self.grid.num_microbatches

        def shape(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(
                (len(self.grid.slots), x.shape[0] // num, *x.shape[1:]),
                jax.dtypes.canonicalize_dtype(x.dtype),
                sharding=self._sharding,
            )

        return jax.tree.map(shape, batch)
