"""How single operations pass cuts on.

Owns one rule per family of operations: from how arguments are cut to how results are,
noting what must be exchanged for it. Invariant: no result is cut twice by one axis.
Products are in `flow_products`; the walk over programs is `flow`'s.
"""

from collections.abc import Callable, Iterator
from typing import Any

from jax.extend import core

from shardkit.operations import CUMULATIVE, REDUCTIONS
from shardkit.planner.flow_products import (
    Cuts,
    avals_of,
    convolution,
    gather,
    product,
    settle,
)
from shardkit.planner.ledger import Cut, Entry, Ledger, axes_in, joined

__all__ = ["RULES", "default_rule"]

Rule = Callable[[core.JaxprEqn, Cuts, Ledger], tuple[Cuts, Cuts]]
"""`(equation, cuts of arguments, ledger) → (those once settled, cuts of results)`."""


def default_rule(eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger) -> tuple[Cuts, Cuts]:
    """Elementwise where the shapes say so; otherwise everything is made whole."""
    avals = avals_of(eqn)
    shape = getattr(eqn.outvars[0].aval, "shape", ()) if eqn.outvars else ()
    shapes = [getattr(aval, "shape", ()) for aval in avals]
    wide = [i for i, found in enumerate(shapes) if found]
    if wide and all(_fits(shapes[i], shape) for i in wide):
        return _elementwise(eqn, ins, ledger, wide)
    return _whole(eqn, ins, ledger)


def _whole(eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger) -> tuple[Cuts, Cuts]:
    avals = avals_of(eqn)
    settled = [settle(a, c, ledger) for a, c in zip(avals, ins, strict=True)]
    for i, cut in enumerate(settled):
        for axis in sorted(cut.axes):
            settled[i] = gather(avals[i], settled[i], axis, ledger)
            _note(ledger, f"{eqn.primitive.name} is not followed: made whole")
    return settled, [Cut.whole(var.aval) for var in eqn.outvars]


