"""What traced programs say of a model beside its work.

Owns three questions to jaxprs: what a backward pass keeps, what is alive at the peak,
and which whole leaves an update sums up. It traces programs and runs none.
"""

import collections
from collections.abc import Sequence
from typing import Any

import jax

from shardkit.errors import ConfigError
from shardkit.jaxprs import flatten
from shardkit.planner.ledger import Axes, Cut, bytes_of
from shardkit.planner.liveness import peak_bytes
from shardkit.planner.model_facts import Leaf

__all__ = ["count_norms", "kept_bytes", "peak_beside"]


def peak_beside(closed: Any, leaves: Sequence[Leaf]) -> int:
    """What a gradient takes at its peak, beside parameters and the gradient itself."""
    return max(peak_bytes(closed) - sum(leaf.num_bytes for leaf in leaves), 0)


def count_norms(tx: Any, params: Any, leaves: Sequence[Leaf]) -> tuple[int, int]:
    """Counts sums over whole leaves in an update, and those of the norm of a step.

    Returns:
        All of them; and those that are of squares of the gradient itself.
    """
    state = jax.eval_shape(tx.init, params)
    try:
        update = jax.make_jaxpr(tx.update)(params, state, params)
    except Exception as error:
        raise ConfigError(f"planner: an update cannot be traced: {error}") from error
    num_grads = len(leaves)
    values: list[str] = []
    args = ["gradient"] * num_grads + [""] * (len(update.jaxpr.invars) - num_grads)
    steps, _ = flatten(update.jaxpr, update.consts, args, values, lambda _: "constant")
    sums: collections.Counter[tuple[tuple[int, ...], str]] = collections.Counter()
    for eqn, sources, results in steps:
        kinds = {values[source] for source in sources}
        kind = "constant" if kinds <= {"constant"} else ""
        # A square is |x|², with an imaginary part that may be a constant zero.
        if kinds == {"gradient"} or kinds == {"gradient", "constant"}:
            name = eqn.primitive.name
            is_square = name in ("square", "integer_pow", "abs", "add")
            kind = "gradient" * (is_square or (name == "mul" and len(kinds) == 1))
        for result in results:
            values[result] = kind
        if eqn.primitive.name == "reduce_sum":
            before: Any = eqn.invars[0].aval
            after: Any = eqn.outvars[0].aval
            sums[before.shape, values[sources[0]]] += not after.shape
    alike = collections.Counter(leaf.shape for leaf in leaves)
    # A sum is known by its shape, so that those of leaves alike are divided among them.
    cut = [leaf.shape for leaf in leaves if "fsdp" in leaf.cuts]
    clips = sum(sums[shape, "gradient"] // alike[shape] for shape in cut)
    others = sum(sums[shape, ""] // alike[shape] for shape in cut)
    return len(cut) + clips + others, clips


def kept_bytes(closed: Any, cuts: Sequence[Cut]) -> dict[Axes, int]:
    """Adds up results, each once, that are neither arguments nor made of constants.

    What follows from no argument, as a causal mask does, is made again where it is
    used.
    """
    values: list[bool] = []
    args = [True] * len(closed.jaxpr.invars)
    consts = [False] * len(closed.consts)
    steps, outs = flatten(closed.jaxpr, consts, args, values, lambda _: False)
    for _, sources, results in steps:
        for result in results:
            values[result] = any(values[source] for source in sources)
    arguments = set(range(len(values))) - {r for _, _, made in steps for r in made}
    found: dict[Axes, int] = {}
    for number, var, cut in zip(outs, closed.jaxpr.outvars, cuts, strict=True):
        if number not in arguments and values[number]:
            arguments.add(number)
            found[cut.axes] = found.get(cut.axes, 0) + bytes_of(var.aval)
    return found
