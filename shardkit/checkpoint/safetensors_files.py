"""Safetensors files as trees of views, and trees as safetensors files.

Owns single files and sets of shards with their index, both ways. Invariants: what is
held in memory does not grow with the file, and a file or directory is either whole or
not there. What names mean is not known here.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shardkit.checkpoint.safetensors_header import (
    Entry,
    encode_header,
    read_header,
    read_small_json,
    refuse,
)
from shardkit.checkpoint.views import Box, View, iter_boxes
from shardkit.errors import ConfigError, RestoreError, reason

__all__ = ["open_safetensors", "write_safetensors"]

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAPPED_BYTES = 64 * 2**20


class _FileView(View):
    """A tensor in a file; mapped anew for each read, so that no pages linger."""

    def __init__(self, path: Path, entry: Entry):
        self.path, self.start = path, entry.start
        self.dtype, self.shape = entry.dtype, entry.shape

    def read(self, box: Box) -> np.ndarray:
        found = np.empty([stop - start for start, stop in box], self.dtype)
        if not found.size:
            return found
        if not box:
            found[...] = self._map(0, 1).reshape(())
            return found
        (first, last), inner = box[0], tuple(slice(*bounds) for bounds in box[1:])
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        step = max(1, _MAPPED_BYTES // row_bytes)
        for start in range(first, last, step):
            stop = min(start + step, last)
            rows = self._map(start, stop)[(slice(None), *inner)]
            found[start - first : stop - first] = rows
        return found

    def _map(self, first: int, last: int) -> np.ndarray:
        rows = (last - first, *self.shape[1:])
        num_bytes = math.prod(rows) * self.dtype.itemsize
        offset = self.start + first * (num_bytes // (last - first))
        try:
            mapped = np.memmap(self.path, np.uint8, "r", offset, (num_bytes,))
        except (OSError, ValueError) as error:
            problem = f"changed since it was opened: {reason(error)}"
            raise refuse(self.path, [problem], "Open it again.") from error
        return np.asarray(mapped).view(self.dtype).reshape(rows)


def open_safetensors(path: str | Path) -> Mapping[str, View]:
    """Opens a file, or all shards that an index names.

    Args:
        path: A `.safetensors` file, an index (`….index.json`), or a directory with
            `model.safetensors` or `model.safetensors.index.json` in it.

    Returns:
        Name → view; headers have been checked, data has not been read.

    Raises:
        RestoreError: If something is missing, damaged or not where the index says,
            listing every bad tensor of the first bad file.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (_INDEX, _WHOLE) if (path / name).is_file()]
        if len(found) != 1:
            problem = (
                f"expected either {_WHOLE} or {_INDEX} in it, found "
                f"{'both' if found else 'neither'}"
            )
            raise refuse(path, [problem], "Name the file or the index itself.")
        path = found[0]
    if path.suffix == ".json":
        return _open_shards(path)
    entries, _ = read_header(path)
    return {name: _FileView(path, entry) for name, entry in entries.items()}


def _open_shards(index: Path) -> dict[str, View]:
    places = _read_index(index)
    headers = {
        shard: read_header(index.parent / shard)[0]
        for shard in dict.fromkeys(places.values())
    }
    bad = [
        f"{name!r}: expected in {shard}, where it is not"
        for name, shard in places.items()
        if name not in headers[shard]
    ] + [
        f"{name!r}: is in {shard}, of which the index says nothing"
        for shard, entries in headers.items()
        for name in entries
        if places.get(name) != shard
    ]
    if bad:
        raise refuse(index, bad, "Fetch the index and its shards together.")
    return {
        name: _FileView(index.parent / shard, headers[shard][name])
        for name, shard in places.items()
    }


