"""Which logical axes each array of a tree was said to have, and where.

Owns reading annotations, in whatever way they were made: `axes`, the metadata of Flax's
variables and boxes, types of fields, rules over paths. All mean the same, one name per
dim, and mix in one tree. Invariant: an array of which two say different things is an
error. What names become on a mesh is decided elsewhere.
"""

import dataclasses
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from shardkit.arguments import check_mapping
from shardkit.errors import PartitionError
from shardkit.mesh import MESH_AXES
from shardkit.tree import find_rule, format_table, path_string

__all__ = [
    "Annotated",
    "Axes",
    "LeafAxes",
    "axes",
    "leaf_axes",
    "read_axes",
    "strip",
    "unused_rules",
]

Names = tuple[str | None, ...]
MESH = "mesh:"
"""How a name begins that is a mesh axis, whatever the rules say."""
_WHAT_TO_GIVE = "Give a name for each dim, None for one without, or a PartitionSpec."


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Annotated:
    """An array with the logical names of its dims; made by `axes`."""

    value: Any
    names: Any = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True, init=False)
class Axes:
    """Logical names of the dims of a field, in its type.

    Works on whatever JAX sees as a node with named fields: dataclasses, Equinox's
    modules, `flax.struct`. A field that holds several arrays says it of each.

    Example:
        >>> @jax.tree_util.register_dataclass
        ... @dataclasses.dataclass
        ... class Dense:
        ...     kernel: typing.Annotated[jax.Array, Axes("embed", "mlp")]
        >>> leaf_axes(Dense(np.zeros((4, 8))))
        [('embed', 'mlp')]
    """

    names: tuple[str | PartitionSpec | None, ...]

    def __init__(self, *names: str | PartitionSpec | None) -> None:
        object.__setattr__(self, "names", names)


@dataclasses.dataclass(frozen=True)
class LeafAxes:
    """What is known of one array.

    Attributes:
        path: Where it is.
        shape: Its shape.
        names: A name, or None, for each dim; None where nothing was said.
        said_by: Who said so, such as `"sk.axes"` or `"path rule '*/kernel'"`.
    """

    path: str
    shape: tuple[int, ...]
    names: Names | None
    said_by: tuple[str, ...] = ()


def axes(array: Any, *names: str | PartitionSpec | None) -> Annotated:
    """Names the dims of an array.

    Args:
        array: Any array.
        *names: One logical name per dim, None for a dim without one; or a single
            `PartitionSpec` for a user who wants mesh axes directly.

    Raises:
        PartitionError: If the number of names is not the number of dims, or a
            `PartitionSpec` names anything but one mesh axis for a dim, or one twice.

    Example:
        >>> axes(np.zeros((4, 8)), "embed", "mlp").names
        ('embed', 'mlp')
    """
    found, problem = _spelled(names, np.shape(array))
    if problem:
        raise PartitionError(f"sk.axes: {problem}. {_WHAT_TO_GIVE}")
    return Annotated(array, found)


def strip(tree: Any) -> Any:
    """Takes the annotations off, leaving the tree that a loss is given.

    NNX variables stay: they are part of the user's own tree. Linen's boxes are taken
    off, as modules take parameters without them.

    Example:
        >>> strip({"w": axes(np.zeros(2), "embed")})
        {'w': array([0., 0.])}
    """
    is_box = lambda x: _is_annotated(x) or _is_linen_box(x)  # noqa: E731
    return jax.tree.map(
        lambda x: strip(x.value) if is_box(x) else x, tree, is_leaf=is_box
    )


def leaf_axes(
    tree: Any, path_rules: Mapping[Any, Any] | None = None
) -> list[Names | None]:
    """Lists the logical axes of every array of `strip(tree)`, in its order.

    Args:
        tree: Annotated in any way, or not at all.
        path_rules: As in `read_axes`, like what is raised.
    """
    return [leaf.names for leaf in read_axes(tree, path_rules)]