def _fits(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether an argument has a result's dims, those of size 1 being repeated."""
    return len(found) == len(shape) and all(
        a in (1, b) for a, b in zip(found, shape, strict=True)
    )


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _note(ledger: Ledger, note: str) -> None:
    if note not in ledger.notes:
        ledger.notes.append(note)


def _elementwise(
    eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger, alike: list[int]
) -> tuple[Cuts, Cuts]:
    avals = avals_of(eqn)
    partials = {ins[i].partial for i in alike}
    if eqn.primitive.name in ("add", "add_any", "sub") and len(partials) == 1:
        # Sums of addends are addends: one exchange serves them all.
        dims = _join(avals, ins, alike, ledger)
        return ins, [Cut(dims, partials.pop())]
    settled = list(ins)
    for i in alike:
        others = [ins[j] for j in alike if j != i and ins[j].axes]
        like = others[0] if others else None
        settled[i] = settle(avals[i], ins[i], ledger, like)
    dims = _join(avals, settled, alike, ledger)
    return settled, [Cut(dims) for _ in eqn.outvars]


def _join(
    avals: list[Any], cuts: Cuts, alike: list[int], ledger: Ledger
) -> tuple[Entry, ...]:
    """Cuts a result as its arguments are; those cut otherwise are dealt out again."""
    out = Cut((None,) * len(cuts[alike[0]].dims))
    for i in alike:
        for place, entry in enumerate(cuts[i].dims):
            for axis in axes_in(entry):
                if out.place(axis) < 0:
                    out = out.cut_at(place, axis)
                elif out.place(axis) != place:
                    ledger.exchange("all-to-all", axis, avals[i], cuts[i])
    return out.dims


def _view(dims: Callable[[core.JaxprEqn, Cut], tuple[Entry, ...]]) -> Rule:
    """A rule for what moves elements of its first argument, addends or not."""

    def rule(eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger) -> tuple[Cuts, Cuts]:
        return ins, [Cut(dims(eqn, ins[0]), ins[0].partial)]

    return rule


def _broadcast(eqn: core.JaxprEqn, cut: Cut) -> tuple[Entry, ...]:
    dims: list[Entry] = [None] * len(eqn.params["shape"])
    places = eqn.params["broadcast_dimensions"]
    for place, axis, size in zip(places, cut.dims, _shape(eqn.invars[0]), strict=True):
        dims[place] = axis if size == eqn.params["shape"][place] else None
    return tuple(dims)


def _reshape(eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger) -> tuple[Cuts, Cuts]:
    """Dims that become one stay cut where each device keeps a run of them.

    That is so for the cuts of the first of them; what cuts a further one is gathered.
    """
    aval, cut = avals_of(eqn)[0], ins[0]
    before, after = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    dims: list[Entry] = [None] * len(after)
    for sources, targets in _runs(before, after):
        wide = [d for d in sources if before[d] > 1]
        room = [d for d in targets if after[d] > 1]
        for place in wide:
            axes = axes_in(cut.dims[place])
            if place == wide[0] and room:
                dims[room[0]] = joined(axes)
                continue
            for axis in axes:
                cut = gather(aval, settle(aval, cut, ledger), axis, ledger)
    return [cut, *ins[1:]], [Cut(tuple(dims), cut.partial)]


def _runs(
    before: tuple[int, ...], after: tuple[int, ...]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the dims that become which dims."""
    i = j = 0
    while i < len(before) and j < len(after):
        sources, targets = [i], [j]
        left, right = before[i], after[j]
        while left != right:
            if left < right and sources[-1] + 1 < len(before):
                sources.append(sources[-1] + 1)
                left *= before[sources[-1]]
            elif left > right and targets[-1] + 1 < len(after):
                targets.append(targets[-1] + 1)
                right *= after[targets[-1]]
            else:
                return
        yield sources, targets
        i, j = sources[-1] + 1, targets[-1] + 1


def _constraint(eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger) -> tuple[Cuts, Cuts]:
    """Cuts a value as was asked for; what is not named may stay as it is."""
    aval: Any = eqn.invars[0].aval
    spec = eqn.params["sharding"].spec
    free = eqn.params["unconstrained_dims"]
    entries = [*spec, *[None] * (len(aval.shape) - len(spec))]
    wanted = {
        axis: d
        for d, entry in enumerate(entries)
        if d not in free and aval.shape[d] > 1
        for axis in axes_in(entry)
    }
    like = Cut(tuple(None if d in free else e for d, e in enumerate(entries)))
    settled = cut = settle(aval, ins[0], ledger, like)
    for axis in sorted(settled.axes):
        place = settled.place(axis)
        if axis in wanted and wanted[axis] != place:
            ledger.exchange("all-to-all", axis, aval, cut)
            cut = cut.without(axis).cut_at(wanted[axis], axis)
        elif axis not in wanted and place not in free:
            cut = gather(aval, cut, axis, ledger)
    for axis, place in wanted.items():
        if axis not in cut.axes:
            cut = cut.cut_at(place, axis)
    return [settled], [cut]


def _slice(eqn: core.JaxprEqn, cut: Cut) -> tuple[Entry, ...]:
    """What is cut off at the ends of a dim leaves it cut; a single element does not."""
    out: Any = eqn.outvars[0].aval
    return tuple(a if n > 1 else None for a, n in zip(cut.dims, out.shape, strict=True))


def _along(*names: str) -> Rule:
    """A rule for what needs the dims named by its parameters whole."""

    def rule(eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger) -> tuple[Cuts, Cuts]:
        avals = avals_of(eqn)
        settled = [settle(a, c, ledger) for a, c in zip(avals, ins, strict=True)]
        for name in names:
            places = eqn.params.get(name, ())
            for place in places if isinstance(places, tuple) else (places,):
                for i, cut in enumerate(settled):
                    entry = cut.dims[place] if place < len(cut.dims) else None
                    for axis in axes_in(entry):
                        settled[i] = gather(avals[i], settled[i], axis, ledger)
        return settled, [
            Cut(settled[min(i, len(ins) - 1)].dims) for i in range(len(eqn.outvars))
        ]

    return rule


def _reduce(eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger) -> tuple[Cuts, Cuts]:
    [aval, *_], [cut, *_] = avals_of(eqn), ins
    places = eqn.params["axes"]
    is_sum = eqn.primitive.name == "reduce_sum"
    if not is_sum:
        cut = settle(aval, cut, ledger)
    dims = tuple(a for i, a in enumerate(cut.dims) if i not in places)
    over = Cut(tuple(a for i, a in enumerate(cut.dims) if i in places)).axes
    if over and eqn.primitive.name in ("argmax", "argmin"):
        # Each device's best, and where that is.
        for axis in sorted(over):
            size = Cut(dims)
            ledger.collect(axis, eqn.outvars[0].aval.update(dtype=aval.dtype), size)
            ledger.collect(axis, eqn.outvars[0].aval, size)
        return [cut, *ins[1:]], [Cut(dims)]
    out = Cut(dims, cut.partial | over)
    if not is_sum:
        out = settle(eqn.outvars[0].aval, out, ledger)
    return [cut, *ins[1:]], [out] * len(eqn.outvars)


def _concatenate(eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger) -> tuple[Cuts, Cuts]:
    avals = avals_of(eqn)
    settled = [settle(a, c, ledger) for a, c in zip(avals, ins, strict=True)]
    dims = _join(avals, settled, list(range(len(ins))), ledger)
    return settled, [Cut(dims)]


def _stack(eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger) -> tuple[Cuts, Cuts]:
    settled, [out] = _concatenate(eqn, ins, ledger)
    place = eqn.params["axis"]
    return settled, [Cut((*out.dims[:place], None, *out.dims[place:]))]


def _unstack(eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger) -> tuple[Cuts, Cuts]:
    place = eqn.params["axis"]
    dims = (*ins[0].dims[:place], *ins[0].dims[place + 1 :])
    return ins, [Cut(dims, ins[0].partial) for _ in eqn.outvars]


def _dynamic_update_slice(
    eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger
) -> tuple[Cuts, Cuts]:
    if ins[0].partial == ins[1].partial:
        return ins, [Cut(ins[0].dims, ins[0].partial)]
    avals = avals_of(eqn)
    settled = [settle(a, c, ledger) for a, c in zip(avals, ins, strict=True)]
    return settled, [Cut(settled[0].dims)]


def _gather_rule(eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger) -> tuple[Cuts, Cuts]:
    """Looking up rows: those of other devices count as zeros, and are added."""
    avals, numbers = avals_of(eqn), eqn.params["dimension_numbers"]
    table, index = (settle(a, c, ledger) for a, c in zip(avals, ins, strict=True))
    out: Any = eqn.outvars[0].aval
    hidden = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [d for d in range(len(table.dims)) if d not in hidden]
    dims: list[Entry] = [None] * len(out.shape)
    for place, dim in zip(numbers.offset_dims, kept, strict=True):
        dims[place] = table.dims[dim]
    rest = [d for d in range(len(dims)) if d not in numbers.offset_dims]
    for place, entry in zip(rest, index.dims, strict=False):
        taken = Cut(tuple(dims)).axes
        dims[place] = joined(axis for axis in axes_in(entry) if axis not in taken)
    over = Cut(tuple(table.dims[d] for d in hidden)).axes - Cut(tuple(dims)).axes
    return [table, index], [Cut(tuple(dims), over)]


RULES: dict[str, Rule] = {
    "broadcast_in_dim": _view(_broadcast),
    "reshape": _reshape,
    "transpose": _view(
        lambda eqn, cut: tuple(cut.dims[i] for i in eqn.params["permutation"])
    ),
    "squeeze": _view(
        lambda eqn, cut: tuple(
            a for i, a in enumerate(cut.dims) if i not in eqn.params["dimensions"]
        )
    ),
    "expand_dims": _reshape,
    "slice": _view(_slice),
    "dynamic_slice": _view(_slice),
    "pad": _view(_slice),
    "dynamic_update_slice": _dynamic_update_slice,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "gather": _gather_rule,
    "sharding_constraint": _constraint,
    "dot_general": product,
    "conv_general_dilated": convolution,
    **dict.fromkeys(
        """cholesky eig eigh fft geqrf hessenberg householder_product lu qr schur svd
        triangular_solve tridiagonal_solve""".split(),
        _whole,
    ),
    "split": _along("axis"),
    "sort": _along("dimension"),
    "rev": _along("dimensions"),
    **dict.fromkeys(
        ("convert_element_type", "copy", "neg", "reduce_precision", "copy_p"),
        _view(lambda eqn, cut: cut.dims),
    ),
    **dict.fromkeys((*REDUCTIONS, "argmax", "argmin"), _reduce),
    **dict.fromkeys(CUMULATIVE, _along("axis")),
}


def _optimization_barrier(
    eqn: core.JaxprEqn, ins: Cuts, ledger: Ledger
) -> tuple[Cuts, Cuts]:
    return ins, list(ins)


RULES["optimization_barrier"] = _optimization_barrier
