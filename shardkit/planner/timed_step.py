"""A step of shardkit on one mesh, to be timed.

Owns a placement with a state that no training made. Invariant: the program is the one
that a `Trainer` runs, compiled and called as it does. It predicts nothing.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardkit.events import EventLog
from shardkit.layout import LeafLayout
from shardkit.mesh import MeshSpec
from shardkit.mesh_choice import FixedMesh
from shardkit.model import Model
from shardkit.placements import Placements
from shardkit.recipe import Recipe
from shardkit.state_layout import lay_out
from shardkit.waits import Waiter

__all__ = ["TimedStep"]

_NUM_WARM = 2
"""The first step finds the grids of exact sums, and takes two passes."""


class TimedStep:
    """One mesh with its step, compiled and warm.

    Args:
        model: What is trained.
        tx: The optimizer, any optax transformation.
        batch: A global batch, in host memory.
        num_microbatches: Into how many it is cut.
        sizes: Mesh axis → size.
        exact: Whether gradients are summed as integers.
        devices: Of which the first are used; None for all.

    Example:
        >>> import optax
        >>> model = Model(
        ...     init=lambda key: {"w": jnp.ones((8, 4))},
        ...     loss=lambda p, batch, key: jnp.mean(batch["x"] @ p["w"]),
        ... )
        >>> step = TimedStep(
        ...     model, optax.sgd(0.1), {"x": np.ones((4, 8), np.float32)}, 2, {}
        ... )
        >>> step.clock() > 0
        True
    """

    def __init__(
        self,
        model: Model,
        tx: Any,
        batch: Any,
        num_microbatches: int,
        sizes: Mapping[str, int],
        *,
        exact: bool = True,
        devices: Sequence[Any] | None = None,
    ) -> None:
        recipe = Recipe(
            init=model.init,
            loss=model.loss,
            tx=tx,
            num_microbatches=num_microbatches,
            exact=exact,
        )
        layout, *_ = lay_out(recipe, model.axis_rules)
        num = math.prod(sizes.values())
        pool = list(jax.devices() if devices is None else devices)[:num]
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        spec = MeshSpec(**{"data": 1, "fsdp": 1, **sizes})
        placements = Placements(
            recipe, layout, FixedMesh(spec), pool, like, like, EventLog(), Waiter()
        )
        self._batch, self._placement = batch, placements.on(num)
        self._placement.compile()
        self._state = jax.tree.map(
            lambda leaf: _first(leaf, self._placement.mesh), layout
        )
        for _ in range(_NUM_WARM):
            self.clock()

    def clock(self, num_steps: int = 1) -> float:
        """Returns seconds per step of so many steps, one after the other."""
        start_s = time.perf_counter()
        for _ in range(num_steps):
            self._state, found = self._placement.step(self._state, self._batch)
        jax.block_until_ready((self._state, found))
        return (time.perf_counter() - start_s) / num_steps


def _first(leaf: LeafLayout, mesh: Any) -> Any:
    """Small numbers for parameters, zeros for the rest: no program need be compiled."""
    like = leaf.physical(mesh)
    if not leaf.path.startswith("params") or not jnp.issubdtype(
        like.dtype, jnp.floating
    ):
        return jnp.zeros(like.shape, like.dtype, device=like.sharding)
    some = 0.02 * np.random.default_rng(0).standard_normal(1 << 16)
    value = np.resize(some.astype(like.dtype), leaf.shape)
    pad = [(0, a - b) for a, b in zip(like.shape, leaf.shape, strict=True)]
    return jax.device_put(np.pad(value, pad) if pad else value, like.sharding)
