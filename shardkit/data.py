"""The global batch as a pure function of the step.

Owns the order in which examples are visited.

Invariant: `batches(step)` depends on the data, the seed and the step only. Device
and process counts and earlier calls never enter, so a run's whole data cursor is one
integer. Does not place anything on devices and knows no mesh.

References:
    Black & Rogaway, Ciphers with Arbitrary Finite Domains (CT-RSA 2002): cycle walking.
    Luby & Rackoff, How to Construct Pseudorandom Permutations (SIAM J. Comput. 1988).
    Steele, Lea & Flood, Fast Splittable Pseudorandom Number Generators (OOPSLA 2014).
"""

import operator
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from shardkit.batch import check_batch
from shardkit.corpus import TextCorpus as TextCorpus
from shardkit.errors import DataError
from shardkit.ramp import BatchRamp, as_ramp

__all__ = ["ArrayBatches", "TextBatches", "TextCorpus", "permute"]

NUM_ROUNDS = 8
_UINT64_MASK = 2**64 - 1


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Applies one SplitMix64 step, a bijection of 64 bits, to an array."""
    # Never to a scalar: NumPy wraps integer arrays silently but warns about scalars.
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> np.uint64(30))) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> np.uint64(27))) * 0x94D049BB133111EB
    return x ^ (x >> np.uint64(31))


def _encrypt(
    value: npt.NDArray[np.uint64], round_keys: npt.NDArray[np.uint64], num_bits: int
) -> npt.NDArray[np.uint64]:
    """Permutes `[0, 2**num_bits)` by an alternating, possibly unequal, Feistel net.

    Args:
        value: `[n]`, below `2**num_bits`.
        round_keys: `[NUM_ROUNDS, n]`.
        num_bits: Width of the domain.
    """
    low_bits = num_bits // 2
    low_mask = 2**low_bits - 1
    high_mask = 2 ** (num_bits - low_bits) - 1
    high, low = value >> low_bits, value & low_mask
    for number, round_key in enumerate(round_keys):
        if number % 2:
            low = low ^ (_mix(high ^ round_key) & low_mask)
        else:
            high = high ^ (_mix(low ^ round_key) & high_mask)
    return (high << low_bits) | low


def permute(
    index: npt.ArrayLike, *, size: int, seed: int, epoch: npt.ArrayLike
) -> npt.NDArray[np.int64]:
    """Maps indices through the pseudorandom permutation of one epoch.

    A Feistel network permutes the smallest power of two that holds `size`; whatever
    lands outside goes through again until it is inside (cycle walking). So any
    position costs the same, without its predecessors and without a table.

    Args:
        index: Positions in the epoch, `0 <= index < size`; any shape.
        size: Number of examples in an epoch.
        seed: Any integer, taken modulo 2⁶⁴.
        epoch: Epoch of each position, not negative; broadcast against `index`.

    Returns:
        int64 of the broadcast shape: for each epoch a bijection of `[0, size)`.

    Raises:
        DataError: If an index is outside `[0, size)`.

    Example:
        >>> sorted(permute(np.arange(5), size=5, seed=0, epoch=3).tolist())
        [0, 1, 2, 3, 4]
    """
    positions, epochs = np.broadcast_arrays(index, epoch)
    if positions.size and not 0 <= positions.min() <= positions.max() < size:
        raise DataError(
            f"permute: indices must lie in [0, {size}), found "
            f"{positions.min()}…{positions.max()}. Reduce them modulo the size first."
        )
    value = positions.ravel().astype(np.uint64)
    seed_key = _mix(np.array([operator.index(seed) & _UINT64_MASK], np.uint64))
    epoch_key = _mix(seed_key ^ epochs.ravel().astype(np.uint64))
    round_keys = np.stack([_mix(epoch_key + number) for number in range(NUM_ROUNDS)])
    # Six bits at least: on fewer the network visibly favours some orders.
    num_bits = max(6, (size - 1).bit_length())
    # An index inside comes back inside at the latest when its cycle closes, so this
    # ends; above 32 the domain is under twice the size, so it ends soon.
    outside = np.arange(value.size)
    while outside.size:
        value[outside] = _encrypt(value[outside], round_keys[:, outside], num_bits)
        outside = outside[value[outside] >= size]
    return value.astype(np.int64).reshape(positions.shape)


def _pick_examples(
    step: SupportsIndex,
    *,
    num_examples: int,
    global_batch_size: int | BatchRamp,
    seed: int | None,
) -> npt.NDArray[np.int64]:
    """Returns the examples `[rows of the step]`; in order if seed is None.

    Raises:
        DataError: If the step is negative.
    """
    if (number := operator.index(step)) < 0:
        raise DataError(f"Batches are numbered from step 0, found step {number}.")
    rows = as_ramp(global_batch_size, "global_batch_size")
    # Python's integers, so that no step overflows before the remainder is small.
    epoch, offset = divmod(rows.before(number), num_examples)
    index = offset + np.arange(rows(number))
    position = index % num_examples
    if seed is None:
        return position
    epochs = (index // num_examples).astype(np.uint64) + (epoch & _UINT64_MASK)
    return permute(position, size=num_examples, seed=seed, epoch=epochs)


def _check_sizes(where: str, **sizes: int | BatchRamp):
    numbers = {name: x for name, x in sizes.items() if not isinstance(x, BatchRamp)}
    for name, size in numbers.items():
        if not hasattr(size, "__index__"):
            as_ramp(size, f"{where}: {name}")
    bad = [f"{name} = {size}" for name, size in numbers.items() if size < 1]
    if bad:
        raise DataError(
            f"{where}: sizes must be at least 1, found {', '.join(bad)}. "
            "Raise them to 1 or more."
        )


@dataclass(frozen=True)
class TextBatches:
    """Batches of windows over one split of a corpus, in a new order each epoch.

    The split is cut into windows of `sequence_length` tokens that do not overlap, each
    with the one token after it as its last target; what is left at the end is dropped.
    Example `rows of all steps before + row` belongs to epoch `example // num_windows`,
    so batches run over epoch borders and no window of an epoch is skipped or repeated.

    Attributes:
        corpus: Where the tokens come from.
        sequence_length: Tokens the model sees at once.
        global_batch_size: Rows over all devices together; or `ramp.rows(…)`.
        seed: Chooses the orders; `"validation"` is always read in order.
        split: `"train"` or `"validation"`.

    Raises:
        DataError: If a size is below 1 or the split is shorter than one window.

    Example:
        >>> corpus = TextCorpus.open()
        >>> batches = TextBatches(corpus, sequence_length=64, global_batch_size=8)
        >>> batches(step=1000)["tokens"].shape
        (8, 65)
    """

    corpus: TextCorpus
    _: KW_ONLY
    sequence_length: int
    global_batch_size: int | BatchRamp
    seed: int = 0
    split: str = "train"

    def __post_init__(self):
        _check_sizes(
            "TextBatches",
            sequence_length=self.sequence_length,
            global_batch_size=self.global_batch_size,
        )
        num_tokens = len(self.corpus.split(self.split))
        if num_tokens <= self.sequence_length:
            raise DataError(
                f"The {self.split} split of the corpus {self.corpus.source} is shorter "
                f"than one window: expected at least {self.sequence_length + 1} tokens "
                f"(sequence_length + 1), found {num_tokens} of the corpus's "
                f"{len(self.corpus.tokens)}. Take more text, a smaller sequence_length "
                "or another validation_fraction."
            )

    @cached_property
    def _windows(self) -> npt.NDArray[np.uint8]:
        tokens = self.corpus.split(self.split)
        width = self.sequence_length + 1
        every = np.lib.stride_tricks.sliding_window_view(tokens, width)
        return every[:: self.sequence_length]

    @property
    def num_windows(self) -> int:
        """Examples in one epoch."""
        return len(self._windows)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step trains on; of a ramp, the first step."""
        rows = as_ramp(self.global_batch_size, "global_batch_size")
        return rows(0) * self.sequence_length

    def __call__(self, step: SupportsIndex) -> dict[str, npt.NDArray[np.int32]]:
        """Returns `{"tokens": int32 [rows, sequence_length + 1]}`."""
        windows = _pick_examples(
            step,
            num_examples=self.num_windows,
            global_batch_size=self.global_batch_size,
            seed=None if self.split == "validation" else self.seed,
        )
        return {"tokens": self._windows[windows].astype(np.int32)}


