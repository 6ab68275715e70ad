"""Which checkpoints stay: the newest, those at intervals, the best.

Owns the translation of a config into Orbax's policies, which do the rest.
"""

import math
from typing import Any

from orbax.checkpoint import checkpoint_managers as policies

from shardkit.checkpoint.config import CheckpointConfig

__all__ = ["retention"]


def retention(config: CheckpointConfig) -> policies.PreservationPolicy | None:
    """Returns what Orbax is to keep; None for everything."""
    if config.keep is None:
        return None
    kept: list[Any] = [policies.LatestN(config.keep)]
    if config.keep_every is not None:
        kept.append(policies.EveryNSteps(config.keep_every))
    if config.keep_best:
        sign = 1.0 if config.best_mode == "max" else -1.0

        def quality(metrics: Any) -> float:
            found = (metrics or {}).get(config.best_metric, math.nan)
            # What was never evaluated, or is not a number, is no better than anything.
            return sign * found if math.isfinite(found) else -math.inf

        kept.append(
            policies.BestN(
                get_metric_fn=quality,
                n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            )
        )
    return policies.AnyPreservationPolicy(kept)
