"""Who takes part in a collective, and which mesh axes that spans.

Owns reading groups in all the ways in which XLA spells them: listed, as a transposed
range of numbers, over axes of a mesh of its own, or as pairs. Invariant: the axes
follow from the groups themselves, whatever names the text has for them. Numbers are
places in the order of the mesh, not ids of devices.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["Span", "read_groups", "read_pairs", "span_of"]

_LISTED = re.compile(r"\breplica_groups=\{((?:\{[\d,]*\},?)*)\}")
_RANGE = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_IOTA = re.compile(rf"\breplica_groups=\[([\d,]+)\]<={_RANGE}")
_MESH = re.compile(
    r"\breplica_groups=@?\w*\[((?:'[^']*'=\d+,? ?)+)\](?:, device_ids=\(([^)]*"
    r"(?:\([^)]*\))?[^)]*)\))? \{([^}]*)\}"
)
_PART = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")

Groups = list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Span:
    """Over what a collective goes.

    Attributes:
        axes: The mesh axes larger than 1 along which members of a group differ; None
            if the text does not tell.
        group_size: How many take part in each.
        is_whole: Whether groups are all devices along these axes, not some of them.
    """

    axes: tuple[str, ...] | None
    group_size: int
    is_whole: bool = True

    def __str__(self) -> str:
        if self.axes is None:
            return "?"
        return " ".join(self.axes) + ("" if self.is_whole else " (parts)")


def span_of(attributes: str, mesh: Mapping[str, int]) -> Span:
    """Says which axes of a mesh a collective spans.

    Args:
        attributes: Of the instruction.
        mesh: Axis → size, the outermost first.

    Example:
        >>> mesh = {"data": 2, "tensor": 4}
        >>> str(span_of("replica_groups=[4,2]<=[2,4]T(1,0)", mesh))
        'data'
        >>> span_of("source_target_pairs={{0,1},{1,0}}", mesh)
        Span(axes=('tensor',), group_size=2, is_whole=True)
    """
    size = math.prod(mesh.values())
    pairs = read_pairs(attributes)
    groups = read_groups(attributes, size) if pairs is None else _joined(pairs)
    if groups is None or any(place >= size for group in groups for place in group):
        return Span(None, 0)
    if not groups:
        return Span((), 1)
    shape, names = tuple(mesh.values()), list(mesh)
    varied: set[int] = set()
    is_whole = True
    for group in groups:
        places = np.array(np.unravel_index(np.array(group), shape)).reshape(
            -1, len(group)
        )
        differ = {d for d, row in enumerate(places) if len(set(row.tolist())) > 1}
        is_whole &= math.prod(shape[d] for d in differ) == len(group)
        varied |= differ
    largest = max(map(len, groups))
    # Where groups span different axes, none of them has all devices along all.
    is_whole &= math.prod(shape[d] for d in varied) == largest
    # Pairs say who sends to whom, and need not join all.
    is_whole |= pairs is not None
    return Span(tuple(names[d] for d in sorted(varied)), largest, is_whole)


def read_groups(attributes: str, num_devices: int) -> Groups | None:
    """Reads `replica_groups`; None if there are none or they cannot be read.

    Example:
        >>> read_groups("replica_groups=[2,2]<=[4]", 4)
        [(0, 1), (2, 3)]
        >>> read_groups("replica_groups=mesh['x'=2,'y'=2] {'x'}", 4)
        [(0, 2), (1, 3)]
    """
    if found := _LISTED.search(attributes):
        listed = [_integers(group) for group in re.findall(r"\{([\d,]*)\}", found[1])]
        return listed or [tuple(range(num_devices))]
    if found := _IOTA.search(attributes):
        places = _permuted(_integers(found[2]), found[3])
        return _rows(places.reshape(_integers(found[1])))
    if found := _MESH.search(attributes):
        return _mesh_groups(*found.groups())
    return None


def read_pairs(attributes: str) -> list[tuple[int, int]] | None:
    """Reads who sends to whom; None if the text does not say that."""
    found = _PAIRS.search(attributes)
    if found is None:
        return None
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", found[1])]


def _joined(pairs: Sequence[tuple[int, int]]) -> Groups:
    """Makes groups of those that send to one another, leaving out who stays alone."""
    group_of: dict[int, set[int]] = {}
    for source, target in pairs:
        if source != target:
            union = group_of.get(source, {source}) | group_of.get(target, {target})
            group_of.update(dict.fromkeys(union, union))
    return sorted({tuple(sorted(group)) for group in group_of.values()})


def _mesh_groups(axes: str, device_ids: str | None, over: str) -> Groups:
    sizes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", axes)}
    count = math.prod(sizes.values())
    places = np.arange(count)
    if device_ids:
        found = re.search(_RANGE, device_ids)
        places = (
            _permuted(_integers(found[1]), found[2])
            if found
            else np.array(_integers(device_ids))
        )
    # An axis can be split, and groups go over a part of it: 'a':(outer)size.
    shape: list[int] = []
    grouped: list[int] = []
    parts = {name: (pre, size) for name, pre, size in _PART.findall(over)}
    for name, size in sizes.items():
        pre, part = parts.get(name, ("", ""))
        split = [size]
        if part:
            split = [int(pre), int(part), size // (int(pre) * int(part))]
        if name in parts:
            grouped.append(len(shape) + (1 if part else 0))
        shape += split
    rest = [d for d in range(len(shape)) if d not in grouped]
    cube = places.reshape(shape).transpose(rest + grouped)
    return _rows(cube.reshape(-1, math.prod(shape[d] for d in grouped)))


def _permuted(dims: tuple[int, ...], order: str | None) -> np.ndarray:
    places = np.arange(math.prod(dims)).reshape(dims)
    return (places.transpose(_integers(order)) if order else places).ravel()


def _rows(places: np.ndarray) -> Groups:
    return [tuple(row) for row in places.reshape(len(places), -1).tolist()]


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number.strip())
