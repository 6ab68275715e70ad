"""What a global batch must be.

Owns the checks on a tree of host arrays before it is cut into microbatches: every
leaf has one row per example, the grid divides the rows, and no batch differs from the
first in anything that a compiled program depends on, but in its number of rows as a
ramp says. It loads and places nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from shardkit.errors import DataError
from shardkit.ramp import BatchRamp, as_ramp

__all__ = [
    "abstract_batch",
    "check_alike",
    "check_batch",
    "check_named",
    "checked_data",
]


def _iterate_leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from _iterate_leaves(child, f"{path}/{name}" if path else str(name))
    else:
        yield path or "(the batch itself)", node


def check_batch(batch: Any, *, num_microbatches: int, where: str) -> int:
    """Checks that every leaf of a batch can be cut into equal microbatches.

    Args:
        batch: Arrays `[global_batch_size, ...]` in a dict, nested or not.
        num_microbatches: The number of equal runs of rows to cut it into.
        where: What the batch is, for the message, such as `"train batch of step 3"`.

    Returns:
        The global batch size.

    Raises:
        DataError: Naming every leaf whose leading size is not that of the others, or
            the microbatch counts next to one that does not divide.

    Example:
        >>> import numpy as np
        >>> check_batch({"x": np.ones((6, 2))}, num_microbatches=3, where="batch")
        6
    """
    if num_microbatches < 1:
        raise DataError(
            f"{where}: expected at least one microbatch, found num_microbatches = "
            f"{num_microbatches}. Raise it to 1 or more."
        )
    check_named(batch, where=where)
    shapes = {
        path: tuple(getattr(leaf, "shape", ())) for path, leaf in _iterate_leaves(batch)
    }
    sizes = Counter(shape[0] for shape in shapes.values() if shape)
    if not sizes:
        raise DataError(
            f"{where}: expected a dict of arrays with a leading batch dim, found "
            f"{len(shapes)} leaves, none of them with one. Return arrays of examples."
        )
    size = sizes.most_common(1)[0][0]
    bad = {path: shape for path, shape in shapes.items() if shape[:1] != (size,)}
    if bad:
        raise DataError(
            f"{where}: {len(bad)} of {len(shapes)} leaves differ in their leading dim:"
            + "".join(
                f"\n  {path}: expected {size} rows, found "
                + (f"{shape[0]} (shape {shape})" if shape else "none (no leading dim)")
                for path, shape in bad.items()
            )
            + "\nGive every leaf one row per example, repeating constants if need be."
        )
    if size == 0 or size % num_microbatches:
        raise DataError(
            _explain_indivisible(where, list(shapes), size, num_microbatches)
        )
    return size


def check_named(batch: Any, *, where: str) -> None:
    """Refuses arrays without names, as in `(x, y)`.

    Args:
        batch: What should be arrays in a dict.
        where: What it is, for the message.

    Raises:
        DataError: For a tuple or a list in place of a dict.

    Example:
        >>> check_named({"x": 1, "y": 2}, where="data(0)")
    """
    if isinstance(batch, tuple | list):
        raise DataError(
            f"{where}: expected a dict of arrays, found a {type(batch).__name__} of "
            f'{len(batch)}. Name its parts, as in {{"x": x, "y": y}}.'
        )


def check_alike(batch: Any, first: Any, *, where: str) -> None:
    """Checks that a batch has the leaves, shapes and dtypes of the first one.

    Programs are compiled for the shapes of a run, which therefore cannot change.

    Args:
        batch: Arrays in a dict, nested or not.
        first: What it should be like.
        where: What the batch is, for the message.

    Raises:
        DataError: Naming every leaf that differs.

    Example:
        >>> import numpy as np
        >>> check_alike({"x": np.ones(4)}, {"x": np.zeros(4)}, where="data(1)")
    """
    found, expected = (
        {path: _describe(leaf) for path, leaf in _iterate_leaves(tree)}
        for tree in (batch, first)
    )
    bad = [p for p in found.keys() | expected.keys() if found.get(p) != expected.get(p)]
    if bad:
        raise DataError(
            f"{where}: {len(bad)} leaves are not as in the first batch:"
            + "".join(
                f"\n  {path}: expected {expected.get(path, 'nothing')}, "
                f"found {found.get(path, 'nothing')}"
                for path in sorted(bad)
            )
            + "\nGive every batch the same leaves, shapes and dtypes."
        )


def _describe(leaf: Any) -> str:
    shape = list(getattr(leaf, "shape", ()))
    return f"{getattr(leaf, 'dtype', type(leaf).__name__)}{shape}"


def _explain_indivisible(
    where: str, paths: list[str], size: int, num_microbatches: int
) -> str:
    if size == 0:
        return f"{where}: expected rows, found none in {', '.join(paths)}. Add some."
    divisors = [count for count in range(1, size + 1) if size % count == 0]
    below = [count for count in divisors if count < num_microbatches][-1:]
    above = [count for count in divisors if count > num_microbatches][:1]
    counts = " or ".join(map(str, below + above))
    rows = num_microbatches * max(1, size // num_microbatches)
    return (
        f"{where}: expected a leading dim that {num_microbatches} microbatches divide, "
        f"found {size} rows in {', '.join(paths)}. Set num_microbatches to {counts}, "
        f"or the global batch size to a multiple of {num_microbatches} such as {rows}."
    )


def abstract_batch(batch: Any) -> Any:
    """Returns the shapes and dtypes of a batch."""
    import jax

    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def checked_data(
    data: Callable[[int], Any], ramp: BatchRamp
) -> tuple[Any, BatchRamp, Callable[[int], Any]]:
    """Looks at the first batch, and sees to it that the others are like it.

    Args:
        data: `step → global batch`.
        ramp: How many microbatches each is cut into.

    Returns:
        The first batch, abstractly, how many rows each has, and what returns checked
        batches.

    Raises:
        DataError: If the first cannot be cut, or the data say that they have other rows
            in later steps; later, if a batch is not like the first.
    """
    first = data(0)
    size = check_batch(first, num_microbatches=ramp(0), where="data(0)")
    rows = ramp.rows(size // ramp(0))
    _check_said(getattr(data, "global_batch_size", None), rows, ramp)
    like = abstract_batch(first)

    def checked(step: int) -> Any:
        batch = data(step)
        where = f"data({step})"
        if not ramp.is_constant:
            _check_rows(batch, rows(step), ramp(step), where)
        check_alike(batch, _with_rows(like, rows(step)), where=where)
        return batch

    return like, rows, checked


def _check_said(said: Any, rows: BatchRamp, ramp: BatchRamp) -> None:
    """Refuses at once what would be refused at the first step of another phase."""
    is_ramp = isinstance(said, BatchRamp)
    if not (is_ramp or (isinstance(said, int) and not ramp.is_constant)):
        return
    if rows != as_ramp(said, "global_batch_size"):
        raise DataError(
            f"data: with num_microbatches = {ramp.record} expected rows by step "
            f"{rows.record}, found global_batch_size = "
            f"{said.record if is_ramp else said}. Give one ramp to both: "
            f"num_microbatches=ramp, global_batch_size=ramp.rows({rows(0) // ramp(0)})."
        )


def _check_rows(batch: Any, expected: int, num: int, where: str) -> None:
    found = {getattr(leaf, "shape", (None,))[:1] for _, leaf in _iterate_leaves(batch)}
    # Where leaves differ from one another, each is named.
    if len(found) == 1 and found != {(expected,)}:
        number = next(iter(found))[0] if found != {()} else "no"
        raise DataError(
            f"{where}: expected {expected} rows, {num} microbatches of "
            f"{expected // num} at this step, found {number}. Return ramp(step) × "
            f"{expected // num} rows, as sources do that are given "
            f"global_batch_size=ramp.rows({expected // num})."
        )


def _with_rows(like: Any, rows: int) -> Any:
    import jax

    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), like
    )
