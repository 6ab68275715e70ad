"""The header of a safetensors file: which tensor lies where.

Owns reading headers of files that nobody vouches for, and making them. Invariant: what
`read_header` returns lies inside its file, each byte of data in exactly one tensor, and
nothing larger than the file was allocated to find out. It reads no data.

References:
    Hugging Face, the safetensors format (2022): 8 bytes with the header's length,
    little-endian; the header as JSON; the data.
"""

import collections
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from shardkit.errors import ConfigError, RestoreError

__all__ = [
    "MAX_HEADER_BYTES",
    "Entry",
    "encode_header",
    "read_header",
    "read_small_json",
    "refuse",
]

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMS = 32
_MAX_LISTED = 20
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "I8": np.dtype(np.int8),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor is: bytes `start` to `stop` of the file, row-major."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def refuse(path: Path, problems: Iterable[str], advice: str) -> RestoreError:
    """Makes the error that lists what is wrong with a file, the first few in full."""
    lines = list(problems)
    more = len(lines) - _MAX_LISTED
    listed = [f"  {line}" for line in lines[:_MAX_LISTED]]
    listed += [f"  and {more} more"] * (more > 0)
    return RestoreError("\n".join([f"{path}: cannot be read", *listed, advice]))


def read_small_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object, in which no name may come twice.

    Raises:
        RestoreError: If it is missing, is none, or is larger than a header may be.
    """
    try:
        # A pipe would block.
        if not path.is_file():
            raise refuse(path, ["expected a file, found none"], "Check the path.")
        with path.open("rb") as file:
            text = file.read(MAX_HEADER_BYTES + 1)
    except (OSError, ValueError) as error:
        raise refuse(path, [str(error)], "Check the path.") from error
    if len(text) > MAX_HEADER_BYTES:
        problem = f"expected at most {MAX_HEADER_BYTES} bytes, found more"
        raise refuse(path, [problem], _DAMAGED)
    return _parse(path, text)


def _parse(path: Path, text: bytes) -> dict[str, Any]:

    def unique(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = collections.Counter(name for name, _ in pairs)
            raise ValueError(f"{_short(counts.most_common(1)[0][0])} is there twice")
        return found

    try:
        found = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise refuse(path, [f"not JSON: {error}"], _DAMAGED) from error
    if not isinstance(found, dict):
        problem = f"expected a JSON object, found {type(found).__name__}"
        raise refuse(path, [problem], _DAMAGED)
    return found


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Reads the header of one file.

    Args:
        path: The file.

    Returns:
        Name → where that tensor is, and the metadata, both in the header's order.

    Raises:
        RestoreError: If the file is missing or damaged, listing every bad tensor.
    """
    try:
        # A pipe would block.
        if not path.is_file():
            raise refuse(path, ["expected a file, found none"], "Check the path.")
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            limit = min(MAX_HEADER_BYTES, size_bytes - 8)
            if not 0 < length <= limit:
                problem = (
                    f"expected a header of 1 to {max(limit, 0)} bytes, found {length}, "
                    f"in a file of {size_bytes} bytes"
                )
                raise refuse(path, [problem], _DAMAGED)
            text = file.read(length)
    except (OSError, ValueError) as error:
        raise refuse(path, [str(error)], "Check the path.") from error
    header = _parse(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise refuse(path, ["__metadata__: expected strings by name"], _DAMAGED)
    data_start = 8 + length
    found = {name: _entry(value, data_start) for name, value in header.items()}
    entries = {name: x for name, x in found.items() if isinstance(x, Entry)}
    bad = [f"{_short(name)}: {x}" for name, x in found.items() if isinstance(x, str)]
    bad = bad or list(_find_gaps(entries, data_start, size_bytes))
    if bad:
        raise refuse(path, bad, _DAMAGED)
    return entries, metadata


_DAMAGED = "The file is damaged, cut short or of another kind; fetch it anew."


def _short(name: str) -> str:
    return repr(name if len(name) <= 200 else f"{name[:200]}…")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _entry(value: Any, data_start: int) -> Entry | str:
    """Returns where a tensor is, or what is wrong with what the header says of it."""
    keys = ("dtype", "shape", "data_offsets")
    if not isinstance(value, dict) or sorted(value) != sorted(keys):
        return f"expected the keys {', '.join(keys)}, found {_short(str(value))}"
    dtype_name, shape, offsets = (value[key] for key in keys)
    dtype = _DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        known = ", ".join(_DTYPES)
        return f"dtype: expected one of {known}, found {_short(str(dtype_name))}"
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMS
        or not all(map(_is_count, shape))
        # An empty tensor can still be of a size that no array has.
        or math.prod(dim for dim in shape if dim) >= 2**59
    ):
        return f"shape: expected sizes of dims, found {_short(str(shape))}"
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(map(_is_count, offsets))
    ):
        return f"data_offsets: expected two counts, found {_short(str(offsets))}"
    size_bytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size_bytes:
        return (
            f"data_offsets: expected {size_bytes} bytes for {dtype}{shape}, "
            f"found {_short(str(offsets))}"
        )
    start, stop = (data_start + offset for offset in offsets)
    return Entry(dtype, tuple(shape), start, stop)


def _find_gaps(entries: Mapping[str, Entry], data_start: int, size_bytes: int):
    """Yields what overlaps, is in no tensor or is outside the file."""
    end, previous = data_start, "the header"
    by_place = sorted(entries.items(), key=lambda item: item[1][2:])
    for name, entry in by_place:
        if entry.start != end:
            yield (
                f"{_short(name)}: expected to begin at byte {end}, where {previous} "
                f"ends, found {entry.start}"
            )
        end, previous = entry.stop, _short(name)
    if end != size_bytes:
        yield f"expected {end} bytes of header and data, found {size_bytes}"


def encode_header(
    leaves: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Makes what a file begins with, its tensors following in the order given.

    Args:
        leaves: Name → dtype and shape.
        metadata: Strings by name; `{"format": "pt"}` is what `transformers` asks for.

    Raises:
        ConfigError: Naming every leaf that the format cannot hold.

    Example:
        >>> encode_header({"a": (np.dtype("<f4"), (2,))})[8:]
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  '
    """
    bad = [
        f"  {name}: {dtype}{list(shape)}"
        for name, (dtype, shape) in leaves.items()
        if dtype not in _NAMES or name == "__metadata__"
    ]
    if bad:
        raise ConfigError(
            "safetensors: expected a name other than __metadata__ and a dtype of "
            f"{', '.join(map(str, _NAMES))}, found\n" + "\n".join(bad) + "\nCast them, "
            "or leave them out."
        )
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in leaves.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data begins at a multiple of 8.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
