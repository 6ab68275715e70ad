"""What makes dims and what ends them: products, sums and look-ups.

Owns the rules that note meetings. The other operations are in `strand_rules`.
"""

import math
from collections.abc import Callable
from typing import Any

from jax.extend import core

from shardkit.planner.ledger import bytes_of
from shardkit.planner.strands import Past, Strands, Value

__all__ = [
    "Rule",
    "Values",
    "lookup",
    "made",
    "past_of",
    "product",
    "reduction",
    "shape_of",
]

Values = list[Value]
Rule = Callable[[core.JaxprEqn, Values, Strands, int], Values]
"""`(equation, arguments, strands, how often it runs) → results`."""


def shape_of(atom: Any) -> tuple[int, ...]:
    """The shape of an equation's argument or result."""
    return getattr(atom.aval, "shape", ())


def past_of(values: Values) -> Past:
    """What comes before several arrays."""
    past = Past()
    for value in values:
        past |= value.past
    return past


def made(eqn: core.JaxprEqn, ins: Values, strands: Strands) -> Values:
    """Results that are tied to nothing."""
    return [Value(strands.new(shape_of(var)), past_of(ins)) for var in eqn.outvars]


def reduction(kind: str) -> Rule:
    """Makes the rule of what ends dims, each of them a meeting of this kind."""

    def rule(eqn: Any, ins: Values, strands: Strands, times: int) -> Values:
        places, [value, *_] = eqn.params["axes"], ins
        out, operand = eqn.outvars[0].aval, eqn.invars[0].aval
        num_bytes = bytes_of(out)
        if kind == "argmax":
            # A device says where its largest element is, and how large that is.
            num_bytes += out.size * operand.dtype.itemsize
        past = value.past
        for place in places:
            past |= strands.meet(kind, value.dims[place], None, num_bytes, times)
        rest = tuple(dim for i, dim in enumerate(value.dims) if i not in places)
        return [Value(rest, past, value.leaf) for _ in eqn.outvars]

    return rule


def product(eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int) -> Values:
    """What is summed over ends there; the other dims of a parameter begin."""
    sums, batches = eqn.params["dimension_numbers"]
    left, right = ins
    num_bytes = bytes_of(eqn.outvars[0].aval)
    leaf = right.leaf if left.leaf is None else left.leaf
    before, terms = past_of(ins), 1
    past = Past(before.met) | strands.source()
    for i, j in zip(*sums, strict=True):
        strands.tie(left.dims[i], right.dims[j])
        terms *= shape_of(eqn.invars[0])[i]
        past |= strands.meet(
            "row", left.dims[i], leaf, num_bytes, times, before.sources
        )
    out: list[int | None] = []
    for i, j in zip(*batches, strict=True):
        strands.tie(left.dims[i], right.dims[j])
        out.append(left.dims[i])
    for value, used in ((left, 0), (right, 1)):
        gone = (*sums[used], *batches[used])
        free = [dim for i, dim in enumerate(value.dims) if i not in gone]
        if value.leaf is not None:
            for dim in free:
                strands.meet("column", dim, value.leaf, num_bytes, times)
        out += free
    work = 2 * math.prod(shape_of(eqn.outvars[0])) * terms * times
    strands.products.append(((*left.dims, *right.dims), work))
    return [Value(tuple(out), past)]


def lookup(eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int) -> Values:
    """Rows of a table: those of other devices count as zeros, and are added."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    [table, index, *_], shape = ins, shape_of(eqn.invars[0])
    batches = numbers.operand_batching_dims
    gone = (*numbers.collapsed_slice_dims, *batches)
    is_plain = (
        len(numbers.start_index_map) == 1
        and numbers.collapsed_slice_dims == numbers.start_index_map
        and all(sizes[i] == n for i, n in enumerate(shape) if i not in gone)
    )
    if not is_plain:
        strands.keep_whole(table.dims, "elements are looked up by several dims")
        return made(eqn, ins, strands)
    [looked] = numbers.start_index_map
    # Looking up among activations, as the label of a loss, is a sum like others.
    kind = "sum" if table.leaf is None else "lookup"
    num_bytes = bytes_of(eqn.outvars[0].aval)
    past = Past(past_of(ins).met) | strands.source()
    past |= strands.meet(kind, table.dims[looked], table.leaf, num_bytes, times)
    for i, j in zip(batches, numbers.start_indices_batching_dims, strict=True):
        strands.tie(table.dims[i], index.dims[j])
    out: list[int | None] = [None] * len(shape_of(eqn.outvars[0]))
    kept = [dim for i, dim in enumerate(table.dims) if i not in gone]
    for place, dim in zip(numbers.offset_dims, kept, strict=True):
        out[place] = dim
    rest = [i for i in range(len(out)) if i not in numbers.offset_dims]
    for place, dim in zip(rest, index.dims[:-1], strict=True):
        out[place] = dim
    return [Value(tuple(out), past)]
