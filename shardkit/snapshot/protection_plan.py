"""What a host is to keep of the images of its group, and of which bytes it is made.

Owns the plan of a protection: its parity blocks, their places in a segment, and the
byte ranges of other hosts' images that go into each. Invariant: a host that has several
images has one per lane, and a codeword never leaves its lane, so that its blocks are on
different hosts. Pure: it sees the heads of images, no segment.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from shardkit.errors import ConfigError
from shardkit.snapshot.codewords import Codeword, cut_codewords
from shardkit.snapshot.groups import Group
from shardkit.snapshot.head import (
    IMAGE,
    RECORD_BYTES,
    Buffer,
    Head,
    align,
    as_bytes,
    read_head,
)

__all__ = ["ParityBlock", "ProtectionPlan", "Want"]

SUM_DIGITS = 16


class Want(NamedTuple):
    """Bytes of an image that a protection is made of.

    Attributes:
        host: Whose image.
        process: Which of that host's.
        offset: From where in it.
        num_bytes: How many.
        block: Which block of the plan they go into.
        data_index: As which data block of its codeword.
    """

    host: str
    process: int
    offset: int
    num_bytes: int
    block: int
    data_index: int


class ParityBlock(NamedTuple):
    """A parity block of one host.

    Attributes:
        lane: Of which images: the first ones of all hosts, the second ones, …
        codeword: The codeword.
        index: Which of its parity blocks.
        offset: Where it is in the segment.
    """

    lane: int
    codeword: Codeword
    index: int
    offset: int


Lane = tuple[bytes | None, ...]
"""For every host of a group the head of one of its images, if it has one."""


@dataclasses.dataclass(frozen=True)
class ProtectionPlan:
    """What one host keeps for its group, and of which bytes it is made.

    Attributes:
        run: The id of the run.
        group: The hosts.
        host: Which of them keeps it.
        lanes: The heads of the first images of all hosts, of the second ones, …
        blocks: The parity blocks.
        header_bytes: The room for the header.
        num_bytes: The segment's size.
    """

    run: str
    group: Group
    host: str
    lanes: tuple[Lane, ...]
    blocks: tuple[ParityBlock, ...]
    header_bytes: int
    num_bytes: int

    @classmethod
    def of(
        cls, run: str, group: Group, host: str, heads: Mapping[str, Iterable[Buffer]]
    ) -> "ProtectionPlan":
        """Plans the protection of committed images.

        Args:
            run: The id of the run.
            group: The hosts.
            host: Which of them is to keep it.
            heads: For every host of the group the heads of its images: of each the
                bytes of its segment before `Head.body_start`, or more.

        Raises:
            ConfigError: If a host is missing, or the images are of different steps.
            TornError: If a head is damaged.
        """
        if not {*group.hosts} <= heads.keys() or host not in group.hosts:
            raise ConfigError(
                f"protection on {host}: expected the heads of the images of "
                f"{', '.join(group.hosts)}, found those of {', '.join(sorted(heads))}."
            )
        columns = [
            sorted(map(_head_bytes, heads[name]), key=lambda x: read_head(x).process)
            for name in group.hosts
        ]
        return cls.laid_out(
            run,
            group,
            host,
            tuple(
                tuple(
                    column[lane] if lane < len(column) else None for column in columns
                )
                for lane in range(max(map(len, columns)))
            ),
        )

    @classmethod
    def laid_out(
        cls, run: str, group: Group, host: str, lanes: Sequence[Lane]
    ) -> "ProtectionPlan":
        """Finds the blocks and their places: see `of`."""
        parsed = [_read(lane) for lane in lanes]
        found = {
            (head.magic, head.step, head.generation)
            for lane in parsed
            for head in lane
            if head
        }
        if len(found) != 1 or next(iter(found))[0] != IMAGE:
            raise ConfigError(
                f"protection on {host}: expected images of one step and generation, "
                f"found {sorted(found)}. Wait until all have committed the same step."
            )
        me = group.hosts.index(host)
        blocks = [
            ParityBlock(lane, codeword, codeword.parity.index(me), 0)
            for lane, heads in enumerate(parsed)
            for codeword in cut_codewords(
                group, [head.solid_bytes if head else 0 for head in heads]
            )
            if me in codeword.parity
        ]
        draft = cls(run, group, host, tuple(lanes), tuple(blocks), 0, 0)
        text = draft.text([0] * len(blocks))
        header_bytes = align(RECORD_BYTES + len(text)) - RECORD_BYTES
        draft = dataclasses.replace(draft, header_bytes=header_bytes)
        end = draft.solid_bytes
        for i, block in enumerate(blocks):
            blocks[i] = block._replace(offset=end)
            end += align(block.codeword.num_bytes)
        return dataclasses.replace(draft, blocks=tuple(blocks), num_bytes=end)

    @functools.cached_property
    def heads(self) -> tuple[tuple[Head | None, ...], ...]:
        """What the records of the images say, by lane and host."""
        return tuple(_read(lane) for lane in self.lanes)

    @property
    def head_bytes(self) -> list[bytes]:
        """The heads of all images, one after another."""
        return [head for lane in self.lanes for head in lane if head is not None]

    @property
    def heads_start(self) -> int:
        """Where the heads of the images begin."""
        return RECORD_BYTES + self.header_bytes

    @property
    def solid_bytes(self) -> int:
        """Where the blocks begin: before that is all that is known of the images."""
        return align(self.heads_start + sum(map(len, self.head_bytes)))

    @functools.cached_property
    def wants(self) -> tuple[Want, ...]:
        """The bytes of other hosts' images that the blocks are made of."""
        return tuple(
            Want(self.group.hosts[data.member], head.process, *data[1:], number, i)
            for number, block in enumerate(self.blocks)
            for i, data in enumerate(block.codeword.data)
            if (head := self.heads[block.lane][data.member]) and data.num_bytes
        )

    def text(self, sums: Iterable[int]) -> bytes:
        """Spells the header.

        Args:
            sums: The XXH3 of every block.
        """
        fields = {
            "run": self.run,
            "host": self.host,
            "group": dataclasses.asdict(self.group),
            "lanes": [[len(head or b"") for head in lane] for lane in self.lanes],
            "sums": "".join(f"{value:0{SUM_DIGITS}x}" for value in sums),
        }
        return json.dumps(fields, separators=(",", ":")).encode()


def _head_bytes(memory: Buffer) -> bytes:
    return bytes(as_bytes(memory)[: read_head(memory).body_start])


def _read(lane: Lane) -> tuple[Head | None, ...]:
    return tuple(None if head is None else read_head(head) for head in lane)
