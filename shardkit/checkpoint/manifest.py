"""What a checkpoint says of itself: JSON beside the arrays.

Owns `Manifest` and its one spelling on disk, sealed by a SHA-256 of its own text.
Invariant: it records logical things only, so that it is read without a mesh and
without JAX; and nothing that it says is believed before it has been checked, so that
a hostile one costs an error and nothing else.
"""

import dataclasses
import hashlib
import json
import math
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from shardkit.blocks import Blocks
from shardkit.errors import DamagedError, reason

__all__ = [
    "FILE_NAME",
    "LeafRecord",
    "Manifest",
    "is_path",
    "numpy_dtype",
    "read_small",
    "sealed",
    "unsealed",
]

FILE_NAME = "shardkit.json"
_FORMAT = 2
_MAX_BYTES = 1 << 28
_MAX_DIMS = 32
_MAX_SIZE = 1 << 48
_MAX_DEPTH = 32
_LANES = re.compile(r"[0-9a-f]{32}")
_KEY_DTYPES = {"key<fry>": 2}
"""Dtypes of random keys, by how many words of uint32 a key is."""


def numpy_dtype(name: str) -> np.dtype:
    """Finds a dtype by its name, those of `ml_dtypes` among them.

    Raises:
        ValueError: If there is none.

    Example:
        >>> numpy_dtype("bfloat16").itemsize
        2
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{1,31}", name):
        raise ValueError(f"no dtype is called {name!r}")
    found = getattr(ml_dtypes, name, None) or np.sctypeDict.get(name)
    # One name for each: aliases, and what only looks like a dtype, are none.
    is_dtype = isinstance(found, type) and issubclass(found, np.generic)
    if not is_dtype or np.dtype(found).name != name:
        raise ValueError(f"no dtype is called {name!r}")
    dtype = np.dtype(found)
    if dtype.kind not in "biufcV" or not dtype.itemsize:
        raise ValueError(f"arrays of {name!r} are not saved")
    return dtype


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """One leaf of a saved tree.

    Attributes:
        shape: Its logical shape.
        dtype: The name of its dtype; of random keys `key<fry>`.
        blocks: The digest of every block, four sums in 32 hex digits, in row-major
            order of `Blocks.grid`; empty where none is known.
        axes: The logical axis of each dim, where there are annotations.
    """

    shape: tuple[int, ...]
    dtype: str
    blocks: tuple[str, ...] = ()
    axes: tuple[str | None, ...] | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the array that is stored; of keys, their words'."""
        return (*self.shape, *([_KEY_DTYPES[self.dtype]] if self.is_key else []))

    @property
    def stored_dtype(self) -> np.dtype:
        """The dtype of the array that is stored."""
        return np.dtype(np.uint32) if self.is_key else numpy_dtype(self.dtype)

    @property
    def is_key(self) -> bool:
        """Whether the leaf consists of random keys."""
        return self.dtype in _KEY_DTYPES

    @property
    def nbytes(self) -> int:
        """The bytes of the array, not compressed."""
        return math.prod(self.stored_shape) * self.stored_dtype.itemsize

    @property
    def grid(self) -> Blocks:
        """How it is cut into blocks."""
        return Blocks.of(self.stored_shape, self.stored_dtype.itemsize)

    @property
    def layers(self) -> int | None:
        """How many layers are stacked in it, as its logical axes say."""
        if self.axes is None or "layers" not in self.axes:
            return None
        return self.shape[self.axes.index("layers")]

    def lanes(self) -> np.ndarray:
        """The digests of the blocks, `uint32 [blocks, 4]`."""
        return np.array(
            [
                [int(text[i : i + 8], 16) for i in (0, 8, 16, 24)]
                for text in self.blocks
            ],
            np.uint32,
        ).reshape(-1, 4)

    def differing(self, table: np.ndarray) -> Iterator[tuple[int, Any]]:
        """Yields number and box of the blocks of which a digest is another.

        Args:
            table: `uint32 [blocks, 4]`.
        """
        lanes = self.lanes()
        # Without digests nothing would be compared.
        is_known = lanes.shape == table.shape
        differs = (lanes != table).any(axis=1) if is_known else [True] * len(table)
        for number, index in enumerate(self.grid if any(differs) else ()):
            if differs[number]:
                yield number, self.grid.box(index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a saved state but its bits.

    Attributes:
        step: How many steps were done.
        digest: Of the whole state, as `combine_digests` folds it.
        leaves: By path.
        run: What a run must share to go on from here: its config, its seed, its
            number of microbatches, the digest of its corpus.
        data: Where the data is to go on: the next step, examples seen.
        random: How keys are made: generator and seed.
        fingerprint: Versions and kinds of devices, which bits may depend on.
        mesh: The mesh that saved; for information only.
        metrics: What was known of the run's quality.
    """

    step: int
    digest: str
    leaves: Mapping[str, LeafRecord]
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    random: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint: Mapping[str, str] = dataclasses.field(default_factory=dict)
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays, not compressed."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    def to_bytes(self) -> bytes:
        """Spells it for a file."""
        fields = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        fields["leaves"] = {
            path: {
                "shape": list(leaf.shape),
                "dtype": leaf.dtype,
                "axes": None if leaf.axes is None else list(leaf.axes),
                "layers": leaf.layers,
                "blocks": list(leaf.blocks),
            }
            for path, leaf in self.leaves.items()
        }
        return sealed({"format": _FORMAT, **fields})

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads the manifest of a saved item.

        Raises:
            DamagedError: If there is none, or it is not what was written.
        """
        path = directory / FILE_NAME
        found = unsealed(path, _FORMAT)
        try:
            return cls._parse(found)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DamagedError(
                f"{path}: not a manifest: {type(error).__name__}: {error}. Restore "
                "another step."
            ) from None

    @classmethod
    def _parse(cls, found: Mapping[str, Any]) -> "Manifest":
        step = _whole(found["step"], "step")
        if not isinstance(found["digest"], str):
            raise ValueError("digest: expected text")
        rest = {name: found[name] for name in _DICTS}
        for name, value in rest.items():
            if not isinstance(value, dict):
                raise ValueError(f"{name}: expected a table")
            _check_depth(value, name)
        for name, value in found["metrics"].items():
            if type(value) not in (int, float):
                raise ValueError(f"metrics: {name!r:.80} is not a number")
            float(value)
        if not isinstance(found["leaves"], dict):
            raise ValueError("leaves: expected a table")
        leaves = {path: _leaf(path, x) for path, x in found["leaves"].items()}
        return cls(step=step, digest=found["digest"], leaves=leaves, **rest)


_DICTS = ("run", "data", "random", "fingerprint", "mesh", "metrics")


def sealed(fields: Mapping[str, Any]) -> bytes:
    """Spells a JSON table that ends with the SHA-256 of its own text before that."""
    text = json.dumps(fields, indent=1).removesuffix("\n}").encode()
    return text + _seal(text)


def unsealed(path: Path, version: int) -> dict[str, Any]:
    """Reads a table that `sealed` has spelled.

    Raises:
        DamagedError: If it is missing, cut short, changed or of another format.
    """
    try:
        data = read_small(path)
        # What has been changed is not even parsed.
        if data[-_SEAL_BYTES:] != _seal(data[:-_SEAL_BYTES]):
            raise ValueError("its text is not what was written")
        found = json.loads(data, object_pairs_hook=_unique)
        del found["sha256"]
        if type(found.get("format")) is not int or found["format"] != version:
            raise ValueError(
                f"expected format {version}, found {found.get('format')!r:.40}"
            )
    except FileNotFoundError:
        raise DamagedError(
            f"{path}: not there; expected a checkpoint of shardkit, with its manifest"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path}: damaged: {reason(error):.300}") from None
    return found


def read_small(path: Path) -> bytes:
    """Reads a file that must be a regular one, and not a large one.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is something else; a pipe would never end.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("expected a file")
    if found.st_size > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES} bytes")
    with path.open("rb") as file:
        return file.read(found.st_size)


def is_path(path: str) -> bool:
    """Whether something may be called so: names that stay where they are put.

    >>> is_path("params/kernel"), is_path("params/../kernel")
    (True, False)
    """
    try:
        is_text = 0 < len(path.encode()) <= 4096 and "\0" not in path
    except UnicodeEncodeError:
        return False
    return is_text and not {"", ".", ".."} & {*path.split("/")}


def _seal(text: bytes) -> bytes:
    return b',\n "sha256": "%s"\n}' % hashlib.sha256(text).hexdigest().encode()


_SEAL_BYTES = len(_seal(b""))


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _check_depth(value: Any, where: str, depth: int = 0) -> None:
    """Refuses what nothing that goes through a table could be expected to stand."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where}: nested too deeply")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, where, depth + 1)


