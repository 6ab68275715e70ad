"""Which axes of a mesh a collective of a compiled program goes over.

Owns reading groups of devices in every way in which XLA spells them: listed, as a
transposed range, over axes of a mesh of its own, or as pairs. Invariant: the answer
follows from who is in a group, whatever names the text has for axes. Numbers are places
in the order of the mesh, not ids of devices.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

__all__ = ["axes_of_groups", "replica_groups"]

_SIZES = r"\[([\d,]+)\]"
_ORDER = r"(?:T\(([\d,]+)\))?"
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d, ]*\},? ?)*)\}")
_RANGE = re.compile(rf"replica_groups={_SIZES}<={_SIZES}{_ORDER}")
_MESH = re.compile(r"replica_groups=@?\w*\[((?:'[^']*'=\d+,? ?)+)\]([^{]*)\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def replica_groups(attributes: str, num_devices: int) -> list[tuple[int, ...]] | None:
    """Returns who takes part together; None if the text does not tell.

    Args:
        attributes: Of a collective, as XLA writes them.
        num_devices: How many run the program.

    Example:
        >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
        [(0, 2), (1, 3)]
        >>> replica_groups("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", 4)
        [(0, 1), (2, 3)]
    """
    if found := _LISTED.search(attributes):
        groups = [_numbers(part) for part in re.findall(r"\{([^}]*)\}", found[1])]
        return groups or [tuple(range(num_devices))]
    if found := _RANGE.search(attributes):
        return _rows(_places(found[2], found[3]).reshape(_numbers(found[1])))
    if found := _MESH.search(attributes):
        return _rows(_along_axes(*found.groups()))
    if found := _PAIRS.search(attributes):
        pairs = re.findall(r"\{(\d+),(\d+)\}", found[1])
        return [(int(a), int(b)) for a, b in pairs]
    return None


def axes_of_groups(attributes: str, mesh: Mapping[str, int]) -> tuple[str, ...] | None:
    """Returns the mesh axes along which the members of a group differ.

    Args:
        attributes: Of a collective, as XLA writes them.
        mesh: Axis → size, the outermost first.

    Returns:
        Names in the order of the mesh; None if the text does not tell.

    Example:
        >>> axes_of_groups("replica_groups={{0,2},{1,3}}", {"data": 2, "tensor": 2})
        ('data',)
    """
    shape = tuple(mesh.values())
    groups = replica_groups(attributes, math.prod(shape))
    if groups is None or max(map(max, groups)) >= math.prod(shape):
        return None
    differ = np.zeros(len(shape), bool)
    for group in groups:
        where = np.stack(np.unravel_index(np.array(group), shape))
        differ |= (where != where[:, :1]).any(axis=1)
    return tuple(name for name, is_over in zip(mesh, differ, strict=True) if is_over)


def _along_axes(sizes: str, order: str, over: str) -> np.ndarray:
    """Groups over axes of a mesh; `'a':(2)4` is the part of `a` after the first 2."""
    shape: list[int] = []
    grouped: list[int] = []
    parts = {
        name: _numbers(f"{before},{size}")
        for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", over)
    }
    for name, size in (
        (name, int(n)) for name, n in re.findall(r"'(.*?)'=(\d+)", sizes)
    ):
        if name not in parts:
            shape.append(size)
            continue
        before, part = parts[name] or (1, size)
        grouped.append(len(shape) + 1)
        shape += [before, part, size // (before * part)]
    ids = re.search(rf"{_SIZES}{_ORDER}", order)
    listed = re.search(r"\(([\d, ]+)\)", order)
    places = (
        _places(ids[1], ids[2])
        if ids
        else np.array(_numbers(listed[1]))
        if listed
        else np.arange(math.prod(shape))
    ).reshape(shape)
    rest = [d for d in range(len(shape)) if d not in grouped]
    size = math.prod(shape[d] for d in grouped)
    return places.transpose(rest + grouped).reshape(-1, size)


def _places(sizes: str, order: str | None) -> np.ndarray:
    places = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return (places.transpose(_numbers(order)) if order else places).ravel()


def _rows(places: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(row) for row in places.tolist()]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number.strip())
