"""A training run, apart from any device: what is computed, never where.

Owns the logical run: its first state, its update, and which dim of every leaf of its
state is cut. Invariant: nothing here depends on a mesh. The update is written for
whole arrays; `placement` carries it out on pieces.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import PRNGKeyArray

from shardkit.errors import ConfigError, InexactError, PartitionError
from shardkit.exact_sum import INITIAL_EXPONENT, Accumulator
from shardkit.inexact import check_operations
from shardkit.keys import stream
from shardkit.localize import Localizer
from shardkit.logical_axes import AxisRules, check_rules, leaf_axes, sharded_dims, strip
from shardkit.model import call_loss
from shardkit.model_state import Combiner, check_state, split_variables
from shardkit.shards import Shards
from shardkit.state import TrainState, find_place, make_layout, with_axes
from shardkit.tree import format_table, map_named, named_leaves
from shardkit.updates import changed_leaves, describe, refuse

__all__ = ["LossScale", "Recipe", "update_arguments"]

_MAX_ROUNDS = 8
# Zero gradients are finite at any scale, which must not grow until nothing else is.
_MAX_SCALE = 2.0**60
# Metrics that every step has.
_TAKEN = {"loss", "weight", "grad_norm", "gradient_passes"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossScale:
    """Scales the loss so that half-precision gradients do not vanish.

    A step whose gradient is not finite is skipped and the scale falls; after
    `growth_interval` good steps it grows.

    Attributes:
        initial: The first scale.
        factor: By how much it falls and grows; a power of two keeps bits.
        growth_interval: Good steps before it grows; None keeps it fixed.

    References:
        Micikevicius et al., Mixed Precision Training (ICLR 2018).
    """

    initial: float = 2.0**15
    factor: float = 2.0
    growth_interval: int | None = 2000

    def first(self) -> tuple[Array, Array]:
        """The scale, and zero good steps."""
        return jnp.float32(self.initial), jnp.int32(0)

    def next(self, current: tuple[Array, Array], finite: Array) -> tuple[Array, Array]:
        """The scale after a step whose gradient was `finite`."""
        if self.growth_interval is None:
            return current
        scale, good = current
        grows = good + 1 >= self.growth_interval
        grown = jnp.where(grows, jnp.minimum(scale * self.factor, _MAX_SCALE), scale)
        good = jnp.where(grows, 0, good + 1)
        fallen = jnp.maximum(scale / self.factor, 1)
        return jnp.where(finite, grown, fallen), jnp.where(finite, good, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run computes.

    Attributes:
        init: `key → params` or `key → Variables`, annotated or not.
        loss: `(params, microbatch, key) → scalar or LossOutput`; with the model's state
            after the parameters if it has one.
        tx: Any optax transformation.
        num_microbatches: Into how many equal parts the global batch is cut.
        seed: The seed of everything random.
        eval_loss: The loss for evaluation; None for `loss`.
        exact: Whether the device count may leave no trace.
        ema: Decay of a moving average of the parameters, or None.
        loss_scale: How the loss is scaled, or None.
        combine: Glob over paths of the model's state → one of `model_state.COMBINE`.
    """

    init: Callable[[Any], Any]
    loss: Callable[..., Any]
    tx: optax.GradientTransformation
    num_microbatches: int
    seed: int = 0
    eval_loss: Callable[..., Any] | None = None
    exact: bool = True
    ema: float | None = None
    loss_scale: LossScale | None = None
    combine: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.exact:
            # Refuses what its grid has no room for.
            Accumulator(self.num_microbatches)

    def first_state(self, root: PRNGKeyArray) -> TrainState:
        """Computes the state before step 0, whole."""
        params, model_state = split_variables(strip(self.init(stream(root, "init"))))
        exponent = jnp.int32(INITIAL_EXPONENT)
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=self.tx.init(params),
            # In bfloat16 a decay near 1 would round to 1.
            ema=jax.tree.map(lambda p: p.astype(jnp.float32), params)
            if self.ema is not None
            else None,
            grad_exponent=jax.tree.map(lambda _: exponent, params)
            if self.exact
            else None,
            loss_scale=self.loss_scale.first() if self.loss_scale else None,
            model_state=model_state,
        )

    def update(
        self, state: TrainState, grads: Any, grad_exponent: Any, model_state: Any
    ) -> tuple[TrainState, dict[str, Array]]:
        """Applies one gradient; written for whole arrays.

        Returns:
            The next state, and the norm of the gradient.
        """
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        ema = state.ema
        if self.ema is not None:
            decay = self.ema
            ema = jax.tree.map(
                lambda e, p: decay * e + (1 - decay) * p.astype(e.dtype), ema, params
            )
        norm = optax.tree.norm(grads)
        new = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=ema,
            grad_exponent=grad_exponent,
            loss_scale=state.loss_scale,
            model_state=model_state,
        )
        if self.loss_scale is not None:
            finite = jnp.isfinite(norm)
            new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
            scale = self.loss_scale.next(state.loss_scale, finite)
            new = dataclasses.replace(
                new, step=state.step + 1, loss_scale=scale, grad_exponent=grad_exponent
            )
        return new, {"grad_norm": norm}

    def layout(
        self,
        axis_rules: AxisRules,
        *,
        path_rules: Mapping[str, tuple[str | None, ...]] | None = None,
        strict: bool = False,
    ) -> tuple[Any, list[str]]:
        """Decides which dim of every leaf of the state is cut, as `examine` does.

        Returns:
            A `TrainState` of `LeafLayout`, and warnings.
        """
        return self.examine(axis_rules, path_rules=path_rules, strict=strict)[:2]

    def examine(
        self,
        axis_rules: AxisRules,
        *,
        path_rules: Mapping[str, tuple[str | None, ...]] | None = None,
        strict: bool = False,
    ) -> tuple[Any, list[str], Localizer]:
        """Decides which dim of every leaf of the state is cut.

        Parameters follow their annotations. The optimizer's state follows the
        update itself: a leaf is cut where the update leaves its new value cut, so
        moments follow their parameters and factored moments their dims.

        Returns:
            A `TrainState` of `LeafLayout`, warnings, and what an update was traced by.

        Raises:
            PartitionError: If the annotations or rules do not fit.
            ConfigError: If the optimizer needs more than gradients, state and params.
            InexactError: If the optimizer cannot be exact.
        """
        key = jax.eval_shape(lambda: jax.random.key(0))
        annotated = jax.eval_shape(self.init, key)
        names = [leaf_axes(part, path_rules) for part in split_variables(annotated)]
        leaves = itertools.chain.from_iterable(names)
        used = {name for leaf in leaves if leaf for name in leaf if name}
        warnings = check_rules(axis_rules, used, strict=strict)
        traced, abstract = jax.make_jaxpr(self.first_state, return_shape=True)(key)
        if self.exact:
            check_operations(traced, "init")
        _check_dtypes(named_leaves(abstract.params))
        known, cuts, dims = {}, {}, []
        for part, found in zip(
            (abstract.params, abstract.model_state), names, strict=True
        ):
            leaves = [(path, leaf.shape) for path, leaf in named_leaves(part)]
            known |= dict(zip(leaves, found, strict=True))
            paths, shapes = [path for path, _ in leaves], [shape for _, shape in leaves]
            cut = sharded_dims(paths, shapes, found, axis_rules, strict=strict)
            cuts |= dict(zip(leaves, cut, strict=True))
            dims.append(jax.tree.structure(part).unflatten(cut))
        param_dims, state_dims = dims
        dims = dataclasses.replace(
            jax.tree.map(lambda _: -1, abstract),
            params=param_dims,
            # What an update leaves as it was would stay whole, if it began so.
            opt_state=map_named(
                lambda path, x: (
                    -1 if (d := find_place(path, x.shape, cuts)) is None else d
                ),
                abstract.opt_state,
            ),
            ema=None if self.ema is None else param_dims,
            model_state=state_dims,
        )
        dims, localizer = self._settle(abstract, dims)
        return with_axes(make_layout(abstract, dims), known), warnings, localizer

    def _settle(
        self, abstract: TrainState, dims: TrainState
    ) -> tuple[TrainState, Localizer]:
        """Cuts the optimizer's state as its own update does, until nothing changes."""
        # Any cut is right, as results are brought to it: a state that never settles,
        # such as one that is transposed at every step, only moves more.
        for _ in range(_MAX_ROUNDS):
            found, localizer = self._trace_update(abstract, dims)
            if jax.tree.leaves(found) == jax.tree.leaves(dims.opt_state):
                break
            dims = dataclasses.replace(dims, opt_state=found)
        return dims, localizer  # pyright: ignore[reportPossiblyUnbound]

    def _trace_update(self, abstract: TrainState, dims: Any) -> tuple[Any, Localizer]:
        """Returns how one update leaves the optimizer's state cut, and its tracer."""
        found: list[Any] = []
        shapes = update_arguments(abstract, lambda x: x)
        in_dims = update_arguments(dims, lambda _: -1)
        localizer = Localizer(Shards(exact=self.exact))

        def trace(*args: Any) -> Any:
            (new, _), (new_dims, _) = localizer(self.update, args, in_dims, shapes)
            found.append(new_dims.opt_state)
            return new

        try:
            new = jax.eval_shape(trace, *shapes)
        except Exception as error:
            refuse(self.tx, abstract.params, error)
        changed = changed_leaves("params", abstract.params, new.params)
        changed += changed_leaves("state", abstract.opt_state, new.opt_state)
        if changed:
            raise ConfigError(describe(changed))
        return found[0], localizer

    def output_structure(
        self, params: Any, model_state: Any, batch: Any, eval_batch: Any
    ) -> tuple[Any, Any, Combiner]:
        """Returns the structure of what `loss` and `eval_loss` return.

        Args:
            params: Abstract parameters.
            model_state: The abstract state of the model, or None.
            batch: An abstract global batch.
            eval_batch: Another, to evaluate on.

        Returns:
            The structure of the sums of each, and how the states that microbatches
            leave become one.

        Raises:
            PartitionError: If a loss returns anything but scalars, a metric whose name
                is taken, or another state than it was given.
            InexactError: If a loss cannot keep its bits.
        """
        variables = params, model_state
        train, is_kept = self._loss_structure("loss", self.loss, variables, batch)
        combiner = Combiner.plan(
            model_state, is_kept, self.combine, self.num_microbatches, self.exact
        )
        if self.eval_loss is None and eval_batch is batch:
            return train, train, combiner
        name = "loss" if self.eval_loss is None else "eval_loss"
        loss = self.eval_loss or self.loss
        return (
            train,
            self._loss_structure(name, loss, variables, eval_batch)[0],
            combiner,
        )

    def _loss_structure(
        self, name: str, loss: Callable[..., Any], variables: Any, batch: Any
    ) -> tuple[Any, list[bool]]:
        """Returns the structure of the sums, and which leaves of the state are kept."""
        microbatch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (x.shape[0] // self.num_microbatches, *x.shape[1:]),
                jax.dtypes.canonicalize_dtype(x.dtype),
            ),
            batch,
        )
        args = *variables, microbatch, jax.eval_shape(lambda: jax.random.key(0))
        output = functools.partial(call_loss, loss)
        try:
            traced, (out, left) = jax.make_jaxpr(output, return_shape=True)(*args)
        except NameError as error:
            if "axis name" not in str(error):
                raise
            raise InexactError(
                f"{name} asks for a mesh axis ({error}), but sees one microbatch and "
                "no mesh: a sum over devices is taken of what it returns, and a key or "
                "a value that depends on the device could not stay the same."
            ) from error
        bad = [(path, str(x.shape)) for path, x in named_leaves(out) if x.shape]
        if bad:
            raise PartitionError(
                f"{name} must return scalars (a mean, or sums in an sk.LossOutput), "
                "found\n" + format_table(bad)
            )
        taken = _TAKEN & out.metrics.keys()
        if taken:
            raise PartitionError(
                f"{name}: the metrics {sorted(taken)} exist already; rename yours"
            )
        if name == "loss":
            check_state(variables[1], left)
        if self.exact:
            check_operations(traced, name)
        if self.exact and name == "loss":
            # The gradient has rules of its own, which may do other things.
            gradient = jax.grad(lambda *args: output(*args)[0].loss_sum)
            check_operations(jax.make_jaxpr(gradient)(*args), name)
        # What an evaluation leaves is of no use.
        given = traced.jaxpr.invars[len(jax.tree.leaves(variables[0])) :]
        found = traced.jaxpr.outvars[len(jax.tree.leaves(out)) :]
        is_kept = [a is b for a, b in zip(given, found, strict=False)]
        return jax.tree.structure(out), is_kept[: len(jax.tree.leaves(left))]


def update_arguments(state: Any, of_state: Callable[[Any], Any]) -> tuple[Any, ...]:
    """The arguments of `Recipe.update`, of a state or a tree like one.

    Args:
        state: What stands for the state.
        of_state: What stands for a leaf of the model's next state, which is whole.
    """
    model_state = jax.tree.map(of_state, state.model_state)
    return state, state.params, state.grad_exponent, model_state


def _check_dtypes(leaves: list[tuple[str, Any]]) -> None:
    """Refuses parameters that no exact gradient exists for."""
    bad = [
        (path, str(leaf.dtype))
        for path, leaf in leaves
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype.itemsize > 4
    ]
    if bad:
        raise PartitionError(
            "params must be floats of at most 32 bits; found\n"
            + format_table(bad)
            + "\nKeep counters and keys out of params, and cast float64 to float32."
        )