def _leaf(path: str, found: Any) -> LeafRecord:
    if not is_path(path):
        raise ValueError(f"leaves: {path!r:.80} is no path")
    shape, axes, blocks = (found[name] for name in ("shape", "axes", "blocks"))
    if type(shape) is not list or len(shape) > _MAX_DIMS:
        raise ValueError(f"{path}: expected a shape, found {shape!r:.80}")
    shape = tuple(_whole(size, path) for size in shape)
    if math.prod(size for size in shape if size) > _MAX_SIZE:
        raise ValueError(f"{path}: expected a shape, found {list(shape)!r:.80}")
    if axes is not None and (
        type(axes) is not list
        or len(axes) != len(shape)
        or not all(isinstance(a, str | None) for a in axes)
    ):
        raise ValueError(f"{path}: expected an axis for every dim, found {axes!r:.80}")
    if type(blocks) is not list or not all(
        isinstance(x, str) and _LANES.fullmatch(x) for x in blocks
    ):
        raise ValueError(f"{path}: its digests are not digests")
    blocks = tuple(blocks)
    if not isinstance(found["dtype"], str):
        raise ValueError(f"{path}: expected the name of a dtype")
    axes = None if axes is None else tuple(axes)
    leaf = LeafRecord(shape, found["dtype"], blocks, axes)
    # Only numbers are compared: nothing as large as a shape may claim is made.
    if blocks and len(leaf.blocks) != len(leaf.grid):
        raise ValueError(
            f"{path}: expected {len(leaf.grid)} digests, found {len(blocks)}"
        )
    leaf.stored_dtype  # noqa: B018  # Raises for a name that is none.
    return leaf


def _whole(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_SIZE:
        raise ValueError(f"{where}: expected a whole number, found {value!r:.40}")
    return value
