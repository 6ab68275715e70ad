"""What is alive at once while a program runs on one device.

Owns the peak of a jaxpr's own values, those of loops and branches included. It is that
of a compiler that runs the equations in their order, fuses what works elementwise into
its readers, and writes a result where an argument of its size is no longer needed. Real
ones reorder and lay out, so that it is an estimate: beside XLA's for the CPU it was
found within a quarter for most models. `compile_microbatch` asks the compiler itself.
"""

import dataclasses
from typing import Any

from jax.extend import core

from shardkit.jaxprs import Step, flatten
from shardkit.planner.ledger import bytes_of

__all__ = ["peak_bytes"]

# What a compiler computes anew inside whatever reads it, as it costs next to nothing.
_CHEAP = frozenset(
    """abs add add_any and bitcast_convert_type broadcast_in_dim convert_element_type
    copy eq expand_dims ge gt iota le lt max min mul ne neg not or reshape select_n
    shift_left shift_right_arithmetic shift_right_logical sign slice squeeze sub
    stop_gradient transpose xor integer_pow square rev concatenate pad clamp
    is_finite round floor ceil split""".split()
)
# What is computed inside its only reader, or else written.
_DEAR = frozenset(
    """cos div erf erf_inv exp exp2 expm1 log log1p logistic pow rem rsqrt sin sqrt tan
    tanh random_bits threefry2x32 random_wrap random_unwrap random_fold_in
    dynamic_slice gather reduce_precision""".split()
)
_REDUCTIONS = frozenset(
    """reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin
    """.split()
)
_LOOPS = ("scan", "while", "cond")
# Views that share the bytes of their argument.
_VIEWS = frozenset(
    "reshape squeeze expand_dims copy stop_gradient optimization_barrier".split()
)


@dataclasses.dataclass
class _Value:
    """A number of `flatten`'s, as a compiler would treat it.

    Attributes:
        aval: Its shape and dtype; None for a constant.
        sources: The buffers that are read when it is read: itself, if it is written.
        is_argument: Whether it lives outside.
    """

    aval: Any = None
    sources: frozenset[int] = frozenset()
    is_argument: bool = False


def peak_bytes(closed: Any) -> int:
    """Returns the most bytes that a program's own values and results take at once.

    Args:
        closed: A closed jaxpr. Its arguments are not counted.

    Example:
        >>> import jax
        >>> x = jax.numpy.ones((256, 256))
        >>> program = jax.make_jaxpr(lambda x: jax.numpy.sum((x @ x) @ x))(x)
        >>> peak_bytes(program) // x.nbytes
        2
    """
    values: list[Any] = []
    jaxpr = closed.jaxpr
    args = [_Value(var.aval, is_argument=True) for var in jaxpr.invars]
    steps, outs = flatten(
        jaxpr, closed.consts, args, values, lambda _: _Value(is_argument=True)
    )
    values[:] = [v if isinstance(v, _Value) else _Value() for v in values]
    readers: dict[int, list[int]] = {}
    for place, (_, ins, _) in enumerate(steps):
        for number in ins:
            readers.setdefault(number, []).append(place)
    _find_buffers(steps, values, readers, set(outs))
    return _simulate(steps, values, outs)


def _find_buffers(
    steps: list[Step],
    values: list[_Value],
    readers: dict[int, list[int]],
    outs: set[int],
) -> None:
    """Settles for every value which buffers are read when it is."""
    for number, value in enumerate(values):
        if value.is_argument:
            value.sources = frozenset({number})
    for eqn, ins, results in steps:
        name = eqn.primitive.name
        reads = (
            frozenset().union(*(values[i].sources for i in ins)) if ins else frozenset()
        )
        for number, var in zip(results, eqn.outvars, strict=True):
            value = values[number]
            value.aval = var.aval
            if name in _VIEWS and len(values[ins[0]].sources) == 1 and name != "copy":
                value.sources = values[ins[results.index(number)]].sources
            elif _is_fused(name, number, steps, readers, outs):
                value.sources = reads
            else:
                value.sources = frozenset({number})


