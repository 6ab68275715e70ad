"""A training run, apart from any device: what is computed, never where.

Owns the logical run: its first state, its update, and which dim of every leaf of its
state is cut. Invariant: nothing here depends on a mesh. The update is written for
whole arrays; `placement` carries it out on pieces.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import PRNGKeyArray

from shardkit.errors import InexactError, PartitionError
from shardkit.exact_sum import INITIAL_EXPONENT, Accumulator
from shardkit.inexact import check_operations
from shardkit.keys import stream
from shardkit.layout import LeafLayout
from shardkit.localize import Localizer
from shardkit.logical_axes import AxisRules, check_rules, leaf_axes, sharded_dims, strip
from shardkit.model import LossOutput, as_loss_output
from shardkit.shards import Shards
from shardkit.state import TrainState, make_layout
from shardkit.tree import format_table, named_leaves

__all__ = ["LossScale", "Recipe"]

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
        init: `key → params`, annotated or not.
        loss: `(params, microbatch, key) → scalar or LossOutput`.
        tx: Any optax transformation.
        num_microbatches: Into how many equal parts the global batch is cut.
        seed: The seed of everything random.
        eval_loss: The loss for evaluation; None for `loss`.
        exact: Whether the device count may leave no trace.
        ema: Decay of a moving average of the parameters, or None.
        loss_scale: How the loss is scaled, or None.
    """

    init: Callable[[Any], Any]
    loss: Callable[[Any, Any, Any], Any]
    tx: optax.GradientTransformation
    num_microbatches: int
    seed: int = 0
    eval_loss: Callable[[Any, Any, Any], Any] | None = None
    exact: bool = True
    ema: float | None = None
    loss_scale: LossScale | None = None

    def __post_init__(self) -> None:
        if self.exact:
            # Refuses what its grid has no room for.
            Accumulator(self.num_microbatches)

    def first_state(self, root: PRNGKeyArray) -> TrainState:
        """Computes the state before step 0, whole."""
        params = strip(self.init(stream(root, "init")))
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
        )

    def update(
        self, state: TrainState, grads: Any, grad_exponent: Any
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
        names = leaf_axes(annotated, path_rules)
        used = {name for leaf in names if leaf for name in leaf if name}
        warnings = check_rules(axis_rules, used, strict=strict)
        traced, abstract = jax.make_jaxpr(self.first_state, return_shape=True)(key)
        if self.exact:
            check_operations(traced, "init")
        leaves = named_leaves(abstract.params)
        _check_dtypes(leaves)
        param_dims = jax.tree.structure(abstract.params).unflatten(
            sharded_dims(
                [path for path, _ in leaves],
                [leaf.shape for _, leaf in leaves],
                names,
                axis_rules,
                strict=strict,
            )
        )
        dims = jax.tree.map(lambda _: -1, abstract)
        dims = dataclasses.replace(
            dims, params=param_dims, ema=None if self.ema is None else param_dims
        )
        layout = make_layout(abstract, self._settle(abstract, dims))
        known = [(path, leaf.shape) for path, leaf in leaves]
        return _with_axes(layout, dict(zip(known, names, strict=True))), warnings

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
        shapes = (abstract, abstract.params, abstract.grad_exponent)
        in_dims = (dims, dims.params, dims.grad_exponent)

        def trace(*args: Any) -> Any:
            nonlocal found
            localizer = Localizer(Shards(exact=self.exact))
            out, (new_dims, _) = localizer(self.update, args, in_dims, shapes)
            found = new_dims.opt_state
            return out

        jax.eval_shape(trace, *shapes)
        return found

    def output_structure(
        self, params: Any, batch: Any, eval_batch: Any
    ) -> tuple[Any, Any]:
        """Returns the structure of what `loss` and `eval_loss` return.

        Args:
            params: Abstract parameters.
            batch: An abstract global batch.
            eval_batch: Another, to evaluate on.

        Raises:
            PartitionError: If a loss returns anything but scalars, or a metric whose
                name is taken.
            InexactError: If a loss cannot keep its bits.
        """
        train = self._loss_structure("loss", self.loss, params, batch)
        if self.eval_loss is None and eval_batch is batch:
            return train, train
        name = "loss" if self.eval_loss is None else "eval_loss"
        return train, self._loss_structure(
            name, self.eval_loss or self.loss, params, eval_batch
        )

    def _loss_structure(
        self, name: str, loss: Callable[..., Any], params: Any, batch: Any
    ) -> Any:
        microbatch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (x.shape[0] // self.num_microbatches, *x.shape[1:]),
                jax.dtypes.canonicalize_dtype(x.dtype),
            ),
            batch,
        )
        args = params, microbatch, jax.eval_shape(lambda: jax.random.key(0))

        def output(*args: Any) -> LossOutput:
            return as_loss_output(loss(*args))

        try:
            traced, out = jax.make_jaxpr(output, return_shape=True)(*args)
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
        if self.exact:
            check_operations(traced, name)
        if self.exact and name == "loss":
            # The gradient has rules of its own, which may do other things.
            gradient = jax.grad(lambda *args: output(*args).loss_sum)
            check_operations(jax.make_jaxpr(gradient)(*args), name)
        return jax.tree.structure(out)


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


def _with_axes(
    layout: TrainState,
    names: Mapping[tuple[str, tuple[int, ...]], tuple[str | None, ...] | None],
) -> TrainState:
    """Notes the logical axes of parameters, and of what has a parameter's place."""

    def find(leaf: LeafLayout) -> tuple[str | None, ...] | None:
        parts = leaf.path.split("/")
        tails = ("/".join(parts[i:]) for i in range(1, len(parts)))
        return next((x for tail in tails if (x := names.get((tail, leaf.shape)))), None)

    return jax.tree.map(lambda leaf: dataclasses.replace(leaf, axes=find(leaf)), layout)
