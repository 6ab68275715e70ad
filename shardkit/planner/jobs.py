"""From a run to what the planner is asked.

Owns that way, for a config that nobody runs yet and for a trainer alike. Invariant:
both ask the same of the same run, so that `shardkit plan` says what a trainer does.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from shardkit.logical_axes import AxisRules
from shardkit.model import Model
from shardkit.planner.ledger import Habits
from shardkit.planner.reading import read_model
from shardkit.planner.search import Job
from shardkit.ramp import BatchRamp

__all__ = ["read_job"]


def read_job(
    model: Model,
    microbatch: Any,
    tx: Any,
    ramp: BatchRamp,
    *,
    axis_rules: AxisRules | None = None,
    path_rules: Mapping[Any, Any] | None = None,
    ema: float | None = None,
    exact: bool = True,
    offload: bool = False,
    fixed: Mapping[str, int] | None = None,
    habits: Habits | None = None,
) -> Job:
    """Reads what is trained, without computing any of it.

    Of a ramp the largest batch is taken, which needs most.

    Args:
        model: Its loss and its first parameters.
        microbatch: The arrays of one microbatch, abstract or not, rows first.
        tx: The optimizer.
        ramp: How many microbatches each step has.
        axis_rules: As `read_model` takes them.
        path_rules: Likewise.
        ema: The decay of an average of the parameters, if there is one.
        exact: Whether gradients are summed as integers.
        offload: Whether the optimizer's state is in host memory between updates.
        fixed: Mesh axis → a size that is given.
        habits: Those of the compiler; None for those of GPUs'.

    Raises:
        ConfigError, PartitionError: As `read_model` does.
    """
    facts = read_model(
        model,
        microbatch,
        tx,
        axis_rules=axis_rules,
        path_rules=path_rules,
        habits=habits or Habits(),
    )
    if ema is not None:
        # The average is kept like a moment of every parameter.
        average = (dataclasses.replace(x, path=f"ema/{x.path}") for x in facts.params)
        facts = dataclasses.replace(facts, opt_state=(*facts.opt_state, *average))
    num_microbatches = max(ramp.counts)
    return Job(
        facts={"remat as configured": facts},
        global_batch_size=facts.num_rows * num_microbatches,
        # Another number would be another run, with other bits.
        num_microbatches=[num_microbatches],
        exact=exact,
        offload=offload,
        fixed=fixed or {},
    )
