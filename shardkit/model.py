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

__all__ = ["LossOutput", "Model", "as_loss_output"]


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
    """

    loss_sum: Array
    weight: Array
    metrics: dict[str, Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What a model factory, such as `models.gpt:build`, returns.

    Attributes:
        init: `key → params`, annotated with logical axes.
        loss: `(params, microbatch, key) → scalar or LossOutput`, ordinary
            single-device code.
        eval_loss: Like `loss`, without dropout; None to evaluate with `loss`.
        axis_rules: Logical axis → mesh axis, unless the user says otherwise.
    """

    init: Callable[[Any], Any]
    loss: Callable[[Any, Any, Any], Any]
    eval_loss: Callable[[Any, Any, Any], Any] | None = None
    axis_rules: Mapping[str, str | None] = dataclasses.field(default_factory=dict)


def as_loss_output(value: Any) -> LossOutput:
    """Turns what a loss returned into float32 sums.

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
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), value)
