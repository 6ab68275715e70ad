"""Batches over anything that is read by index.

Owns the way from a step to the examples of its batch.

Invariant: `batches(step)` depends on the source, the seed and the step only. It knows
no devices and no processes.
"""

import hashlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, SupportsIndex

import numpy as np

from shardkit.data import permute
from shardkit.errors import DataError
from shardkit.ramp import BatchRamp, as_ramp
from shardkit.sources.collate import stack_examples
from shardkit.sources.mixture import Mixture
from shardkit.sources.readers import open_reader

__all__ = ["Examples"]

_UINT64_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class _Stream:
    """A source in the order in which it is visited, without end."""

    num_examples: int | None
    read: Callable[[Sequence[int]], list[tuple[str, Any]]]
    """From places in the order to examples, each with what to call it."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Batches of examples of any source, in a new order each epoch.

    A source is anything with a length and examples by index: a list of dicts, a
    structured NumPy array, a Grain `MapDataset`, a Hugging Face `Dataset`, what
    `sk.sources` opens, or an `sk.Mixture`. If it has `__getitems__`, that is called
    with all indices of a batch at once.

    Example `rows of all steps before + row` belongs to epoch `example // len(source)`,
    so batches run over epoch borders and no example of an epoch is skipped or comes
    twice.

    A Grain `MapDataset` is told the epoch, so that its random maps go on from epoch to
    epoch. A Grain `DataLoader` brings its own order, that of one process, and its seed.

    Attributes:
        source: Where the examples come from.
        global_batch_size: Rows over all devices together; or `ramp.rows(…)`.
        seed: Chooses the orders; None keeps the order of the source.
        collate: Makes a batch of a list of examples. None stacks dicts of arrays.

    Raises:
        DataError: If the source cannot be read by index, or a size is below 1.

    Example:
        >>> rows = [{"x": np.ones(3) * i, "label": i % 2} for i in range(10)]
        >>> batches = Examples(rows, global_batch_size=4)
        >>> batches(step=10**9)["x"].shape
        (4, 3)
    """

    source: Any
    _: KW_ONLY
    global_batch_size: int | BatchRamp
    seed: int | None = 0
    collate: Callable[[list[Any]], Any] | None = None

    def __post_init__(self):
        size = self.global_batch_size
        if not hasattr(size, "__index__"):
            as_ramp(size, "Examples: global_batch_size")
        elif not isinstance(size, BatchRamp) and size < 1:
            raise DataError(
                f"Examples: expected a global_batch_size of at least 1, found {size}. "
                "Raise it."
            )
        # Opened here, so that a source that is none is refused at once.
        assert self._stream is not None

    @cached_property
    def _stream(self) -> _Stream:
        return _open_stream(self.source, self.seed, "")

    @property
    def num_examples(self) -> int | None:
        """Examples in one epoch; None for mixtures and for orders without epochs."""
        return self._stream.num_examples

    @property
    def digest(self) -> str | None:
        """The source's digest, by which a resumed run knows its data; None if none."""
        return getattr(self.source, "digest", None)

    def __call__(self, step: SupportsIndex) -> Any:
        """Returns the batch of a step: arrays `[rows, ...]`.

        Raises:
            DataError: If the step is negative, or its examples cannot be stacked.
        """
        if (number := operator.index(step)) < 0:
            raise DataError(f"Batches are numbered from step 0, found step {number}.")
        rows = as_ramp(self.global_batch_size, "global_batch_size")
        found = self._stream.read(range(rows.before(number), rows.before(number + 1)))
        examples = [example for _, example in found]
        if self.collate is not None:
            return self.collate(examples)
        return stack_examples(examples, [name for name, _ in found])


def _open_stream(source: Any, seed: int | None, where: str) -> _Stream:
    if isinstance(source, Mixture):
        return _mix_streams(source, seed, where)
    reader = open_reader(source, where=f"Examples, {where}"[:-2])
    size = reader.num_examples
    is_ordered = hasattr(source, "__len__") and size is None
    if is_ordered and seed is not None:
        raise DataError(
            f"Examples: {where}a source of length {len(source)} has no epochs that a "
            f"seed could shuffle, found seed = {seed}. Leave out its .repeat(), as "
            "epochs are counted here, or keep its own order with seed=None."
        )

    def read(places: Sequence[int]) -> list[tuple[str, Any]]:
        indices = _visit(places, size, seed)
        names = [f"{where}example {i if size is None else i % size}" for i in indices]
        return list(zip(names, reader.read(indices), strict=True))

    return _Stream(size, read)


def _visit(places: Sequence[int], size: int | None, seed: int | None) -> list[int]:
    """Returns which example stands at each place, counted on over epochs."""
    if size is None or seed is None:
        return list(places)
    epochs, positions = zip(*(divmod(place, size) for place in places), strict=True)
    order = permute(
        np.array(positions, np.int64),
        size=size,
        seed=seed,
        epoch=np.array([epoch & _UINT64_MASK for epoch in epochs], np.uint64),
    )
    # Python's integers: no step is so far that an index overflows.
    pairs = zip(epochs, order.tolist(), strict=True)
    return [epoch * size + position for epoch, position in pairs]


def _mix_streams(mixture: Mixture, seed: int | None, where: str) -> _Stream:
    streams = [
        _open_stream(source, _derive(seed, number), f"{where}source {number}, ")
        for number, source in enumerate(mixture.sources)
    ]

    def read(places: Sequence[int]) -> list[tuple[str, Any]]:
        located = [mixture.locate(place) for place in places]
        found: list[Any] = [None] * len(located)
        for number, stream in enumerate(streams):
            rows = [row for row, (which, _) in enumerate(located) if which == number]
            if rows:
                wanted = [located[row][1] for row in rows]
                for row, example in zip(rows, stream.read(wanted), strict=True):
                    found[row] = example
        return found

    return _Stream(None, read)


def _derive(seed: int | None, number: int) -> int | None:
    """Returns a seed for one of several sources, which may be of the same length."""
    if seed is None:
        return None
    hashed = hashlib.sha256(f"{operator.index(seed)} {number}".encode()).digest()
    return int.from_bytes(hashed[:8], "little")
