"""The memory and the collectives of shardkit's own step.

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
from shardkit.planner.placement_model import Exchange

__all__ = ["BUCKET_BYTES", "memory", "state_bytes", "state_exchanges", "whole_bytes"]

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
    return _bytes(leaves, meshes, itemsize, along_fsdp=False)


def _bytes(
    leaves: Iterable[Leaf],
    meshes: Meshes,
    itemsize: int = 0,
    *,
    along_fsdp: bool = True,
) -> Any:
    """Physical bytes on a device, padding included."""
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
        "params": _bytes(facts.params, meshes),
        "optimizer": _bytes(facts.opt_state, meshes),
        "model state": _bytes(facts.model_state, meshes),
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
    slots = np.maximum(np.ceil(meshes.rounds), 2)
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
        + _left_bytes(facts, meshes),
        "gathered": whole,
        "sums": limbs,
        "gradient": whole,
        "activations": activations,
        "adding up": np.maximum(adding_up - (2 * whole + limbs + activations), 0.0),
    }


def _left_bytes(facts: ModelFacts, meshes: Meshes) -> Any:
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


def state_exchanges(
    facts: ModelFacts, meshes: Meshes, *, exact: bool = True
) -> list[Exchange]:
    """The collectives of a step that move parameters and gradients.

    The numbers of each are arrays. Those over an axis of one device are there too, as
    they are in a compiled program, and send nothing.
    """
    cut = [leaf for leaf in facts.params if "fsdp" in leaf.cuts]
    rest = [leaf for leaf in facts.params if "fsdp" not in leaf.cuts]
    fsdp, data = meshes.sizes["fsdp"], meshes.sizes["data"]
    limbs = 2 if exact else 1
    gathered = _bytes(cut, meshes) * fsdp
    summed = _bytes(cut, meshes, 4) * fsdp * limbs
    other = _bytes(rest, meshes, 4) * limbs
    rows = 4.0 * facts.num_outputs * meshes.num_microbatches
    found = [
        _exchange("all-gather", "fsdp", "params", gathered, fsdp),
        _exchange("reduce-scatter", "fsdp", "grads", summed, fsdp),
        _exchange("all-reduce", "data", "grads", summed / fsdp, data),
        _exchange("all-reduce", "data", "other grads", other, data * fsdp),
        _exchange("all-reduce", "data", "metrics", rows, data * fsdp),
        _exchange(
            "all-reduce", "data", "model state", _left_bytes(facts, meshes), data * fsdp
        ),
        _exchange(
            "all-reduce",
            "fsdp",
            "norm",
            np.full(len(meshes), _norm_bytes(facts, exact)),
            fsdp,
        ),
    ]
    if exact:
        # One number per leaf, each time over the microbatches: hardly ever twice.
        peaks = np.full(len(meshes), 4.0 * len(facts.params))
        found.append(_exchange("all-reduce", "data", "peaks", peaks, data * fsdp))
    return found


def _norm_bytes(facts: ModelFacts, exact: bool) -> float:
    """Norms, of each leaf a number: exact sums take a peak and four digits.

    Sums of floats that are the same are one sum; those of digits are kept apart.
    """
    if exact:
        return 20.0 * facts.num_norm_leaves
    return 4.0 * (facts.num_norm_leaves - facts.num_clip_leaves)


def _exchange(kind: str, axis: str, state: str, num_bytes: Any, n: Any) -> Exchange:
    times = 2 if kind == "all-reduce" else 1
    return Exchange(kind, axis, state, num_bytes, times * num_bytes * (n - 1) / n)
