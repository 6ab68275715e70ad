"""How single operations tie dims together.

Owns one rule per family of operations: which dims of the results are those of which
arguments, which products and sums a dim meets, and what needs it whole. Invariant: what
is in no list needs all its arguments whole, so that what nobody knows is never cut.
Products, sums and look-ups are in `strand_products`, the walk over programs in
`strand_walk`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.extend import core

from shardkit.operations import CUMULATIVE, REDUCTIONS, is_elementwise
from shardkit.planner.strand_products import (
    Rule,
    Values,
    lookup,
    made,
    past_of,
    product,
    reduction,
    shape_of,
)
from shardkit.planner.strands import Dims, Strands, Value

__all__ = ["RULES", "default_rule"]

_ADDING = ("add", "add_any", "sub")


def default_rule(
    eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int
) -> Values:
    """Elementwise where the operation is known to be; else everything stays whole."""
    if is_elementwise(eqn, exact=False):
        return _elementwise(eqn, ins, strands, times)
    for value in ins:
        strands.keep_whole(value.dims, f"{eqn.primitive.name} is not followed")
    return made(eqn, ins, strands)


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
        for dim, like in zip(left, right, strict=True):
            if dim is None or like is None:
                continue
            strands.skips.append((dim, one.sources, other.met))
            strands.skips.append((dim, other.sources, one.met))
    # What is made of parameters alone is one still.
    is_leaf = wide and all(value.leaf is not None for value in wide)
    leaf = wide[0].leaf if is_leaf else None
    return [Value(dims, past_of(ins), leaf) for _ in eqn.outvars]


def _view(dims: Callable[[core.JaxprEqn, Dims, Strands], Dims]) -> Rule:
    """A rule for what only arranges the elements of its first argument otherwise."""

    def rule(eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int) -> Values:
        return [Value(dims(eqn, ins[0].dims, strands), past_of(ins), ins[0].leaf)]

    return rule


def _broadcast(eqn: core.JaxprEqn, dims: Dims, strands: Strands) -> Dims:
    out = list(strands.new(eqn.params["shape"]))
    for place, dim in zip(eqn.params["broadcast_dimensions"], dims, strict=True):
        out[place] = out[place] if dim is None else dim
    return tuple(out)


def _reshape(eqn: core.JaxprEqn, dims: Dims, strands: Strands) -> Dims:
    """Of dims that become one, and of those that one becomes, the first is cut."""
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if (order := eqn.params["dimensions"]) is not None:
        # Another order than that of rows, as Fortran's, is gone through.
        before, dims = tuple(before[i] for i in order), tuple(dims[i] for i in order)
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
        outs = [list(strands.new(shape_of(var))) for var in eqn.outvars]
        for i in range(len(ins[0].dims)):
            if i in whole:
                strands.keep_whole([value.dims[i] for value in wide], why)
                continue
            for value in wide[1:]:
                strands.tie(wide[0].dims[i], value.dims[i])
            for out in outs:
                out[i] = wide[0].dims[i]
        return [Value(tuple(out), past_of(ins), ins[0].leaf) for out in outs]

    return rule


def _changed(eqn: core.JaxprEqn) -> list[int]:
    """The dims of which only a part is taken."""
    pairs = zip(shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]), strict=True)
    return [i for i, (a, b) in enumerate(pairs) if a != b]


def _padded(eqn: core.JaxprEqn) -> list[int]:
    return [i for i, pad in enumerate(eqn.params["padding_config"]) if any(pad)]


def _update_slice(
    eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int
) -> Values:
    whole = shape_of(eqn.invars[0])
    for i, (size, part) in enumerate(zip(whole, shape_of(eqn.invars[1]), strict=True)):
        one, other = ins[0].dims[i], ins[1].dims[i]
        if size == part:
            strands.tie(one, other)
        else:
            strands.keep_whole([one, other], "a part of it is written")
    return [Value(ins[0].dims, past_of(ins))]


def _stack(eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int) -> Values:
    dims = ins[0].dims
    for value in ins[1:]:
        dims = _tie(strands, dims, value.dims)
    place = eqn.params["axis"]
    [new] = strands.new((len(ins),))
    strands.keep_whole([new], "it is stacked")
    return [Value((*dims[:place], new, *dims[place:]), past_of(ins))]


def _unstack(eqn: core.JaxprEqn, ins: Values, strands: Strands, times: int) -> Values:
    place, dims = eqn.params["axis"], ins[0].dims
    strands.keep_whole([dims[place]], "a part of it is taken")
    rest = (*dims[:place], *dims[place + 1 :])
    return [Value(rest, ins[0].past, ins[0].leaf) for _ in eqn.outvars]


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
        CUMULATIVE,
        _whole_places("it is summed up bit by bit", lambda eqn: eqn.params["axis"]),
    ),
    "dynamic_update_slice": _update_slice,
    "stack": _stack,
    "unstack": _unstack,
    "gather": lookup,
    "dot_general": product,
    **dict.fromkeys(("argmax", "argmin"), reduction("argmax")),
    **dict.fromkeys(REDUCTIONS, reduction("sum")),
    **dict.fromkeys(("optimization_barrier", "sharding_constraint"), _each),
}
