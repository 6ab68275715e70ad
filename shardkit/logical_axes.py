"""What the logical axes of tensors become on a mesh.

Owns the rules: which mesh axis each name goes to. Invariant: which dim of a leaf is
sharded is decided from names and rules alone, never from the number of devices, so that
a state means the same on every mesh. It does not place anything.

References:
    Xu et al., GSPMD: General and Scalable Parallelization for ML Computation Graphs
    (2021).
"""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from shardkit.annotations import MESH, axes, leaf_axes, strip
from shardkit.arguments import check_mapping
from shardkit.errors import PartitionError
from shardkit.mesh import MESH_AXES
from shardkit.tree import format_table

__all__ = [
    "AxisRules",
    "auto_axes",
    "check_rules",
    "constrain",
    "infer_shardings",
    "mesh_axis",
    "sharded_dims",
]

AxisRules = Mapping[str, str | None]
"""Logical axis name → mesh axis, or None for a dim that stays whole."""


def check_rules(rules: AxisRules, used: set[str], *, strict: bool = False) -> list[str]:
    """Checks the rules against the mesh axes and the names in use.

    Returns:
        Warnings: rules that no leaf uses, and those that cut nothing.

    Raises:
        PartitionError: For a mesh axis that does not exist, and under `strict` for a
            rule that no leaf uses.
        ConfigError: If the rules are no dict.
    """
    check_mapping(
        "axis_rules",
        rules,
        "Of pairs in the style of Flax and MaxText take the names that go to fsdp, as "
        '{"embed": "fsdp"}; docs/migrate-from-rules.md has the line that does it.',
    )
    unknown = {n: a for n, a in rules.items() if a is not None and a not in MESH_AXES}
    if unknown:
        rows = [(f"{name} = {axis!r}", _remedy(axis)) for name, axis in unknown.items()]
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
    return unused + [
        ("a PartitionSpec" if name.startswith(MESH) else f"axis_rules: {name!r}")
        + " goes to 'data', along which no array is cut; 'fsdp' cuts"
        for name in sorted(used)
        if mesh_axis(name, rules) == "data"
    ]


def _remedy(axis: Any) -> str:
    if isinstance(axis, str):
        return _suggestion(axis, MESH_AXES)
    known = [
        name for name in MESH_AXES if isinstance(axis, list | tuple) and name in axis
    ]
    return f"; give one of them: {' or '.join(map(repr, known))}" if known else ""


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
        targets = [mesh_axis(name, rules) for name in leaf_names]
        cut = [d for d, a in enumerate(targets) if a == axis and shape[d] > 1]
        dims.append(cut[0] if cut else -1)
    if missing and strict:
        raise PartitionError(
            "strict: these leaves carry no logical axes\n"
            + format_table(missing)
            + "\nAnnotate them with sk.axes(array, ...) or a path rule."
        )
    return dims


def mesh_axis(name: str | None, rules: AxisRules) -> str | None:
    """Returns the mesh axis of a logical one; that of a mesh axis' name is itself.

    Example:
        >>> mesh_axis("embed", {"embed": "fsdp"}), mesh_axis("fsdp", {})
        ('fsdp', 'fsdp')
    """
    if name is None:
        return None
    if name.startswith(MESH):
        return name.removeprefix(MESH)
    return rules.get(name, name if name in MESH_AXES else None)


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
    shardings = [
        NamedSharding(mesh, _spec(np.shape(array), names or (), axis_rules, mesh.shape))
        for array, names in zip(arrays, leaf_axes(tree), strict=True)
    ]
    return treedef.unflatten(shardings)


def auto_axes() -> dict[str, int]:
    """Returns the mesh axes that are left to the compiler here, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {axis: size for axis, size, kind in kinds if kind == AxisType.Auto}


def constrain(x: Any, *names: Any, axis_rules: AxisRules | None = None) -> Any:
    """Asks for activations to be cut along mesh axes that are left to the compiler.

    In a `Trainer` these are `tensor`, `expert` and `context`, along which a group of
    devices computes a microbatch together: no number depends on what is asked for but
    by rounding. In a loop of one's own they are the axes of the mesh that
    `jax.set_mesh` has made the current one. Elsewhere, and along axes that do not
    divide a dim, nothing is cut.

    Args:
        x: An array.
        *names: As in `axes`, like what is raised; besides, `...` for a dim that the
            compiler may cut as it likes (None: it stays whole), and a tuple for one
            that several axes cut, the slowest first.
        axis_rules: Logical axis → mesh axis; a mesh axis' own name is itself.

    Example:
        >>> constrain(np.ones(2), "batch", axis_rules={"batch": "data"})
        array([1., 1.])
    """
    rules = axis_rules or {}
    check_rules(rules, set(rules))
    several = [name if isinstance(name, tuple) else (name,) for name in names]
    first = [name[0] if name and name[0] is not ... else None for name in several]
    found = axes(x, *first).names
    if len(found) == len(several):
        # A `PartitionSpec` for all dims is a name for each by now.
        rest = [name[1:] if found[d] else () for d, name in enumerate(several)]
        found = [(name, *more) for name, more in zip(found, rest, strict=True)]
    if not (sizes := auto_axes()):
        return x
    entries = [*_spec(x.shape, found, rules, sizes)]
    for dim, name in enumerate(names):
        if name is ...:
            entries[dim] = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def _spec(
    shape: tuple[int, ...], names: Any, rules: AxisRules, sizes: Mapping[str, int]
) -> PartitionSpec:
    """Cuts dims by the axes that divide them, each axis once."""
    entries: list[Any] = []
    used: set[str] = set()
    for size, name in zip(shape, names, strict=False):
        cut: list[str] = []
        for one in name if isinstance(name, tuple) else (name,):
            target = mesh_axis(one, rules)
            count = sizes.get(target or "", 0)
            if target and count and target not in used and size % count == 0:
                used.add(target)
                cut.append(target)
                size //= count
        entries.append(tuple(cut) if len(cut) > 1 else cut[0] if cut else None)
    return PartitionSpec(*entries)
