"""Carries out a rebuild: reads blocks, decodes them, verifies what comes out.

Owns the loop over chunks, so that memory beside the image is bounded. Invariant: the
image is committed last, and only if every byte of it is what its own checksums say. It
does not know how bytes are read from other hosts.
"""

from collections.abc import Callable

from shardkit.errors import SaveError
from shardkit.snapshot.head import (
    RECORD_BYTES,
    Buffer,
    as_bytes,
    clear_head,
    read_head,
    rewrite_record,
    torn,
)
from shardkit.snapshot.image import Image, read_image
from shardkit.snapshot.parity import decode
from shardkit.snapshot.repairs import Rebuild, Repair

__all__ = ["Read", "rebuild"]

Read = Callable[[str, str, int, int], Buffer]
"""Reads bytes: `read(host, name of the segment, offset, num_bytes)`."""


def rebuild(
    plan: Rebuild,
    read: Read,
    memory: memoryview,
    *,
    chunk_bytes: int = 1 << 20,
) -> Image:
    """Makes a lost image again, in a segment.

    Only what was protected comes back: the other pieces have copies in other images.

    Args:
        plan: What to read.
        read: How to read it.
        memory: A segment of `plan.num_bytes` or more.
        chunk_bytes: How much of each block is read at once.

    Returns:
        The image, verified and committed.

    Raises:
        SaveError: If the segment is too small.
        TornError: If what comes out is not what was lost: something that was read has
            changed. Nothing is committed then.
    """
    if len(memory) < plan.num_bytes:
        raise SaveError(
            f"rebuilding the image of process {plan.process}: expected a segment of "
            f"{plan.num_bytes} bytes or more, found {len(memory)}."
        )
    clear_head(memory)
    head, start, where = read_head(plan.head), len(plan.head), f"{plan.host}: rebuilt"
    record = bytearray(RECORD_BYTES)
    for repair in plan.repairs:
        for offset in range(0, repair.num_bytes, chunk_bytes):
            num_bytes = min(chunk_bytes, repair.num_bytes - offset)
            data = _read_chunk(repair, read, offset, num_bytes)
            begin = repair.offset + offset
            # The record waits until all else is there and verified.
            held = min(max(RECORD_BYTES - begin, 0), num_bytes)
            record[begin : begin + held] = data[:held]
            memory[begin + held : begin + num_bytes] = data[held:]
    if record + memory[RECORD_BYTES:start] != plan.head:
        raise torn(where, "its head is not what was lost; something read has changed")
    found = read_image(plan.head, where, header_only=True)
    found.with_memory(memory[: plan.num_bytes]).verify()
    # What is in the segment now ends with what was protected.
    rewrite_record(memory, head, num_bytes=head.solid_bytes)
    return read_image(memory, where)


def _read_chunk(repair: Repair, read: Read, offset: int, num_bytes: int) -> memoryview:
    blocks: dict[int, Buffer] = {}
    for block in repair.blocks:
        there = min(max(block.num_bytes - offset, 0), num_bytes)
        data = (
            as_bytes(read(block.host, block.name, block.offset + offset, there))
            if there
            else memoryview(b"")
        )
        if len(data) != there:
            raise torn(
                f"{block.host}: {block.name}",
                f"expected {there} bytes at {block.offset + offset}, found {len(data)}",
            )
        if there < num_bytes:
            data = bytes(data).ljust(num_bytes, b"\0")
        blocks[block.index] = data
    return decode(repair.num_data, repair.num_parity, blocks, repair.index)
