"""How one lost image is rebuilt: which blocks of which codewords are read.

Owns the plan of a rebuild. Invariant: it names, for every part of the lost image, as
many blocks that are there as the codeword needs, or there is no plan. Pure: reading and
decoding are `rebuild`'s.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from shardkit.snapshot.codewords import Codeword, cut_codewords
from shardkit.snapshot.head import read_head
from shardkit.snapshot.image import Image
from shardkit.snapshot.protection import Protection
from shardkit.snapshot.protection_plan import ProtectionPlan

__all__ = ["BlockSource", "Rebuild", "Repair", "Survivor", "plan_rebuild"]


class Survivor(NamedTuple):
    """An image that is there: where, what is in it, and the bytes that say so."""

    host: str
    name: str
    image: Image
    content: bytes


class BlockSource(NamedTuple):
    """Where a block is read, or that it is all zeros.

    Attributes:
        index: Which block of the codeword, those of parity after those of data.
        host: Who has it.
        name: The segment, of an image or a protection.
        offset: Where it begins there.
        num_bytes: Its length; after that come zeros. If it is 0, nobody has it.
    """

    index: int
    host: str
    name: str
    offset: int
    num_bytes: int


class Repair(NamedTuple):
    """A part of an image, and what it is rebuilt from.

    Attributes:
        offset: Where the part begins in the image.
        num_bytes: Its length.
        index: Which data block of its codeword it is.
        num_data: The data blocks of the codeword.
        num_parity: Its parity blocks.
        blocks: As many blocks as there are data blocks.
    """

    offset: int
    num_bytes: int
    index: int
    num_data: int
    num_parity: int
    blocks: tuple[BlockSource, ...]


@dataclasses.dataclass(frozen=True)
class Rebuild:
    """What makes a lost image again: that part of it that was protected.

    Attributes:
        process: Whose image it is.
        lost_host: The host that had it.
        host: The host that is to do it.
        head: The image's own first bytes, against which the result is verified.
        repairs: Its parts.
    """

    process: int
    lost_host: str
    host: str
    head: bytes
    repairs: tuple[Repair, ...]

    @property
    def num_bytes(self) -> int:
        """The size of what is made."""
        return read_head(self.head).solid_bytes

    @property
    def read_bytes(self) -> int:
        """The bytes that are read."""
        return sum(
            min(block.num_bytes, repair.num_bytes)
            for repair in self.repairs
            for block in repair.blocks
        )

    def describe(self) -> str:
        """Says it in a line."""
        blocks = [block for repair in self.repairs for block in repair.blocks]
        hosts = sorted({block.host for block in blocks if block.num_bytes})
        return (
            f"{self.num_bytes} bytes of process {self.process}, lost with "
            f"{self.lost_host}, are rebuilt on {self.host} from {self.read_bytes} "
            f"bytes of {', '.join(hosts)}"
        )

    def to_fields(self) -> dict[str, Any]:
        """What JSON can hold of it: all but the head."""
        return {
            "process": self.process,
            "lost_host": self.lost_host,
            "host": self.host,
            "repairs": self.repairs,
        }

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any], head: bytes) -> "Rebuild":
        """Undoes `to_fields`, after JSON too."""
        repairs = tuple(
            Repair(*found[:-1], blocks=tuple(BlockSource(*x) for x in found[-1]))
            for found in fields["repairs"]
        )
        process, lost_host, host = (fields[x] for x in ("process", "lost_host", "host"))
        return cls(process, lost_host, host, head, repairs)


class _Reported(Protocol):
    """Who has a protection, and under which name."""

    @property
    def host(self) -> str: ...
    @property
    def name(self) -> str: ...


def plan_rebuild(
    process: int,
    images: Mapping[int, Survivor],
    protections: Sequence[tuple[_Reported, Protection]],
    others: Sequence[Rebuild] = (),
) -> tuple[Rebuild | None, str]:
    """Plans how one image is rebuilt.

    Args:
        process: Whose image is lost.
        images: Those that are there, by process.
        protections: Those that are there, all of the image's step and generation.
        others: What is rebuilt as well: work is spread over the hosts.

    Returns:
        The plan; or None, and why there is none.
    """
    for _, protection in protections:
        plan = protection.plan
        for number, lane in enumerate(plan.heads):
            for member, head in enumerate(lane):
                if head and head.process == process:
                    lost = _Lost(plan, number, member, images, protections)
                    return lost.plan(process, others)
    return None, f"nothing is left that protects the image of process {process}"


class _Lost:
    """One image that is gone, and what is left of its group."""

    def __init__(
        self,
        plan: ProtectionPlan,
        lane: int,
        member: int,
        images: Mapping[int, Survivor],
        protections: Sequence[tuple[_Reported, Protection]],
    ) -> None:
        self._group, self._lane, self._member = plan.group, lane, member
        self._heads, self._parsed = plan.lanes[lane], plan.heads[lane]
        self._images = images
        self._protections = {
            protection.plan.host: (reported, protection)
            for reported, protection in protections
            if (protection.plan.group, protection.plan.lanes)
            == (plan.group, plan.lanes)
        }

    def plan(
        self, process: int, others: Sequence[Rebuild]
    ) -> tuple[Rebuild | None, str]:
        lost_host = self._group.hosts[self._member]
        sizes = [head.solid_bytes if head else 0 for head in self._parsed]
        repairs = []
        for codeword in cut_codewords(self._group, sizes):
            members = [block.member for block in codeword.data]
            if self._member not in members:
                continue
            index = members.index(self._member)
            _, offset, num_bytes = codeword.data[index]
            if not num_bytes:
                continue
            # What is all zeros costs nothing; data needs no arithmetic.
            blocks = sorted(self._blocks(codeword), key=lambda x: (x.num_bytes > 0, x))
            if (num_data := len(members)) > len(blocks):
                return None, (
                    f"the image of process {process}, lost with {lost_host}, cannot be "
                    f"rebuilt: of a codeword {len(blocks)} blocks are left, {num_data} "
                    "are needed"
                )
            repairs.append(
                Repair(
                    *(offset, num_bytes, index, num_data, len(codeword.parity)),
                    tuple(sorted(blocks[:num_data])),
                )
            )
        host = self._idlest_host(repairs, others)
        head = self._heads[self._member] or b""
        return Rebuild(process, lost_host, host, head, tuple(repairs)), ""

    def _blocks(self, codeword: Codeword) -> Iterator[BlockSource]:
        """Yields the blocks of a codeword that are there."""
        for index, (member, offset, num_bytes) in enumerate(codeword.data):
            head = self._parsed[member]
            if not num_bytes or head is None:
                yield BlockSource(index, "", "", 0, 0)
                continue
            found = self._images.get(head.process)
            # An image that was rebuilt has another record, and so other bytes.
            if found and found.content == self._heads[member]:
                yield BlockSource(index, found.host, found.name, offset, num_bytes)
        for number, member in enumerate(codeword.parity):
            if self._group.hosts[member] in self._protections:
                reported, protection = self._protections[self._group.hosts[member]]
                for block in protection.plan.blocks:
                    if (block.lane, block.codeword) == (self._lane, codeword):
                        yield BlockSource(
                            len(codeword.data) + number,
                            *(reported.host, reported.name),
                            *(block.offset, codeword.num_bytes),
                        )

    def _idlest_host(self, repairs: Sequence[Repair], others: Sequence[Rebuild]) -> str:
        """The host with the least to rebuild so far, then with the most to read."""
        local: dict[str, int] = {}
        for repair in repairs:
            for block in repair.blocks:
                if block.num_bytes:
                    local[block.host] = local.get(block.host, 0) + block.num_bytes
        work = {
            host: sum(other.num_bytes for other in others if other.host == host)
            for host in local
        }
        return min(local, key=lambda host: (work[host], -local[host], host))
