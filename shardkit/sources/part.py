"""A part of a source, such as what is kept for validation. It copies nothing."""

import hashlib
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from shardkit.errors import DataError
from shardkit.sources.readers import open_reader

__all__ = ["Part", "split_tail"]


class Part:
    """Some examples of a source, as a source of their own.

    Args:
        source: Anything read by index.
        indices: Which examples, in this order.

    Raises:
        DataError: If an index is outside.

    Example:
        >>> part = Part(["a", "b", "c"], [2, 0])
        >>> len(part), part[0]
        (2, 'c')
    """

    def __init__(self, source: Any, indices: Sequence[int]):
        self._reader = open_reader(source, where="Part")
        size = self._reader.num_examples
        if (
            not len(indices)
            or size is None
            or not (0 <= min(indices) and max(indices) < size)
        ):
            found = f"{min(indices)} to {max(indices)}" if len(indices) else "none"
            raise DataError(
                f"Part: expected indices of a source of length {size}, found {found}."
            )
        self.source, self.indices = source, indices

    @property
    def digest(self) -> str | None:
        """The source's, and which part it is; None if the source has none."""
        whole = getattr(self.source, "digest", None)
        if whole is None or isinstance(self.indices, range):
            return whole and f"{whole} {self.indices!r}"
        chosen = np.asarray(self.indices, np.int64).tobytes()
        return f"{whole} {hashlib.sha256(chosen).hexdigest()}"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: SupportsIndex) -> Any:
        return self.__getitems__([operator.index(index)])[0]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Any]:
        return self._reader.read([self.indices[index] for index in indices])


def split_tail(num_examples: int, fraction: float, *, what: str) -> int:
    """Returns where validation begins, with at least one example on either side.

    Raises:
        DataError: If there are too few.

    Example:
        >>> split_tail(100, 0.05, what="windows")
        95
    """
    if fraction == 0:
        return num_examples
    if num_examples < 2:
        raise DataError(
            f"Training and validation: expected two {what} or more, found "
            f"{num_examples}. Take more data, or validation_fraction = 0."
        )
    return min(num_examples - 1, max(1, round(num_examples * (1 - fraction))))
