"""How values will be read, before they are made.

Owns the way back through a program: a value of which every reader wants a piece need
not be made whole. Invariant: nothing is exchanged for it; only what devices have whole
is cut, so that they compute less. The way forwards is `flow`'s.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend import core

from shardkit.jaxprs import Step
from shardkit.planner.flow_products import Cuts
from shardkit.planner.flow_rules import RULES
from shardkit.planner.ledger import Axes, Cut

__all__ = ["deal_out", "find_wants"]

_MAKERS = ("dot_general", "gather")
_ALIKE = ("convert_element_type", "copy", "neg", "reduce_precision")


def find_wants(
    steps: Sequence[Step], values: Sequence[Cut], results: set[int]
) -> dict[int, Cut]:
    """Says of products and look-ups in which pieces all who read them want them.

    Args:
        steps: The program.
        values: The cut of every value, if none looks ahead.
        results: Which values are results, read by whoever knows.
    """
    wants: dict[int, Cut] = {}
    readers: dict[int, list[Cut]] = {}
    made: dict[int, Cut] = {}
    for eqn, ins, outs in reversed(steps):
        for number in outs:
            found = readers.get(number, [])
            if found and number not in results:
                wants[number] = _common(values[number], found)
        name = eqn.primitive.name
        passes = name not in RULES or name in _ALIKE or name == "sharding_constraint"
        out: Any = eqn.outvars[0].aval if eqn.outvars else None
        for atom, number in zip(eqn.invars, ins, strict=True):
            shape = getattr(atom.aval, "shape", ())
            is_alike = passes and shape == getattr(out, "shape", None)
            wanted = wants.get(outs[0], values[outs[0]]) if is_alike else None
            readers.setdefault(number, []).append(wanted or Cut.whole(atom.aval))
        if name in _MAKERS and outs[0] in wants:
            made[outs[0]] = wants[outs[0]]
    return made


def _common(own: Cut, readers: Sequence[Cut]) -> Cut:
    """How a value is cut, and besides how all of its readers cut it."""
    first, *rest = readers
    for axis in sorted(first.axes - own.axes):
        place = first.place(axis)
        if all(other.place(axis) == place for other in rest):
            own = own.cut_at(place, axis)
    return Cut(own.dims)


def deal_out(eqn: core.JaxprEqn, ins: Cuts, want: Cut) -> Cuts:
    """Cuts arguments that are whole along an axis as a result is wanted."""
    ins = list(ins)
    known: Axes = frozenset().union(*(cut.axes | cut.partial for cut in ins))
    sources = _sources(eqn)
    for axis in sorted(want.axes - known):
        for argument, dim in sources.get(want.place(axis), ()):
            ins[argument] = ins[argument].cut_at(dim, axis)
    return ins


def _sources(eqn: core.JaxprEqn) -> Mapping[int, list[tuple[int, int]]]:
    """For each dim of a result the arguments, and their dims, that it comes from."""
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "gather":
        out: Any = eqn.outvars[0].aval
        rest = [d for d in range(len(out.shape)) if d not in numbers.offset_dims]
        return {d: [(1, i)] for i, d in enumerate(rest)}
    sums, batch = numbers
    found: list[list[tuple[int, int]]] = [
        [(0, i), (1, j)] for i, j in zip(*batch, strict=True)
    ]
    for argument, atom in enumerate(eqn.invars):
        aval: Any = atom.aval
        hidden = (*sums[argument], *batch[argument])
        free = (d for d in range(len(aval.shape)) if d not in hidden)
        found += [[(argument, d)] for d in free]
    return dict(enumerate(found))
