"""Evaluation on a fixed set of batches.

Owns the set, and the sums over it. Invariant: the result has the same bits on every
mesh, since each batch is summed exactly and the batches are added in their order.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any, SupportsIndex

import jax
import numpy as np

from shardkit.batch import abstract_batch, check_batch
from shardkit.device_work import evaluated
from shardkit.errors import ConfigError, DataError, NonFiniteError
from shardkit.model import call_loss
from shardkit.placement import Placement
from shardkit.recipe import Recipe
from shardkit.state import TrainState

__all__ = ["EvalConfig", "FixedSet", "check_other", "check_weights", "evaluate"]


@dataclasses.dataclass(frozen=True, eq=False)
class FixedSet:
    """Rows of arrays in their order, each once; the last batch may be a part of one.

    Batches have one shape, so what is missing in the last one is filled with its last
    row. Then every batch has one leaf more, float32 `[global_batch_size]`: 1 for a row,
    0 for what only fills. A loss multiplies by it what it sums, its weight too.

    Attributes:
        arrays: Arrays `[num_rows, ...]`, not to be changed afterwards.
        global_batch_size: Rows of a batch, over all devices together.
        weight: The name of that leaf.

    Raises:
        DataError: If the arrays have no rows or differ in how many they have, or one
            of them has the name of the weights.

    Example:
        >>> rows = FixedSet({"x": np.arange(5.0)}, global_batch_size=3)
        >>> [rows(i)["x"].tolist() for i in range(rows.num_batches)]
        [[0.0, 1.0, 2.0], [3.0, 4.0, 4.0]]
        >>> rows(1)["weight"].tolist()
        [1.0, 1.0, 0.0]
    """

    arrays: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    _: dataclasses.KW_ONLY
    global_batch_size: int
    weight: str = "weight"

    def __post_init__(self) -> None:
        check_batch(self.arrays, num_microbatches=1, where="FixedSet")
        size = self.global_batch_size
        if not isinstance(size, SupportsIndex) or operator.index(size) < 1:
            raise DataError(
                "FixedSet: expected a global_batch_size of at least 1, a whole number "
                f"that no ramp changes, found {size!r}."
            )
        if self.weight in self.arrays:
            raise DataError(
                f"FixedSet: an array has the name {self.weight!r} of the weights. "
                "Give them another one: FixedSet(…, weight=…)."
            )

    @property
    def num_rows(self) -> int:
        """Rows of the set."""
        return len(next(iter(self.arrays.values())))

    @property
    def num_batches(self) -> int:
        """Batches of the set."""
        return -(-self.num_rows // self.global_batch_size)

    @property
    def is_filled(self) -> bool:
        """Whether the last batch is a part of one, so that there are weights."""
        return self.num_rows % self.global_batch_size != 0

    def __call__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Returns batch `index` of the set.

        Raises:
            DataError: If there is no such batch.
        """
        index = operator.index(index)
        if not 0 <= index < self.num_batches:
            raise DataError(
                f"FixedSet: expected a batch from 0 to {self.num_batches - 1}, found "
                f"{index}."
            )
        rows = index * self.global_batch_size + np.arange(self.global_batch_size)
        taken = np.minimum(rows, self.num_rows - 1)
        batch = {name: array[taken] for name, array in self.arrays.items()}
        if self.is_filled:
            batch[self.weight] = (rows < self.num_rows).astype(np.float32)
        return batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When and on what a `Trainer` evaluates.

    The loss is the trainer's `eval_loss`; without one it is `loss` as it stands, with
    its dropout. The result is what `Trainer.evaluate` returns, and an event `"eval"`.

    Attributes:
        data: `index → global batch`; a `FixedSet`, say.
        every: Steps between evaluations; 0 evaluates only when asked.
        num_batches: How many batches are the fixed set: `data(0)`, `data(1)`, …. None
            is all of a `FixedSet`, and one of anything else.
    """

    data: Callable[[int], Any]
    every: int = 0
    num_batches: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or self.every < 0:
            raise ConfigError(
                "EvalConfig: expected num_batches of at least 1 and every of at least "
                f"0, found {self.num_batches} and {self.every}"
            )
        if isinstance(self.data, FixedSet) and self.size > self.data.num_batches:
            raise ConfigError(
                f"EvalConfig: num_batches: the set has {self.data.num_batches} "
                f"batches, found {self.num_batches}. Leave it out for all of them."
            )

    @property
    def size(self) -> int:
        """How many batches are evaluated."""
        if self.num_batches is not None:
            return self.num_batches
        return self.data.num_batches if isinstance(self.data, FixedSet) else 1


def check_weights(config: EvalConfig, recipe: Recipe, layout: Any) -> None:
    """Checks that a loss reads the weights of a set whose last batch is filled.

    Args:
        config: What is evaluated on.
        recipe: With the loss.
        layout: A `TrainState` of `LeafLayout`.

    Raises:
        ConfigError: If it does not; it would count rows twice.
    """
    data = config.data
    if not isinstance(data, FixedSet) or not data.is_filled:
        return
    loss, num = recipe.eval_loss or recipe.loss, recipe.num_eval_microbatches
    batch = abstract_batch(data(0))
    rest = {name: x for name, x in batch.items() if name != data.weight}

    def output(weight: Any, params: Any, state: Any, rest: Any, key: Any) -> Any:
        microbatch = {**rest, data.weight: weight}
        return call_loss(loss, params, state, microbatch, key)[0]

    def cut(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((x.shape[0] // num, *x.shape[1:]), x.dtype)

    of = lambda leaf: leaf.abstract  # noqa: E731
    params, state = jax.tree.map(of, (layout.params, layout.model_state))
    key = jax.eval_shape(lambda: jax.random.key(0))
    weight, rest = jax.tree.map(cut, (batch[data.weight], rest))
    jaxpr = jax.make_jaxpr(output)(weight, params, state, rest, key).jaxpr
    if not any(jaxpr.invars[0] in eqn.invars for eqn in jaxpr.eqns):
        raise ConfigError(
            f"EvalConfig: the {data.num_rows} rows of the set do not fill "
            f"{data.num_batches} batches of {data.global_batch_size}, and the loss "
            f"does not read microbatch[{data.weight!r}], which is 0 for rows that only "
            "fill. Multiply what it sums, and its weight, by it, in an eval_loss if "
            "batches of training have none; or choose a global_batch_size that divides "
            "the rows."
        )


def check_other(config: EvalConfig, placement: Placement) -> None:
    """Checks that what was made for another set can be evaluated on this one.

    Raises:
        ConfigError, PartitionError, InexactError: If the loss cannot be used for it.
    """
    check_weights(config, placement.recipe, placement.layout)
    batch = config.data(0)
    num = placement.recipe.num_eval_microbatches
    check_batch(batch, num_microbatches=num, where="eval data(0)")
    params, state = jax.tree.map(lambda x: x.abstract, evaluated(placement.layout))
    placement.recipe.eval_structure(params, state, abstract_batch(batch))


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
    num = placement.recipe.num_eval_microbatches
    totals: dict[str, float] = {}
    for index in range(config.size):
        batch = data(index)
        check_batch(batch, num_microbatches=num, where=f"eval data({index})")
        for name, value in placement.evaluate(state, batch, step, index).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    weight = totals.pop("weight")
    if weight == 0:
        raise NonFiniteError(
            f"evaluation at step {step}: the weight of all {config.size} "
            "batches together is 0. Evaluate on data with something to count."
        )
    return {name: total / weight for name, total in totals.items()}
