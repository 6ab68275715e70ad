"""The optimizer's state in host memory, while a step computes gradients.

Owns which leaves are away, and the way there and back. Invariant: bits are copied and
never computed with, so that a run with its state away has the bits of one without. A
step takes them and returns them away; whatever else looks at a state has them back.

References:
    Ren et al., ZeRO-Offload: Democratizing Billion-Scale Model Training (2021).
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from shardkit.errors import ConfigError
from shardkit.layout import LeafLayout
from shardkit.state import TrainState

__all__ = ["AWAY", "HERE", "check_memory", "put_away", "resting", "take_back"]

HERE, AWAY = "device", "pinned_host"
"""The kinds of memory, as JAX calls them."""


def check_memory(devices: Iterable[Any]) -> None:
    """Refuses devices without host memory that they can copy from and to.

    Raises:
        ConfigError: Naming the kinds of memory that they have.
    """
    for device in devices:
        kinds = sorted(memory.kind for memory in device.addressable_memories())
        if AWAY not in kinds:
            raise ConfigError(
                f"offload: expected devices with {AWAY} memory, and {device} has "
                f"{', '.join(kinds)}. Leave offload out here."
            )


def resting(leaf: LeafLayout, mesh: Mesh) -> NamedSharding:
    """Where a leaf of the optimizer's state is between steps; scalars stay."""
    sharding = leaf.sharding(mesh)
    return sharding.with_memory_kind(AWAY) if leaf.shape else sharding


def put_away(state: TrainState, layout: TrainState, mesh: Mesh) -> TrainState:
    """Puts the optimizer's state into host memory; may be traced."""
    put = lambda x, leaf: jax.device_put(x, resting(leaf, mesh))  # noqa: E731
    away = jax.tree.map(put, state.opt_state, layout.opt_state)
    return dataclasses.replace(state, opt_state=away)


def take_back(state: TrainState, layout: TrainState, mesh: Mesh) -> TrainState:
    """Undoes `put_away`."""

    def take(x: Any, leaf: LeafLayout) -> Any:
        return jax.device_put(x, leaf.sharding(mesh).with_memory_kind(HERE))

    here = jax.tree.map(take, state.opt_state, layout.opt_state)
    return dataclasses.replace(state, opt_state=here)