def read_axes(tree: Any, path_rules: Mapping[Any, Any] | None = None) -> list[LeafAxes]:
    """Says of every array of `strip(tree)`, in its order, what axes it has.

    Args:
        tree: Annotated by `axes`, by the types of fields, by Flax's metadata, or not
            at all.
        path_rules: Glob over the leaf's path, or a compiled regex that is searched for
            in it, → names, a `PartitionSpec`, or None for an array whose dims have
            none; the first that fits counts. In a glob `*` stands for any text, `/` in
            it or not, and `**/` for any number of parents, 0 too.

    Raises:
        PartitionError: Naming all arrays whose annotations do not fit them, or one
            another.
    """
    check_mapping("path_rules", path_rules, "Make one of pairs by dict(pairs).")
    found, bad, conflicts = [], [], []
    for path, array, said in _said(tree):
        shape, spelled = np.shape(array), []
        if rule := find_rule(path, path_rules or {}):
            names = (None,) * len(shape) if rule[1] is None else rule[1]
            said = [*said, (f"path rule {_spell_rule(rule[0])}", names)]
        for source, value in said:
            names, problem = _spelled(_as_names(value), shape)
            if problem:
                bad.append((path, source, problem))
            else:
                spelled.append((source, names))
        if len({_plain(names) for _, names in spelled}) > 1:
            rows = [f"{source} says {_plain(names)}" for source, names in spelled]
            conflicts.append((path, *rows))
        # Who names a mesh axis means it, whatever the rules say.
        names = max((names for _, names in spelled), key=_num_meant, default=None)
        sources = tuple(source for source, _ in spelled)
        found.append(LeafAxes(path, shape, names, sources))
    _refuse(bad, conflicts)
    return found


def _plain(names: Names) -> Names:
    """The names without saying which of them are mesh axes for sure."""
    return tuple(name and name.removeprefix(MESH) for name in names)


def _num_meant(names: Names) -> int:
    return sum(name is not None and name.startswith(MESH) for name in names)


def unused_rules(
    leaves: Sequence[LeafAxes], path_rules: Mapping[Any, Any] | None
) -> list[str]:
    """Says which rules fit the path of no array, as what is misspelled does."""
    paths = [leaf.path for leaf in leaves]
    return [
        f"path_rules: no array's path fits {_spell_rule(pattern)}"
        f"{_rest_hint(pattern, paths)}"
        for pattern in path_rules or {}
        if not any(find_rule(path, {pattern: True}) for path in paths)
    ]


def _rest_hint(pattern: Any, paths: Sequence[str]) -> str:
    """Tables of a model with a state put `params/` in front; rules do not have it."""
    head, _, rest = pattern.partition("/") if isinstance(pattern, str) else ("", "", "")
    fits = any(find_rule(path, {rest: True}) for path in paths)
    is_head = fits and head in ("params", "state")
    return f"; paths begin within {head}: {rest!r}" if is_head else ""


def _refuse(bad: list[tuple[str, ...]], conflicts: list[tuple[str, ...]]) -> None:
    if bad:
        raise PartitionError(
            "these annotations do not fit their arrays\n"
            + format_table(bad)
            + f"\n{_WHAT_TO_GIVE}"
        )
    if conflicts:
        width = max(map(len, conflicts))
        rows = [row + ("",) * (width - len(row)) for row in conflicts]
        raise PartitionError(
            "these arrays are annotated twice, and not alike\n"
            + format_table(rows)
            + "\nRemove one of the two."
        )


def _said(
    node: Any, path: tuple[Any, ...] = (), by_type: Sequence[tuple[str, Any]] = ()
) -> Iterator[tuple[str, Any, list[tuple[str, Any]]]]:
    """Yields every array with its path and what is said of it: who, names."""
    if (boxed := _boxed(node)) is not None:
        for array in jax.tree.leaves(strip(node)):
            yield path_string(path), array, [*by_type, *boxed]
        return
    if jax.tree_util.all_leaves([node]):
        yield path_string(path), node, list(by_type)
        return
    kind = type(node)
    fields = field_axes(kind)
    children = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda x: x is not node
    )[0]
    keys = [getattr(key[0], "name", None) for key, _ in children]
    if fields and children and not any(keys):
        raise PartitionError(
            f"{kind.__name__}: its fields' types name axes, but it is registered "
            "without the names of its fields. Register it by "
            "jax.tree_util.register_dataclass, or with keys."
        )
    for (key, child), name in zip(children, keys, strict=True):
        if child is None:
            continue
        own = [
            (f"type of {kind.__name__}.{name}", x) for x in fields.get(name or "", ())
        ]
        yield from _said(child, (*path, *key), [*by_type, *own])


def _boxed(node: Any) -> list[tuple[str, Any]] | None:
    """What a box says of what is in it; None if it is no box."""
    if _is_annotated(node):
        return [("sk.axes", node.names), *(_boxed(node.value) or ())]
    if _is_linen_box(node):
        names = getattr(node, "names", None)
        said = [] if names is None else [(f"Flax's {type(node).__name__}", names)]
        return [*said, *(_boxed(node.value) or ())]
    if _is_variable(node):
        return [*_of_metadata(node), *_inside(node)]
    return None


