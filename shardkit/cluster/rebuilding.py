"""What an agent does after a loss: says what its host has, and makes images again.

Owns the answers to a survey, and the rebuilds that were ordered. Invariants: an image
that was rebuilt is offered once every byte of it was verified; what was found damaged
is offered no more; the event loop waits for none of it. What is rebuilt where from what
is the supervisor's decision.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from shardkit.cluster.guards import Guards
from shardkit.cluster.peers import Part, Peers
from shardkit.cluster.slots import Image, Slots
from shardkit.cluster.threads import in_thread
from shardkit.cluster.wire import Link
from shardkit.errors import ClusterError, TornError
from shardkit.snapshot.head import IMAGE, Buffer, Head, read_head
from shardkit.snapshot.image import read_image
from shardkit.snapshot.protection import read_protection
from shardkit.snapshot.rebuild import rebuild
from shardkit.snapshot.recovery import report
from shardkit.snapshot.repairs import Rebuild
from shardkit.snapshot.segments import Segment

__all__ = ["Rebuilding"]


class Rebuilding:
    """What the supervisor asks of a host between two generations.

    Args:
        host: The name of the host.
        slots: Its images.
        guards: Its protections.
        peers: How other hosts are read; used by nobody else.
        on_change: Called in the loop when there is something to tell.
    """

    def __init__(
        self,
        host: str,
        slots: Slots,
        guards: Guards,
        peers: Peers,
        on_change: Callable[[], Any],
    ) -> None:
        self._host, self._slots, self._guards = host, slots, guards
        self._peers, self._on_change = peers, on_change
        self._turn = asyncio.Lock()
        self._number = 0
        # By process.
        self._done: dict[int, dict[str, Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._surveying: tuple[Link | None, int] = (None, 0)

    def report(self) -> list[dict[str, Any]]:
        """Says what has come of the rebuilds, as JSON values."""
        return [{"number": self._number, **found} for found in self._done.values()]

    def close(self) -> None:
        """Gives up everything."""
        for task in self._tasks:
            task.cancel()
        self._peers.close()

    def _begin(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What there is.

    def survey(self, link: Link, number: int, *, verify: bool) -> None:
        """Begins to say what is in every segment.

        Args:
            link: To whom.
            number: What the answers are to be marked with.
            verify: Whether to read all of it first, and to drop what is damaged.
        """
        if self._surveying != (link, number):
            self._surveying = (link, number)
            self._begin(self._survey(link, number, verify=verify))

    async def _survey(self, link: Link, number: int, *, verify: bool) -> None:
        damaged, count = [], 0
        try:
            for segment in self._segments():
                try:
                    if verify:
                        await in_thread(_verify, segment, self._where(segment))
                    content = report(self._host, segment.name, segment.memory).content
                except TornError as error:
                    damaged.append(str(error))
                    self._slots.drop(segment.name)
                    self._guards.drop(segment.name)
                    continue
                count += 1
                found = {"type": "found", "number": number, "name": segment.name}
                link.post(found, content)
                with contextlib.suppress(OSError):
                    await link.writer.drain()
            done = {"type": "surveyed", "number": number}
            link.post({**done, "count": count, "damaged": damaged})
        finally:
            self._surveying = (None, 0)

    def _segments(self) -> list[Segment]:
        images = [self._slots.find(image.name) for image in self._slots.images()]
        return [x for x in images if x is not None] + self._guards.segments()

    def _where(self, segment: Segment) -> str:
        try:
            head = read_head(segment.memory)
        except TornError:
            return f"{self._host}: {segment.name}"
        if head.magic != IMAGE:
            return f"what protects step {head.step} on {self._host}"
        return f"the image of process {head.process}, step {head.step}, on {self._host}"

    # What there was.

    def rebuild(self, header: Mapping[str, Any], head: bytes) -> None:
        """Begins to make an image again, unless that is done or being done.

        Args:
            header: `number` of the order, the `rebuild` and `addresses` of the agents.
            head: The first bytes of the image.
        """
        number, plan = header["number"], Rebuild.of_fields(header["rebuild"], head)
        if number < self._number:
            return
        if number > self._number:
            self._number, self._done = number, {}
        if plan.process not in self._done:
            self._note(number, plan, state="doing")
            self._begin(self._rebuild(number, plan, header["addresses"]))

    def _note(self, number: int, plan: Rebuild, **found: Any) -> None:
        if number == self._number:
            self._done[plan.process] = {"process": plan.process, **found}
            self._on_change()

    async def _rebuild(
        self, number: int, plan: Rebuild, addresses: Mapping[str, str]
    ) -> None:
        segment = None
        async with self._turn:
            try:
                read = self._reader(number, plan, addresses)
                name = self._slots.new_name("rebuilt")
                segment = await in_thread(self._slots.create, name, plan.num_bytes)
                head = await in_thread(_make, plan, read, segment)
            except Exception as error:
                # Whatever it was: the supervisor has to hear of it, and choose anew.
                if segment is not None:
                    self._slots.remove(segment)
                is_torn = isinstance(error, TornError)
                self._note(
                    number, plan, state="failed", why=str(error), is_torn=is_torn
                )
                return
        self._slots.adopt(
            segment,
            Image(
                name=name,
                step=head.step,
                generation=head.generation,
                process=head.process,
                num_bytes=head.num_bytes,
                protected_bytes=head.solid_bytes,
                head_bytes=head.body_start,
            ),
        )
        self._note(number, plan, state="done", name=name, num_bytes=head.num_bytes)

    def _reader(
        self, number: int, plan: Rebuild, addresses: Mapping[str, str]
    ) -> Callable[[str, str, int, int], Buffer]:
        """Returns how a thread reads blocks, here or from peers."""
        own: dict[str, Segment | None] = {
            block.name: self._slots.find(block.name) or self._guards.find(block.name)
            for repair in plan.repairs
            for block in repair.blocks
            if block.host == self._host
        }

        def read(host: str, name: str, offset: int, num_bytes: int) -> Buffer:
            if number != self._number:
                raise ClusterError("it is not wanted any more")
            if host == self._host:
                segment = own[name]
                if segment is None:
                    raise ClusterError(f"segment {name} is not there any more")
                return segment.memory[offset : offset + num_bytes]
            part = Part(host, addresses[host], name, offset, num_bytes)
            return self._peers.read_all(part)

        return read


def _make(plan: Rebuild, read: Callable[..., Buffer], segment: Segment) -> Head:
    return rebuild(plan, read, segment.memory).head


def _verify(segment: Segment, where: str) -> None:
    """Reads all of a segment; raises `TornError` if it is damaged."""
    if read_head(segment.memory, where).magic == IMAGE:
        read_image(segment.memory, where).verify()
    else:
        read_protection(segment.memory, where).verify()
