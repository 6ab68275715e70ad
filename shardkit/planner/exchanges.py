"""The collectives of shardkit's own step.

Owns what devices exchange: once in a step, and with each microbatch where a group of
devices computes it together. Invariant: it follows what `device_work` and `gradient` do
over the batch axes; what a compiler makes of a group's axes is read from `ModelFacts`.
"""

import math
from typing import Any

import numpy as np

from shardkit.mesh import GROUP_AXES
from shardkit.planner.memory import leaf_bytes, left_bytes
from shardkit.planner.meshes import Meshes
from shardkit.planner.model_facts import Leaf, ModelFacts
from shardkit.planner.placement_model import Exchange

__all__ = ["microbatch_exchanges", "state_exchanges"]

_DIGITS = 4
"""Of which an exact sum is made."""


def state_exchanges(
    facts: ModelFacts, meshes: Meshes, *, exact: bool = True
) -> list[Exchange]:
    """The collectives of a step that move parameters and gradients, and of its norm.

    The numbers of each are arrays. Those over an axis of one device are there too, as
    they are in a compiled program, and send nothing.
    """
    cut = [leaf for leaf in facts.params if "fsdp" in leaf.cuts]
    rest = [leaf for leaf in facts.params if "fsdp" not in leaf.cuts]
    fsdp, data = meshes.sizes["fsdp"], meshes.sizes["data"]
    limbs = 2 if exact else 1
    gathered = leaf_bytes(cut, meshes) * fsdp
    summed = leaf_bytes(cut, meshes, 4) * fsdp * limbs
    other = leaf_bytes(rest, meshes, 4) * limbs
    rows = 4.0 * facts.num_outputs * meshes.num_microbatches
    found = [
        _exchange("all-gather", "fsdp", "params", gathered, fsdp),
        _exchange("reduce-scatter", "fsdp", "grads", summed, fsdp),
        _exchange("all-reduce", "data", "grads", summed / fsdp, data),
        _exchange("all-reduce", "data", "other grads", other, data * fsdp),
        _exchange("all-reduce", "data", "metrics", rows, data * fsdp),
        _exchange(
            "all-reduce", "data", "model state", left_bytes(facts, meshes), data * fsdp
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
    for axis in GROUP_AXES:
        amount = _group_norm_bytes(facts, meshes, axis, exact)
        n = meshes.sizes[axis]
        found.append(_exchange("all-reduce", axis, "norm", amount * (n > 1), n))
    return found


def microbatch_exchanges(
    facts: ModelFacts, meshes: Meshes, *, exact: bool = True
) -> list[Exchange]:
    """The collectives of one microbatch, over the axes of a group."""
    found = [
        _exchange(kind, axis, "microbatches", num_bytes, meshes.sizes[axis])
        for (kind, axis), num_bytes in facts.work.buffers(meshes.sizes).items()
        if axis in GROUP_AXES
    ]
    if exact:
        # The largest of each gradient, so that it stays on its grid.
        for axis in GROUP_AXES:
            n = meshes.sizes[axis]
            peaks = 4.0 * sum(axis in leaf.cuts for leaf in facts.params) * (n > 1)
            found.append(_exchange("all-reduce", axis, "peaks", peaks, n))
    return found


def _group_norm_bytes(facts: ModelFacts, meshes: Meshes, axis: str, exact: bool) -> Any:
    """Norms of leaves that an axis of a group cuts: the compiler's own sums.

    A sum over a leaf is made dim by dim, the last one first, so that what comes before
    the dim that is cut is not yet added up when devices exchange.
    """
    fsdp = sum("fsdp" in leaf.cuts for leaf in facts.params)
    total = np.zeros(len(meshes))
    for leaf in (leaf for leaf in facts.params if axis in leaf.cuts):
        if not exact:
            times = facts.num_norm_leaves - facts.num_clip_leaves
            total += 4.0 * times / max(fsdp, 1)
            continue
        rows = _rows_before(leaf, meshes, leaf.cuts.index(axis))
        total += (1 + _DIGITS * rows) * 4.0 * facts.num_norm_leaves / max(fsdp, 1)
    return total


def _rows_before(leaf: Leaf, meshes: Meshes, dim: int) -> Any:
    counts = [meshes.sizes[axis] if axis else 1 for axis in leaf.cuts[:dim]]
    return math.prod(
        (-(-size // n) for size, n in zip(leaf.shape, counts, strict=False)),
        start=np.ones(len(meshes)),
    )


def _norm_bytes(facts: ModelFacts, exact: bool) -> float:
    """Norms, of each leaf a number: exact sums take a peak and four digits.

    Sums of floats that are the same are one sum; those of digits are kept apart.
    """
    if exact:
        return 20.0 * facts.num_norm_leaves
    return 4.0 * (facts.num_norm_leaves - facts.num_clip_leaves)


def _exchange(kind: str, axis: str, state: str, num_bytes: Any, n: Any) -> Exchange:
    times = 2 if kind == "all-reduce" else 1
    sent_bytes = times * num_bytes * (n - 1) / n
    return Exchange(kind, axis, state, num_bytes, sent_bytes, n)
