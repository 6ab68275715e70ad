"""A training run, apart from any device: what is computed, never where.

Owns the logical run: its first state, its update, and which dim of every leaf of its
state is cut. Invariant: nothing here depends on a mesh. The update is written for
whole arrays; `placement` carries it out on pieces.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import PRNGKeyArray

from shardkit.annotations import read_axes, strip, unused_rules
from shardkit.errors import ConfigError, PartitionError
from shardkit.exact_sum import INITIAL_EXPONENT, Accumulator
from shardkit.inexact import check_operations
from shardkit.keys import is_key_dtype, stream
from shardkit.layout import LeafLayout
from shardkit.localize import Localizer
from shardkit.logical_axes import AxisRules, check_rules, sharded_dims
from shardkit.loss_structure import loss_structure
from shardkit.model import LossOutput
from shardkit.model_state import (
    Combiner,
    split_variables,
    unused_combine,
)
from shardkit.noise import structure_with_squares, take_noise
from shardkit.shards import Shards
from shardkit.state import TrainState, make_layout
from shardkit.tree import format_table, named_leaves

__all__ = ["LossScale", "Recipe", "update_arguments"]

_MAX_ROUNDS = 8
# Zero gradients are finite at any scale, which must not grow until nothing else is.
_MAX_SCALE = 2.0**60


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
        noise_scale: Whether the gradient noise scale is measured.
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
    noise_scale: bool = False

    def __post_init__(self) -> None:
        if self.exact:
            # Refuses what its grid has no room for.
            Accumulator(self.num_microbatches)
        if self.noise_scale and self.num_microbatches < 2:
            raise ConfigError(
                "noise_scale: expected at least 2 microbatches, whose gradients are "
                f"compared, found {self.num_microbatches}. Use more, or leave it off."
            )

    def first_state(self, root: PRNGKeyArray) -> TrainState:
        """Computes the state before step 0, whole."""
        params, model_state = split_variables(strip(self.init(stream(root, "init"))))
        exponent = jnp.int32(INITIAL_EXPONENT)
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=self.tx.init(params),
            # In bfloat16 a decay near 1 would round to 1.
            ema=jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
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

    def metrics(self, out: LossOutput, norm: Array, zero: Array) -> dict[str, Array]:
        """What is told of a step.

        Args:
            out: The sums over the global batch.
            norm: Of the gradient.
            zero: An int32 zero unknown to the compiler.
        """
        found: dict[str, Array] = {}
        if self.noise_scale:
            out, found = take_noise(out, norm, zero)
        found |= {name: x / out.weight for name, x in out.metrics.items()}
        return found | {"loss": out.loss_sum / out.weight, "weight": out.weight}

    def layout(
        self,
        axis_rules: AxisRules,
        *,
        path_rules: Mapping[Any, Any] | None = None,
        strict: bool = False,
    ) -> tuple[Any, list[str]]:
        """Decides which dim of every leaf of the state is cut.

        Parameters follow their annotations. The optimizer's state follows the
        update itself: a leaf is cut where the update leaves its new value cut, so
        moments follow their parameters and factored moments their dims.

        Returns:
            A `TrainState` of `LeafLayout`, and warnings.

        Raises:
            PartitionError: If the annotations or rules do not fit.
            InexactError: If the optimizer cannot be exact.
        """
        key = jax.eval_shape(lambda: jax.random.key(0))
        annotated = jax.eval_shape(self.init, key)
        said = [read_axes(part, path_rules) for part in split_variables(annotated)]
        names = [[leaf.names for leaf in part] for part in said]
        leaves = [*itertools.chain.from_iterable(said)]
        used = {name for leaf in leaves for name in leaf.names or () if name}
        warnings = check_rules(axis_rules, used, strict=strict)
        unused = unused_rules(leaves, path_rules)
        unused += unused_combine(split_variables(annotated)[1], self.combine)
        if strict and unused:
            raise PartitionError("\n".join(unused) + "\nRemove the rule, or strict.")
        warnings += unused
        traced, abstract = jax.make_jaxpr(self.first_state, return_shape=True)(key)
        if self.exact:
            check_operations(traced, "init")
        _check_dtypes(named_leaves(abstract.params))
        known, dims = [], []
        parts = abstract.params, abstract.model_state
        for part, found in zip(parts, names, strict=True):
            leaves = [(path, leaf.shape) for path, leaf in named_leaves(part)]
            known.append(dict(zip(leaves, found, strict=True)))
            paths, shapes = [path for path, _ in leaves], [shape for _, shape in leaves]
            cut = sharded_dims(paths, shapes, found, axis_rules, strict=strict)
            # A key's words stay together.
            cut = [
                -1 if is_key_dtype(leaf.dtype) else dim
                for dim, leaf in zip(cut, jax.tree.leaves(part), strict=True)
            ]
            dims.append(jax.tree.structure(part).unflatten(cut))
        param_dims, state_dims = dims
        dims = dataclasses.replace(
            jax.tree.map(lambda _: -1, abstract),
            params=param_dims,
            ema=None if self.ema is None else param_dims,
            model_state=state_dims,
        )
        layout = make_layout(abstract, self._settle(abstract, dims))
        return _with_axes(layout, *known), warnings

    def _settle(self, abstract: TrainState, dims: TrainState) -> TrainState:
        """Cuts the optimizer's state as its own update does, until nothing changes."""
        # Any cut is right, as results are brought to it: a state that never settles,
        # such as one that is transposed at every step, only moves more.
        for _ in range(_MAX_ROUNDS):
            found = self._dims_after_update(abstract, dims)
            if jax.tree.leaves(found) == jax.tree.leaves(dims.opt_state):
                break
            dims = dataclasses.replace(dims, opt_state=found)
        return dims

    def _dims_after_update(self, abstract: TrainState, dims: TrainState) -> Any:
        """Returns how one update leaves the optimizer's state cut."""
        found: Any = None
        shapes = update_arguments(abstract, lambda x: x)
        in_dims = update_arguments(dims, lambda _: -1)

        def trace(*args: Any) -> Any:
            nonlocal found
            localizer = Localizer(Shards(exact=self.exact))
            out, (new_dims, _) = localizer(self.update, args, in_dims, shapes)
            found = new_dims.opt_state
            return out

        jax.eval_shape(trace, *shapes)
        return found

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
        train, is_kept = self._examine("loss", self.loss, variables, batch, trains=True)
        combiner = Combiner.plan(
            model_state, is_kept, self.combine, self.num_microbatches, self.exact
        )
        evaluation = train
        if self.eval_loss is not None or eval_batch is not batch:
            evaluation = self.eval_structure(params, model_state, eval_batch)
        if self.noise_scale:
            train = structure_with_squares(train)
        return train, evaluation, combiner

    def eval_structure(self, params: Any, model_state: Any, batch: Any) -> Any:
        """Returns what an evaluation on such a batch does; see `output_structure`."""
        name = "loss" if self.eval_loss is None else "eval_loss"
        loss, variables = self.eval_loss or self.loss, (params, model_state)
        return self._examine(name, loss, variables, batch, trains=False)[0]

    def _examine(self, *args: Any, trains: bool) -> tuple[Any, list[bool]]:
        return loss_structure(
            *args,
            num_microbatches=self.num_microbatches,
            exact=self.exact,
            trains=trains,
        )


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


_Known = Mapping[tuple[str, tuple[int, ...]], tuple[str | None, ...] | None]


def _with_axes(layout: TrainState, params: _Known, model_state: _Known) -> TrainState:
    """Notes the logical axes of parameters, and of what has a parameter's place.

    Args:
        layout: Of the state.
        params: Path and shape → axes.
        model_state: Likewise.
    """

    def find(leaf: LeafLayout) -> tuple[str | None, ...] | None:
        parts = leaf.path.split("/")
        if parts[0] == "model_state":
            return model_state.get(("/".join(parts[1:]), leaf.shape))
        tails = ("/".join(parts[i:]) for i in range(1, len(parts)))
        found = (params.get((tail, leaf.shape)) for tail in tails)
        return next((names for names in found if names), None)

    return jax.tree.map(lambda leaf: dataclasses.replace(leaf, axes=find(leaf)), layout)
