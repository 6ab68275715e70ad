"""How cuts that were found are written: as rules for names, or over paths.

Owns the choice of words: a dim that its model names gets a rule for that name, any
other a rule over paths, as short as it can be. Invariant: with these rules before those
that there are, `tensor` cuts the dims that were found, and no others, but for those of
which `notes` say that only the model itself can be changed.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from shardkit.annotations import MESH, LeafAxes
from shardkit.logical_axes import AxisRules, mesh_axis
from shardkit.tree import find_rule

__all__ = ["WrittenRules", "write_rules"]

_TENSOR = "tensor"
Names = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenRules:
    """Rules, to be put before others of their kind.

    Attributes:
        axis_rules: Logical axis → `"tensor"`, or None where a rule that there is would
            cut what had better stay whole.
        path_rules: Glob over paths → a name for every dim: `"tensor"` where it cuts,
            and what was said already of the others.
        notes: What they change beside that, and what they cannot say.
    """

    axis_rules: Mapping[str, str | None]
    path_rules: Mapping[str, Names]
    notes: tuple[str, ...]


def write_rules(
    said: Sequence[LeafAxes],
    own: Sequence[LeafAxes],
    dims: Sequence[int],
    axis_rules: AxisRules,
) -> WrittenRules:
    """Writes down which dims are cut.

    Args:
        said: What is known of every array.
        own: What its model says of it, without rules over paths.
        dims: The dim of every array that `tensor` is to cut, -1 for none.
        axis_rules: The rules that there are.

    Example:
        >>> layers = [LeafAxes(f"{i}/up", (4, 8), None) for i in range(3)]
        >>> write_rules(layers, layers, [1, 1, 1], {}).path_rules
        {'*/up': (None, 'tensor')}
    """
    names, notes = _by_name(own, dims, axis_rules)
    tuples: dict[str, Names] = {}
    unsaid = []
    for leaf, mine, dim in zip(said, own, dims, strict=True):
        if dim < 0:
            continue
        if mine.names is None:
            tuples[leaf.path] = _cut_names(leaf, dim, axis_rules)
        elif mine.names[dim] not in (*names, MESH + _TENSOR):
            unsaid.append(f"{leaf.path} {_spell(mine.names)} dim {dim}")
    if unsaid:
        notes.append(
            "no rule can say this, as the model itself names these dims and names them "
            f"like others that stay whole: {', '.join(unsaid)}; give them names of "
            "their own in the model, and those to tensor"
        )
    globs = _globs(tuples, [leaf.path for leaf in said])
    return WrittenRules(axis_rules=names, path_rules=globs, notes=tuple(notes))


def _by_name(
    own: Sequence[LeafAxes], dims: Sequence[int], axis_rules: AxisRules
) -> tuple[dict[str, str | None], list[str]]:
    """Names of which all dims are cut, and what the others of their arrays lose."""
    cut: set[str] = set()
    whole: set[str] = set()
    for leaf, dim in zip(own, dims, strict=True):
        for place, name in enumerate(leaf.names or ()):
            if name is not None and not name.startswith(MESH) and leaf.shape[place] > 1:
                (cut if place == dim else whole).add(name)
    found: dict[str, str | None] = {name: _TENSOR for name in sorted(cut - whole)}
    notes = [
        f"{name} goes from fsdp to tensor: look at what fsdp cuts instead"
        for name in found
        if mesh_axis(name, axis_rules) == "fsdp"
    ]
    for name in sorted(whole - cut):
        if mesh_axis(name, axis_rules) == _TENSOR:
            found[name] = None
    return found, notes


def _spell(names: Names) -> str:
    return "(" + ", ".join((name or "·").removeprefix(MESH) for name in names) + ")"


def _cut_names(leaf: LeafAxes, dim: int, axis_rules: AxisRules) -> Names:
    """The names of an array's dims; `fsdp` gives way to its largest other dim."""
    names = [
        None if mesh_axis(name, axis_rules) == _TENSOR else name
        for name in leaf.names or (None,) * len(leaf.shape)
    ]
    if mesh_axis(names[dim], axis_rules) == "fsdp":
        sizes = {i: n for i, n in enumerate(leaf.shape) if i != dim and n > 1}
        if sizes:
            names[max(sizes, key=lambda i: sizes[i])] = "fsdp"
    names[dim] = _TENSOR
    return tuple(name and name.removeprefix(MESH) for name in names)


def _globs(tuples: Mapping[str, Names], paths: Sequence[str]) -> dict[str, Names]:
    """Finds few globs that give every path its names, and fit no other path."""
    found: dict[str, Names] = {}
    for path, names in tuples.items():
        if find_rule(path, found):
            continue
        # A path is a glob of itself, but for characters that mean something there.
        best, most = re.sub(r"([\[?*])", r"[\1]", path), 1
        for glob in _candidates(path):
            fits = [other for other in paths if find_rule(other, {glob: True})]
            if all(tuples.get(other) == names for other in fits) and len(fits) > most:
                best, most = glob, len(fits)
        found[best] = names
    return found


def _candidates(path: str) -> Iterator[str]:
    """Globs that fit a path, from those that say most of it on."""
    parts = re.sub(r"([\[?*])", r"[\1]", path).split("/")
    for kept, length in itertools.product(
        range(len(parts), -1, -1), range(len(parts), 0, -1)
    ):
        if kept > length:
            continue
        # The last parts as they are, others for any number in them.
        ends = len(parts) - kept
        tail = [
            part if i >= ends else re.sub(r"\d+", "*", part)
            for i, part in enumerate(parts)
        ][-length:]
        yield "/".join(tail if length == len(parts) else ["**", *tail])
