"""How single operations tie dims together.

Owns one rule per family of operations: which dims of the results are those of which
arguments, which products and sums a dim meets, and what needs it whole. Invariant: what
is in no list needs all its arguments whole, so that what nobody knows is never cut.
The walk over programs is in `strand_walk`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.extend import core

from shardkit.operations import is_elementwise
from shardkit.planner.ledger import bytes_of
from shardkit.planner.strands import Dims, Past, Strands, Value

__all__ = ["RULES", "default_rule"]

Values = list[Value]
Rule = Callable[[core.JaxprEqn, Values, Strands, int], Values]
"""`(equation, arguments, strands, how often it runs) → results`."""

_ADDING = ("add", "add_any", "sub")


def default_rule(
    eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int
) -> Values:
    """Elementwise where the operation is known to be; else everything stays whole."""
    if is_elementwise(eqn, exact=False):
        return _elementwise(eqn, ins, strands, times)
    for value in ins:
        strands.keep_whole(value.dims, f"{eqn.primitive.name} is not followed")
    return _made(eqn, ins, strands)


def _shape(atom: Any) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())


def _past(values: Values) -> Past:
    past = Past()
    for value in values:
        past |= value.past
    return past


def _made(eqn: core.JaxprEqn, ins: Values, strands: Strands) -> Values:
    """Results that are tied to nothing."""
    return [Value(strands.new(_shape(var)), _past(ins)) for var in eqn.outvars]


def _tie(strands: Strands, one: Dims, other: Dims) -> Dims:
    for a, b in zip(one, other, strict=True):
        strands.tie(a, b)
    return tuple(b if a is None else a for a, b in zip(one, other, strict=True))


def _elementwise(
    eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int
) -> Values:
    wide = [value for value in ins if value.dims]
    dims = strands.new(()) if not wide else wide[0].dims
    for value in wide[1:]:
        dims = _tie(strands, dims, value.dims)
    if eqn.primitive.name in _ADDING and len(wide) == 2:
        (left, one, _), (right, other, _) = wide
        for dim in {a for a, b in zip(left, right, strict=True) if None not in (a, b)}:
            strands.skips.append((dim, one.sources, other.met))
            strands.skips.append((dim, other.sources, one.met))
    # What is made of parameters alone is one still.
    is_leaf = wide and all(value.leaf is not None for value in wide)
    leaf = wide[0].leaf if is_leaf else None
    return [Value(dims, _past(ins), leaf) for _ in eqn.outvars]


def _view(dims: Callable[[core.JaxprEqn, Dims, Strands], Dims]) -> Rule:
    """A rule for what only arranges the elements of its first argument otherwise."""

    def rule(eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int) -> Values:
        return [Value(dims(eqn, ins[0].dims, strands), _past(ins), ins[0].leaf)]

    return rule


def _broadcast(eqn: core.JaxprEqn, dims: Dims, strands: Strands) -> Dims:
    out = list(strands.new(eqn.params["shape"]))
    for place, dim in zip(eqn.params["broadcast_dimensions"], dims, strict=True):
        out[place] = out[place] if dim is None else dim
    return tuple(out)


def _reshape(eqn: core.JaxprEqn, dims: Dims, strands: Strands) -> Dims:
    """Of dims that become one, and of those that one becomes, the first is cut."""
    before, after = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    out = list(strands.new(after))
    for sources, targets in _groups(before, after):
        is_clear = len(sources) == 1 or len(targets) == 1
        if is_clear and sources and targets:
            strands.tie(dims[sources[0]], out[targets[0]])
            sources, targets = sources[1:], targets[1:]
        why = "a reshape takes it apart"
        strands.keep_whole([dims[i] for i in sources], why)
        strands.keep_whole([out[j] for j in targets], why)
    return tuple(out)


def _groups(
    before: Sequence[int], after: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the fewest dims before and after that have as many elements.

    >>> list(_groups((6, 1, 4), (2, 3, 4)))
    [([0], [0, 1]), ([2], [2])]
    """
    wide = [i for i, size in enumerate(before) if size != 1]
    others = [j for j, size in enumerate(after) if size != 1]
    while wide and others and math.prod(before):
        sources, targets = [wide.pop(0)], [others.pop(0)]
        left, right = before[sources[0]], after[targets[0]]
        while left != right:
            if left < right:
                sources.append(wide.pop(0))
                left *= before[sources[-1]]
            else:
                targets.append(others.pop(0))
                right *= after[targets[-1]]
        yield sources, targets


