"""From a model to what is known of it.

Owns the reading: which mesh axes may cut which dims, and the traces that the facts are
taken from. Invariant: everything comes from abstract shapes, so that a model that no
machine holds can be read on a laptop.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from shardkit.annotations import LeafAxes, read_axes, strip, unused_rules
from shardkit.errors import ConfigError
from shardkit.layout import SHARD_AXIS
from shardkit.logical_axes import AxisRules, check_rules, mesh_axis, sharded_dims
from shardkit.mesh import GROUP_AXES
from shardkit.model import Model, call_loss
from shardkit.model_state import split_variables
from shardkit.planner.flow import follow
from shardkit.planner.flow_products import gather, settle
from shardkit.planner.ledger import Cut, Habits, Ledger, bytes_of
from shardkit.planner.model_facts import Leaf, ModelFacts
from shardkit.planner.traces import count_norms, kept_bytes, peak_beside
from shardkit.state import find_place
from shardkit.tree import named_leaves

__all__ = ["arguments", "read_model", "trace"]


def read_model(
    model: Model,
    microbatch: Any,
    tx: Any,
    *,
    axis_rules: AxisRules | None = None,
    path_rules: Mapping[Any, Any] | None = None,
    habits: Habits | None = None,
) -> ModelFacts:
    """Reads a model, without computing anything.

    Args:
        model: What a model factory returns.
        microbatch: The arrays of one microbatch, abstract or not: rows first. Every
            device of a group has all of them; what the axes of a group cut is what
            the model asks for with `constrain`, and what follows from parameters.
        tx: The optimizer, any optax transformation.
        axis_rules: Logical axis → mesh axis; None for the model's own.
        path_rules: As `read_axes` takes them.
        habits: Of the compiler; None for that of a GPU.

    Raises:
        ConfigError: If the loss or the optimizer cannot be traced with these shapes.
        PartitionError: If annotations do not fit.

    Example:
        >>> import optax
        >>> import jax.numpy as jnp
        >>> from shardkit.annotations import axes
        >>> def init(key):
        ...     return {"w": axes(jnp.ones((8, 4)), "embed", "mlp")}
        >>> def loss(params, microbatch, key):
        ...     return jnp.sum((microbatch["x"] @ params["w"]) ** 2)
        >>> model = Model(init=init, loss=loss, axis_rules={"mlp": "tensor"})
        >>> facts = read_model(model, {"x": jnp.ones((2, 8))}, optax.adam(1e-3))
        >>> facts.num_params, facts.work.total_flops, facts.divisors["tensor"]
        (32, 256, 4)
    """
    rules = model.axis_rules if axis_rules is None else axis_rules
    variables, args = arguments(model, microbatch)
    said = [read_axes(part, path_rules) for part in split_variables(variables)]
    params, state, microbatch, key = args
    both = [*said[0], *said[1]]
    named = {name for leaf in both for name in leaf.names or () if name}
    warnings = check_rules(rules, named) + unused_rules(both, path_rules)
    rules, notes = _divisible(both, rules)
    if all(mesh_axis(name, rules) != SHARD_AXIS for name in named):
        warnings.append(
            f"nothing is cut by {SHARD_AXIS}, as no name of a dim goes there: every "
            "device holds the whole state"
        )
    leaves = [
        _leaves(part, names, rules)
        for part, names in zip((params, state), said, strict=True)
    ]
    whole = [Cut.whole(x) for x in jax.tree.leaves((microbatch, key))]
    cuts = [*(Cut(_inner(leaf.cuts)) for part in leaves for leaf in part), *whole]
    functions = _functions(model)
    # Once where no mesh is, as modules that are made meanwhile would see it.
    trace(functions[0], args)
    traced = [trace(fn, args, in_group=True) for fn in functions]
    habits = habits or Habits()
    (_, forward), (outs, work), (kept, _) = (
        follow(x.jaxpr, cuts, Ledger(habits=habits)) for x in traced
    )
    _settle_results(traced[1], outs, leaves[0], work)
    residuals = kept_bytes(traced[2], kept)
    num_norms, num_clips = count_norms(tx, params, leaves[0])
    rows = {x.shape[0] for x in jax.tree.leaves(microbatch) if x.shape}
    return ModelFacts(
        params=leaves[0],
        opt_state=_opt_leaves(tx, params, leaves[0]),
        model_state=leaves[1],
        num_rows=max(rows, default=1),
        num_outputs=_num_outputs(model, args),
        microbatch_bytes=sum(bytes_of(x) for x in jax.tree.leaves(microbatch)),
        work=work,
        forward=forward,
        residuals=residuals,
        peak_bytes=peak_beside(traced[1], leaves[0]),
        num_norm_leaves=num_norms,
        num_clip_leaves=num_clips,
        divisors={axis: work.divisors.get(axis, 1) for axis in GROUP_AXES},
        notes=(*warnings, *notes, *work.notes),
    )


def arguments(model: Model, microbatch: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns shapes: what `init` makes, annotated, and what a loss is given.

    Args:
        model: What a model factory returns.
        microbatch: Arrays, abstract or not.

    Returns:
        The first is for `read_axes`; the second `(params, state, microbatch, key)`.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(model.init, key)
    params, state = split_variables(strip(variables))
    microbatch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)),
        microbatch,
    )
    return variables, (params, state, microbatch, key)


def trace(fn: Any, args: tuple[Any, ...], *, in_group: bool = False) -> Any:
    """Traces a function of a loss's arguments.

    Args:
        fn: The function.
        args: Its arguments, as `arguments` returns them.
        in_group: Whether the jaxpr has the cuts that a model asks for. The axes of a
            group are there then, with size 1, which divides every dim.

    Raises:
        ConfigError: Naming the shapes of the microbatch.
    """
    sizes = (1,) * len(GROUP_AXES) * in_group
    axes, kinds = GROUP_AXES[: len(sizes)], (AxisType.Auto,) * len(sizes)
    try:
        with jax.sharding.use_abstract_mesh(AbstractMesh(sizes, axes, kinds)):
            return jax.make_jaxpr(fn)(*args)
    except Exception as error:
        shapes = ", ".join(
            f"{path} {x.dtype}{list(x.shape)}" for path, x in named_leaves(args[2])
        )
        raise ConfigError(
            f"planner: the loss cannot be traced with a microbatch of {shapes}: "
            f"{error}. Give the shapes of one microbatch, rows first."
        ) from error


def _functions(model: Model) -> list[Any]:
    """The loss; the loss and its gradient; what the loss leaves for its gradient."""

    def loss(params: Any, state: Any, microbatch: Any, key: Any) -> Any:
        out, left = call_loss(model.loss, params, state, microbatch, key)
        return out.loss_sum, (out, left)

    def kept(params: Any, *rest: Any) -> Any:
        return jax.tree.leaves(jax.vjp(lambda p: loss(p, *rest)[0], params)[1])

    return [loss, jax.value_and_grad(loss, has_aux=True), kept]


def _num_outputs(model: Model, args: tuple[Any, ...]) -> int:
    out = jax.eval_shape(lambda *a: call_loss(model.loss, *a)[0], *args)
    return len(jax.tree.leaves(out))


def _settle_results(
    closed: Any, outs: Sequence[Cut], params: Sequence[Leaf], ledger: Ledger
) -> None:
    """Adds up what a microbatch leaves: gradients cut as parameters, the rest whole."""
    num = len(outs) - len(params)
    wanted = [None] * num + [Cut(_inner(leaf.cuts)) for leaf in params]
    for var, cut, like in zip(closed.jaxpr.outvars, outs, wanted, strict=True):
        found = settle(var.aval, cut, ledger, like)
        for axis in sorted(found.axes - (like.axes if like else frozenset())):
            gather(var.aval, found, axis, ledger)


def _divisible(
    said: Sequence[LeafAxes], rules: AxisRules
) -> tuple[AxisRules, list[str]]:
    """Leaves names whole that would leave an axis no size but 1, saying so."""
    sizes: dict[str, int] = {}
    for leaf in said:
        for name, size in zip(leaf.names or (), leaf.shape, strict=False):
            if mesh_axis(name, rules) in GROUP_AXES:
                sizes[name or ""] = math.gcd(sizes.get(name or "", 0), size)
    rules, notes = dict(rules), []
    for axis in GROUP_AXES:
        names = [name for name in sizes if mesh_axis(name, rules) == axis]
        while len(names) > 1 and math.gcd(*(sizes[n] for n in names)) == 1:
            worst = max(
                names, key=lambda n: math.gcd(*(sizes[m] for m in names if m != n))
            )
            names.remove(worst)
            rules[worst] = None
            notes.append(
                f"{worst} = {sizes[worst]} stays whole along {axis}: nothing divides "
                f"it and {', '.join(f'{n} = {sizes[n]}' for n in names)}"
            )
    return rules, notes


def _leaves(part: Any, said: Sequence[LeafAxes], rules: AxisRules) -> tuple[Leaf, ...]:
    dims = sharded_dims(
        [x.path for x in said], [x.shape for x in said], [x.names for x in said], rules
    )
    found = []
    for array, names, dim in zip(jax.tree.leaves(part), said, dims, strict=True):
        cuts: list[str | None] = [None] * len(names.shape)
        for place, name in enumerate(names.names or ()):
            axis = mesh_axis(name, rules)
            if axis in GROUP_AXES and axis not in cuts:
                cuts[place] = axis
        if dim >= 0:
            cuts[dim] = "fsdp"
        found.append(
            Leaf(names.path, names.shape, array.dtype, names.names, tuple(cuts))
        )
    return tuple(found)


def _inner(cuts: Sequence[str | None]) -> tuple[str | None, ...]:
    """The cuts that are seen by a microbatch, for which parameters are gathered."""
    return tuple(axis if axis in GROUP_AXES else None for axis in cuts)


def _opt_leaves(tx: Any, params: Any, leaves: Sequence[Leaf]) -> tuple[Leaf, ...]:
    """What the optimizer keeps: moments are cut as their parameters are."""
    try:
        state = jax.eval_shape(tx.init, params)
    except Exception as error:
        raise ConfigError(
            f"planner: the optimizer's state cannot be traced: {error}"
        ) from error
    # By the paths of the optimizer's own tree, whose nodes may add names to them.
    known = {
        (path, leaf.shape): leaf
        for (path, _), leaf in zip(named_leaves(params), leaves, strict=True)
    }
    found = []
    for path, x in named_leaves(state):
        like = find_place(path, x.shape, known)
        names = like.names if like else None
        cuts = like.cuts if like else (None,) * len(x.shape)
        found.append(Leaf(path, tuple(x.shape), x.dtype, names, cuts))
    return tuple(found)