def _is_fused(
    name: str,
    number: int,
    steps: list[Step],
    readers: dict[int, list[int]],
    outs: set[int],
) -> bool:
    """Whether a value is computed inside its readers and never written."""
    if number in outs:
        return False
    if name in _CHEAP:
        limit = None
    elif name in _DEAR:
        limit = 1
    else:
        return False
    places = readers.get(number, [])
    if limit is not None and len(places) > limit:
        return False
    kinds = [steps[place][0].primitive.name for place in places]
    return all(k in _CHEAP or k in _DEAR or k in _REDUCTIONS for k in kinds)


def _simulate(steps: list[Step], values: list[_Value], outs: list[int]) -> int:
    """Walks the program, with every buffer from its making to its last reading."""
    last: dict[int, int] = {}
    for place, (_, ins, _) in enumerate(steps):
        for number in ins:
            for source in values[number].sources:
                last[source] = place
    for number in outs:
        for source in values[number].sources:
            last[source] = len(steps)
    copies = _orientations(steps, values)
    alive: dict[int, int] = {}
    now = peak = 0
    for place, (eqn, ins, results) in enumerate(steps):
        made = {
            number: bytes_of(values[number].aval) * copies.get(number, 1)
            for number in results
            if number in values[number].sources and number in last
        }
        ending = {
            source
            for number in ins
            for source in values[number].sources
            if last.get(source) == place and source in alive
        }
        reused = _reused(eqn, made, {s: alive[s] for s in ending})
        inside = _inside(eqn)
        peak = max(peak, now + sum(made.values()) - reused + inside)
        for number, size in made.items():
            alive[number] = size
        for source in ending:
            del alive[source]
        now = sum(alive.values())
    return max(peak, now)


def _orientations(steps: list[Step], values: list[_Value]) -> dict[int, int]:
    """In how many layouts products read a value."""
    found: dict[int, set[Any]] = {}
    for eqn, ins, _ in steps:
        if eqn.primitive.name == "dot_general":
            sums, _ = eqn.params["dimension_numbers"]
            for number, dims in zip(ins, sums, strict=True):
                for source in values[number].sources:
                    found.setdefault(source, set()).add(tuple(dims))
    return {number: len(kinds) for number, kinds in found.items()}


def _reused(eqn: core.JaxprEqn, made: dict[int, int], ending: dict[int, int]) -> int:
    """Bytes of results that are written where an argument lay."""
    if eqn.primitive.name in ("dot_general", "conv_general_dilated", "sort", "gather"):
        return 0
    free, total = sorted(ending.values()), 0
    for size in sorted(made.values()):
        if size in free:
            free.remove(size)
            total += size
    return total


def _inside(eqn: core.JaxprEqn) -> int:
    """What an equation needs besides its arguments and results."""
    name = eqn.primitive.name
    if name == "scan":
        body = eqn.params["jaxpr"]
        return peak_bytes(body) + _sliced(eqn, body.jaxpr)
    if name == "while":
        return peak_bytes(eqn.params["body_jaxpr"])
    if name == "cond":
        return max(peak_bytes(branch) for branch in eqn.params["branches"])
    if name == "dot_general":
        return _copied(eqn)
    return 0


def _sliced(eqn: core.JaxprEqn, body: core.Jaxpr) -> int:
    """The rows of a pass of a loop, which are copied out for products to read."""
    return sum(
        bytes_of(b.aval)
        for a, b in zip(eqn.invars, body.invars, strict=True)
        if _ndim(a) != _ndim(b) and _ndim(b) > 1
    )


def _ndim(atom: Any) -> int:
    return len(getattr(atom.aval, "shape", ()))


def _copied(eqn: core.JaxprEqn) -> int:
    """Operands of a product of batches that have to be laid out anew."""
    sums, batches = eqn.params["dimension_numbers"]
    total = 0
    for atom, summed, batch in zip(eqn.invars, sums, batches, strict=True):
        aval: Any = atom.aval
        leading = tuple(batch) == tuple(range(len(batch)))
        edge = len(aval.shape) - len(summed)
        last = tuple(sorted(summed)) == tuple(range(edge, len(aval.shape)))
        first = tuple(sorted(summed)) == tuple(
            range(len(batch), len(batch) + len(summed))
        )
        if not (leading and (last or first)):
            total += bytes_of(aval)
    return total