@dataclass(frozen=True, eq=False)
class ArrayBatches:
    """Batches of rows of arrays in memory, in a new order each epoch.

    The same contract as `TextBatches`, with a row in place of a window.

    Attributes:
        arrays: Arrays `[num_rows, ...]`, not to be changed afterwards.
        global_batch_size: Rows over all devices together; or `ramp.rows(…)`.
        seed: Chooses the orders.

    Raises:
        DataError: If the arrays have no rows or differ in how many they have.

    Example:
        >>> batches = ArrayBatches({"x": np.arange(6.0)}, global_batch_size=6)
        >>> sorted(batches(step=7)["x"].tolist())
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """

    arrays: Mapping[str, np.ndarray] = field(repr=False)
    _: KW_ONLY
    global_batch_size: int | BatchRamp
    seed: int = 0

    def __post_init__(self):
        check_batch(self.arrays, num_microbatches=1, where="ArrayBatches")
        _check_sizes("ArrayBatches", global_batch_size=self.global_batch_size)

    @property
    def num_rows(self) -> int:
        """Examples in one epoch."""
        return len(next(iter(self.arrays.values())))

    def __call__(self, step: SupportsIndex) -> dict[str, np.ndarray]:
        """Returns the step's rows of every array, as copies."""
        rows = _pick_examples(
            step,
            num_examples=self.num_rows,
            global_batch_size=self.global_batch_size,
            seed=self.seed,
        )
        return {name: array[rows] for name, array in self.arrays.items()}
