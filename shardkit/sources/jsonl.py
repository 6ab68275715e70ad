"""JSON Lines files, read by line number.

Owns the index of where the lines begin, built once by one pass over the files.

Invariant: example `i` is the `i`-th line that is not blank. Lines are parsed when they
are asked for and not kept.
"""

import hashlib
import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from shardkit.errors import DataError
from shardkit.sources.files import PathOrPaths, find_files

__all__ = ["JsonLines"]

_CHUNK_BYTES = 2**24
_NEWLINE = ord("\n")


class JsonLines:
    r"""One JSON object per line, of one file or several.

    The index takes 16 bytes of memory a line. The files are mapped, not read into
    memory, and must not change.

    Args:
        path: A file, a directory (all `.jsonl`, `.ndjson` and `.json` below it), a
            glob, or several of them.
        fields: Which fields of an object to return; None for all.

    Attributes:
        files: What was found, in order.
        digest: SHA-256 of names and contents.

    Raises:
        DataError: If there are no lines. When a line is read: naming the file and the
            line if it is not a JSON object or lacks a field.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "few.jsonl"
        ...     _ = path.write_text('{"text": "one", "id": 1}\n{"text": "two"}\n')
        ...     lines = JsonLines(path, fields=["text"])
        ...     len(lines), lines[1]
        (2, {'text': 'two'})
    """

    def __init__(self, path: PathOrPaths, *, fields: Sequence[str] | None = None):
        self.files = find_files(path, (".jsonl", ".ndjson", ".json"))
        self.fields = None if fields is None else tuple(fields)
        digest = hashlib.sha256()
        self._maps = [_map(file) for file in self.files]
        spans = [
            _index_lines(content, file, digest)
            for content, file in zip(self._maps, self.files, strict=True)
        ]
        self.digest = digest.hexdigest()
        self._spans = np.concatenate(spans)
        self._ends = np.cumsum([len(span) for span in spans])
        if not len(self._spans):
            raise DataError(
                f"JsonLines: expected lines in {self.files[0]}, found none in "
                f"{len(self.files)} file(s). Name a path that holds some."
            )

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        number = range(len(self))[operator.index(index)]
        file = int(np.searchsorted(self._ends, number, side="right"))
        start, stop = self._spans[number].tolist()
        raw = self._maps[file][start:stop].tobytes()
        try:
            value = json.loads(raw)
        except ValueError as error:
            raise DataError(
                f"{self._place(file, start)}: expected a JSON object, found "
                f"{raw[:40]!r} ({error}). Mend the line or take it out."
            ) from error
        if not isinstance(value, dict):
            raise DataError(
                f"{self._place(file, start)}: expected a JSON object, found a "
                f"{type(value).__name__}. Write {{…}} with named fields."
            )
        if self.fields is None:
            return value
        missing = [name for name in self.fields if name not in value]
        if missing:
            raise DataError(
                f"{self._place(file, start)}: expected the fields "
                f"{', '.join(self.fields)}, found {', '.join(value) or 'none'}. Name "
                "other fields, or mend the line."
            )
        return {name: value[name] for name in self.fields}

    def _place(self, file: int, start: int) -> str:
        # Counted for the message alone: blank lines have no index of their own.
        line = np.count_nonzero(self._maps[file][:start] == _NEWLINE) + 1
        return f"{self.files[file]}:{line}"


def _map(file: Path) -> np.ndarray:
    # Nothing can be mapped of an empty file.
    if file.stat().st_size == 0:
        return np.zeros(0, np.uint8)
    content = np.memmap(file, np.uint8, mode="r")
    if content[:2].tobytes() == b"\x1f\x8b":
        raise DataError(
            f"{file}: expected text, found gzip, which cannot be read from the middle. "
            "Unpack it: gunzip --keep."
        )
    return content


def _index_lines(content: np.ndarray, file: Path, digest: Any) -> np.ndarray:
    """Returns where each line begins and ends, `[lines, 2]`, and feeds the digest."""
    digest.update(f"{file.name} {len(content)}\n".encode())
    newlines = []
    for start in range(0, len(content), _CHUNK_BYTES):
        chunk = np.asarray(content[start : start + _CHUNK_BYTES])
        digest.update(chunk)
        newlines.append(np.flatnonzero(chunk == _NEWLINE) + start)
    stops = np.concatenate([*newlines, [len(content)]]).astype(np.int64)
    starts = np.concatenate([[0], stops[:-1] + 1])
    keep = stops > starts
    # An object takes two bytes; a line that short may hold white space instead.
    for line in np.flatnonzero(keep & (stops - starts <= 2)):
        keep[line] = bool(content[starts[line] : stops[line]].tobytes().strip())
    return np.stack([starts, stops], axis=1)[keep]
