"""Clipping by what gradients have been like, not by a fixed norm.

Owns an optax transformation and its state, three scalars. It is ordinary optax code for
whole arrays, which a `Trainer` carries out on shards: the norm is an exact sum there.

References:
    Kumar et al., ZClip: Adaptive Spike Mitigation for LLM Pre-Training (2025).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from shardkit.errors import ConfigError

__all__ = ["SpikeState", "clip_spikes"]

_EPSILON = 1e-6


class SpikeState(NamedTuple):
    """What is known of the norms so far.

    Attributes:
        count: How many norms were seen; int32 scalar.
        mean: Of norms as they were after clipping; float32 scalar.
        variance: Of the same; float32 scalar.
    """

    count: Array
    mean: Array
    variance: Array


def clip_spikes(
    z_score: float = 2.5, *, decay: float = 0.97, warmup_steps: int = 25
) -> optax.GradientTransformation:
    """Scales gradients down whose global norm is far above what it has been.

    With μ and σ of earlier norms and z = (norm - μ) / σ, a norm with z above `z_score`
    becomes μ + σ `z_score`² / z: the larger a spike, the more is taken from it. Mean
    and variance are plain ones during the warm-up, when nothing is clipped, and then
    moving averages of clipped norms. A norm that is not finite leaves them as they are.

    Args:
        z_score: From which on a norm is a spike.
        decay: How much of mean and variance a step keeps.
        warmup_steps: Steps that are only looked at, at least 2.

    Raises:
        ConfigError: If a value cannot be used.

    Example:
        >>> tx = optax.chain(clip_spikes(2.5), optax.adamw(1e-3))
        >>> tx.init({"w": jnp.ones(3)})[0].count
        Array(0, dtype=int32)
    """
    if not (z_score > 0 and 0 <= decay < 1 and warmup_steps >= 2):
        raise ConfigError(
            "clip_spikes: expected z_score > 0, 0 <= decay < 1 and warmup_steps >= 2, "
            f"found {z_score}, {decay} and {warmup_steps}."
        )

    def init(params: Any) -> SpikeState:
        return SpikeState(jnp.int32(0), jnp.float32(0), jnp.float32(0))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, SpikeState]:
        norm = optax.tree.norm(updates).astype(jnp.float32)
        count, mean, variance = state
        is_warm = count >= warmup_steps
        deviation = jnp.sqrt(variance) + _EPSILON
        z = (norm - mean) / deviation
        is_spike = is_warm & (z > z_score)
        limit = mean + deviation * (z_score**2 / jnp.where(is_spike, z, 1.0))
        seen = jnp.where(is_spike, limit, norm)
        num = (count + 1).astype(jnp.float32)
        share = jnp.where(is_warm, 1 - decay, 1 / num)
        new_mean = mean + share * (seen - mean)
        # Of all so far in the warm-up (Welford), and a moving average after it.
        other = jnp.where(is_warm, new_mean, mean)
        square = (seen - new_mean) * (seen - other)
        new = SpikeState(count + 1, new_mean, variance + share * (square - variance))
        new = jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(norm), a, b), new, state)
        factor = jnp.where(is_spike, limit / norm, 1.0)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), new

    return optax.GradientTransformation(init, update)
