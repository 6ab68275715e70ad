"""Files that make up a source: found, put in order, digested; text files as documents.

Invariant: the order and the digest depend on the files' names below what was asked for
and on their contents, not on where they lie or how the file system lists them.
"""

import glob
import hashlib
import operator
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import SupportsIndex

from shardkit.errors import DataError

__all__ = ["PathOrPaths", "TextFiles", "digest_samples", "find_files"]

PathOrPaths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_SAMPLE_BYTES = 2**16
_NUM_SAMPLES = 256


def find_files(path: PathOrPaths, suffixes: Collection[str]) -> list[Path]:
    """Lists the files that a path stands for.

    Args:
        path: A file, a directory (every file below it with one of the suffixes), a
            glob (any suffix), or several of them, which are taken in the order given.
        suffixes: Such as `.jsonl`.

    Raises:
        DataError: If one of the paths stands for no file.
    """
    several = [path] if isinstance(path, str | os.PathLike) else path
    found: list[Path] = []
    for name in map(Path, several):
        root = name.expanduser()
        if root.is_file():
            files = [root]
        elif root.is_dir():
            files = [x for x in root.rglob("*") if x.suffix.lower() in suffixes]
        else:
            files = [Path(x) for x in glob.glob(str(root), recursive=True)]
        files = sorted((x for x in files if x.is_file()), key=lambda x: x.as_posix())
        if not files:
            raise DataError(
                f"The data {root} do not exist: expected a file, a glob, or a "
                f"directory with files ending in {' '.join(sorted(suffixes))}, found "
                f"none. Check the path; relative ones start at {Path.cwd()}."
            )
        found += files
    return found


def digest_samples(files: Sequence[Path]) -> str:
    """Digests the size and evenly spread samples of files too large to be read whole.

    256 pieces of 64 KiB are read of each, the first and the last bytes among them. A
    change between two samples that keeps the size goes unseen.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        last = max(0, size - _SAMPLE_BYTES)
        starts = {last * number // (_NUM_SAMPLES - 1) for number in range(_NUM_SAMPLES)}
        with file.open("rb") as stream:
            for start in sorted(starts):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class TextFiles:
    """Text files as documents, one each: `{"text": str}`.

    Bytes that are not UTF-8 become U+FFFD.

    Args:
        path: A file, a directory, a glob, or several of them.
        suffixes: Which files of a directory count.

    Attributes:
        files: What was found, in order.
        digest: SHA-256 of names and contents.

    Raises:
        DataError: If there are none.
    """

    def __init__(
        self, path: PathOrPaths, *, suffixes: Sequence[str] = (".txt", ".md", ".py")
    ):
        self.files = find_files(path, suffixes)
        digest = hashlib.sha256()
        for file in self.files:
            content = file.read_bytes()
            # Lengths first, or a byte could move from one file to the next unseen.
            digest.update(f"{file.name} {len(content)}\n".encode())
            digest.update(content)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: SupportsIndex) -> dict[str, str]:
        content = self.files[operator.index(index)].read_bytes()
        return {"text": content.decode(errors="replace")}