def _of_metadata(variable: Any) -> list[tuple[str, Any]]:
    metadata = variable.get_metadata()
    for name in ("out_sharding", "sharding_names", "sharding"):
        value = metadata.get(name)
        value = value.spec if isinstance(value, NamedSharding) else value
        if isinstance(value, PartitionSpec):
            # Flax keeps logical names in one, too; it may be shorter than the array.
            [array, *_] = [*jax.tree.leaves(strip(variable)), None]
            value = (*value, *[None] * (np.ndim(array) - len(value)))
        if isinstance(value, tuple | list):
            return [(f"NNX's {name}", tuple(value))]
    return []


def _inside(variable: Any) -> list[tuple[str, Any]]:
    """What a box within a variable says."""
    is_other = lambda x: x is not variable and (_is_annotated(x) or _is_linen_box(x))  # noqa: E731
    leaves = jax.tree.leaves(variable, is_leaf=is_other)
    return [said for leaf in leaves for said in _boxed(leaf) or ()]


def _is_annotated(x: Any) -> bool:
    return isinstance(x, Annotated)


def _is_variable(x: Any) -> bool:
    # An NNX variable can only be met where flax.nnx has been imported.
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Variable)


def _is_linen_box(x: Any) -> bool:
    meta = sys.modules.get("flax.core.meta")
    return meta is not None and isinstance(x, meta.AxisMetadata)


def field_axes(kind: type) -> dict[str, list[Any]]:
    """What the types of a class's fields say: name → all that is said there.

    Raises:
        PartitionError: If they say something in a type that cannot be evaluated.
    """
    found: dict[str, list[Any]] = {}
    for base in reversed(getattr(kind, "__mro__", ())):
        for name, hint in vars(base).get("__annotations__", {}).items():
            said = [*_metadata(_evaluated(base, name, hint))]
            found.pop(name, None)
            if said:
                found[name] = said
    return found


def _evaluated(kind: type, name: str, hint: Any) -> Any:
    if not isinstance(hint, str):
        return hint
    module = sys.modules.get(kind.__module__)
    try:
        return eval(hint, vars(module) if module else {}, dict(vars(kind)))
    except Exception as error:
        # Names that only a type checker imports are usual, and no matter.
        if not any(word in hint for word in ("Axes(", "PartitionSpec(", "P(")):
            return None
        raise PartitionError(
            f"{kind.__name__}.{name}: its type {hint!r} names axes, but cannot be "
            f"evaluated: {error}. Import what it names at run time."
        ) from error


def _metadata(hint: Any) -> Iterator[Any]:
    """Yields what a type says, in its parts too, such as those of a union or a list."""
    for extra in getattr(hint, "__metadata__", ()):
        if isinstance(extra, Axes):
            yield extra.names
        elif isinstance(extra, PartitionSpec):
            yield extra
    if (alias := getattr(hint, "__value__", None)) is not None:
        yield from _metadata(alias)
    inner = (hint.__origin__,) if hasattr(hint, "__metadata__") else ()
    for part in (*inner, *typing.get_args(hint)[len(inner) :]):
        yield from _metadata(part)


def _as_names(value: Any) -> Any:
    """What `axes` would be given."""
    is_several = isinstance(value, tuple | list) and not isinstance(
        value, PartitionSpec
    )
    return tuple(value) if is_several else (value,)


def _spelled(names: Any, shape: tuple[int, ...]) -> tuple[Names, str]:
    """Spells names out, and says what is wrong with them, if anything is."""
    if len(names) == 1 and isinstance(names[0], PartitionSpec):
        return _of_spec(names[0], shape)
    dims = f"the {len(shape)} dims of an array of shape {shape}"
    bad = [
        name
        for name in names
        if not isinstance(name, str | None)
        or (name and name.startswith(MESH) and name.removeprefix(MESH) not in MESH_AXES)
    ]
    if bad:
        return (), f"expected a name or None for each of {dims}, found {bad[0]!r}"
    if len(names) != len(shape):
        return (), f"expected one name for each of {dims}, found {names}"
    return tuple(names), ""


def _of_spec(spec: PartitionSpec, shape: tuple[int, ...]) -> tuple[Names, str]:
    entries = list(spec)
    named = [entry for entry in entries if entry is not None]
    if any(entry not in MESH_AXES for entry in named):
        problem = (
            "expected at most one mesh axis for each dim, one of "
            f"{', '.join(MESH_AXES)}; found {named} in {spec}"
        )
    elif len(set(named)) < len(named):
        problem = f"expected each mesh axis once, found {spec}"
    elif len(entries) > len(shape):
        problem = (
            f"expected at most {len(shape)} dims for an array of shape {shape}, found "
            f"{len(entries)} in {spec}"
        )
    else:
        padded = [*entries, *[None] * (len(shape) - len(entries))]
        return tuple(None if a is None else MESH + a for a in padded), ""
    return (), problem


def _spell_rule(pattern: Any) -> str:
    return repr(getattr(pattern, "pattern", pattern))
