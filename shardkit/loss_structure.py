"""What a loss returns, found by tracing it once.

Owns the checks of a loss that need its trace. It compiles nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from shardkit.errors import InexactError, PartitionError
from shardkit.inexact import check_operations
from shardkit.jaxprs import handed_on
from shardkit.model import call_loss
from shardkit.model_state import check_state
from shardkit.noise import METRICS
from shardkit.tree import format_table, named_leaves

__all__ = ["loss_structure"]

# Metrics that every step has.
_TAKEN = {"loss", "weight", "grad_norm", "gradient_passes", *METRICS}


def loss_structure(
    name: str,
    loss: Callable[..., Any],
    variables: Any,
    batch: Any,
    *,
    num_microbatches: int,
    exact: bool,
    trains: bool,
) -> tuple[Any, list[bool]]:
    """Traces a loss, and checks what it does and returns.

    Args:
        name: What it is called in messages.
        loss: As in `Model`.
        variables: Params and state, abstract.
        batch: A global batch, abstract.
        num_microbatches: How many it is cut into.
        exact: Whether the loss must keep its bits.
        trains: Whether there is a gradient, and what it leaves is of use.

    Returns:
        The structure of the sums, and for every leaf of the state whether it is handed
        on untouched.

    Raises:
        PartitionError: If it returns anything but scalars, a metric whose name is
            taken, or another state than it was given.
        InexactError: If it cannot keep its bits.
    """
    microbatch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (x.shape[0] // num_microbatches, *x.shape[1:]),
            jax.dtypes.canonicalize_dtype(x.dtype),
        ),
        batch,
    )
    args = *variables, microbatch, jax.eval_shape(lambda: jax.random.key(0))
    output = functools.partial(call_loss, loss)
    try:
        traced, (out, left) = jax.make_jaxpr(output, return_shape=True)(*args)
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise InexactError(
            f"{name} asks for a mesh axis ({error}), but sees one microbatch and "
            "no mesh: a sum over devices is taken of what it returns, and a key or "
            "a value that depends on the device could not stay the same."
        ) from error
    bad = [(path, str(x.shape)) for path, x in named_leaves(out) if x.shape]
    if bad:
        raise PartitionError(
            f"{name} must return scalars (a mean, or sums in an sk.LossOutput), "
            "found\n" + format_table(bad)
        )
    taken = _TAKEN & out.metrics.keys()
    if taken:
        raise PartitionError(
            f"{name}: the metrics {sorted(taken)} exist already; rename yours"
        )
    # What an evaluation leaves is of no use.
    if trains:
        check_state(variables[1], left)
    if exact:
        check_operations(traced, name)
    if exact and trains:
        # The gradient has rules of its own, which may do other things.
        gradient = jax.grad(lambda *args: output(*args)[0].loss_sum)
        check_operations(jax.make_jaxpr(gradient)(*args), name)
    first = len(jax.tree.leaves(variables[0]))
    found = handed_on(traced.jaxpr)[len(jax.tree.leaves(out)) :]
    is_kept = [given == first + i for i, given in enumerate(found)]
    return jax.tree.structure(out), is_kept
