"""Operations that cannot keep their bits, found before anything is compiled.

Owns two lists: what init, losses and updates may not hold in exact mode, since its
bits follow the sharding or host code, and what is refused on GPUs, where a scatter
that adds to one place from several threads adds in whatever order the threads come.
It changes no program.
"""

import os
from typing import Any

from shardkit.errors import InexactError
from shardkit.jaxprs import equations
from shardkit.tree import format_table

__all__ = ["check_atomics", "check_operations", "find_atomics", "find_inexact"]

_FLAG = "--xla_gpu_deterministic_ops=true"
_REFUSED = {
    "rng_bit_generator": "its bits depend on the sharding; use threefry keys",
    "rng_uniform": "its bits depend on the sharding; use threefry keys",
    "pure_callback": "the host code behind it cannot be shown to be exact",
    "io_callback": "the host code behind it cannot be shown to be exact",
}
# How JAX prints the dtype of keys of the one generator that ignores the sharding.
_EXACT_KEY = "key<fry>"


def find_inexact(jaxpr: Any) -> list[tuple[str, str, str]]:
    """Lists `(operation, source line, reason)` of what cannot be exact anywhere.

    Args:
        jaxpr: A jaxpr, open or closed.

    Example:
        >>> import jax
        >>> draw = lambda: jax.random.normal(jax.random.key(0, impl="rbg"))
        >>> sorted({reason for *_, reason in find_inexact(jax.make_jaxpr(draw)())})
        ['its bits depend on the sharding; use threefry keys']
    """
    rows = [
        (name, line, reason)
        for eqn, line in equations(jaxpr)
        for name, reason in _refusals(eqn)
    ]
    return list(dict.fromkeys(rows))


def check_operations(jaxpr: Any, where: str) -> None:
    """Refuses what cannot be exact on any backend.

    Args:
        jaxpr: A jaxpr, open or closed.
        where: What it is of, for the message.

    Raises:
        InexactError: Naming every such operation, its source line and the reason.

    Example:
        >>> import jax
        >>> def loss(x):
        ...     return jax.random.uniform(jax.random.key(0, impl="rbg")) * x
        >>> check_operations(jax.make_jaxpr(loss)(1.0), "loss")
        Traceback (most recent call last):
        ...
        shardkit.errors.InexactError: loss cannot be exact:
        ...
    """
    rows = find_inexact(jaxpr)
    if rows:
        raise InexactError(
            f"{where} cannot be exact:\n{format_table(rows)}\n"
            "Replace them, or run with consistency='fast'."
        )


def _refusals(eqn: Any) -> list[tuple[str, str]]:
    """Lists `(operation, reason)` for one equation."""
    name = eqn.primitive.name
    found = [(name, _REFUSED[name])] if name in _REFUSED else []
    for var in (*eqn.invars, *eqn.outvars):
        kind = str(getattr(var.aval, "dtype", ""))
        if kind.startswith("key<") and kind != _EXACT_KEY:
            found.append((f"{name} of {kind}", _REFUSED["rng_bit_generator"]))
    return found


def find_atomics(jaxpr: Any) -> list[tuple[str, str]]:
    """Lists `(operation, source line)` of every scatter with shared targets.

    Args:
        jaxpr: A jaxpr, open or closed.

    Example:
        >>> import jax
        >>> grad = jax.grad(lambda table, i: table[i].sum())
        >>> table, i = jax.numpy.ones((4, 2)), jax.numpy.array([0, 0])
        >>> [name for name, _ in find_atomics(jax.make_jaxpr(grad)(table, i))]
        ['scatter-add']
    """
    found = [
        (eqn.primitive.name, line)
        for eqn, line in equations(jaxpr)
        # Reduce-scatters and the like are collectives, not memory operations.
        if "scatter" in eqn.primitive.name
        and eqn.primitive.name not in ("reduce_scatter", "psum_scatter")
        and not eqn.params.get("unique_indices")
    ]
    return list(dict.fromkeys(found))


def check_atomics(jaxpr: Any, platform: str) -> None:
    """Refuses a program for GPUs whose scatters would not keep their bits.

    Raises:
        InexactError: Naming every such operation and its source line, unless the
            process runs with XLA's flag for deterministic operations.
    """
    if platform not in ("gpu", "cuda", "rocm") or _FLAG in os.environ.get(
        "XLA_FLAGS", ""
    ):
        return
    found = find_atomics(jaxpr)
    if found:
        raise InexactError(
            "these operations add in any order on GPUs, so their bits differ from run "
            "to run:\n"
            + format_table(found)
            + "\nUse the scatter-free sk.nn.embed and sk.nn.cross_entropy (or a "
            f"one-hot product), set XLA_FLAGS={_FLAG} (slower), or consistency='fast'."
        )
