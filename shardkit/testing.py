"""Assertions that two runs are the same, to the bit.

Owns how bits are compared and how a difference is told. Invariant: two things pass
as the same only if every bit of them is, so 0.0 and -0.0 differ and a NaN equals
itself. It makes no trainers and no devices; a test brings its own.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from shardkit.keys import raw
from shardkit.membership import Lost, scripted
from shardkit.trainer import Trainer
from shardkit.tree import format_table, named_leaves

__all__ = ["assert_same_bits", "run_digest"]


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Asserts that two trees have the same leaves with the same bits.

    Args:
        actual: A tree of arrays, on any devices; random keys may be among them.
        expected: Another.

    Raises:
        AssertionError: Listing every leaf that is missing, has another shape or
            dtype, or differs, with the number of differing elements and the first.

    Example:
        >>> assert_same_bits({"w": np.ones(3)}, {"w": np.ones(3)})
        >>> assert_same_bits({"w": np.float32([1, 0.0])}, {"w": np.float32([1, -0.0])})
        Traceback (most recent call last):
        ...
        AssertionError: 1 of 1 leaves differ
          w  1 of 2 elements, the first at (1,): 0.0 instead of -0.0
    """
    found, wanted = dict(named_leaves(actual)), dict(named_leaves(expected))
    rows = []
    for path in sorted(found.keys() | wanted.keys()):
        if path not in found or path not in wanted:
            rows.append((path, "missing" if path not in found else "not expected"))
        elif difference := _difference(found[path], wanted[path]):
            rows.append((path, difference))
    if rows:
        count = len(found.keys() | wanted.keys())
        raise AssertionError(
            f"{len(rows)} of {count} leaves differ\n" + format_table(rows)
        )


def run_digest(
    trainer: Trainer, steps: int, script: Mapping[int, int | Lost] | None = None
) -> dict[str, Any]:
    """Trains until `steps` steps are done, and returns the bits of what came of it.

    Args:
        trainer: Where it stands is where it begins.
        steps: The absolute end.
        script: Step → device count, or `Lost`; see `sk.scripted`.

    Returns:
        `"steps"`: step → name → the bits of loss and metrics, as hex digits.
        `"state"`: the digest of the state. Two runs are the same if these are equal.
    """
    steps_found = {}
    for metrics in trainer.run(steps=steps, membership=scripted(script or {})):
        steps_found[metrics.step] = {
            name: np.asarray(value).tobytes().hex()
            for name, value in sorted(metrics.values.items())
        }
    return {"steps": steps_found, "state": trainer.state_digest()}


def _difference(actual: Any, expected: Any) -> str:
    """Describes how two leaves differ; empty if they do not."""
    actual, expected = _host(actual), _host(expected)
    kinds = [f"{x.dtype}{list(x.shape)}" for x in (actual, expected)]
    if kinds[0] != kinds[1]:
        return f"{kinds[0]} instead of {kinds[1]}"
    differs = np.any(_bytes(actual) != _bytes(expected), axis=1)
    if not differs.any():
        return ""
    first = tuple(map(int, np.unravel_index(np.argmax(differs), actual.shape)))
    return (
        f"{np.count_nonzero(differs)} of {actual.size} elements, the first at {first}: "
        f"{actual[first]} instead of {expected[first]}"
    )


def _host(x: Any) -> np.ndarray:
    return np.asarray(raw(x) if isinstance(x, jax.Array) else x)


def _bytes(x: np.ndarray) -> np.ndarray:
    """Views an array as one row of bytes per element."""
    return np.ascontiguousarray(x).reshape(-1, 1).view(np.uint8)
