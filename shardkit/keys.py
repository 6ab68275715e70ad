"""Random keys as a function of what is computed, never of where.

Owns the key derivation: `seed → stream → step → index`. Invariant: no key depends
on a device, a process or a mesh, so every draw is replayed on any of them. It
holds no generator state; nothing about randomness needs saving but the seed.

References:
    Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Int, PRNGKeyArray

from shardkit.errors import InexactError

__all__ = [
    "check_generator",
    "example_keys",
    "is_key_dtype",
    "rank_keys",
    "raw",
    "root_key",
    "step_key",
    "stream",
]

_REASON = {
    "rbg": "its bits depend on how an array is sharded",
    "unsafe_rbg": "its bits depend on how an array is sharded, and splitting is weak",
}


@functools.cache
def is_key_dtype(dtype: Any) -> bool:
    """Whether an array of this dtype consists of random keys.

    Example:
        >>> is_key_dtype(jax.random.key(0).dtype), is_key_dtype(jax.numpy.uint32)
        (True, False)
    """
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def raw(x: Array) -> Array:
    """What an array consists of: the data of keys, and anything else as it is."""
    return jax.random.key_data(x) if is_key_dtype(x.dtype) else x


def check_generator(key: PRNGKeyArray | None = None) -> None:
    """Refuses generators whose bits depend on the sharding.

    Args:
        key: A typed key to check; without one, JAX's settings are checked.

    Raises:
        InexactError: For `rbg`, `unsafe_rbg`, any generator other than threefry, or
            threefry in its non-partitionable form.

    Example:
        >>> check_generator(jax.random.key(0))
    """
    if key is None:
        name = str(jax.config.jax_default_prng_impl)  # pyright: ignore
        if not jax.config.jax_threefry_partitionable:  # pyright: ignore
            raise InexactError(
                "jax_threefry_partitionable is off: the draws of a sharded array then "
                "depend on its sharding. Remove the setting (on is JAX's default)."
            )
    else:
        name = str(jax.random.key_impl(key))
    if name != "threefry2x32":
        reason = _REASON.get(name, "it is not known to be independent of the sharding")
        raise InexactError(
            f"random generator {name!r} is refused: {reason}. Use threefry2x32 "
            "(jax.config.update('jax_default_prng_impl', 'threefry2x32'))."
        )


def root_key(seed: int) -> PRNGKeyArray:
    """Returns the key from which everything in a run is derived.

    Raises:
        InexactError: If JAX is set to a generator that depends on the sharding.

    Example:
        >>> key = root_key(0)
    """
    check_generator()
    return jax.random.key(seed)


def stream(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """Derives the key of a named stream, such as `"dropout"`.

    Args:
        key: Any key; inside a loss, the key the loss was given.
        name: A stable name: renaming a stream changes its draws.

    Raises:
        InexactError: If the name is empty.

    Example:
        >>> key = root_key(0)
        >>> bool((stream(key, "dropout") == stream(key, "noise")).all())
        False
    """
    if not name:
        raise InexactError("a random stream needs a name, found an empty one")
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def step_key(
    root: PRNGKeyArray, name: str, step: Int[Array, ""] | int, index: Int[Array, ""]
) -> PRNGKeyArray:
    """Derives the key for one index of one stream at one step.

    Args:
        root: What `root_key` returned.
        name: The stream.
        step: The global step, counted from 0.
        index: The global microbatch (or example, or logical rank) index.

    Example:
        >>> key = step_key(root_key(0), "dropout", 3, 17)
    """
    return jax.random.fold_in(jax.random.fold_in(stream(root, name), step), index)


def example_keys(key: PRNGKeyArray, num_examples: int) -> PRNGKeyArray:
    """Derives one key per example of a microbatch.

    The key of an example depends on the microbatch key and its row alone; as
    microbatches hold fixed rows of the global batch, that names the global example.

    Example:
        >>> example_keys(root_key(0), 4).shape
        (4,)
    """
    rows = jax.numpy.arange(num_examples)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def rank_keys(
    root: PRNGKeyArray,
    name: str,
    step: Int[Array, ""] | int,
    ranks: Sequence[int],
) -> list[PRNGKeyArray]:
    """Derives keys for programs that want one per rank.

    The ranks are *logical*: a run keeps as many as it started with, and whoever
    takes over a rank's work takes its key, so a key stays with its work.

    Example:
        >>> keys = rank_keys(root_key(0), "sampler", 0, ranks=[2, 5])
        >>> len(keys)
        2
    """
    return [step_key(root, name, step, jax.numpy.int32(rank)) for rank in ranks]
