"""Which checkpoints stay: the newest, those at intervals, the best.

Owns the translation of a config into Orbax's policies, which do the rest. What was best
before a run was resumed is known from what was recorded with it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers as policies

from shardkit.checkpoint.config import CheckpointConfig

__all__ = ["retention"]

Recorded = Callable[[int], Mapping[str, float]]


def retention(
    config: CheckpointConfig, recorded: Recorded
) -> policies.PreservationPolicy | None:
    """Returns what Orbax is to keep; None for everything.

    Args:
        config: What the user wants.
        recorded: Step → the metrics that were saved with it.
    """
    if config.keep is None:
        return None
    kept: list[Any] = [policies.LatestN(config.keep)]
    if config.keep_every is not None:
        kept.append(policies.EveryNSteps(config.keep_every))
    if config.keep_best:
        kept.append(_Best(config, recorded))
    return policies.AnyPreservationPolicy(kept)


class _Best(policies.PreservationPolicy):
    """The best of all that are there, by whichever process they were saved.

    Orbax forgets metrics when it is closed.
    """

    def __init__(self, config: CheckpointConfig, recorded: Recorded) -> None:
        self._metric, self._recorded = config.best_metric, recorded
        self._sign = 1.0 if config.best_mode == "max" else -1.0
        self._num, self._known = config.keep_best, dict[Any, float]()

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        ranked = [(self._quality(info), info.step) for info in checkpoints]
        best = sorted(x for x in ranked if x[0] > -math.inf)[-self._num :]
        return [x in best for x in ranked]

    def _quality(self, info: Any) -> float:
        # A step that was gone back from and saved again is another one.
        name = info.step, info.time
        if name not in self._known:
            metrics = info.metrics or self._recorded(info.step)
            found = metrics.get(self._metric, math.nan)
            # What was never evaluated, or is not a number, is no better than anything.
            self._known[name] = (
                self._sign * found if math.isfinite(found) else -math.inf
            )
        return self._known[name]