def _whole_places(why: str, places: Callable[[core.JaxprEqn], Any]) -> Rule:
    """A rule for what needs some dims of its arguments whole; all are shaped alike.

    The results have the other dims.
    """

    def rule(eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int) -> Values:
        found = places(eqn)
        whole = {found} if isinstance(found, int) else set(found)
        wide = [value for value in ins if len(value.dims) == len(ins[0].dims)]
        outs = [list(strands.new(_shape(var))) for var in eqn.outvars]
        for i in range(len(ins[0].dims)):
            if i in whole:
                strands.keep_whole([value.dims[i] for value in wide], why)
                continue
            for value in wide[1:]:
                strands.tie(wide[0].dims[i], value.dims[i])
            for out in outs:
                out[i] = wide[0].dims[i]
        return [Value(tuple(out), _past(ins), ins[0].leaf) for out in outs]

    return rule


def _changed(eqn: core.JaxprEqn) -> list[int]:
    """The dims of which only a part is taken."""
    pairs = zip(_shape(eqn.invars[0]), _shape(eqn.outvars[0]), strict=True)
    return [i for i, (a, b) in enumerate(pairs) if a != b]


def _padded(eqn: core.JaxprEqn) -> list[int]:
    return [i for i, pad in enumerate(eqn.params["padding_config"]) if any(pad)]


def _update_slice(
    eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int
) -> Values:
    whole = _shape(eqn.invars[0])
    for i, (size, part) in enumerate(zip(whole, _shape(eqn.invars[1]), strict=True)):
        one, other = ins[0].dims[i], ins[1].dims[i]
        if size == part:
            strands.tie(one, other)
        else:
            strands.keep_whole([one, other], "a part of it is written")
    return [Value(ins[0].dims, _past(ins))]


def _stack(eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int) -> Values:
    dims = ins[0].dims
    for value in ins[1:]:
        dims = _tie(strands, dims, value.dims)
    place = eqn.params["axis"]
    [new] = strands.new((len(ins),))
    strands.keep_whole([new], "it is stacked")
    return [Value((*dims[:place], new, *dims[place:]), _past(ins))]


def _unstack(eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int) -> Values:
    place, dims = eqn.params["axis"], ins[0].dims
    strands.keep_whole([dims[place]], "a part of it is taken")
    rest = (*dims[:place], *dims[place + 1 :])
    return [Value(rest, ins[0].past, ins[0].leaf) for _ in eqn.outvars]


def _reduce(kind: str) -> Rule:
    def rule(eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int) -> Values:
        places, [value, *_] = eqn.params["axes"], ins
        out: Any = eqn.outvars[0].aval
        num_bytes = bytes_of(out)
        if kind == "argmax":
            # A device says where its largest element is, and how large that is.
            num_bytes += (
                out.size
                * bytes_of(eqn.invars[0].aval)
                // max(math.prod(_shape(eqn.invars[0])), 1)
            )
        past = value.past
        for place in places:
            past |= strands.meet(kind, value.dims[place], None, num_bytes, times)
        rest = tuple(dim for i, dim in enumerate(value.dims) if i not in places)
        return [Value(rest, past, value.leaf) for _ in eqn.outvars]

    return rule


