"""How noisy the gradient is: the simple gradient noise scale.

Owns what of every microbatch's gradient is kept for it, and the estimate. Invariant:
the sums go the way of metrics, so their bits are the same on every mesh. It changes no
gradient, and nothing of it is computed unless it is asked for.

References:
    McCandlish et al., An Empirical Model of Large-Batch Training (2018), appendix A.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from shardkit.model import LossOutput
from shardkit.rounding import unfused

__all__ = ["METRICS", "structure_with_squares", "take_noise", "with_squares"]

METRICS = ("noise_scale", "noise_trace", "grad_square")
_SQUARES, _COUNT = "shardkit/squares", "shardkit/count"


def with_squares(out: LossOutput, grads: list[Array], scale: Array) -> LossOutput:
    """Adds to the sums of a microbatch |G|² / weight, and 1 if it has a weight.

    Args:
        out: What the microbatch returned.
        grads: G, the gradient of its `loss_sum`, times `scale`.
        scale: Of the loss.
    """
    # The factor comes first: the square of a scaled gradient may be too large.
    inverse = 1 / scale
    squares = [jnp.sum(jnp.square(g.astype(jnp.float32) * inverse)) for g in grads]
    counts = out.weight > 0
    weight = jnp.where(counts, out.weight, 1)
    square = jnp.where(counts, jnp.sum(jnp.stack(squares)) / weight, 0)
    found = {_SQUARES: square, _COUNT: counts.astype(jnp.float32)}
    return dataclasses.replace(out, metrics=out.metrics | found)


def structure_with_squares(structure: Any) -> Any:
    """The tree structure of what `with_squares` makes of such sums."""
    out = structure.unflatten([jnp.float32(0)] * structure.num_leaves)
    return jax.tree.structure(with_squares(out, [jnp.float32(0)], jnp.float32(1)))


def take_noise(
    out: LossOutput, norm: Array, zero: Array
) -> tuple[LossOutput, dict[str, Array]]:
    """Estimates the noise from what `with_squares` has added up.

    Of n microbatches with weights wᵢ, gradients gᵢ of their means and W the sum of all
    wᵢ, the expectation of Σ wᵢ |gᵢ|² is W |G|² + n tr(Σ), and that of W |g|², for the
    gradient g of them all, is W |G|² + tr(Σ). Two equations: both are estimated without
    bias. Their quotient is not, and single steps vary widely, so whoever wants one
    number should average `noise_trace` and `grad_square` over steps and then divide.

    Args:
        out: Sums over the global batch.
        norm: |g|.
        zero: An int32 zero unknown to the compiler.

    Returns:
        The sums as without it, and `noise_trace` = tr(Σ), the variance of the gradient
        of one unit of weight (a token, where a loss counts tokens), `grad_square` =
        |G|², and `noise_scale` = tr(Σ) / |G|², in units of weight: far smaller batches
        waste steps, far larger ones examples. It is negative where the estimate of |G|²
        is, as it can be if noise is nearly all that there is; 0 where that is 0.
    """
    metrics = dict(out.metrics)
    squares, count = metrics.pop(_SQUARES), metrics.pop(_COUNT)
    square = unfused(norm * norm, zero)
    trace = (squares - unfused(square * out.weight, zero)) / (count - 1)
    true = square - unfused(trace / out.weight, zero)
    scale = jnp.where(true == 0, 0, trace / true)
    found = zip(METRICS, (scale, trace, true), strict=True)
    return dataclasses.replace(out, metrics=metrics), dict(found)
