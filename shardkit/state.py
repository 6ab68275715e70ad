"""The state of a training run, apart from where it is.

Owns `TrainState` and the layout of each of its leaves. Invariant: every leaf is a
global array; nothing in it names a device or a mesh. It computes no updates.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array

from shardkit.errors import PartitionError
from shardkit.keys import is_key_dtype
from shardkit.layout import LeafLayout
from shardkit.tree import map_named

__all__ = ["Place", "TrainState", "find_place", "make_layout", "with_axes"]

Place = tuple[str, tuple[int, ...]]
"""The path and the shape of a leaf."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
        step: How many steps are done; the next step's index. int32 scalar.
        params: The user's tree.
        opt_state: The optimizer's tree.
        ema: The moving average of the parameters, or None.
        grad_exponent: Per parameter leaf, the grid on which its gradient is summed;
            int32 scalars. None in fast mode.
        loss_scale: `(scale, number of good steps)`, or None.
        model_state: What the model carries on beside its parameters, or None.
    """

    step: Array
    params: Any
    opt_state: Any
    ema: Any = None
    grad_exponent: Any = None
    loss_scale: Any = None
    model_state: Any = None


def make_layout(abstract: TrainState, dims: Any) -> Any:
    """Pairs every leaf of an abstract state with the dim along which it is cut.

    Args:
        abstract: A state of `jax.ShapeDtypeStruct`.
        dims: A tree like it, of ints; -1 for whole.

    Returns:
        A tree like it, of `LeafLayout`.

    Raises:
        PartitionError: If two leaves have the same path.
    """
    layout = map_named(
        lambda path, x, dim: LeafLayout(path, tuple(x.shape), x.dtype, dim),
        abstract,
        dims,
    )
    # Checkpoints spell "/" as ".", so both are one there.
    names = collections.Counter(
        x.path.replace("/", ".") for x in jax.tree.leaves(layout)
    )
    shared = [name for name, count in names.items() if count > 1]
    if shared:
        raise PartitionError(
            f"several leaves have the same path: {', '.join(shared)}. Rename a key "
            "that contains '/' or '.'."
        )
    return layout


def find_place(
    path: str, shape: tuple[int, ...], table: Mapping[Place, Any], default: Any = None
) -> Any:
    """Looks up the parameter whose place a leaf has, as moments do.

    Args:
        path: The leaf's path, which ends like the parameter's.
        shape: The leaf's shape, which is the parameter's.
        table: What to look up, by the path and shape of parameters.
        default: For a leaf that has no parameter's place.

    Example:
        >>> find_place("0/mu/w", (2, 3), {("w", (2, 3)): "found"})
        'found'
    """
    parts = path.split("/")
    places = (("/".join(parts[i:]), shape) for i in range(len(parts)))
    return next((table[place] for place in places if place in table), default)


def with_axes(
    layout: TrainState, params: Mapping[Place, Any], model_state: Mapping[Place, Any]
) -> TrainState:
    """Notes what parameters are annotated with, and what has a parameter's place.

    Args:
        layout: A state of `LeafLayout`.
        params: Logical axes, and what the axes of a group cut, by the path and shape of
            parameters.
        model_state: Likewise, of the model's state.
    """

    def note_leaf(leaf: LeafLayout, table: Mapping[Place, Any]) -> LeafLayout:
        axes, group = find_place(leaf.path, leaf.shape, table, (None, ()))
        # An update may leave cut along `fsdp` what its parameter has elsewhere.
        group = tuple((axis, dim) for axis, dim in group if dim != leaf.dim)
        # A key's words stay together.
        group = () if is_key_dtype(leaf.dtype) else group
        return dataclasses.replace(leaf, axes=axes, group=group)

    def note(part: Any, table: Mapping[Place, Any]) -> Any:
        return jax.tree.map(lambda leaf: note_leaf(leaf, table), part)

    noted = note(layout.model_state, model_state)
    return dataclasses.replace(note(layout, params), model_state=noted)
