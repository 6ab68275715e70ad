"""How the state of a run is cut, decided before there is a mesh.

Owns the decision which dim of every leaf is cut along `fsdp`: parameters and the
model's state by their annotations, the optimizer's state by what its own update does.
The axes of a group cut parameters by their annotations too, and what has a parameter's
place like it; what else an update keeps is whole in a group. Invariant: the decision
depends on the run alone, so that every mesh of the run cuts the same dims.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shardkit.annotations import LeafAxes, read_axes, unused_rules
from shardkit.errors import ConfigError, PartitionError
from shardkit.inexact import check_operations
from shardkit.keys import is_key_dtype
from shardkit.localize import Localizer
from shardkit.logical_axes import AxisRules, check_rules, sharded_dims
from shardkit.mesh import GROUP_AXES
from shardkit.model_state import split_variables, unused_combine
from shardkit.recipe import Recipe, update_arguments
from shardkit.shards import Shards
from shardkit.state import Place, TrainState, find_place, make_layout, with_axes
from shardkit.tree import format_table, map_named, named_leaves
from shardkit.updates import changed_leaves, describe, refuse

__all__ = ["StateLayout", "lay_out"]

_MAX_ROUNDS = 8


class StateLayout(NamedTuple):
    """How a state is cut.

    Attributes:
        state: A `TrainState` of `LeafLayout`.
        warnings: What was probably not meant.
        localizer: What an update was traced by; it knows what is done on whole arrays.
    """

    state: Any
    warnings: list[str]
    localizer: Localizer


def lay_out(
    recipe: Recipe,
    axis_rules: AxisRules,
    *,
    path_rules: Mapping[Any, Any] | None = None,
    strict: bool = False,
) -> StateLayout:
    """Decides which dim of every leaf of a run's state is cut.

    Parameters follow their annotations. The optimizer's state follows the update
    itself: a leaf is cut where the update leaves its new value cut, so moments follow
    their parameters and factored moments their dims.

    Args:
        recipe: What the run computes.
        axis_rules: Logical axis → mesh axis.
        path_rules: As `read_axes` takes them.
        strict: Whether a leaf without annotation and a rule without use are errors.

    Raises:
        PartitionError: If the annotations or rules do not fit.
        ConfigError: If the optimizer needs more than gradients, state and params.
        InexactError: If the optimizer cannot be exact.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    parts = split_variables(jax.eval_shape(recipe.init, key))
    said = [read_axes(part, path_rules) for part in parts]
    leaves = [*itertools.chain.from_iterable(said)]
    used = {name for leaf in leaves for name in leaf.names or () if name}
    warnings = check_rules(axis_rules, used, strict=strict)
    unused = unused_rules(leaves, path_rules)
    unused += unused_combine(parts[1], recipe.combine)
    if strict and unused:
        raise PartitionError("\n".join(unused) + "\nRemove the rule, or strict.")
    traced, abstract = jax.make_jaxpr(recipe.first_state, return_shape=True)(key)
    if recipe.exact:
        check_operations(traced, "init")
    _check_dtypes(said[0], abstract.params)
    param_dims = _dims(abstract.params, said[0], axis_rules, strict)
    state_dims = _dims(abstract.model_state, said[1], axis_rules, strict)
    places = _places(abstract.params)
    cuts = dict(zip(places, jax.tree.leaves(param_dims), strict=True))
    dims = dataclasses.replace(
        jax.tree.map(lambda _: -1, abstract),
        params=param_dims,
        # What an update leaves as it was would stay whole, if it began so.
        opt_state=map_named(
            lambda path, x: find_place(path, x.shape, cuts, -1), abstract.opt_state
        ),
        ema=None if recipe.ema is None else param_dims,
        model_state=state_dims,
    )
    dims, localizer = _settle(recipe, abstract, dims)
    noted = [[(x.names, _group(x, axis_rules)) for x in part] for part in said]
    layout = with_axes(
        make_layout(abstract, dims),
        dict(zip(places, noted[0], strict=True)),
        dict(zip(_places(abstract.model_state), noted[1], strict=True)),
    )
    return StateLayout(layout, warnings + unused, localizer)


def _places(part: Any) -> list[Place]:
    """Lists the leaves of a part of the state as the state has them.

    Annotations name them as users do: a variable's value like the variable.
    """
    return [(path, tuple(x.shape)) for path, x in named_leaves(part)]


def _group(leaf: LeafAxes, rules: AxisRules) -> tuple[tuple[str, int], ...]:
    """Returns which dims of a leaf the axes of a group cut."""
    args = [leaf.path], [leaf.shape], [leaf.names], rules
    dims = {axis: sharded_dims(*args, axis=axis)[0] for axis in GROUP_AXES}
    return tuple((axis, dim) for axis, dim in dims.items() if dim >= 0)


def _dims(part: Any, said: list[LeafAxes], rules: AxisRules, strict: bool) -> Any:
    """Returns a tree like a part of the state, with the dims by its annotations."""
    dims = sharded_dims(
        [leaf.path for leaf in said],
        [leaf.shape for leaf in said],
        [leaf.names for leaf in said],
        rules,
        strict=strict,
    )
    leaves, structure = jax.tree.flatten(part)
    # A key's words stay together.
    cut = zip(leaves, dims, strict=True)
    return structure.unflatten(-1 if is_key_dtype(x.dtype) else d for x, d in cut)


def _settle(
    recipe: Recipe, abstract: TrainState, dims: TrainState
) -> tuple[TrainState, Localizer]:
    """Cuts the optimizer's state as its own update does, until nothing changes."""
    # Any cut is right, as results are brought to it: a state that never settles,
    # such as one that is transposed at every step, only moves more.
    for _ in range(_MAX_ROUNDS):
        found, localizer = _trace_update(recipe, abstract, dims)
        if jax.tree.leaves(found) == jax.tree.leaves(dims.opt_state):
            break
        dims = dataclasses.replace(dims, opt_state=found)
    return dims, localizer  # pyright: ignore[reportPossiblyUnbound]


def _trace_update(
    recipe: Recipe, abstract: TrainState, dims: Any
) -> tuple[Any, Localizer]:
    """Returns how one update leaves the optimizer's state cut, and its tracer."""
    found: list[Any] = []
    shapes = update_arguments(abstract, lambda x: x)
    in_dims = update_arguments(dims, lambda _: -1)
    localizer = Localizer(Shards(exact=recipe.exact))

    def trace(*args: Any) -> Any:
        (new, _), (new_dims, _) = localizer(recipe.update, args, in_dims, shapes)
        found.append(new_dims.opt_state)
        return new

    try:
        new = jax.eval_shape(trace, *shapes)
    except Exception as error:
        refuse(recipe.tx, abstract.params, error)
    changed = changed_leaves("params", abstract.params, new.params)
    changed += changed_leaves("state", abstract.opt_state, new.opt_state)
    if changed:
        raise ConfigError(describe(changed))
    return found[0], localizer


def _check_dtypes(said: list[LeafAxes], params: Any) -> None:
    """Refuses parameters that no exact gradient exists for."""
    bad = [
        (leaf.path, str(x.dtype))
        for leaf, x in zip(said, jax.tree.leaves(params), strict=True)
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize > 4
    ]
    if bad:
        raise PartitionError(
            "params must be floats of at most 32 bits; found\n"
            + format_table(bad)
            + "\nKeep counters and keys out of params, and cast float64 to float32."
        )
