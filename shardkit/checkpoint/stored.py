"""Arrays on disk as Orbax writes them, read box by box.

Owns how a stored array is opened through TensorStore: neither the mesh that saved nor
Orbax is needed, and no more than a chunk is read beside what was asked for. It
verifies nothing.
"""

import functools
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shardkit.checkpoint.manifest import LeafRecord, is_path, read_small
from shardkit.checkpoint.views import Box, View, box_slices
from shardkit.errors import ConfigError, DamagedError, reason

__all__ = [
    "METADATA_NAME",
    "StoredView",
    "check_savable",
    "insert",
    "shared_context",
    "stored_name",
    "tree_names",
]

METADATA_NAME = "_METADATA"
_INDEX_BYTES = 32 << 20
_BAD_JSON = OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError
_UNREADABLE = ValueError, OSError, LookupError, RuntimeError, MemoryError
"""What TensorStore makes of its status codes."""


def stored_name(path: str) -> str:
    """How Orbax calls the array at a path.

    >>> stored_name("params/layers/0")
    'params.layers.0'
    """
    return path.replace("/", ".")


def insert(tree: dict[str, Any], path: str, value: Any) -> None:
    """Puts a value into nested dicts, as Orbax is to store it.

    Raises:
        ConfigError: If two paths would be stored under one name.
    """
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            break
    if not isinstance(tree, dict) or last in tree:
        raise ConfigError(
            f"{path}: would be stored as {stored_name(path)!r}, as another leaf is; "
            "rename one of them"
        )
    tree[last] = value


def check_savable(leaves: Iterable[Any]) -> None:
    """Refuses what could be written and never be read again.

    Args:
        leaves: Anything with a path, a shape and a dtype.

    Raises:
        ConfigError: Naming all leaves of a dtype that is not saved, all without a name
            of their own, and all that would be stored under the name of another; or if
            there is no element.
    """
    bad, names, leaves = [], dict[str, str](), list(leaves)
    if not any(math.prod(leaf.shape) for leaf in leaves):
        what = "all leaves are" if leaves else "the tree is"
        raise ConfigError(f"nothing can be saved: {what} empty")
    for leaf in leaves:
        if not leaf.path:
            bad.append('an array by itself has no name: save {"name": array}')
            continue
        if not is_path(leaf.path):
            bad.append(
                f"{leaf.path!r:.200}: is no path: no part of it may be empty, "
                "'.' or '..', nor hold a zero byte"
            )
            continue
        other = names.setdefault(stored_name(leaf.path), leaf.path)
        if other is not leaf.path:
            bad.append(f"{leaf.path}: would be stored under the name of {other}")
        try:
            LeafRecord((), str(leaf.dtype)).stored_dtype  # noqa: B018
        except ValueError as error:
            bad.append(f"{leaf.path}: {error}")
    if bad:
        raise ConfigError("these leaves cannot be saved:\n  " + "\n  ".join(bad[:20]))


def shared_context() -> Callable[[], Any]:
    """What arrays of one checkpoint share: a cache of its index, and threads.

    Without the cache every read would read the index anew. Without threads of their
    own, a thread of TensorStore's would wait for itself where a view is streamed into
    a store, and so is read by the thread that writes.
    """

    @functools.cache
    def make() -> Any:
        import tensorstore as ts

        return ts.Context(
            {
                "cache_pool#ocdbt": {"total_bytes_limit": _INDEX_BYTES},
                "data_copy_concurrency": {"limit": max(2, os.cpu_count() or 2)},
            }
        )

    return make


class StoredView(View):
    """One stored array; it is opened when it is first needed.

    Args:
        directory: Of the item that it is in.
        path: Its path in the tree.
        shape: What it has to have, if that is known.
        dtype: Likewise.
        context: What it shares with the others there: see `shared_context`.

    Raises:
        DamagedError: When it is opened or read, if it cannot be.
    """

    def __init__(
        self,
        directory: Path,
        path: str,
        shape: tuple[int, ...] | None = None,
        dtype: np.dtype | None = None,
        context: Callable[[], Any] | None = None,
    ) -> None:
        self._directory, self._path = directory, path
        self._context = context or shared_context()
        self._store: Any = None
        self._lock = threading.Lock()
        if shape is None or dtype is None:
            store = self._open()
            shape, dtype = tuple(store.shape), store.dtype.numpy_dtype
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._check()

    def read(self, box: Box) -> np.ndarray:
        """Reads one box: see `View.read`."""
        if not self.shape or all(stop > start for start, stop in box):
            store = self._open()
            try:
                return np.asarray(store[box_slices(box)].read().result(), order="C")
            except _UNREADABLE as error:
                raise self._error(error) from None
        return np.zeros([stop - start for start, stop in box], self.dtype)

    def _check(self) -> None:
        if self._store is None:
            return
        found = tuple(self._store.shape), self._store.dtype.numpy_dtype
        if found != (self.shape, self.dtype):
            raise self._error(
                f"expected {self.describe()}, found {found[1]}{list(found[0])}"
            )

    def _open(self) -> Any:
        with self._lock:
            if self._store is None:
                self._store = self._opened()
                if hasattr(self, "dtype"):
                    self._check()
            return self._store

    def _opened(self) -> Any:
        import tensorstore as ts

        name = f"{stored_name(self._path)}/"
        base = {"driver": "file", "path": f"{self._directory}/"}
        if (self._directory / "manifest.ocdbt").exists():
            kvstore = {
                "driver": "ocdbt",
                "base": base,
                "path": name,
                "cache_pool": "cache_pool#ocdbt",
            }
        else:
            kvstore = {**base, "path": base["path"] + name}
        problem: Exception | None = None
        for driver in ("zarr", "zarr3"):
            spec = {"driver": driver, "kvstore": kvstore}
            try:
                return ts.open(
                    spec, open=True, read=True, context=self._context()
                ).result()
            except _UNREADABLE as error:
                problem = problem or error
        raise self._error(problem)

    def _error(self, problem: Any) -> DamagedError:
        # TensorStore ends its messages with where in its own source they arose.
        text = re.sub(r"\s*\[(source locations|tensorstore_spec)=.*", "", str(problem))
        return DamagedError(
            f"{self._directory}: {self._path} cannot be read: {text:.300}"
        )


def tree_names(directory: Path) -> Iterator[str]:
    """Lists the paths of the arrays of a tree that Orbax saved.

    Raises:
        DamagedError: If there is no such tree.
    """
    path = directory / METADATA_NAME
    try:
        for entry in json.loads(read_small(path))["tree_metadata"].values():
            kind = entry["value_metadata"]["value_type"]
            parts = [str(key["key"]) for key in entry["key_metadata"]]
            if not is_path("/".join(parts)) or any("/" in part for part in parts):
                raise ValueError(f"{parts!r:.80} is no path")
            if kind in ("jax.Array", "np.ndarray", "scalar"):
                yield "/".join(parts)
    except FileNotFoundError:
        raise DamagedError(f"{path}: missing; expected Orbax's") from None
    except _BAD_JSON as e:
        raise DamagedError(
            f"{path}: damaged: {type(e).__name__}: {reason(e):.200}"
        ) from None
