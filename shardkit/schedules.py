"""Learning rates that follow the size of the global batch.

Owns the rules by which one follows the other. Invariant: the rate is a function of the
step alone. A schedule of its own, warm-up among them, it takes as it is.

References:
    Goyal et al., Accurate, Large Minibatch SGD (2017): the linear rule.
    Krizhevsky, One Weird Trick for Parallelizing CNNs (2014), and Hoffer et al., Train
    longer, generalize better (NeurIPS 2017): the rule of the square root.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from shardkit.errors import ConfigError
from shardkit.ramp import BatchRamp

__all__ = ["scale_to_batch"]

_RULES: dict[str, Callable[[float], float]] = {"linear": float, "sqrt": math.sqrt}


def scale_to_batch(
    learning_rate: float | Callable[[Any], Any],
    ramp: BatchRamp,
    rule: str = "linear",
) -> Callable[[Any], Any]:
    """Multiplies a learning rate by k, or √k, where the batch is k times the first.

    The factor of each phase is rounded once, in Python, and chosen by the step; so it
    is the same on every mesh. Like all of optax's schedules it counts the updates: a
    step that a loss scale skips is none.

    Args:
        learning_rate: That of the batch of step 0: a number, or step → number.
        ramp: How large the batch is; in what units does not matter.
        rule: `"linear"`, or `"sqrt"`.

    Returns:
        A schedule, for any optimizer of optax: step → float32.

    Raises:
        ConfigError: If there is no such rule, or `ramp` is none.

    Example:
        >>> ramp = BatchRamp({0: 8, 100: 32})
        >>> rate = scale_to_batch(0.5, ramp, "sqrt")
        >>> float(rate(99)), float(rate(100))
        (0.5, 1.0)
    """
    if rule not in _RULES:
        raise ConfigError(
            f"scale_to_batch: rule must be one of {', '.join(map(repr, _RULES))}, "
            f"found {rule!r}"
        )
    if not isinstance(ramp, BatchRamp):
        raise ConfigError(
            f"scale_to_batch: expected an sk.BatchRamp, found {ramp!r}; where the "
            "batch stays as it is, so does the learning rate"
        )
    factors = [_RULES[rule](count / ramp(0)) for _, count in ramp.phases]
    schedule = learning_rate if callable(learning_rate) else None
    if not callable(learning_rate):
        factors = [factor * learning_rate for factor in factors]
    starts = [start for start, _ in ramp.phases]

    def rate(step: Any) -> Any:
        chosen = jnp.asarray(np.float32(factors[0]))
        for start, factor in zip(starts[1:], factors[1:], strict=True):
            chosen = jnp.where(step >= start, np.float32(factor), chosen)
        if schedule is None:
            return chosen
        return jnp.asarray(schedule(step), jnp.float32) * chosen

    return rate
