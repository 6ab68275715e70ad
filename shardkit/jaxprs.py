"""Jaxprs as flat lists of equations.

Owns the unwrapping of functions within functions, so that an interpreter sees one
list and can choose its order, and a search misses nothing. It interprets nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.extend import core, source_info_util

__all__ = ["Step", "equations", "flatten", "handed_on", "results", "scan_parts"]

_WRAPPERS = frozenset(
    """checkpoint closed_call core_call custom_jvp_call custom_vjp_call
    custom_vjp_call_jaxpr jit pjit remat remat2""".split()
)

Step = tuple[core.JaxprEqn, list[int], list[int]]
"""An equation, the numbers of its arguments and those of its results."""


def flatten(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Any],
    values: list[Any],
    wrap: Callable[[Any], Any],
) -> tuple[list[Step], list[int]]:
    """Lists all equations, those of wrapped functions too, over numbered values.

    Args:
        jaxpr: The function.
        consts: Its constants.
        args: Its arguments.
        values: Gets a place for every value; those known are filled in.
        wrap: Makes a value of a constant.

    Returns:
        The equations, and the numbers of the results.
    """
    steps: list[Step] = []

    def new(value: Any = None) -> int:
        values.append(value)
        return len(values) - 1

    def walk(jaxpr: core.Jaxpr, consts: Sequence[Any], ins: list[int]) -> list[int]:
        places = dict(zip(jaxpr.constvars, [new(wrap(c)) for c in consts], strict=True))
        places.update(zip(jaxpr.invars, ins, strict=True))

        def place(atom: Any) -> int:
            return (
                new(wrap(atom.val)) if isinstance(atom, core.Literal) else places[atom]
            )

        for eqn in jaxpr.eqns:
            eqn_ins = [place(atom) for atom in eqn.invars]
            inner = inner_jaxpr(eqn)
            if inner is not None:
                outs = walk(inner.jaxpr, inner.consts, eqn_ins)
            else:
                outs = [new() for _ in eqn.outvars]
                steps.append((eqn, eqn_ins, outs))
            places.update(zip(eqn.outvars, outs, strict=True))
        return [place(atom) for atom in jaxpr.outvars]

    outs = walk(jaxpr, consts, [new(arg) for arg in args])
    return steps, outs


def results(eqn: core.JaxprEqn, arrays: list[Any]) -> list[Any]:
    """Carries out an equation as it stands."""
    out = eqn.primitive.bind(*arrays, **eqn.params)
    return list(out) if eqn.primitive.multiple_results else [out]


def inner_jaxpr(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Returns the body of an equation that merely wraps another function."""
    # Others have bodies too, which they run many times or on parts of their operands.
    if eqn.primitive.name not in _WRAPPERS:
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        body = eqn.params.get(name)
        if body is not None:
            return body if hasattr(body, "consts") else core.ClosedJaxpr(body, ())
    return None


def scan_parts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """Counts a scan's constants and what it carries; the other arguments are rows."""
    # They are spelled otherwise from version to version of JAX; what is cut into rows
    # has one dim less inside.
    body = eqn.params["jaxpr"].jaxpr
    pairs = zip(eqn.invars, body.invars, strict=True)
    num_rows = sum(_num_dims(a) != _num_dims(b) for a, b in pairs)
    pairs = zip(eqn.outvars, body.outvars, strict=True)
    num_carry = sum(_num_dims(a) == _num_dims(b) for a, b in pairs)
    return len(eqn.invars) - num_rows - num_carry, num_carry


def _num_dims(atom: Any) -> int:
    return len(getattr(atom.aval, "shape", ()))


def equations(jaxpr: Any, line: str = "") -> Iterator[tuple[core.JaxprEqn, str]]:
    """Yields every equation of a jaxpr, open or closed, and of all within it.

    Args:
        jaxpr: The jaxpr.
        line: The source line that it is called from.

    Returns:
        Each with its source line. What JAX has jitted itself, such as `jnp.take`, has
        none of its own, but that of the call.
    """
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        here = source_info_util.summarize(eqn.source_info) or line
        yield eqn, here
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner, here)


def handed_on(jaxpr: core.Jaxpr) -> list[int | None]:
    """Says of each result which argument it is, untouched; None if it is none.

    Example:
        >>> import jax
        >>> traced = jax.make_jaxpr(jax.jit(lambda a, b: (b, a + b)))(1.0, 2.0)
        >>> handed_on(traced.jaxpr)
        [1, None]
    """
    known = {id(var): i for i, var in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        inner = inner_jaxpr(eqn)
        if inner is None:
            continue
        for var, i in zip(eqn.outvars, handed_on(inner.jaxpr), strict=True):
            if i is not None and id(eqn.invars[i]) in known:
                known[id(var)] = known[id(eqn.invars[i])]
    return [known.get(id(var)) for var in jaxpr.outvars]
