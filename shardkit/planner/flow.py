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

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from shardkit.jaxprs import inner_jaxpr, scan_parts
from shardkit.planner.flow_rules import RULES, default_rule
from shardkit.planner.ledger import Cut, Ledger, bytes_of

__all__ = ["follow"]

_MAX_ROUNDS = 4
# What only renames or views bytes is not counted as written.
_FREE = frozenset(
    """broadcast_in_dim reshape squeeze expand_dims transpose iota copy
    optimization_barrier stop_gradient slice convert_element_type""".split()
)


def follow(
    jaxpr: core.Jaxpr, cuts: Sequence[Cut], ledger: Ledger | None = None
) -> tuple[list[Cut], Ledger]:
    """Follows the cuts of the arguments to the results.

    Args:
        jaxpr: The program.
        cuts: How its arguments are cut.
        ledger: Where everything is noted; None for a new one.

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
    known: dict[Any, Cut] = dict(zip(jaxpr.invars, cuts, strict=True))
    for var in jaxpr.constvars:
        known[var] = Cut.whole(var.aval)

    def read(atom: Any) -> Cut:
        return Cut.whole(atom.aval) if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        ins = [read(atom) for atom in eqn.invars]
        settled, outs = _equation(eqn, ins, ledger)
        # A sum that was needed once is there for all who need it later.
        for atom, before, after in zip(eqn.invars, ins, settled, strict=True):
            if before != after and not isinstance(atom, core.Literal):
                known[atom] = after
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars], ledger


def _equation(
    eqn: core.JaxprEqn, ins: list[Cut], ledger: Ledger
) -> tuple[list[Cut], list[Cut]]:
    """Returns the cuts of the arguments, sums made where needed, and of the results."""
    name = eqn.primitive.name
    inner = inner_jaxpr(eqn)
    if inner is not None and len(inner.jaxpr.invars) == len(ins):
        return ins, follow(inner.jaxpr, ins, ledger)[0]
    if name == "scan":
        return _scan(eqn, ins, ledger)
    if name == "while":
        return _while(eqn, ins, ledger)
    if name == "cond":
        return _cond(eqn, ins, ledger)
    rule = RULES.get(name, default_rule)
    settled, outs = rule(eqn, ins, ledger)
    if name not in _FREE and name not in ("dot_general", "conv_general_dilated"):
        for var, out in zip(eqn.outvars, outs, strict=True):
            ledger.other_bytes[out.axes] += bytes_of(var.aval)
    return settled, outs


def _scan(
    eqn: core.JaxprEqn, ins: list[Cut], ledger: Ledger
) -> tuple[list[Cut], list[Cut]]:
    body, length = eqn.params["jaxpr"].jaxpr, eqn.params["length"]
    num_consts, num_carry = scan_parts(eqn)
    first = num_consts + num_carry
    rows = [Cut(cut.dims[1:], cut.partial) for cut in ins[first:]]
    carry, outs, inside = _settled_loop(
        body, ins[:num_consts], ins[num_consts:first], rows
    )
    ledger.add(inside, length)
    stacked = [Cut((None, *cut.dims), cut.partial) for cut in outs[num_carry:]]
    return [*ins[:num_consts], *carry, *ins[first:]], [*carry, *stacked]


def _while(
    eqn: core.JaxprEqn, ins: list[Cut], ledger: Ledger
) -> tuple[list[Cut], list[Cut]]:
    skipped = eqn.params["cond_nconsts"]
    num_consts = eqn.params["body_nconsts"]
    first = skipped + num_consts
    body = eqn.params["body_jaxpr"].jaxpr
    carry, _, inside = _settled_loop(body, ins[skipped:first], ins[first:], [])
    if inside.flops:
        ledger.notes.append("a loop of unknown length counts as one pass")
    ledger.add(inside)
    return [*ins[:first], *carry], carry


def _settled_loop(
    body: core.Jaxpr, consts: list[Cut], carry: list[Cut], rows: list[Cut]
) -> tuple[list[Cut], list[Cut], Ledger]:
    """Walks a loop's body until what is carried is cut the same before and after."""
    carry = [Cut(cut.dims) for cut in carry]
    outs, inside = follow(body, [*consts, *carry, *rows])
    for _ in range(_MAX_ROUNDS):
        after = [Cut(cut.dims) for cut in outs[: len(carry)]]
        merged = [_common(a, b) for a, b in zip(carry, after, strict=True)]
        if merged == carry:
            break
        carry = merged
        outs, inside = follow(body, [*consts, *carry, *rows])
    for var, cut in zip(body.outvars, outs[: len(carry)], strict=False):
        for axis in cut.partial:
            inside.exchange("all-reduce", axis, var.aval, cut)
    return carry, outs, inside


def _common(before: Cut, after: Cut) -> Cut:
    """What is carried is cut as a pass leaves it: that is how it will be found."""
    dims = tuple(
        b if b is not None else a for a, b in zip(before.dims, after.dims, strict=True)
    )
    axes = [axis for axis in dims if axis]
    return after if len(set(axes)) < len(axes) else Cut(dims)


def _cond(
    eqn: core.JaxprEqn, ins: list[Cut], ledger: Ledger
) -> tuple[list[Cut], list[Cut]]:
    found = [
        follow(branch.jaxpr, [Cut(c.dims) for c in ins[1:]])
        for branch in eqn.params["branches"]
    ]
    outs, inside = max(found, key=lambda pair: pair[1].total_flops)
    ledger.add(inside)
    return ins, outs
