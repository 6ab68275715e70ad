"""Walks a program and finds its strands.

Owns the way through functions and loops. Invariant: every dim of every array of the
program is in `Strands.arrays`, those within loops once.
"""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from shardkit.jaxprs import inner_jaxpr, scan_parts
from shardkit.planner.strand_rules import RULES, default_rule
from shardkit.planner.strands import Strands, Value

__all__ = ["LOOPED", "walk"]

LOOPED = "a loop takes it one by one"
"""Why layers that are stacked for a scan are not cut."""


def walk(
    jaxpr: core.Jaxpr, ins: Sequence[Value], strands: Strands, times: int = 1
) -> list[Value]:
    """Ties the dims of a program.

    Args:
        jaxpr: The program.
        ins: Its arguments.
        strands: Where everything is noted.
        times: How often it runs.

    Returns:
        Its results.

    Example:
        >>> import jax
        >>> x, w = jax.numpy.ones((4, 8)), jax.numpy.ones((8, 2))
        >>> closed = jax.make_jaxpr(lambda x, w: jax.numpy.tanh(x @ w))(x, w)
        >>> strands = Strands()
        >>> args = [Value(strands.new(x.shape)), Value(strands.new(w.shape), leaf=0)]
        >>> [out] = walk(closed.jaxpr, args, strands)
        >>> strands.roots(args[1].dims), strands.roots(out.dims)
        ([1, 3], [0, 3])
    """
    known: dict[Any, Value] = dict(zip(jaxpr.invars, ins, strict=True))
    for var in jaxpr.constvars:
        known[var] = _constant(var, strands)
    for eqn in _needed(jaxpr):
        values = [
            _constant(atom, strands) if isinstance(atom, core.Literal) else known[atom]
            for atom in eqn.invars
        ]
        outs = _equation(eqn, values, strands, times)
        known.update(zip(eqn.outvars, outs, strict=True))
    strands.arrays.update(value.dims for value in known.values())
    return [
        _constant(atom, strands) if isinstance(atom, core.Literal) else known[atom]
        for atom in jaxpr.outvars
    ]


def _needed(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """The equations that results follow from: a compiler leaves the others out."""
    used = {var for var in jaxpr.outvars if not isinstance(var, core.Literal)}
    needed = []
    for eqn in reversed(jaxpr.eqns):
        if used.intersection(eqn.outvars):
            used.update(a for a in eqn.invars if not isinstance(a, core.Literal))
            needed.append(eqn)
    return needed[::-1]


def _constant(atom: Any, strands: Strands) -> Value:
    return Value(strands.new(getattr(atom.aval, "shape", ())))


def _equation(
    eqn: core.JaxprEqn, ins: list[Value], strands: Strands, times: int
) -> list[Value]:
    inner = inner_jaxpr(eqn)
    if inner is not None and len(inner.jaxpr.invars) == len(ins):
        return walk(inner.jaxpr, ins, strands, times)
    if eqn.primitive.name == "scan":
        return _scan(eqn, ins, strands, times)
    rule = RULES.get(eqn.primitive.name, default_rule)
    return rule(eqn, ins, strands, times)


def _scan(
    eqn: core.JaxprEqn, ins: list[Value], strands: Strands, times: int
) -> list[Value]:
    """One pass stands for all: what is carried is cut alike before and after."""
    num_consts, num_carry = scan_parts(eqn)
    first = num_consts + num_carry
    for value in ins[first:]:
        strands.keep_whole(value.dims[:1], LOOPED)
    rows = [Value(v.dims[1:], v.past, v.leaf) for v in ins[first:]]
    # What is carried is another after a pass, also a parameter.
    carry = [Value(v.dims, v.past | strands.source()) for v in ins[num_consts:first]]
    outs = walk(
        eqn.params["jaxpr"].jaxpr,
        [*ins[:num_consts], *carry, *rows],
        strands,
        times * eqn.params["length"],
    )
    for before, after in zip(carry, outs, strict=False):
        for one, other in zip(before.dims, after.dims, strict=True):
            strands.tie(one, other)
    [new] = strands.new((eqn.params["length"],))
    strands.keep_whole([new], LOOPED)
    stacked = [Value((new, *v.dims), v.past) for v in outs[num_carry:]]
    return [*outs[:num_carry], *stacked]
