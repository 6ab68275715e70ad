"""What a host keeps of the images of its group: parity blocks, in a segment.

Owns writing and reading them. Invariant: a protection is committed when all of it is
there, is of one step and one generation, and carries the heads of all images that it
protects, so that what a lost host had is known. It moves no bytes between hosts:
`ProtectionWriter.missing` says which it must be given.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from shardkit.errors import ConfigError, SaveError, TornError
from shardkit.snapshot.groups import Group
from shardkit.snapshot.head import (
    PROTECTION,
    Buffer,
    Head,
    as_bytes,
    byte_sum,
    clear_head,
    header_fields,
    read_head,
    torn,
    write_head,
)
from shardkit.snapshot.parity import ParitySum
from shardkit.snapshot.protection_plan import SUM_DIGITS, ProtectionPlan, Want

__all__ = ["Protection", "ProtectionWriter", "read_protection"]


class ProtectionWriter:
    """Makes a protection in a segment, from bytes as they come.

    Args:
        memory: A segment, at least as large as the plan.
        plan: What to keep.

    Raises:
        SaveError: If the segment is too small.
        ConfigError: If zfec is needed and is not there.
    """

    def __init__(self, memory: memoryview, plan: ProtectionPlan) -> None:
        if len(memory) < plan.num_bytes:
            raise SaveError(
                f"protection on {plan.host}: expected a segment of {plan.num_bytes} "
                f"bytes or more, found {len(memory)}. Reserve a larger one."
            )
        clear_head(memory)
        self.plan, self._memory = plan, memory
        self._sums = [
            ParitySum(
                memory[block.offset : block.offset + block.codeword.num_bytes],
                len(block.codeword.data),
                len(block.codeword.parity),
                block.index,
            )
            for block in plan.blocks
        ]

    def add(self, want: Want, offset: int, chunk: Buffer) -> None:
        """Takes the next bytes of what is wanted; from one thread at a time.

        Args:
            want: One of `plan.wants`, in any order.
            offset: Where in it they begin: where its last ones ended.
            chunk: The bytes.

        Raises:
            ValueError: If they are not the next ones, or too many.
        """
        if offset + len(as_bytes(chunk)) > want.num_bytes:
            raise ValueError(f"expected {want.num_bytes} bytes at most for {want}")
        self._sums[want.block].add(want.data_index, offset, chunk)

    @property
    def missing(self) -> tuple[Want, ...]:
        """What has not come in full yet."""
        return tuple(
            want
            for want in self.plan.wants
            if not self._sums[want.block].is_complete(want.data_index, want.num_bytes)
        )

    def commit(self) -> Head:
        """Writes heads, header and, last of all, the record.

        Raises:
            SaveError: If something has not come yet.
        """
        plan, memory = self.plan, self._memory
        if missing := self.missing:
            raise SaveError(
                f"protection on {plan.host}: expected all bytes before it is "
                f"committed; missing are some of "
                f"{sorted({want.host for want in missing})}."
            )
        start = plan.heads_start
        for head in plan.head_bytes:
            memory[start : start + len(head)] = head
            start += len(head)
        sums = [
            byte_sum(memory[block.offset : block.offset + block.codeword.num_bytes])
            for block in plan.blocks
        ]
        head = dataclasses.replace(
            read_head(plan.head_bytes[0]),
            magic=PROTECTION,
            process=plan.group.hosts.index(plan.host),
            num_bytes=plan.num_bytes,
            solid_bytes=plan.solid_bytes,
            header_bytes=plan.header_bytes,
        )
        return write_head(memory, head, plan.text(sums).ljust(plan.header_bytes))


@dataclasses.dataclass(frozen=True)
class Protection:
    """A protection whose header and heads are whole.

    Attributes:
        head: What its record says.
        plan: What it keeps.
        sums: The XXH3 of every block.
        memory: Its bytes, or only those before its blocks.
        where: What it is, for messages.
    """

    head: Head
    plan: ProtectionPlan
    sums: tuple[int, ...]
    memory: memoryview
    where: str

    def verify(self) -> None:
        """Reads all blocks.

        Raises:
            TornError: If one of them is not what was put there.
        """
        for block, expected in zip(self.plan.blocks, self.sums, strict=True):
            stop = block.offset + block.codeword.num_bytes
            if stop > len(self.memory):
                raise torn(self.where, f"it ends at byte {len(self.memory)}")
            if byte_sum(self.memory[block.offset : stop]) != expected:
                index = block.codeword.index
                raise torn(self.where, f"block {index} is not what was written")


def read_protection(memory: Buffer, where: str = "protection") -> Protection:
    """Reads what a protection keeps; its blocks are not read, and need not be there.

    Raises:
        TornError: If it was never committed, or was changed.
    """
    memory = as_bytes(memory)
    head = read_head(memory, where)
    if head.magic != PROTECTION:
        raise torn(where, "expected what protects images, found an image")
    if len(memory) < head.solid_bytes:
        raise torn(where, f"expected {head.solid_bytes} bytes, found {len(memory)}")
    try:
        plan, sums = _parse(memory, head, header_fields(memory, head, where))
    except (ConfigError, TornError) as error:
        raise torn(where, f"the heads in it: {error}") from None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise torn(where, f"its header: {error!s:.200}") from None
    return Protection(head, plan, sums, memory[: head.num_bytes], where)


def _parse(
    memory: memoryview, head: Head, fields: Mapping[str, Any]
) -> tuple[ProtectionPlan, tuple[int, ...]]:
    run, host, group, sizes, spelled = (
        fields[key] for key in ("run", "host", "group", "lanes", "sums")
    )
    group = Group(tuple(group["hosts"]), group["num_losses"], group["is_mirror"])
    if not all(isinstance(x, str) for x in (run, host, spelled, *group.hosts)):
        raise ValueError("a name is none")
    if not 0 < group.num_losses < len(group.hosts) <= 256 or host not in group.hosts:
        raise ValueError("the group cannot be")
    lanes, start = [], head.body_start
    for lane in sizes:
        if len(lane) != len(group.hosts):
            raise ValueError("a lane does not fit the group")
        row: list[bytes | None] = []
        for size in lane:
            if type(size) is not int or not 0 <= size <= head.solid_bytes - start:
                raise ValueError("the head of an image is outside")
            row.append(bytes(memory[start : start + size]) or None)
            start += size
        lanes.append(tuple(row))
    plan = ProtectionPlan.laid_out(run, group, host, lanes)
    found, expected = (
        (x.step, x.generation) for x in (head, read_head(plan.head_bytes[0]))
    )
    if found != expected:
        raise ValueError("it is of another step than the images in it")
    if (plan.num_bytes, plan.solid_bytes) != (head.num_bytes, head.solid_bytes):
        raise ValueError(f"expected {plan.num_bytes} bytes, found {head.num_bytes}")
    if len(spelled) != SUM_DIGITS * len(plan.blocks):
        raise ValueError(f"{len(plan.blocks)} blocks have other sums")
    starts = range(0, len(spelled), SUM_DIGITS)
    return plan, tuple(int(spelled[i : i + SUM_DIGITS], 16) for i in starts)
