"""Logical axis names on tensors, and what they become on a mesh.

Owns annotations (which name each dim carries) and rules (which mesh axis each name
goes to). Invariant: which dim of a leaf is sharded is decided from names and rules
alone, never from the number of devices, so that a state means the same on every
mesh. It does not place anything.

References:
    Xu et al., GSPMD: General and Scalable Parallelization for ML Computation Graphs
    (2021).
"""

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardkit.errors import PartitionError
from shardkit.mesh import MESH_AXES
from shardkit.tree import format_table, match_path, named_leaves

__all__ = [
    "Annotated",
    "AxisRules",
    "axes",
    "check_rules",
    "infer_shardings",
    "leaf_axes",
    "sharded_dims",
    "strip",
]

AxisRules = Mapping[str, str | None]
"""Logical axis name → mesh axis, or None for a dim that stays whole."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Annotated:
    """An array with the logical names of its dims; made by `axes`."""

    value: Any
    names: Any = dataclasses.field(metadata={"static": True})


def axes(array: Any, *names: str | PartitionSpec | None) -> Annotated:
    """Names the dims of an array.

    Args:
        array: Any array.
        *names: One logical name per dim, None for a dim without one; or a single
            `PartitionSpec` for a user who wants mesh axes directly.

    Raises:
        PartitionError: If the number of names is not the number of dims, or a
            `PartitionSpec` names anything but one mesh axis for a dim.

    Example:
        >>> axes(np.zeros((4, 8)), "embed", "mlp").names
        ('embed', 'mlp')
    """
    if len(names) == 1 and isinstance(names[0], PartitionSpec):
        spec = names[0]
        bad = [entry for entry in spec if entry not in (None, *MESH_AXES)]
        if bad:
            raise PartitionError(
                f"sk.axes: expected at most one mesh axis for each dim, one of "
                f"{', '.join(MESH_AXES)}; found {bad} in {spec}"
            )
        padded = (*spec, *[None] * (np.ndim(array) - len(spec)))
        names = tuple(None if a is None else f"mesh:{a}" for a in padded)
    if len(names) != np.ndim(array):
        raise PartitionError(
            f"sk.axes: expected one name for each of the {np.ndim(array)} dims of an "
            f"array of shape {np.shape(array)}, found {names}. Use None for a dim "
            "without a name."
        )
    return Annotated(array, tuple(names))


def _is_boxed(x: Any) -> bool:
    return isinstance(x, Annotated) or _is_variable(x)


def _is_variable(x: Any) -> bool:
    # An NNX variable can only be met where flax.nnx has been imported.
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Variable)


def strip(tree: Any) -> Any:
    """Takes the annotations off, leaving the tree that a loss is given.

    NNX variables stay: they are part of the user's own tree.

    Example:
        >>> strip({"w": axes(np.zeros(2), "embed")})
        {'w': array([0., 0.])}
    """
    is_annotated = lambda x: isinstance(x, Annotated)  # noqa: E731
    return jax.tree.map(
        lambda x: x.value if is_annotated(x) else x, tree, is_leaf=is_annotated
    )


def leaf_axes(
    tree: Any, path_rules: Mapping[str, tuple[str | None, ...]] | None = None
) -> list[tuple[str | None, ...] | None]:
    """Lists the logical axes of every array of `strip(tree)`, in its order.

    Args:
        tree: Annotated by `axes`, by NNX metadata, or not at all.
        path_rules: Glob over the leaf's path → names, for what carries none; the
            first that fits. `*` stands for any text, `/` in it or not, and `**/` for
            any number of parents, 0 too.

    Returns:
        One entry per array; None where nothing is known.

    Raises:
        PartitionError: Naming all leaves whose annotation does not fit their shape.
    """
    found: list[tuple[str | None, ...] | None] = []
    bad = []
    for path, leaf in named_leaves(tree, is_leaf=_is_boxed):
        names = _annotation(leaf)
        for array in jax.tree.leaves(strip(leaf)):
            if names is None:
                names = match_path(path, path_rules or {})
            if names is not None and len(names) != np.ndim(array):
                bad.append((path, f"shape {np.shape(array)}", f"axes {names}"))
            found.append(names)
    if bad:
        raise PartitionError(
            "expected one logical axis per dim, found\n" + format_table(bad)
        )
    return found


def _annotation(leaf: Any) -> tuple[str | None, ...] | None:
    if isinstance(leaf, Annotated):
        return leaf.names
    if _is_variable(leaf):
        metadata = leaf.get_metadata()
        for name in ("out_sharding", "sharding_names", "sharding"):
            value = metadata.get(name)
            if isinstance(value, tuple | list | PartitionSpec):
                return tuple(value)
    return None


def check_rules(rules: AxisRules, used: set[str], *, strict: bool = False) -> list[str]:
    """Checks the rules against the mesh axes and the names in use.

    Returns:
        Warnings: rules that no leaf uses.

    Raises:
        PartitionError: For a mesh axis that does not exist, and under `strict` for a
            rule that no leaf uses.
    """
    unknown = {n: a for n, a in rules.items() if a is not None and a not in MESH_AXES}
    if unknown:
        rows = [
            (f"{name} = {axis!r}", _suggestion(str(axis), MESH_AXES))
            for name, axis in unknown.items()
        ]
        raise PartitionError(
            f"axis_rules: the mesh axes are {', '.join(MESH_AXES)}; found\n"
            + format_table(rows)
        )
    unused = [
        f"axis_rules: no leaf has the logical axis {name!r}"
        + _suggestion(name, sorted(used))
        for name in rules
        if name not in used
    ]
    if unused and strict:
        raise PartitionError("\n".join(unused) + "\nRemove the rule, or strict.")
    return unused


def _suggestion(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def sharded_dims(
    paths: list[str],
    shapes: list[tuple[int, ...]],
    names: list[tuple[str | None, ...] | None],
    rules: AxisRules,
    *,
    axis: str = "fsdp",
    strict: bool = False,
) -> list[int]:
    """Decides which dim of each leaf is cut along a mesh axis.

    Args:
        paths: Where each leaf is, for messages.
        shapes: Global shapes.
        names: What `leaf_axes` returned.
        rules: Logical axis → mesh axis. Where several dims of a leaf map to the
            same mesh axis, the first that is larger than 1 is cut.
        axis: The mesh axis.
        strict: Whether a leaf without annotation is an error.

    Returns:
        A dim per leaf, -1 for a leaf that every device holds whole.

    Raises:
        PartitionError: Under `strict`, naming all leaves without annotation.
    """
    dims = []
    missing = []
    for path, shape, leaf_names in zip(paths, shapes, names, strict=True):
        if leaf_names is None:
            if shape:
                missing.append((path, str(shape)))
            dims.append(-1)
            continue
        targets = [_target(name, rules) for name in leaf_names]
        cut = [d for d, a in enumerate(targets) if a == axis and shape[d] > 1]
        dims.append(cut[0] if cut else -1)
    if missing and strict:
        raise PartitionError(
            "strict: these leaves carry no logical axes\n"
            + format_table(missing)
            + "\nAnnotate them with sk.axes(array, ...) or a path rule."
        )
    return dims


def _target(name: str | None, rules: AxisRules) -> str | None:
    if name is None:
        return None
    return name[5:] if name.startswith("mesh:") else rules.get(name)


def infer_shardings(tree: Any, axis_rules: AxisRules, mesh: Mesh) -> Any:
    """Returns a `NamedSharding` for every array of an annotated tree.

    For people with a loop of their own. A JAX array cannot be cut unevenly, so a
    dim that its mesh axis does not divide stays whole here; `Trainer` pads it.

    Args:
        tree: Arrays or `jax.ShapeDtypeStruct`, annotated.
        axis_rules: Logical axis → mesh axis.
        mesh: The mesh to place them on.

    Returns:
        A tree like `strip(tree)`.

    Raises:
        PartitionError: For a rule that names an axis that does not exist.

    Example:
        >>> from shardkit.mesh import MeshSpec
        >>> mesh = MeshSpec(fsdp=-1).build(jax.devices()[:1])
        >>> tree = {"w": axes(np.zeros((4, 8)), "embed", "mlp")}
        >>> infer_shardings(tree, {"embed": "fsdp"}, mesh)["w"].spec[0]
        'fsdp'
    """
    check_rules(axis_rules, set(axis_rules))
    arrays, treedef = jax.tree.flatten(strip(tree))
    shardings = []
    for array, names in zip(arrays, leaf_axes(tree), strict=True):
        entries: list[str | None] = []
        for size, name in zip(np.shape(array), names or (), strict=False):
            target = _target(name, axis_rules)
            fits = target is not None and size % mesh.shape[target] == 0
            entries.append(target if fits and target not in entries else None)
        shardings.append(NamedSharding(mesh, PartitionSpec(*entries)))
    return treedef.unflatten(shardings)
