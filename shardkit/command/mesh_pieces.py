"""What each device of an imagined mesh would hold of a checkpoint.

Owns the rules of training over again, in numbers alone, so that no JAX is needed: the
first dim longer than 1 that maps to `fsdp` is cut, into equal pieces, the last padded.
Invariant: what the records do not decide is unknown, and never guessed.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from shardkit.checkpoint.manifest import LeafRecord
from shardkit.command.options import MESH_AXES
from shardkit.errors import ConfigError

__all__ = ["Piece", "check_rules", "cut_all", "cut_dim", "piece_of", "recorded_rules"]

_AXIS = "fsdp"


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a device holds of a leaf.

    Attributes:
        dim: The dim that is cut; None for a leaf that every device holds whole.
        shape: Of the piece, padding included.
        nbytes: Of the piece.
        is_padded: Whether the last pieces hold padding.
    """

    dim: int | None
    shape: tuple[int, ...]
    nbytes: int
    is_padded: bool


def cut_dim(leaf: LeafRecord, rules: Mapping[str, str]) -> int | None:
    """Finds the dim that training cuts along `fsdp`; -1 for none, None if unknown.

    Args:
        leaf: Its shape and logical axes.
        rules: Logical axis → mesh axis, of all axes that are cut; empty if unknown.

    >>> leaf = LeafRecord((5, 3), "float32", axes=("embed", "mlp"))
    >>> cut_dim(leaf, {"mlp": "fsdp"}), cut_dim(leaf, {}) is None
    (1, True)
    """
    if all(size <= 1 for size in leaf.shape):
        return -1
    if leaf.axes is None:
        return None
    names = [name or "" for name in leaf.axes]
    if not rules and not any(name.startswith("mesh:") for name in names):
        return None
    targets = [rules.get(name, name.removeprefix("mesh:")) for name in names]
    cut = [d for d, a in enumerate(targets) if a == _AXIS and leaf.shape[d] > 1]
    return cut[0] if cut else -1


def piece_of(leaf: LeafRecord, dim: int, count: int) -> Piece:
    """Cuts a leaf into `count` pieces.

    >>> piece_of(LeafRecord((5, 3), "float32"), 0, 4)
    Piece(dim=0, shape=(2, 3), nbytes=24, is_padded=True)
    """
    shape = leaf.stored_shape
    if dim < 0:
        return Piece(None, shape, leaf.nbytes, False)
    size = -(-shape[dim] // count)
    cut = (*shape[:dim], size, *shape[dim + 1 :])
    nbytes = math.prod(cut) * leaf.stored_dtype.itemsize
    return Piece(dim, cut, nbytes, size * count != shape[dim])


def cut_all(
    leaves: Mapping[str, LeafRecord], rules: Mapping[str, str], mesh: Mapping[str, int]
) -> dict[str, Piece | None]:
    """Cuts all leaves; None for those of which it is unknown whether they are cut."""
    count, found = mesh.get(_AXIS, 1), {}
    for path, leaf in leaves.items():
        dim = cut_dim(leaf, rules) if count > 1 else -1
        found[path] = None if dim is None else piece_of(leaf, dim, count)
    return found


def check_rules(rules: Mapping[str, str], leaves: Iterable[LeafRecord]) -> None:
    """Refuses rules of axes that there are not.

    Args:
        rules: Logical axis → mesh axis, as they were given.
        leaves: Of which the logical axes are recorded.

    Raises:
        ConfigError: Naming all, and the axes there are.

    >>> check_rules({"mpl": "fsdp"}, [LeafRecord((5,), "float32", axes=("mlp",))])
    Traceback (most recent call last):
    ...
    shardkit.errors.ConfigError: --axis-rules: no leaf has an axis 'mpl'; there is mlp
    """
    names = {name for leaf in leaves for name in leaf.axes or () if name}
    names = {name for name in names if not name.startswith("mesh:")}
    bad = []
    if unknown := sorted(rules.keys() - names):
        what = " or ".join(map(repr, unknown))
        verb = "is" if len(names) == 1 else "are"
        there = ", ".join(sorted(names)) or "none, since no logical axes are recorded"
        bad.append(f"no leaf has an axis {what}; there {verb} {there}")
    if unknown := sorted({*rules.values()} - {*MESH_AXES}):
        what = " or ".join(map(repr, unknown))
        bad.append(f"no mesh has an axis {what}; there are {', '.join(MESH_AXES)}")
    if bad:
        raise ConfigError("--axis-rules: " + "; ".join(bad))


def recorded_rules(config: Mapping[str, Any]) -> dict[str, str]:
    """Finds the axis rules in a run's config; its model may have others of its own."""
    prefix = "axis_rules."
    return {
        key.removeprefix(prefix): str(axis)
        for key, axis in config.items()
        if key.startswith(prefix)
    }
