"""How products pass cuts on, and what addends need to become sums.

Owns the rules for matrix products and convolutions, where all the work is, and the
exchanges that any rule may need. The other operations are in `flow_rules`.
"""

import math
from typing import Any

from jax.extend import core

from shardkit.planner.ledger import Cut, Entry, Ledger, axes_in, bytes_of, joined

__all__ = ["Cuts", "avals_of", "convolution", "gather", "product", "settle"]

Cuts = list[Cut]


def settle(aval: Any, cut: Cut, ledger: Ledger, like: Cut | None = None) -> Cut:
    """Turns addends into sums: in pieces where `like` has pieces, else everywhere."""
    for axis in sorted(cut.partial):
        place = like.place(axis) if like else -1
        has_piece = place >= 0 and axis not in cut.axes
        scatters = has_piece and ledger.habits.scatters
        ledger.exchange("reduce-scatter" if scatters else "all-reduce", axis, aval, cut)
        if has_piece:
            cut = cut.cut_at(place, axis)
    return Cut(cut.dims)


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
        if (cuts[0].place(axis), cuts[1].place(axis)) not in matched:
            cuts = _reconcile(avals, cuts, axis, pairs[1], ledger)
    summed = {
        axis
        for cut, places in ((cuts[0], left_sum), (cuts[1], right_sum))
        for place in places
        for axis in axes_in(cut.dims[place])
    }
    used: list[Entry] = [
        joined(dict.fromkeys((*axes_in(cuts[0].dims[i]), *axes_in(cuts[1].dims[j]))))
        for i, j in pairs[1]
    ]
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
    return cuts, [Cut(tuple(used), frozenset(summed))]


def _settle_pair(
    avals: list[Any], ins: Cuts, matched: list[tuple[int, int]], ledger: Ledger
) -> Cuts:
    """Makes sums of addends, in the pieces in which the other operand is cut."""
    cuts = list(ins)
    for me, other in ((0, 1), (1, 0)):
        like: list[Entry] = [None] * len(cuts[me].dims)
        for pair in matched:
            like[pair[me]] = cuts[other].dims[pair[other]]
        cuts[me] = settle(avals[me], cuts[me], ledger, Cut(tuple(like)))
    return cuts


def _reconcile(
    avals: list[Any],
    cuts: Cuts,
    axis: str,
    batch: tuple[tuple[int, int], ...],
    ledger: Ledger,
) -> Cuts:
    """Lets an axis cut two operands in one way that cuts different dims of theirs."""
    cuts = list(cuts)
    for pair in batch:
        for me, other in ((0, 1), (1, 0)):
            if cuts[other].place(axis) == pair[other]:
                # The other one is many products, of which each device has some.
                ledger.exchange("all-to-all", axis, avals[me], cuts[me])
                cuts[me] = cuts[me].without(axis).cut_at(pair[me], axis)
                return cuts
    smaller = 0 if bytes_of(avals[0]) < bytes_of(avals[1]) else 1
    cuts[smaller] = gather(avals[smaller], cuts[smaller], axis, ledger)
    return cuts


def convolution(eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger) -> tuple[Cuts, Cuts]:
    """Cuts a convolution along rows and channels; images stay whole."""
    avals, numbers = avals_of(eqn), eqn.params["dimension_numbers"]
    data, kernel = (settle(a, c, ledger) for a, c in zip(avals, ins, strict=True))
    out: Any = eqn.outvars[0].aval
    dims: list[Entry] = [None] * len(out.shape)
    out_batch, out_feature = numbers.out_spec[:2]
    rows = axes_in(data.dims[numbers.lhs_spec[0]])
    dims[out_batch] = joined(rows)
    feature = axes_in(kernel.dims[numbers.rhs_spec[0]])
    dims[out_feature] = joined(axis for axis in feature if axis not in rows)
    inner = {
        *axes_in(data.dims[numbers.lhs_spec[1]]),
        *axes_in(kernel.dims[numbers.rhs_spec[1]]),
    }
    result = Cut(tuple(dims))
    summed = frozenset(inner - result.axes)
    # Elements of the kernel per output channel.
    terms = math.prod(avals[1].shape) // avals[1].shape[numbers.rhs_spec[0]]
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
        for size, entry in zip(aval.shape, cut.dims, strict=True):
            for axis in axes_in(entry):
                ledger.divisors[axis] = math.gcd(ledger.divisors[axis], size)
        ledger.product_bytes[cut.axes] += bytes_of(aval)