def _product(eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int) -> Values:
    """What is summed over ends there; the other dims of a parameter begin."""
    sums, batches = eqn.params["dimension_numbers"]
    left, right = ins
    num_bytes = bytes_of(eqn.outvars[0].aval)
    leaf = right.leaf if left.leaf is None else left.leaf
    before, terms = _past(ins), 1
    past = Past(before.met) | strands.source()
    for i, j in zip(*sums, strict=True):
        strands.tie(left.dims[i], right.dims[j])
        terms *= _shape(eqn.invars[0])[i]
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
    work = 2 * math.prod(_shape(eqn.outvars[0])) * terms * times
    strands.products.append(((*left.dims, *right.dims), work))
    return [Value(tuple(out), past)]


def _gather(eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int) -> Values:
    """Rows of a table: those of other devices count as zeros, and are added."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    [table, index, *_], shape = ins, _shape(eqn.invars[0])
    batches = numbers.operand_batching_dims
    gone = (*numbers.collapsed_slice_dims, *batches)
    is_plain = (
        len(numbers.start_index_map) == 1
        and numbers.collapsed_slice_dims == numbers.start_index_map
        and all(sizes[i] == n for i, n in enumerate(shape) if i not in gone)
    )
    if not is_plain:
        strands.keep_whole(table.dims, "elements are looked up by several dims")
        return _made(eqn, ins, strands)
    [looked] = numbers.start_index_map
    # Looking up among activations, as the label of a loss, is a sum like others.
    kind = "sum" if table.leaf is None else "lookup"
    num_bytes = bytes_of(eqn.outvars[0].aval)
    past = Past(_past(ins).met) | strands.source()
    past |= strands.meet(kind, table.dims[looked], table.leaf, num_bytes, times)
    for i, j in zip(batches, numbers.start_indices_batching_dims, strict=True):
        strands.tie(table.dims[i], index.dims[j])
    out: list[int | None] = [None] * len(_shape(eqn.outvars[0]))
    kept = [dim for i, dim in enumerate(table.dims) if i not in gone]
    for place, dim in zip(numbers.offset_dims, kept, strict=True):
        out[place] = dim
    rest = [i for i in range(len(out)) if i not in numbers.offset_dims]
    for place, dim in zip(rest, index.dims[:-1], strict=True):
        out[place] = dim
    return [Value(tuple(out), past)]


def _each(eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int) -> Values:
    return ins


_PART = _whole_places("a part of it is taken", _changed)

RULES: dict[str, Rule] = {
    "broadcast_in_dim": _view(_broadcast),
    "reshape": _view(_reshape),
    "squeeze": _view(
        lambda eqn, dims, _: tuple(
            dim for i, dim in enumerate(dims) if i not in eqn.params["dimensions"]
        )
    ),
    "transpose": _view(
        lambda eqn, dims, _: tuple(dims[i] for i in eqn.params["permutation"])
    ),
    "slice": _PART,
    "dynamic_slice": _PART,
    "pad": _whole_places("it is padded", _padded),
    "rev": _whole_places("it is turned round", lambda eqn: eqn.params["dimensions"]),
    "sort": _whole_places("it is sorted", lambda eqn: eqn.params["dimension"]),
    "top_k": _whole_places("it is sorted", lambda eqn: eqn.params["axis"]),
    "split": _whole_places("a part of it is taken", lambda eqn: eqn.params["axis"]),
    "concatenate": _whole_places(
        "it is put together of parts", lambda eqn: eqn.params["dimension"]
    ),
    **dict.fromkeys(
        ("cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp"),
        _whole_places("it is summed up bit by bit", lambda eqn: eqn.params["axis"]),
    ),
    "dynamic_update_slice": _update_slice,
    "stack": _stack,
    "unstack": _unstack,
    "gather": _gather,
    "dot_general": _product,
    **dict.fromkeys(("argmax", "argmin"), _reduce("argmax")),
    **dict.fromkeys(
        (
            "reduce_sum",
            "reduce_max",
            "reduce_min",
            "reduce_prod",
            "reduce_and",
            "reduce_or",
        ),
        _reduce("sum"),
    ),
    **dict.fromkeys(("optimization_barrier", "sharding_constraint"), _each),
}
