"""What `layout.json` says of the leaves of a state, and which device holds which box.

Owns that file and the boxes that follow from it on a mesh, in numbers alone: no JAX is
needed to look at a run. Its invariant: the boxes are those of `shardkit.layout`, so
padding is part of none. Where meshes come from is `stored_run.py`'s business.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardkit.report.jsonl import write_atomically

__all__ = ["Leaf", "Piece", "parse_layout", "pieces_of", "write_layout"]


_PADDED = "fsdp"
"""The axis that cuts what it does not divide too."""


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of the state, apart from any mesh.

    Attributes:
        path: Where it is in the state.
        shape: Its logical shape.
        dtype: The name of its dtype.
        cuts: For every dim, the mesh axes that cut it, the slowest first; any but
            `fsdp` only where it divides the dim.
        axes: The logical axis of every dim; None if it is not annotated.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    cuts: tuple[tuple[str, ...], ...]
    axes: tuple[str | None, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A box of a leaf, and who holds it.

    Attributes:
        box: `(start, stop)` for every dim, without padding.
        device_ids: The devices that hold it, in mesh order.
        shape: What each of them has of it in memory, padding included.
    """

    box: tuple[tuple[int, int], ...]
    device_ids: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def is_padded(self) -> bool:
        """Whether there is padding in its memory."""
        return any(
            stop - start != size
            for (start, stop), size in zip(self.box, self.shape, strict=True)
        )


def write_layout(path: Path, leaves: Iterable[Any]) -> None:
    """Writes what `Trainer.layout` returns.

    Args:
        path: The file.
        leaves: Each a `shardkit.layout.LeafLayout`.
    """
    rows = []
    for leaf in leaves:
        said = [(_PADDED, leaf.dim), *leaf.group]
        cuts = [
            [axis for axis, d in said if d == dim] for dim in range(len(leaf.shape))
        ]
        row = {"path": leaf.path, "shape": [*leaf.shape], "dtype": str(leaf.dtype)}
        rows.append({**row, "axes": leaf.axes and [*leaf.axes], "cuts": cuts})
    lines = ",\n".join(map(json.dumps, rows))
    write_atomically(path, f'{{"leaves": [\n{lines}\n]}}\n')


def parse_layout(table: Any) -> list[Leaf]:
    """Reads what `write_layout` wrote.

    Raises:
        ValueError: Saying which leaf is not as it should be.
    """
    if not isinstance(table, dict) or not isinstance(table.get("leaves"), list):
        raise ValueError("expected a table with a list of leaves")
    return [_parse_leaf(row, number) for number, row in enumerate(table["leaves"])]


def _parse_leaf(row: Any, number: int) -> Leaf:
    try:
        path, dtype = row["path"], row["dtype"]
        shape = tuple(row["shape"])
        cuts = tuple(tuple(cut) for cut in row["cuts"])
        axes = None if row.get("axes") is None else tuple(row["axes"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"leaf {number} lacks {error}") from None
    is_good = isinstance(path, str) and isinstance(dtype, str)
    is_good &= all(type(n) is int and n >= 0 for n in shape)
    is_good &= all(isinstance(axis, str) for cut in cuts for axis in cut)
    if not is_good or len(cuts) != len(shape) or len(axes or shape) != len(shape):
        raise ValueError(
            f"leaf {number}, {path!r}, has no sensible shape, cuts or axes"
        )
    return Leaf(path, shape, dtype, cuts, axes)


def pieces_of(
    leaf: Leaf, mesh: Mapping[str, int], device_ids: Sequence[int]
) -> list[Piece]:
    """Cuts a leaf on a mesh.

    Args:
        leaf: What is cut.
        mesh: Axis → size, of the axes larger than 1, the slowest first.
        device_ids: In mesh order.

    Returns:
        The pieces, in the order of their indices; empty boxes are padding only.

    >>> leaf = Leaf("w", (5, 4), "float32", (("fsdp",), ()))
    >>> for piece in pieces_of(leaf, {"data": 2, "fsdp": 2}, [0, 1, 2, 3]):
    ...     print(piece.box, piece.device_ids, piece.shape)
    ((0, 3), (0, 4)) (0, 2) (3, 4)
    ((3, 5), (0, 4)) (1, 3) (3, 4)
    """
    cuts = [
        [axis for axis in cut if axis == _PADDED or not size % mesh.get(axis, 1)]
        for size, cut in zip(leaf.shape, leaf.cuts, strict=True)
    ]
    counts = [math.prod(mesh.get(axis, 1) for axis in cut) for cut in cuts]
    shape = tuple(-(-n // c) for n, c in zip(leaf.shape, counts, strict=True))
    holders: dict[tuple[int, ...], list[int]] = {}
    for place, device_id in enumerate(device_ids):
        coords: dict[str, int] = {}
        for axis in reversed([*mesh]):
            place, coords[axis] = divmod(place, mesh[axis])
        index = []
        for cut in cuts:
            number = 0
            for axis in cut:
                number = number * mesh.get(axis, 1) + coords.get(axis, 0)
            index.append(number)
        holders.setdefault(tuple(index), []).append(device_id)
    return [
        Piece(
            tuple(
                (min(i * size, n), min((i + 1) * size, n))
                for i, size, n in zip(index, shape, leaf.shape, strict=True)
            ),
            tuple(ids),
            shape,
        )
        for index, ids in sorted(holders.items())
    ]
