"""The memory of shardkit's own step.

Owns the bytes that a step takes on one device of a mesh. Invariant: it follows what
`placement` and `gradient` do: parameters are gathered once, gradients are added in
whole accumulators (two integers each in exact mode), sums go to whoever has the shard.
It assumes an optimizer that works elementwise, but for one norm.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from shardkit.mesh import GROUP_AXES
from shardkit.planner.meshes import Meshes
from shardkit.planner.model_facts import Leaf, ModelFacts

__all__ = [
    "BUCKET_BYTES",
    "leaf_bytes",
    "left_bytes",
    "memory",
    "state_bytes",
    "whole_bytes",
]

BUCKET_BYTES = 32 << 20
"""What `collectives` packs into one buffer at most."""

_SCALARS = 64
"""Step, counters and the like, in bytes."""


def whole_bytes(leaves: Iterable[Leaf], meshes: Meshes, itemsize: int = 0) -> Any:
    """Bytes of leaves that are whole along `fsdp`, cut along the other axes.

    Args:
        leaves: The leaves.
        meshes: The meshes.
        itemsize: Bytes per element; 0 for the leaf's own.
    """
    return leaf_bytes(leaves, meshes, itemsize, along_fsdp=False)


def leaf_bytes(
    leaves: Iterable[Leaf],
    meshes: Meshes,
    itemsize: int = 0,
    *,
    along_fsdp: bool = True,
) -> Any:
    """Physical bytes of leaves on a device, padding included.

    Args:
        leaves: The leaves.
        meshes: The meshes.
        itemsize: Bytes per element; 0 for the leaf's own.
        along_fsdp: Whether `fsdp` cuts them, too.
    """
    total = np.zeros(len(meshes))
    # Leaves cut alike are one sum: a model has many layers and few shapes.
    groups: dict[tuple[Any, ...], int] = {}
    for leaf in leaves:
        size = itemsize or np.dtype(leaf.dtype).itemsize
        cut = tuple(
            (axis, n) for axis, n in zip(leaf.cuts, leaf.shape, strict=True) if axis
        )
        rest = math.prod(
            n for axis, n in zip(leaf.cuts, leaf.shape, strict=True) if not axis
        )
        groups[cut] = groups.get(cut, 0) + rest * size
    for cut, unit in groups.items():
        amount = np.full(len(meshes), float(unit))
        for axis, n in cut:
            count = meshes.sizes[axis] if along_fsdp or axis != "fsdp" else 1
            amount = amount * -(-n // count)
        total += amount
    return total


def state_bytes(facts: ModelFacts, meshes: Meshes) -> dict[str, Any]:
    """What every device holds of the state, wherever it is kept."""
    return {
        "params": leaf_bytes(facts.params, meshes),
        "optimizer": leaf_bytes(facts.opt_state, meshes),
        "model state": leaf_bytes(facts.model_state, meshes),
    }


def memory(facts: ModelFacts, meshes: Meshes, *, exact: bool = True) -> dict[str, Any]:
    """Predicts what one device holds at the peak of a step.

    Args:
        facts: The model, read with microbatches of `facts.num_rows` rows.
        meshes: The meshes; their microbatches are taken to have as many rows.
        exact: Whether gradients are summed as integers.

    Returns:
        Kind → bytes, an array each. The kinds add up to the peak.
    """
    kept = state_bytes(facts, meshes)
    slots = np.maximum(meshes.most, 2)
    whole = whole_bytes(facts.params, meshes)
    floats = whole_bytes(facts.params, meshes, 4)
    limbs = floats * (2 if exact else 1)
    activations = _activation_bytes(facts, meshes)
    # When all microbatches are done, sums are packed, sent, and made floats again.
    packed = np.minimum(limbs, BUCKET_BYTES)
    received = (limbs + floats) / meshes.sizes["fsdp"]
    adding_up = packed + np.maximum(limbs, received)
    return {
        **kept,
        "optimizer": np.where(meshes.offload, 0.0, kept["optimizer"]),
        "batch": slots * facts.microbatch_bytes,
        "other": np.full(len(meshes), _SCALARS + 4.0 * len(facts.params) * exact)
        + left_bytes(facts, meshes),
        "gathered": whole,
        "sums": limbs,
        "gradient": whole,
        "activations": activations,
        "adding up": np.maximum(adding_up - (2 * whole + limbs + activations), 0.0),
    }


def left_bytes(facts: ModelFacts, meshes: Meshes) -> Any:
    """What microbatches leave in the model's state: a row of each, if it is floats."""
    total = np.zeros(len(meshes))
    for leaf in facts.model_state:
        rows = meshes.num_microbatches if np.dtype(leaf.dtype).kind in "fV" else 1
        total += 4.0 * math.prod(leaf.shape) * rows
    return total


def _activation_bytes(facts: ModelFacts, meshes: Meshes) -> Any:
    """What a microbatch takes on a device: as the compiler says, or an estimate."""
    found = activation_share(facts, meshes) * facts.peak_bytes
    for group, peak_bytes in facts.known_peaks.items():
        sizes = zip(GROUP_AXES, group, strict=True)
        is_this = np.logical_and.reduce([meshes.sizes[a] == n for a, n in sizes])
        found = np.where(is_this, peak_bytes, found)
    return found


def activation_share(facts: ModelFacts, meshes: Meshes) -> Any:
    """The part of the activations of a microbatch that one device has."""
    total = facts.residual_bytes
    if not total:
        return np.ones(len(meshes))
    share = np.zeros(len(meshes))
    for axes, amount in facts.residuals.items():
        share += amount / math.prod(meshes.sizes[axis] for axis in axes)
    return share / total
