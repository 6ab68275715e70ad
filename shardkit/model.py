"""What a model is to shardkit: two functions.

Owns the small types that user code returns. It runs nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from shardkit.errors import PartitionError

__all__ = ["LossOutput", "Model", "call_loss"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossOutput:
    """The loss of one microbatch as a weighted sum.

    The loss of a step is Σ loss_sum / Σ weight over the global batch, its gradient
    Σ grad(loss_sum) / Σ weight, and every metric Σ metric / Σ weight.

    Attributes:
        loss_sum: Sum of the losses of what is counted (tokens, say); a scalar.
        weight: How much is counted; a scalar. A scalar loss has weight 1.
        metrics: Named scalars, sums like `loss_sum`.
        state: What the model carries on, if `init` returned `Variables`; else None.
    """

    loss_sum: Array
    weight: Array
    metrics: dict[str, Array] = dataclasses.field(default_factory=dict)
    state: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What a model factory, such as `models.gpt:build`, returns.

    Attributes:
        init: `key → params`, annotated with logical axes; or `key → Variables`.
        loss: `(params, microbatch, key) → scalar or LossOutput`, ordinary
            single-device code; for `Variables` `(params, state, microbatch, key) →
            LossOutput`, with the next state in it.
        eval_loss: Like `loss`, without dropout; None to evaluate with `loss`.
        axis_rules: Logical axis → mesh axis, unless the user says otherwise.
        combine: Glob over paths of the state → how what microbatches leave there
            becomes one: see `Trainer`.
        sample: `(params, prompt, key, *, num_tokens, temperature, top_k) → tokens`,
            which come after those of the prompt; None for a model that makes none.
    """

    init: Callable[[Any], Any]
    loss: Callable[..., Any]
    eval_loss: Callable[..., Any] | None = None
    axis_rules: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    combine: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sample: Callable[..., Any] | None = None

    def keys(self) -> tuple[str, ...]:
        """The arguments of `Trainer` that a model has: `Trainer(**model, …)`."""
        return "init", "loss", "eval_loss", "axis_rules", "combine"

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)


def call_loss(
    loss: Callable[..., Any], params: Any, state: Any, microbatch: Any, key: Any
) -> tuple[LossOutput, Any]:
    """Computes a loss, of a model with a state or without.

    Returns:
        Float32 sums without a state, and the state that it leaves.

    Raises:
        PartitionError: If it returns neither a scalar nor a `LossOutput`.
    """
    if state is None:
        out = _as_loss_output(loss(params, microbatch, key))
    else:
        out = _as_loss_output(loss(params, state, microbatch, key))
    return dataclasses.replace(out, state=None), out.state


def _as_loss_output(value: Any) -> LossOutput:
    """Turns what a loss returned into float32 sums; its state stays as it is.

    Raises:
        PartitionError: If it is neither a scalar nor a `LossOutput`.
    """
    if not isinstance(value, LossOutput):
        if not jax.tree_util.all_leaves([value]):
            raise PartitionError(
                f"a loss must return a scalar or sk.LossOutput(loss_sum, weight, "
                f"metrics), found a {type(value).__name__}. Return what else is "
                "measured as metrics."
            )
        value = LossOutput(value, jnp.float32(1))
    sums = dataclasses.replace(value, state=None)
    sums = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), sums)
    return dataclasses.replace(sums, state=value.state)
