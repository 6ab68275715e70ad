"""Checksums of the files of a checkpoint.

Owns one small file that lists every other, with its size and its XXH3, so that a
checkpoint is checked, and the bad file named, as fast as it can be read; no JAX is
needed. It knows nothing of what the files mean.
"""

import concurrent.futures
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from shardkit.checkpoint.manifest import (
    FILE_NAME,
    Manifest,
    is_path,
    sealed,
    unsealed,
)
from shardkit.errors import DamagedError

__all__ = ["SUMS_NAME", "check_sums", "seal"]

SUMS_NAME = "shardkit.sums.json"
_FORMAT = 1
_CHUNK_BYTES = 1 << 22


def seal(directory: Path, manifest: Manifest) -> None:
    """Writes the manifest of an item that is complete, and then the list of its files.

    Args:
        directory: Where its arrays are.
        manifest: What is said of them.
    """
    write_durably(directory / FILE_NAME, manifest.to_bytes())
    write_sums(directory)


def write_sums(directory: Path) -> None:
    """Lists the files under a directory, durably."""
    files = sorted(_files(directory))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sums = list(pool.map(lambda name: file_sum(directory / name), files))
    text = sealed({"format": _FORMAT, "files": dict(zip(files, sums, strict=True))})
    write_durably(directory / SUMS_NAME, text)


def check_sums(
    directory: Path, *, progress: Callable[[int], None] = lambda num_bytes: None
) -> list[str]:
    """Compares the files under a directory with their list.

    Args:
        directory: Of a saved item.
        progress: Is told of bytes that have been read.

    Returns:
        For every file that is not what was written, what is wrong with it; or only
        that the list itself is bad.
    """
    try:
        wanted = _parse(unsealed(directory / SUMS_NAME, _FORMAT)["files"])
    except DamagedError as error:
        return [str(error)]
    except (AttributeError, KeyError, TypeError, ValueError):
        return [f"{directory / SUMS_NAME}: damaged: not a list of files"]
    there, others = set(_files(directory)), set(_files(directory, regular=False))
    bad = [
        f"{directory / name}: "
        + ("expected a file, found something else" if name in others else "missing")
        for name in sorted(wanted.keys() - there)
    ]
    extra = sorted((there | others) - wanted.keys())
    bad += [f"{directory / name}: was not written with the others" for name in extra]

    def check(name: str) -> str | None:
        size, expected = wanted[name]
        path = directory / name
        try:
            if (num := path.stat().st_size) != size:
                return f"{path}: expected {size} bytes, found {num}"
            changed = file_sum(path, progress)[1] != expected
        except OSError as error:
            return f"{path}: {error.strerror}"
        return f"{path}: its bytes are not what was written" if changed else None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        bad += filter(None, pool.map(check, sorted(wanted.keys() & there)))
    return bad


def file_sum(
    path: Path, progress: Callable[[int], None] = lambda num_bytes: None
) -> tuple[int, str]:
    """The size of a file, and the XXH3 of its bytes with 128 bits."""
    found, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while num := file.readinto(buffer):
            found.update(buffer[:num])
            size += num
            progress(num)
    return size, found.hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file so that it is whole or not there, even if the power goes."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _parse(files: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    for name, (size, digest) in files.items():
        if not is_path(name) or type(size) is not int or type(digest) is not str:
            raise ValueError(name)
    return {name: (size, digest) for name, (size, digest) in files.items()}


def _files(directory: Path, *, regular: bool = True) -> Iterator[str]:
    """Regular files, by their path from `directory`; or else links and the like."""
    for folder, folders, names in os.walk(directory):
        for path in (Path(folder, name) for name in (*names, *folders)):
            mode = path.lstat().st_mode
            name = path.relative_to(directory).as_posix()
            if name not in _OURS and not stat.S_ISDIR(mode):
                if stat.S_ISREG(mode) == regular:
                    yield name


_OURS = {SUMS_NAME, "commit_success.txt"}
"""What is written after the list, or is the list."""
