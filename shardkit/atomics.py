"""Operations whose bits can differ from run to run on GPUs.

Owns finding them, and saying what to do. A scatter that adds to the same place from
several threads uses atomic operations there, in whatever order the threads come.
It changes no program.
"""

import os
from collections.abc import Iterator
from typing import Any

from jax.extend import source_info_util

from shardkit.errors import InexactError
from shardkit.tree import format_table

__all__ = ["check_atomics", "find_atomics"]

_FLAG = "--xla_gpu_deterministic_ops=true"


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
    return list(dict.fromkeys(_walk(getattr(jaxpr, "jaxpr", jaxpr))))


def _walk(jaxpr: Any) -> Iterator[tuple[str, str]]:
    for eqn in jaxpr.eqns:
        if "scatter" in eqn.primitive.name and not eqn.params.get("unique_indices"):
            # Reduce-scatters and the like are collectives, not memory operations.
            if eqn.primitive.name not in ("reduce_scatter", "psum_scatter"):
                yield eqn.primitive.name, source_info_util.summarize(eqn.source_info)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _walk(inner)


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
