"""What a segment begins with: a record that is written last, and a header in JSON.

Owns the first bytes of images and of what protects them. Invariant: the record is zero
while anything else is written, and it and the header have checksums, so what is torn or
changed is known before it is believed; and a size is compared with the memory that is
there before it is used. It does not know what the header says.
"""

import dataclasses
import json
import struct
from typing import Any

import numpy as np
import xxhash

from shardkit.errors import TornError

__all__ = [
    "ALIGN_BYTES",
    "IMAGE",
    "PROTECTION",
    "RECORD_BYTES",
    "Buffer",
    "Head",
    "align",
    "as_bytes",
    "byte_sum",
    "clear_head",
    "header_fields",
    "read_head",
    "read_record",
    "rewrite_record",
    "torn",
    "write_head",
]

Buffer = bytes | bytearray | memoryview | np.ndarray
"""What can be seen as bytes."""

ALIGN_BYTES = 64
RECORD_BYTES = 128
IMAGE, PROTECTION = b"SKIMAGE1", b"SKGUARD1"

# Magic, eight numbers, the sum of the header, and that of all of these.
_RECORD = struct.Struct("<8s8QQ")
_SUM = struct.Struct("<Q")


@dataclasses.dataclass(frozen=True)
class Head:
    """What the record says.

    Attributes:
        magic: What follows: `IMAGE` or `PROTECTION`.
        step: The step after which the state was taken.
        generation: The generation that took it.
        process: Which process's state it is.
        num_processes: How many processes' images make a snapshot.
        num_bytes: The bytes of everything, these included.
        solid_bytes: How many of these are enough to be of use: of an image those that
            are protected, of a protection those before its blocks.
        header_bytes: The bytes of the header, which follows the record.
        header_sum: Its XXH3, which stands for the contents as well: they are summed up
            in the header.
    """

    magic: bytes
    step: int
    generation: int
    process: int
    num_processes: int
    num_bytes: int
    solid_bytes: int
    header_bytes: int
    header_sum: int

    @property
    def body_start(self) -> int:
        """Where what follows the header begins."""
        return align(RECORD_BYTES + self.header_bytes)


def align(num_bytes: int) -> int:
    """Rounds up to where something may begin.

    >>> align(1), align(64)
    (64, 64)
    """
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


def as_bytes(buffer: Buffer) -> memoryview:
    """Sees a contiguous buffer as bytes, without a copy."""
    if isinstance(buffer, np.ndarray):
        # Dtypes that Python's buffers lack have to go by numpy.
        return buffer.reshape(-1).view(np.uint8).data
    return memoryview(buffer).cast("B")


def byte_sum(buffer: Buffer) -> int:
    """The XXH3 of bytes, 64 bits of it."""
    return xxhash.xxh3_64_intdigest(as_bytes(buffer))


def clear_head(memory: memoryview) -> None:
    """Takes back what is committed in a segment: before anything in it changes."""
    memory[:RECORD_BYTES] = bytes(RECORD_BYTES)


def write_head(memory: memoryview, head: Head, text: bytes) -> Head:
    """Writes the header and then the record: what is in the segment is committed.

    Args:
        memory: The segment.
        head: What to say; its `header_sum` is found here.
        text: The header, of `head.header_bytes` bytes.

    Returns:
        The head with its sum.
    """
    assert len(text) == head.header_bytes
    memory[RECORD_BYTES : RECORD_BYTES + len(text)] = text
    return rewrite_record(memory, head, header_sum=byte_sum(text))


def rewrite_record(memory: memoryview, head: Head, **changes: int) -> Head:
    """Writes a record whose header is there already: see `write_head`.

    Args:
        memory: The segment.
        head: What to say.
        **changes: Fields that are to be other ones.
    """
    head = dataclasses.replace(head, **changes)
    values = [getattr(head, field.name) for field in dataclasses.fields(head)]
    record = _RECORD.pack(*values, 0)[: -_SUM.size]
    record += _SUM.pack(byte_sum(record))
    memory[: len(record)] = record
    return head


def read_record(memory: Buffer, where: str = "snapshot") -> Head:
    """Reads the record alone, which says how long the header is that follows it.

    Args:
        memory: A segment, or its beginning up to the end of the record.
        where: What it is, for messages.

    Raises:
        TornError: If it was never committed, or has been changed.
    """
    memory = as_bytes(memory)
    if len(memory) < RECORD_BYTES:
        raise torn(where, f"expected {RECORD_BYTES} bytes or more, found {len(memory)}")
    record = bytes(memory[: _RECORD.size])
    if not any(record):
        raise torn(where, "it was being written")
    *values, found = _RECORD.unpack(record)
    head = Head(*values)
    if found != byte_sum(record[: -_SUM.size]):
        raise torn(where, "its record is not what was written")
    if head.magic not in (IMAGE, PROTECTION):
        raise torn(where, f"expected a snapshot, found {head.magic!r}")
    if any(memory[_RECORD.size : RECORD_BYTES]):
        raise torn(where, "there is something between record and header")
    return head


def read_head(memory: Buffer, where: str = "snapshot") -> Head:
    """Reads the record, and checks the header.

    Args:
        memory: A segment, or its beginning up to the end of the header.
        where: What it is, for messages.

    Raises:
        TornError: If it was never committed, or has been changed.
    """
    memory = as_bytes(memory)
    head = read_record(memory, where)
    if head.body_start > min(len(memory), head.solid_bytes):
        raise torn(where, f"expected a header of {head.header_bytes} bytes, found less")
    if head.solid_bytes > head.num_bytes:
        raise torn(where, "it is smaller than a part of it")
    header = memory[RECORD_BYTES : RECORD_BYTES + head.header_bytes]
    if byte_sum(header) != head.header_sum:
        raise torn(where, "its header is not what was written")
    return head


def header_fields(memory: Buffer, head: Head, where: str) -> dict[str, Any]:
    """Parses a header that `read_head` has checked.

    Raises:
        TornError: If it is not a JSON object.
    """
    text = bytes(as_bytes(memory)[RECORD_BYTES : RECORD_BYTES + head.header_bytes])
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise torn(where, f"its header is not JSON: {error!s:.200}") from None
    if not isinstance(found, dict):
        raise torn(where, "its header is not a JSON object")
    return found


def torn(where: str, problem: str) -> TornError:
    """Makes the one error of everything that cannot be used."""
    return TornError(
        f"{where}: torn or damaged: {problem}. Use an older snapshot, or rebuild it."
    )
