"""What can be read by index: sources of many makers, all read alike.

Owns how a source is recognised, how long its epoch is, and how a few of its examples
are fetched at once.

Invariant: what is read depends on the indices only. It decides no order, and imports
no package that a user may not have: an object of one shows that it is loaded.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from shardkit.errors import DataError

__all__ = ["Reader", "open_reader"]


@dataclass(frozen=True, slots=True)
class Reader:
    """One source, read by indices that count on over its epochs.

    Attributes:
        num_examples: In one epoch; None if the source has an order of its own that
            knows no epochs.
        read: From indices, each `epoch * num_examples + position`, to examples.
    """

    num_examples: int | None
    read: Callable[[Sequence[int]], Sequence[Any]]


def open_reader(source: Any, *, where: str = "Examples") -> Reader:
    """Finds out how to read a source.

    Args:
        source: Anything with a length that is indexed by integers, or a Grain
            `DataLoader`.
        where: Who asks, for messages.

    Raises:
        DataError: If it cannot be read by index, or is empty.

    Example:
        >>> open_reader(["a", "b", "c"]).read([0, 5])
        ['a', 'c']
    """
    grain: Any = sys.modules.get("grain")
    if grain is not None and isinstance(source, grain.DataLoader):
        from shardkit.sources.grain_loader import open_loader

        return Reader(None, open_loader(source))
    num_examples = _measure(source, where)
    if grain is not None and isinstance(source, grain.MapDataset):
        # Grain counts epochs as we do, and shuffles each of them anew.
        is_endless = num_examples >= sys.maxsize
        read = lambda indices: [_fetch(source, int(i)) for i in indices]  # noqa: E731
        return Reader(None if is_endless else num_examples, read)

    def read_positions(indices: Sequence[int]) -> Sequence[Any]:
        return _fetch_all(source, [int(i) % num_examples for i in indices])

    return Reader(num_examples, read_positions)


def _measure(source: Any, where: str) -> int:
    """Returns how many examples a source has."""
    found = f"{where}: expected a source read by index, found {_name(source)}"
    if isinstance(source, Mapping):
        raise DataError(
            f"{found}. Take one split of it if it is a dict of data sets, or "
            "sk.data.ArrayBatches if it is a dict of arrays."
        )
    if isinstance(source, str | bytes | PathLike):
        raise DataError(
            f"{found}. Open files by sk.sources.JsonLines, TextFiles or TokenFile."
        )
    try:
        num_examples = len(source)
        is_indexed = hasattr(type(source), "__getitem__")
    except TypeError:
        num_examples, is_indexed = 0, False
    if not is_indexed:
        raise DataError(
            f"{found}, which has no length or cannot be indexed. Use sk.from_iterable "
            "for what can only be iterated."
        )
    if num_examples == 0:
        raise DataError(f"{found} of length 0. Give it at least one example.")
    return num_examples


def _fetch_all(source: Any, positions: list[int]) -> Sequence[Any]:
    """Reads several examples, in one call where the source has one."""
    if isinstance(source, np.ndarray):
        return list(source[positions])
    if not hasattr(source, "__getitems__"):
        return [_fetch(source, position) for position in positions]
    examples = source.__getitems__(positions)
    if len(examples) != len(positions):
        raise DataError(
            f"{_name(source)}.__getitems__: expected {len(positions)} examples, found "
            f"{len(examples)}. Return one for each index."
        )
    return examples


def _fetch(source: Any, index: int) -> Any:
    try:
        example = source[index]
    except Exception as error:
        error.add_note(f"While reading example {index} of {_name(source)}.")
        raise
    if example is None:
        raise DataError(
            f"{_name(source)}: expected an example at index {index}, found None, as "
            "where a Grain filter has dropped it. Filter beforehand: kept = [i for i "
            "in range(len(ds)) if ds[i] is not None], then "
            "grain.MapDataset.source(kept).map(ds.__getitem__)."
        )
    return example


def _name(source: Any) -> str:
    kind = type(source)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"a {module}{kind.__qualname__}"