def _read_index(path: Path) -> dict[str, str]:
    places = read_small_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        problem = "weight_map: expected tensors and the shards they are in"
        raise refuse(path, [problem], "It is no index of safetensors files.")
    bad = sorted({repr(shard)[:200] for shard in places.values() if _is_bad(shard)})
    if bad:
        problems = (f"expected a file beside it, found {shard}" for shard in bad)
        raise refuse(path, problems, "Do not use what comes with this index.")
    return places


def _is_bad(shard: object) -> bool:
    return (
        not isinstance(shard, str)
        or shard in ("", ".")
        or any(text in shard for text in ("/", "\\", "\0", ".."))
    )


def write_safetensors(
    path: str | Path,
    tree: Mapping[str, View],
    metadata: Mapping[str, str] | None = None,
    *,
    max_shard_bytes: int = 5 * 10**9,
    limit_bytes: int = 64 * 2**20,
    files: Mapping[str, bytes] | None = None,
) -> list[Path]:
    """Writes a tree, box by box, and commits it by one rename.

    Args:
        path: A file, if it ends in `.safetensors`, and then all goes into it; or else
            a directory that is new or empty.
        tree: Name → view.
        metadata: For the header of every file.
        max_shard_bytes: In a directory, more data than this is cut into shards with
            an index; a tensor is never cut, though it be larger.
        limit_bytes: The most that is read at once.
        files: What else the directory is to hold: name → content.

    Returns:
        The files with tensors in them.

    Raises:
        ConfigError: If the target cannot be replaced, or a dtype not be stored.
    """
    path = Path(path).absolute()
    if path.suffix == ".safetensors":
        with _staged(path) as staging:
            _write_file(staging, tree, metadata, limit_bytes)
        return [path]
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(
            f"{path}: expected a new or an empty directory, found other files. Name "
            "another, or move them away."
        )
    shards = _cut(tree, max_shard_bytes)
    with _staged(path) as staging:
        staging.mkdir()
        for name, shard in shards.items():
            _write_file(staging / name, shard, metadata, limit_bytes)
        extra = dict(files or {})
        if len(shards) > 1:
            extra[_INDEX] = _encode_index(shards)
        for name, content in extra.items():
            with _created(staging / name) as file:
                file.write(content)
        _sync_directory(staging)
    return [path / name for name in shards]


def _cut(tree: Mapping[str, View], max_bytes: int) -> dict[str, dict[str, View]]:
    shards: list[dict[str, View]] = [{}]
    room = max_bytes
    for name, view in tree.items():
        if view.nbytes > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][name] = view
        room -= view.nbytes
    if len(shards) == 1:
        return {_WHOLE: shards[0]}
    return {
        f"model-{index:05}-of-{len(shards):05}.safetensors": shard
        for index, shard in enumerate(shards, 1)
    }


def _encode_index(shards: Mapping[str, Mapping[str, View]]) -> bytes:
    total = sum(view.nbytes for shard in shards.values() for view in shard.values())
    places = {name: shard for shard, tree in shards.items() for name in tree}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    return (json.dumps(index, indent=2) + "\n").encode()


def _write_file(
    path: Path,
    tree: Mapping[str, View],
    metadata: Mapping[str, str] | None,
    limit_bytes: int,
) -> None:
    # Wide elements first, and each tensor begins at a multiple of its own.
    tree = dict(sorted(tree.items(), key=lambda item: -item[1].dtype.itemsize))
    leaves = {name: (view.dtype, view.shape) for name, view in tree.items()}
    header = encode_header(leaves, metadata)
    with _created(path) as file:
        file.write(header)
        for view in tree.values():
            for box in iter_boxes(view.shape, view.dtype.itemsize, limit_bytes):
                values = np.ascontiguousarray(view.read(box), view.dtype)
                file.write(values.reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def _created(path: Path) -> Iterator[BinaryIO]:
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """Yields a path beside `path`, whose content takes its place in the end."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield staging
        os.replace(staging, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise RestoreError(f"{path}: cannot be written: {reason(error)}") from error
    finally:
        if staging.is_dir():
            shutil.rmtree(staging)
        else:
            staging.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
