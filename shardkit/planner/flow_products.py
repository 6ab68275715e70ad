"""How products pass cuts on, and what addends need to become sums.

Owns the rules for matrix products and convolutions, where all the work is, and the
exchanges that any rule may need. The other operations are in `flow_rules`.
"""

import math
from typing import Any

from jax.extend import core

from shardkit.planner.ledger import Cut, Ledger, bytes_of

__all__ = ["Cuts", "avals_of", "convolution", "gather", "product", "settle"]

Cuts = list[Cut]


def settle(aval: Any, cut: Cut, ledger: Ledger, like: Cut | None = None) -> Cut:
    """Turns addends into sums: in pieces where `like` has pieces, else everywhere."""
    dims = list(cut.dims)
    for axis in sorted(cut.partial):
        place = like.dims.index(axis) if like and axis in like.dims else -1
        if place >= 0 and dims[place] is None:
            ledger.exchange("reduce-scatter", axis, aval, cut)
            dims[place] = axis
        else:
            ledger.exchange("all-reduce", axis, aval, cut)
    return Cut(tuple(dims))


def gather(aval: Any, cut: Cut, axis: str, ledger: Ledger) -> Cut:
    """Makes a value whole along an axis."""
    ledger.exchange("all-gather", axis, aval, cut)
    return cut.without(axis)


def avals_of(eqn: core.JaxprEqn) -> list[Any]:
    """Shapes and dtypes of an equation's arguments."""
    return [atom.aval for atom in eqn.invars]


def product(eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger) -> tuple[Cuts, Cuts]:
    """Cuts a matrix product as its operands are; summing over a cut dim adds up."""
    (left_sum, right_sum), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    avals = avals_of(eqn)
    pairs = [
        (*zip(left_sum, right_sum, strict=True),),
        (*zip(left_batch, right_batch, strict=True),),
    ]
    matched = [pair for group in pairs for pair in group]
    cuts = _settle_pair(avals, ins, matched, ledger)
    # An axis may cut one dim on its own, or one that both have.
    for axis in sorted(cuts[0].axes & cuts[1].axes):
        place = cuts[0].dims.index(axis), cuts[1].dims.index(axis)
        if place not in matched:
            smaller = 0 if bytes_of(avals[0]) < bytes_of(avals[1]) else 1
            cuts[smaller] = gather(avals[smaller], cuts[smaller], axis, ledger)
    summed = {cuts[0].dims[i] for i in left_sum} | {cuts[1].dims[i] for i in right_sum}
    used: list[str | None] = [cuts[0].dims[i] or cuts[1].dims[j] for i, j in pairs[1]]
    for cut, sums, batch in (
        (cuts[0], left_sum, left_batch),
        (cuts[1], right_sum, right_batch),
    ):
        used += [a for i, a in enumerate(cut.dims) if i not in (*sums, *batch)]
    out: Any = eqn.outvars[0].aval
    axes = cuts[0].axes | cuts[1].axes
    num_terms = math.prod(avals[0].shape[i] for i in left_sum)
    work = 2 * math.prod(out.shape) * num_terms
    _count_product(eqn, work, axes, [*cuts, Cut(tuple(used))], ledger)
    return cuts, [Cut(tuple(used), frozenset(a for a in summed if a))]


def _settle_pair(
    avals: list[Any], ins: Cuts, matched: list[tuple[int, int]], ledger: Ledger
) -> Cuts:
    """Makes sums of addends, in the pieces in which the other operand is cut."""
    cuts = list(ins)
    for me, other in ((0, 1), (1, 0)):
        like: list[str | None] = [None] * len(cuts[me].dims)
        for pair in matched:
            like[pair[me]] = cuts[other].dims[pair[other]]
        cuts[me] = settle(avals[me], cuts[me], ledger, Cut(tuple(like)))
    return cuts


def convolution(eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger) -> tuple[Cuts, Cuts]:
    """Cuts a convolution along rows and channels; images stay whole."""
    avals, numbers = avals_of(eqn), eqn.params["dimension_numbers"]
    data, kernel = (settle(a, c, ledger) for a, c in zip(avals, ins, strict=True))
    out: Any = eqn.outvars[0].aval
    dims: list[str | None] = [None] * len(out.shape)
    out_batch, out_feature = numbers.out_spec[:2]
    dims[out_batch] = data.dims[numbers.lhs_spec[0]]
    feature = kernel.dims[numbers.rhs_spec[0]]
    dims[out_feature] = feature if feature != dims[out_batch] else None
    inner = data.dims[numbers.lhs_spec[1]] or kernel.dims[numbers.rhs_spec[1]]
    summed = frozenset({inner} - {None, *dims})
    # Elements of the kernel per output channel.
    terms = math.prod(avals[1].shape) // avals[1].shape[numbers.rhs_spec[0]]
    result = Cut(tuple(dims))
    axes = result.axes | summed
    work = 2 * math.prod(out.shape) * terms
    _count_product(eqn, work, axes, [data, kernel, result], ledger)
    return [data, kernel], [Cut(result.dims, summed)]


def _count_product(
    eqn: core.JaxprEqn, work: int, axes: Any, cuts: Cuts, ledger: Ledger
) -> None:
    avals: list[Any] = [atom.aval for atom in (*eqn.invars, *eqn.outvars)]
    ledger.flops[str(avals[0].dtype), frozenset(axes)] += work
    ledger.num_products += 1
    for aval, cut in zip(avals, cuts, strict=True):
        for size, axis in zip(aval.shape, cut.dims, strict=True):
            if axis:
                ledger.divisors[axis] = math.gcd(ledger.divisors[axis], size)
        ledger.product_bytes[cut.axes] += bytes_of(aval)
