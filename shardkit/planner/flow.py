"""How the cuts of parameters and batches run through a program.

Owns the walk over a jaxpr with a `Cut` for every value: what work is divided by which
mesh axes, and where values must be summed, gathered or dealt out again. Invariant: the
sizes of the axes do not enter, so that one walk serves every mesh. It is what a
partitioner would do at best, one operation after the other; `memory` and compiled
programs say what was done. Rules for single operations are in `flow_rules`.

References:
    Xu et al., GSPMD: General and Scalable Parallelization for ML Computation Graphs
    (2021).
    Shoeybi et al., Megatron-LM (2019), for the one sum that closes a pair of products.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.extend import core

from shardkit.jaxprs import Step, flatten, scan_parts
from shardkit.planner.flow_products import settle
from shardkit.planner.flow_rules import RULES, default_rule
from shardkit.planner.flow_wants import deal_out, find_wants
from shardkit.planner.ledger import Cut, Habits, Ledger, axes_in, bytes_of

__all__ = ["follow"]

_MAX_ROUNDS = 4
# What only renames or views bytes is not counted as written.
_FREE = frozenset(
    """broadcast_in_dim reshape squeeze expand_dims transpose iota copy
    optimization_barrier stop_gradient slice convert_element_type
    sharding_constraint""".split()
)


def follow(
    jaxpr: core.Jaxpr, cuts: Sequence[Cut], ledger: Ledger | None = None
) -> tuple[list[Cut], Ledger]:
    """Follows the cuts of the arguments to the results.

    Args:
        jaxpr: The program.
        cuts: How its arguments are cut.
        ledger: Where everything is noted, with the habits of a compiler; None for a
            new one.

    Returns:
        How the results are cut, and the ledger.

    Example:
        >>> import jax
        >>> x, w = jax.numpy.ones((4, 8)), jax.numpy.ones((8, 2))
        >>> closed = jax.make_jaxpr(lambda x, w: jax.numpy.tanh(x @ w))(x, w)
        >>> cuts = [Cut((None, "tensor")), Cut(("tensor", None))]
        >>> [out], ledger = follow(closed.jaxpr, cuts)
        >>> out.dims, ledger.total_flops, dict(ledger.exchanges)
        ((None, None), 128, {('all-reduce', 'tensor', frozenset()): 32})
    """
    ledger = Ledger() if ledger is None else ledger
    return _follow(jaxpr, cuts, ledger, looks_ahead=True)


def _follow(
    jaxpr: core.Jaxpr, cuts: Sequence[Cut], ledger: Ledger, *, looks_ahead: bool
) -> tuple[list[Cut], Ledger]:
    values: list[Any] = []
    steps, outs = flatten(
        jaxpr, jaxpr.constvars, cuts, values, lambda x: Cut.whole(getattr(x, "aval", x))
    )
    steps = _needed(steps, outs)
    wants: dict[int, Cut] = {}
    if looks_ahead:
        ahead = [*values]
        _walk(steps, ahead, Ledger(habits=ledger.habits), None)
        wants = find_wants(steps, ahead, set(outs))
    _walk(steps, values, ledger, wants if looks_ahead else None)
    return [values[number] for number in outs], ledger


def _needed(steps: Sequence[Step], outs: Sequence[int]) -> list[Step]:
    """Leaves out what nobody reads, as compilers do."""
    read, found = {*outs}, []
    for step in reversed(steps):
        eqn, ins, results = step
        if eqn.effects or not read.isdisjoint(results):
            read.update(ins)
            found.append(step)
    return found[::-1]


def _walk(
    steps: Sequence[Step],
    values: list[Any],
    ledger: Ledger,
    wants: Mapping[int, Cut] | None,
) -> None:
    """Finds the cut of every value; without `wants` no loop looks ahead either."""
    for eqn, numbers, results in steps:
        ins = [values[number] for number in numbers]
        if wants and results and results[0] in wants:
            ins = deal_out(eqn, ins, wants[results[0]])
        settled, outs = _equation(eqn, ins, ledger, looks_ahead=wants is not None)
        # A sum that was needed once is there for all who need it later.
        for number, before, after in zip(numbers, ins, settled, strict=True):
            if before != after:
                values[number] = after
        for number, out in zip(results, outs, strict=True):
            values[number] = out


def _equation(
    eqn: core.JaxprEqn, ins: list[Cut], ledger: Ledger, *, looks_ahead: bool
) -> tuple[list[Cut], list[Cut]]:
    """Returns the cuts of the arguments, sums made where needed, and of the results."""
    name = eqn.primitive.name
    if name in _BODIES:
        return _BODIES[name](eqn, ins, ledger, looks_ahead)
    ledger.source = f"{eqn.source_info.name_stack}/{name}"
    rule = RULES.get(name, default_rule)
    settled, outs = rule(eqn, ins, ledger)
    if not ledger.habits.sums_late:
        pairs = zip(eqn.outvars, outs, strict=True)
        outs = [settle(var.aval, out, ledger) for var, out in pairs]
    if name not in _FREE and name not in ("dot_general", "conv_general_dilated"):
        for var, out in zip(eqn.outvars, outs, strict=True):
            ledger.other_bytes[out.axes] += bytes_of(var.aval)
    return settled, outs


def _scan(
    eqn: core.JaxprEqn, ins: list[Cut], ledger: Ledger, looks_ahead: bool
) -> tuple[list[Cut], list[Cut]]:
    body, length = eqn.params["jaxpr"].jaxpr, eqn.params["length"]
    num_consts, num_carry = scan_parts(eqn)
    first = num_consts + num_carry
    rows = [Cut(cut.dims[1:], cut.partial) for cut in ins[first:]]
    walk = functools.partial(_in_loop, body, ledger.habits, looks_ahead)
    carry, outs, inside = _settled_loop(
        body, ins[:num_consts], ins[num_consts:first], rows, walk
    )
    ledger.add(inside, length)
    stacked = [Cut((None, *cut.dims), cut.partial) for cut in outs[num_carry:]]
    return [*ins[:num_consts], *carry, *ins[first:]], [*carry, *stacked]


def _while(
    eqn: core.JaxprEqn, ins: list[Cut], ledger: Ledger, looks_ahead: bool
) -> tuple[list[Cut], list[Cut]]:
    skipped = eqn.params["cond_nconsts"]
    num_consts = eqn.params["body_nconsts"]
    first = skipped + num_consts
    body = eqn.params["body_jaxpr"].jaxpr
    walk = functools.partial(_in_loop, body, ledger.habits, looks_ahead)
    carry, _, inside = _settled_loop(body, ins[skipped:first], ins[first:], [], walk)
    if inside.flops:
        ledger.notes.append("a loop of unknown length counts as one pass")
    ledger.add(inside)
    return [*ins[:first], *carry], carry


def _in_loop(
    body: core.Jaxpr, habits: Habits, looks_ahead: bool, cuts: list[Cut]
) -> tuple[list[Cut], Ledger]:
    return _follow(body, cuts, Ledger(habits=habits), looks_ahead=looks_ahead)


def _settled_loop(
    body: core.Jaxpr,
    consts: list[Cut],
    carry: list[Cut],
    rows: list[Cut],
    walk: Callable[[list[Cut]], tuple[list[Cut], Ledger]],
) -> tuple[list[Cut], list[Cut], Ledger]:
    """Walks a loop's body until what is carried is cut the same before and after."""
    carry = [Cut(cut.dims) for cut in carry]
    outs, inside = walk([*consts, *carry, *rows])
    for _ in range(_MAX_ROUNDS):
        after = [Cut(cut.dims) for cut in outs[: len(carry)]]
        merged = [_common(a, b) for a, b in zip(carry, after, strict=True)]
        if merged == carry:
            break
        carry = merged
        outs, inside = walk([*consts, *carry, *rows])
    for var, cut in zip(body.outvars, outs[: len(carry)], strict=False):
        for axis in cut.partial:
            inside.exchange("all-reduce", axis, var.aval, cut)
    return carry, outs, inside


def _common(before: Cut, after: Cut) -> Cut:
    """What is carried is cut as a pass leaves it: that is how it will be found."""
    dims = tuple(
        b if b is not None else a for a, b in zip(before.dims, after.dims, strict=True)
    )
    places = [axis for entry in dims for axis in axes_in(entry)]
    return after if len(set(places)) < len(places) else Cut(dims)


def _cond(
    eqn: core.JaxprEqn, ins: list[Cut], ledger: Ledger, looks_ahead: bool
) -> tuple[list[Cut], list[Cut]]:
    found = [
        _in_loop(
            branch.jaxpr, ledger.habits, looks_ahead, [Cut(c.dims) for c in ins[1:]]
        )
        for branch in eqn.params["branches"]
    ]
    outs, inside = max(found, key=lambda pair: pair[1].total_flops)
    ledger.add(inside)
    return ins, outs


_BODIES = {"scan": _scan, "while": _while, "cond": _cond}
