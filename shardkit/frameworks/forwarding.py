"""What a function hands on untouched, also through functions inside it.

Owns one question: is an output the very input at its place? A transformed function
(`jit`, `checkpoint`, `scan`) inside returns new arrays even of what it never changed,
so that identity is not enough, and what is found is read from the trace.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal

from shardkit.jaxprs import flatten

__all__ = ["is_forwarded"]


def is_forwarded(fn: Callable[..., Any], *args: Any) -> list[bool]:
    """Whether each output is the input of the same number.

    Args:
        fn: Returns as many arrays as it is given.
        *args: Trees of arrays.

    Example:
        >>> inner = jax.jit(lambda a, b: (a, b + 1))
        >>> is_forwarded(lambda a, b: inner(a, b), 1.0, 2.0)
        [True, False]
        >>> layers = jax.numpy.ones((3, 2))
        >>> scan = lambda x, w: jax.lax.scan(lambda x, w: (x * w, w), x, w)
        >>> is_forwarded(scan, jax.numpy.ones(2), layers)
        [False, True]
    """
    return _forwarded(jax.make_jaxpr(fn)(*args))


def _forwarded(closed: Any) -> list[bool]:
    numbers = range(len(closed.jaxpr.invars))
    steps, outs = flatten(
        closed.jaxpr, closed.consts, [None for _ in numbers], [], lambda _: None
    )
    origins: dict[int, int] = {}
    for eqn, given, made in steps:
        if eqn.primitive.name == "scan":
            sources = [origins.get(number, number) for number in given]
            origins.update(_through_scan(eqn, sources, made))
    found = [origins.get(number, number) for number in outs]
    return [a == b for a, b in zip(found, numbers, strict=True)]


def _through_scan(eqn: Any, given: list[int], made: list[int]) -> dict[int, int]:
    """Result → argument, for carries that stay and slices put back as they were."""
    body = eqn.params["jaxpr"].jaxpr
    # Counted by ranks, since versions of JAX write the numbers down differently.
    num_carry = _count_whole(eqn.outvars, body.outvars)
    num_consts = _count_whole(eqn.invars, body.invars) - num_carry
    places = {var: place for place, var in enumerate(body.invars)}
    found = {}
    for number, out in enumerate(body.outvars):
        place = None if isinstance(out, Literal) else places.get(out)
        if number < num_carry:
            is_same = place == num_consts + number
        else:
            is_same = place is not None and place >= num_consts + num_carry
        if is_same and place is not None:
            found[made[number]] = given[place]
    return found


def _count_whole(outer: list[Any], inner: list[Any]) -> int:
    """How many a scan does not cut into slices."""
    pairs = zip(outer, inner, strict=True)
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)
