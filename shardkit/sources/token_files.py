"""Files of token ids, memory-mapped and cut into windows.

Owns the formats: NumPy's `.npy` of one dim, and raw integers.

Invariant: the windows of a file do not overlap but for the one token that is the last
target of one and the first input of the next. Knows no documents.
"""

import operator
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from shardkit.errors import DataError
from shardkit.sources.files import PathOrPaths, digest_samples, find_files

__all__ = ["TokenFile"]

_LARGEST = np.iinfo(np.int32).max


class TokenFile:
    """Windows of tokens: `{"tokens": int32 [sequence_length + 1]}`.

    Each file is cut by itself: no window runs from one into the next, and what is left
    at its end is dropped. The files are mapped, not read, and must not change.

    Args:
        path: A file, a directory (all `.bin` and `.npy` below it), a glob, or several.
        sequence_length: Tokens the model sees at once.
        dtype: Of files without a header, such as `"uint16"`; `.npy` files know theirs.
        header_bytes: How much to leave out at the beginning of files other than `.npy`.

    Attributes:
        files: What was found, in order.

    Raises:
        DataError: If a file holds no integers in one dim or no window, or a dtype is
            missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "tokens.npy"
        ...     np.save(path, np.arange(10, dtype=np.uint16))
        ...     windows = TokenFile(path, sequence_length=4)
        ...     len(windows), windows[1]["tokens"].tolist()
        (2, [4, 5, 6, 7, 8])
    """

    def __init__(
        self,
        path: PathOrPaths,
        *,
        sequence_length: int,
        dtype: str | None = None,
        header_bytes: int = 0,
    ):
        if sequence_length < 1:
            raise DataError(
                "TokenFile: expected a sequence_length of at least 1, found "
                f"{sequence_length}. Raise it."
            )
        self.files = find_files(path, (".bin", ".npy"))
        self.sequence_length = sequence_length
        self._maps = [_map(file, dtype, header_bytes) for file in self.files]
        counts = [(len(tokens) - 1) // sequence_length for tokens in self._maps]
        self._ends = np.cumsum(np.maximum(counts, 0))
        if not len(self):
            longest = max(map(len, self._maps))
            raise DataError(
                f"TokenFile: expected a file of at least {sequence_length + 1} tokens "
                f"(sequence_length + 1), found {longest} in the longest, of "
                f"{self.files[0]} …. Take more text or a smaller sequence_length."
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the sizes and of samples: see `digest_samples`."""
        return digest_samples(self.files)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        number = range(len(self))[operator.index(index)]
        file = int(np.searchsorted(self._ends, number, side="right"))
        first = int(self._ends[file - 1]) if file else 0
        start = (number - first) * self.sequence_length
        found = self._maps[file][start : start + self.sequence_length + 1]
        tokens = np.asarray(found).astype(np.int32)
        if (
            found.dtype.itemsize >= 4
            and not 0 <= found.min() <= found.max() <= _LARGEST
        ):
            raise DataError(
                f"{self.files[file]}, window {number - first}: expected tokens from 0 "
                f"to {_LARGEST}, found {found.min()} to {found.max()}. The dtype may "
                f"be another one than {found.dtype}."
            )
        return {"tokens": tokens}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        return [self[index] for index in indices]


def _map(file: Path, dtype: str | None, header_bytes: int) -> np.ndarray:
    if file.suffix == ".npy":
        try:
            tokens = np.lib.format.open_memmap(file, mode="r")
        except ValueError as error:
            raise DataError(f"{file}: expected a .npy file, found {error}") from error
    elif dtype is None:
        raise DataError(
            f"{file}: the dtype of its tokens is missing, and the file does not say. "
            'Give it, as in TokenFile(path, dtype="uint16", …).'
        )
    else:
        size = file.stat().st_size - header_bytes
        if size <= 0 or size % np.dtype(dtype).itemsize:
            raise DataError(
                f"{file}: expected tokens of dtype {dtype}, found {size} bytes after "
                f"{header_bytes} of a header. Give the dtype that it was written with."
            )
        tokens = np.memmap(file, np.dtype(dtype), mode="r", offset=header_bytes)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"{file}: expected integers in one dim, found {tokens.dtype}"
            f"{list(tokens.shape)}. Write the ids of all tokens one after the other."
        )
    return tokens
