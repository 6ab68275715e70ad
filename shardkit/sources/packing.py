"""Documents packed into rows of one length.

Owns the table that says which piece of which document lies where, computed once from
the documents' lengths.

Invariant: in one epoch every token of a document that has one before it is predicted
once, from tokens of its own document only. The table depends on the lengths and the
seed; any row is made without the others.

References:
    Johnson, Near-Optimal Bin Packing Algorithms (1973): first fit decreasing.
    Krell et al., Efficient Sequence Packing without Cross-contamination (2021).
"""

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int64

from shardkit.data import permute
from shardkit.errors import DataError
from shardkit.sources.documents import Documents

__all__ = ["Packed", "pack_pieces", "split_documents"]


def split_documents(
    lengths: Int64[np.ndarray, " documents"], sequence_length: int
) -> Int64[np.ndarray, "pieces 3"]:
    """Cuts documents into pieces of at most `sequence_length + 1` tokens.

    A piece begins with the last token of the one before, as its first input: that
    token has been predicted once, and what follows it has not.

    Returns:
        For each piece its document, its first token in it and its length. A document
        without tokens has none.

    Example:
        >>> split_documents(np.array([9, 1]), sequence_length=4).tolist()
        [[0, 0, 5], [0, 4, 5], [1, 0, 1]]
    """
    counts = np.maximum(-(-(lengths - 1) // sequence_length), np.minimum(lengths, 1))
    document = np.repeat(np.arange(len(lengths)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(document)) - first) * sequence_length
    length = np.minimum(sequence_length + 1, lengths[document] - start)
    return np.stack([document, start, length], axis=1)


def pack_pieces(
    lengths: Int64[np.ndarray, " pieces"], capacity: int, block_size: int
) -> Int64[np.ndarray, " pieces"]:
    """Puts pieces into rows, first fit decreasing, one block of pieces at a time.

    Returns:
        The row of each piece. A block's rows follow those of the block before.

    Example:
        >>> pack_pieces(np.array([3, 2, 5, 1, 2]), capacity=5, block_size=5).tolist()
        [1, 1, 0, 2, 2]
    """
    rows = np.empty(len(lengths), np.int64)
    num_rows = 0
    for start in range(0, len(lengths), block_size):
        block = lengths[start : start + block_size]
        free = np.full(len(block), capacity)
        for piece in np.argsort(-block, kind="stable"):
            row = int(np.argmax(free >= block[piece]))
            free[row] -= block[piece]
            rows[start + piece] = num_rows + row
        num_rows += int(np.count_nonzero(free < capacity))
    return rows


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of several documents each, for models that keep them apart.

    A row is a dict of

    - `tokens`, int32 `[sequence_length + 1]`: inputs but for the last, targets but for
      the first; `pad_token` where nothing lies.
    - `segments`, int32 `[sequence_length + 1]`: 1, 2, … for the pieces of the row and 0
      where nothing lies. Attention must stay within a segment.
    - `positions`, int32 `[sequence_length + 1]`: the place in the piece, from 0.
    - `weights`, float32 `[sequence_length]`: how much the prediction of `tokens[t + 1]`
      from the tokens up to `t` counts: the weight of the document (1 unless it has
      one), and 0 where the two are not of one segment.

    A document longer than a row is cut: see `split_documents`. The pieces are put into
    an order that the seed chooses, and packed in blocks, so that documents that came
    together are in different rows. The rows are the same in every epoch, and
    `sk.Examples` visits them in another order each time.

    Attributes:
        documents: What to pack.
        sequence_length: Tokens the model sees at once.
        seed: Chooses which documents come to lie together.
        pad_token: Stands where nothing lies.
        block_size: How many pieces are packed at a time. More fill the rows better;
            the time grows with it.

    Raises:
        DataError: If a size is below 1, or all documents are empty.

    Example:
        >>> documents = Documents.from_arrays([[1, 2, 3], [4, 5], [6, 7, 8, 9]])
        >>> rows = Packed(documents, sequence_length=4)
        >>> [row["tokens"].tolist() for row in (rows[0], rows[1])]
        [[6, 7, 8, 9, 0], [1, 2, 3, 4, 5]]
        >>> rows[1]["weights"].tolist()
        [1.0, 1.0, 0.0, 1.0]
    """

    documents: Documents
    _: KW_ONLY
    sequence_length: int
    seed: int = 0
    pad_token: int = 0
    block_size: int = 1024

    def __post_init__(self):
        bad = [
            f"{name} = {getattr(self, name)}"
            for name in ("sequence_length", "block_size")
            if getattr(self, name) < 1
        ]
        if bad:
            raise DataError(
                f"Packed: sizes must be at least 1, found {', '.join(bad)}. Raise them."
            )
        if not len(self.documents.tokens):
            raise DataError(
                f"Packed: expected tokens, found {len(self.documents)} documents "
                "without any. Give it text."
            )

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """The pieces `[pieces, 3]` in the order of their rows, and where rows begin."""
        pieces = split_documents(self.documents.lengths, self.sequence_length)
        size = len(pieces)
        pieces = pieces[permute(np.arange(size), size=size, seed=self.seed, epoch=0)]
        rows = pack_pieces(pieces[:, 2], self.sequence_length + 1, self.block_size)
        order = np.argsort(rows, kind="stable")
        starts = np.searchsorted(rows[order], np.arange(rows.max() + 2))
        return pieces[order], starts

    @property
    def fill(self) -> float:
        """The part of the rows that tokens take up."""
        pieces, starts = self._table
        room = (len(starts) - 1) * (self.sequence_length + 1)
        return float(pieces[:, 2].sum() / room)

    @cached_property
    def digest(self) -> str | None:
        """Of the documents and of how they are packed; None if they have none."""
        if self.documents.digest is None:
            return None
        how = (self.sequence_length, self.seed, self.pad_token, self.block_size)
        text = f"{self.documents.digest} {how}"
        return hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._table[1]) - 1

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        row = range(len(self))[operator.index(index)]
        pieces, starts = self._table
        width = self.sequence_length + 1
        tokens = np.full(width, self.pad_token, np.int32)
        segments, positions = np.zeros(width, np.int32), np.zeros(width, np.int32)
        weights = np.zeros(self.sequence_length, np.float32)
        documents, place = self.documents, 0
        chosen = pieces[starts[row] : starts[row + 1]].tolist()
        for number, (document, start, length) in enumerate(chosen):
            first = documents.offsets[document] + start
            here = slice(place, place + length)
            tokens[here] = documents.tokens[first : first + length]
            segments[here] = number + 1
            positions[here] = np.arange(length)
            weight = 1 if documents.weights is None else documents.weights[document]
            weights[place : place + length - 1] = weight
            place += length
        return {
            "tokens": tokens,
            "segments": segments,
            "positions": positions,
            "weights": weights,
        }

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        return [self[index] for index in indices]
