"""What was said of a model's arrays, and what comes of it, as a table to read.

Owns the table that `annotate` makes; it decides nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from shardkit.annotations import MESH, LeafAxes, read_axes, strip, unused_rules
from shardkit.errors import PartitionError
from shardkit.functions import abstract_init
from shardkit.logical_axes import AxisRules, check_rules, mesh_axis, sharded_dims
from shardkit.model import Model
from shardkit.model_state import Variables
from shardkit.tree import format_table

__all__ = ["Annotations", "annotate"]


@dataclasses.dataclass(frozen=True)
class Annotations:
    """What `annotate` found; its text is a table.

    Attributes:
        leaves: What is known of every array.
        dims: The dim of each that `fsdp` cuts, -1 for none.
        axis_rules: Logical axis → mesh axis.
        unused: Rules that no array uses, in words.
    """

    leaves: tuple[LeafAxes, ...]
    dims: tuple[int, ...]
    axis_rules: AxisRules
    unused: tuple[str, ...]

    @property
    def unplaced(self) -> tuple[str, ...]:
        """The paths of arrays of which nothing was said: every device holds them."""
        return tuple(x.path for x in self.leaves if x.names is None and x.shape)

    def __str__(self) -> str:
        rows = [("array", "shape", "axes", "cut by fsdp", "said by")]
        for leaf, dim in zip(self.leaves, self.dims, strict=True):
            cut = "-" if dim < 0 else f"dim {dim}"
            rows.append(
                (
                    leaf.path,
                    "×".join(map(str, leaf.shape)) or "scalar",
                    self._names(leaf),
                    cut,
                    ", ".join(leaf.said_by) or "nobody",
                )
            )
        lines = [format_table(rows)]
        if self.unplaced:
            lines.append(
                f"Nothing was said of {len(self.unplaced)} of {len(self.leaves)} "
                f"arrays, which every device will hold: {', '.join(self.unplaced)}"
            )
        return "\n".join([*lines, *self.unused])

    def _names(self, leaf: LeafAxes) -> str:
        if leaf.names is None:
            return "?"
        spelled = []
        for name in leaf.names:
            axis = mesh_axis(name, self.axis_rules)
            plain = name and name.removeprefix(MESH)
            is_same = axis in (None, plain)
            spelled.append(f"{plain or '·'}" if is_same else f"{plain}→{axis}")
        return " ".join(spelled) or "·"


def annotate(
    model: Model | Callable[[Any], Any] | Any,
    axis_rules: AxisRules | None = None,
    path_rules: Mapping[Any, Any] | None = None,
) -> Annotations:
    """Says which logical axes every array has, who said so, and what is cut.

    Args:
        model: A `Model`, an `init` (`key → params`), or what it returns; nothing is
            computed.
        axis_rules: Logical axis → mesh axis; a model's own by default.
        path_rules: As in `Trainer`.

    Raises:
        PartitionError: Naming all arrays whose annotations do not fit.

    Example:
        >>> import numpy as np
        >>> from shardkit.annotations import axes
        >>> params = {"w": axes(np.zeros((4, 8)), "embed", None), "b": np.zeros(8)}
        >>> print(annotate(params, {"embed": "fsdp"}))
          array  shape  axes          cut by fsdp  said by
          b      8      ?             -            nobody
          w      4×8    embed→fsdp ·  dim 0        sk.axes
        Nothing was said of 1 of 2 arrays, which every device will hold: b
    """
    rules = axis_rules or {}
    if isinstance(model, Model):
        rules = rules or model.axis_rules
        model = model.init
    tree = model
    has_arrays = any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(strip(tree)))
    if callable(model) and not has_arrays:
        tree = abstract_init(model)
    if isinstance(tree, Variables):
        # Rules see the paths of each part, as in a `Trainer`.
        parts = {"params/": tree.params, "state/": tree.state}
    else:
        parts = {"": tree}
    leaves, paths = [], []
    for prefix, part in parts.items():
        found = read_axes(part, path_rules)
        paths += found
        leaves += [dataclasses.replace(x, path=prefix + x.path) for x in found]
    if not leaves:
        raise PartitionError("sk.annotate: expected a tree with arrays, found none")
    used = {name for leaf in leaves for name in leaf.names or () if name}
    unused = check_rules(rules, used)
    unused += unused_rules(paths, path_rules)
    dims = sharded_dims(
        [leaf.path for leaf in leaves],
        [leaf.shape for leaf in leaves],
        [leaf.names for leaf in leaves],
        rules,
    )
    return Annotations(tuple(leaves), tuple(dims), rules, tuple(unused))
