"""Documents as token ids: one flat array, and where each document begins.

Owns that form in memory and on disk. Invariant: a document is
`tokens[offsets[i]:offsets[i + 1]]`. It neither tokenizes nor packs.
"""

import operator
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt
from jaxtyping import Float32, Int32, Int64
from numpy.lib.format import open_memmap

from shardkit.errors import DataError

__all__ = ["Documents"]


class Documents:
    """Token ids of documents that differ in length.

    Args:
        tokens: All documents, one after the other.
        offsets: Where each begins, and last where all end.
        weights: How much each document counts in a loss; None for all alike.
        digest: What a resumed run knows them by; None if they cannot be known.

    Raises:
        DataError: If the offsets do not fit the tokens.

    Example:
        >>> documents = Documents.from_arrays([[1, 2, 3], [4]])
        >>> len(documents), documents[1]["tokens"].tolist()
        (2, [4])
    """

    def __init__(
        self,
        tokens: Int32[np.ndarray, " tokens"],
        offsets: Int64[np.ndarray, " documents_and_one"],
        weights: Float32[np.ndarray, " documents"] | None = None,
        *,
        digest: str | None = None,
    ):
        lengths = np.diff(offsets)
        if (
            len(offsets) < 2
            or offsets[0]
            or offsets[-1] != len(tokens)
            or (lengths < 0).any()
        ):
            raise DataError(
                f"Documents: expected offsets that rise from 0 to {len(tokens)}, the "
                f"number of tokens, found {len(offsets)}: {offsets[:3]} … "
                f"{offsets[-1:]}. Give at least one document."
            )
        if weights is not None and len(weights) != len(lengths):
            raise DataError(
                f"Documents: expected {len(lengths)} weights, one a document, found "
                f"{len(weights)}."
            )
        self.tokens, self.offsets, self.weights = tokens, offsets, weights
        self.lengths: Int64[np.ndarray, " documents"] = lengths
        self.digest = digest

    @classmethod
    def from_arrays(
        cls,
        arrays: Sequence[npt.ArrayLike],
        weights: Sequence[float] | None = None,
        *,
        digest: str | None = None,
    ) -> "Documents":
        """Joins documents that are tokenized already, each a list of ids.

        Raises:
            DataError: If there are none.
        """
        if not len(arrays):
            raise DataError("Documents: expected at least one document, found none.")
        pieces = [np.asarray(array, np.int32).reshape(-1) for array in arrays]
        offsets = np.cumsum([0, *map(len, pieces)]).astype(np.int64)
        weighted = None if weights is None else np.asarray(weights, np.float32)
        return cls(np.concatenate(pieces), offsets, weighted, digest=digest)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        number = range(len(self))[operator.index(index)]
        return {"tokens": self.tokens[self.offsets[number] : self.offsets[number + 1]]}

    def part(self, start: int, stop: int) -> "Documents":
        """Returns the documents `start` to `stop` as a source of their own."""
        first, last = self.offsets[start], self.offsets[stop]
        return Documents(
            self.tokens[first:last],
            self.offsets[start : stop + 1] - first,
            None if self.weights is None else self.weights[start:stop],
            digest=self.digest and f"{self.digest}[{start}:{stop}]",
        )

    def save(self, path: Path) -> None:
        """Writes them into a directory that appears whole, or is there already."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        np.save(unfinished / "tokens.npy", self.tokens)
        np.save(unfinished / "offsets.npy", self.offsets)
        if self.weights is not None:
            np.save(unfinished / "weights.npy", self.weights)
        try:
            unfinished.rename(path)
        except OSError:
            # Another process was first, with the same documents.
            shutil.rmtree(unfinished)
            if not path.is_dir():
                raise

    @classmethod
    def load(cls, path: Path, *, digest: str | None = None) -> "Documents":
        """Maps what `save` wrote."""
        weights = path / "weights.npy"
        return cls(
            open_memmap(path / "tokens.npy", mode="r"),
            open_memmap(path / "offsets.npy", mode="r"),
            open_memmap(weights, mode="r") if weights.exists() else None,
            digest=digest,
        )
