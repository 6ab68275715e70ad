"""Evaluation on a fixed set of batches.

Owns the sums over the set. Invariant: the result has the same bits on every mesh,
since each batch is summed exactly and the batches are added in their order.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from shardkit.batch import check_batch
from shardkit.errors import ConfigError, NonFiniteError
from shardkit.placement import Placement
from shardkit.state import TrainState

__all__ = ["EvalConfig", "evaluate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When and on what a `Trainer` evaluates.

    The loss is the trainer's `eval_loss`; without one it is `loss` as it stands, with
    its dropout. The result is what `Trainer.evaluate` returns, and an event `"eval"`.

    Attributes:
        data: `index → global batch`.
        every: Steps between evaluations; 0 evaluates only when asked.
        num_batches: How many batches are the fixed set: `data(0)`, `data(1)`, ….
    """

    data: Callable[[int], Any]
    every: int
    num_batches: int = 1

    def __post_init__(self) -> None:
        if self.num_batches < 1 or self.every < 0:
            raise ConfigError(
                "EvalConfig: expected num_batches of at least 1 and every of at least "
                f"0, found {self.num_batches} and {self.every}"
            )


def evaluate(
    config: EvalConfig,
    placement: Placement,
    state: TrainState,
    step: int,
    data: Callable[[int], Any],
) -> dict[str, float]:
    """Evaluates parameters where they are, or their average if there is one.

    Args:
        config: On what.
        placement: Where the state is.
        state: As it lies there.
        step: The step, for the random keys of a loss that draws.
        data: What gets a batch of the set; it may raise to give up.

    Returns:
        The loss and the metrics, each Σ / Σ weight over the set.

    Raises:
        NonFiniteError: If there is nothing to divide by.
    """
    num = placement.recipe.num_microbatches
    totals: dict[str, float] = {}
    for index in range(config.num_batches):
        batch = data(index)
        check_batch(batch, num_microbatches=num, where=f"eval data({index})")
        for name, value in placement.evaluate(state, batch, step, index).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    weight = totals.pop("weight")
    if weight == 0:
        raise NonFiniteError(
            f"evaluation at step {step}: the weight of all {config.num_batches} "
            "batches together is 0. Evaluate on data with something to count."
        )
    return {name: total / weight for name, total in totals.items()}
