"""A training run, apart from any device: what is computed, never where.

Owns the logical run: its first state, its update and what its losses return.
Invariant: nothing here depends on a mesh. The update is written for whole arrays;
`state_layout` decides how they are cut, and `placement` carries it out on pieces.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import PRNGKeyArray

from shardkit.annotations import strip
from shardkit.errors import ConfigError
from shardkit.exact_sum import INITIAL_EXPONENT, Accumulator
from shardkit.keys import stream
from shardkit.loss_structure import loss_structure
from shardkit.model import LossOutput
from shardkit.model_state import Combiner, split_variables
from shardkit.noise import structure_with_squares, take_noise
from shardkit.ramp import BatchRamp, as_ramp
from shardkit.state import TrainState

__all__ = ["LossScale", "Recipe", "update_arguments"]

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
        num_microbatches: Into how many equal parts the global batch is cut; a ramp says
            so for every step, and a part has as many rows in all of them.
        seed: The seed of everything random.
        eval_loss: The loss for evaluation; None for `loss`.
        exact: Whether the device count may leave no trace.
        ema: Decay of a moving average of the parameters, or None.
        loss_scale: How the loss is scaled, or None.
        combine: Glob over paths of the model's state → one of `model_state.COMBINE`.
        noise_scale: Whether the gradient noise scale is measured.
        offload: Whether the optimizer's state is in host memory between updates.
    """

    init: Callable[[Any], Any]
    loss: Callable[..., Any]
    tx: optax.GradientTransformation
    num_microbatches: int | BatchRamp
    seed: int = 0
    eval_loss: Callable[..., Any] | None = None
    exact: bool = True
    ema: float | None = None
    loss_scale: LossScale | None = None
    combine: Mapping[str, str] = dataclasses.field(default_factory=dict)
    noise_scale: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        counts = self.ramp.counts
        if self.exact:
            # Refuses what its grid has no room for.
            Accumulator(max(counts))
        if self.noise_scale and min(counts) < 2:
            raise ConfigError(
                "noise_scale: expected at least 2 microbatches, whose gradients are "
                f"compared, found {self.ramp.record}. Use more, or leave it off."
            )

    @property
    def ramp(self) -> BatchRamp:
        """How many microbatches each step has."""
        return as_ramp(self.num_microbatches, "num_microbatches")

    @property
    def num_eval_microbatches(self) -> int:
        """Into how many parts a batch to evaluate on is cut: as many as that of step 0.

        Always the same, so that the same parameters have the same loss at any step.
        """
        return self.ramp(0)

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

    def output_structure(
        self, params: Any, model_state: Any, batch: Any, eval_batch: Any
    ) -> tuple[Any, Any, Combiner]:
        """Returns the structure of what `loss` and `eval_loss` return.

        Args:
            params: Abstract parameters.
            model_state: The abstract state of the model, or None.
            batch: The abstract global batch of step 0.
            eval_batch: Another, to evaluate on.

        Returns:
            The structure of the sums of each, and how the states that microbatches
            leave at step 0 become one.

        Raises:
            PartitionError: If a loss returns anything but scalars, a metric whose name
                is taken, or another state than it was given.
            InexactError: If a loss cannot keep its bits.
        """
        variables = params, model_state
        train, is_kept = self._examine("loss", self.loss, variables, batch, trains=True)
        combiner = Combiner.plan(
            model_state, is_kept, self.combine, self.ramp(0), self.exact
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
            num_microbatches=self.ramp(0),
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
