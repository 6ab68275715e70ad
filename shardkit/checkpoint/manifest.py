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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from shardkit.blocks import Blocks
from shardkit.errors import DamagedError

__all__ = ["FILE_NAME", "LeafRecord", "Manifest", "numpy_dtype", "sealed", "unsealed"]

FILE_NAME = "shardkit.json"
_FORMAT = 2
_MAX_BYTES = 1 << 28
_MAX_DIMS = 32
_MAX_SIZE = 1 << 48
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
    if hasattr(ml_dtypes, name) and isinstance(getattr(ml_dtypes, name), type):
        return np.dtype(getattr(ml_dtypes, name))
    try:
        dtype = np.dtype(name)
    except TypeError:
        raise ValueError(f"no dtype is called {name!r}") from None
    if dtype.kind not in "biufc":
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
        if not isinstance(found["leaves"], dict):
            raise ValueError("leaves: expected a table")
        leaves = {path: _leaf(path, x) for path, x in found["leaves"].items()}
        return cls(step=step, digest=found["digest"], leaves=leaves, **rest)


_DICTS = ("run", "data", "random", "fingerprint", "mesh", "metrics")


def sealed(fields: Mapping[str, Any]) -> bytes:
    """Spells a JSON table with the SHA-256 of its own text."""
    seal = hashlib.sha256(_canonical(fields)).hexdigest()
    return json.dumps({**fields, "sha256": seal}, indent=1).encode()


def unsealed(path: Path, version: int) -> dict[str, Any]:
    """Reads a table that `sealed` has spelled.

    Raises:
        DamagedError: If it is missing, cut short, changed or of another format.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        text = path.read_bytes().decode()
        found = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(found, dict):
            raise ValueError("expected a table")
        seal = found.pop("sha256", None)
        if found.get("format") != version:
            raise ValueError(
                f"expected format {version}, found {found.get('format')!r:.40}"
            )
        if seal != hashlib.sha256(_canonical(found)).hexdigest():
            raise ValueError("its text is not what was written")
    except FileNotFoundError:
        raise DamagedError(
            f"{path}: not there; expected a checkpoint of shardkit, with its manifest"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: damaged: {error!s:.300}") from None
    return found


def _canonical(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _leaf(path: str, found: Any) -> LeafRecord:
    parts = path.split("/")
    if not path or len(path) > 4096 or "\0" in path or {"", ".", ".."} & {*parts}:
        raise ValueError(f"leaves: {path!r:.80} is no path")
    shape = tuple(_whole(size, path) for size in found["shape"])
    if len(shape) > _MAX_DIMS or math.prod(shape) > _MAX_SIZE:
        raise ValueError(f"{path}: expected a shape, found {list(shape)!r:.80}")
    axes = found["axes"]
    if axes is not None and (
        len(axes) != len(shape) or not all(isinstance(a, str | None) for a in axes)
    ):
        raise ValueError(f"{path}: expected an axis for every dim, found {axes!r:.80}")
    blocks = tuple(found["blocks"])
    if not all(isinstance(x, str) and _LANES.fullmatch(x) for x in blocks):
        raise ValueError(f"{path}: its digests are not digests")
    if not isinstance(found["dtype"], str):
        raise ValueError(f"{path}: expected the name of a dtype")
    leaf = LeafRecord(shape, found["dtype"], blocks, axes and tuple(axes))
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
