"""What a host keeps of the images of its group: made, kept, given up.

Owns the protections on one host. Invariants: there are two at most, the one that is
known to be whole on all hosts, and a newer one; one that is being made is offered to
nobody; the event loop never waits for it. Which step is to be protected is the
supervisor's decision.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from shardkit.cluster.peers import Part, Peers
from shardkit.cluster.slots import Slots
from shardkit.cluster.threads import in_thread
from shardkit.cluster.wire import WireError
from shardkit.errors import ClusterError, TornError
from shardkit.snapshot.groups import Group
from shardkit.snapshot.head import Buffer, as_bytes, read_head
from shardkit.snapshot.protection import ProtectionWriter
from shardkit.snapshot.protection_plan import ProtectionPlan
from shardkit.snapshot.segments import Segment

__all__ = ["Guards"]

_KIND = "guard"


class Guards:
    """The protections of one host.

    Args:
        run: The id of the run.
        host: The name of the host.
        slots: The images of this host, and where segments come from.
        peers: How other hosts are read; used by nobody else.
        on_change: Called in the loop when there is something to tell.
    """

    def __init__(
        self,
        run: str,
        host: str,
        slots: Slots,
        peers: Peers,
        on_change: Callable[[], Any],
    ) -> None:
        self._run, self._host, self._slots, self._peers = run, host, slots, peers
        self._on_change = on_change
        # By generation and step.
        self._whole: dict[tuple[int, int], Segment] = {}
        self._spare: Segment | None = None
        self._wanted: Mapping[str, Any] | None = None
        self._task: asyncio.Task[None] | None = None
        self._doing: tuple[int, int] = (0, -1)
        self._is_cancelled = threading.Event()
        self._failed: dict[str, Any] | None = None

    def report(self) -> dict[str, Any]:
        """Says what there is, as JSON values."""
        held = [*self._whole.values(), *([self._spare] if self._spare else [])]
        return {
            "guards": [list(key) for key in self._whole],
            "guard_failed": self._failed,
            "protection_bytes": sum(segment.num_bytes for segment in held),
        }

    def segments(self) -> list[Segment]:
        """Returns those that are whole."""
        return list(self._whole.values())

    def find(self, name: str) -> Segment | None:
        """Returns a whole one; None if there is none of that name."""
        return next((x for x in self._whole.values() if x.name == name), None)

    def protect(self, order: Mapping[str, Any]) -> None:
        """Begins to protect a step, unless that is done or being done.

        Args:
            order: `of` and `step`; `group`, and for each image of it `host`, `address`,
                `name`, `process` and `head_bytes`.
        """
        key = (order["of"], order["step"])
        is_busy = self._task is not None and key <= self._doing
        if key in self._whole or is_busy or key <= self._slots.protected:
            return
        self._wanted = order
        self._start()

    def cancel(self, up_to_generation: int) -> None:
        """Gives up what is being made for these."""
        if self._wanted is not None and self._wanted["of"] <= up_to_generation:
            self._wanted = None
        if self._doing[0] <= up_to_generation:
            self._is_cancelled.set()

    def drop(self, name: str) -> None:
        """Removes one that is of no use."""
        for key, segment in list(self._whole.items()):
            if segment.name == name:
                self._slots.remove(self._whole.pop(key))

    def protected(self) -> None:
        """Learns that `slots.protected` has changed; what is older is not needed."""
        for key in [key for key in self._whole if key < self._slots.protected]:
            self._set_aside(self._whole.pop(key))

    def close(self) -> None:
        """Gives up everything."""
        self._wanted = None
        self._is_cancelled.set()
        self._peers.close()

    def _set_aside(self, segment: Segment) -> None:
        """Keeps one for the next protection, since taking memory is slow."""
        if self._spare is not None:
            self._slots.remove(self._spare)
        self._spare = segment

    def _start(self) -> None:
        if self._task is not None or self._wanted is None:
            return
        order, self._wanted = self._wanted, None
        self._doing = (order["of"], order["step"])
        for key in [key for key in self._whole if key != self._slots.protected]:
            # It was overtaken before all hosts had theirs.
            self._set_aside(self._whole.pop(key))
        self._is_cancelled = threading.Event()
        self._task = asyncio.create_task(self._make(order))

    async def _make(self, order: Mapping[str, Any]) -> None:
        job = _Job(self._run, self._host, order, self._peers, self._is_cancelled)
        job.segment, self._spare = self._spare, None
        try:
            job.read_own(self._slots)
            name = self._slots.new_name(_KIND)
            await in_thread(job.make, self._slots, name)
        except Exception as error:
            # Whatever it was: the supervisor has to hear of it, and go on without.
            self._set_failed(error)
            if job.segment is not None:
                self._set_aside(job.segment)
        else:
            assert job.segment is not None
            self._whole[self._doing], self._failed = job.segment, None
        self._task = None
        self.protected()
        self._on_change()
        self._start()

    def _set_failed(self, error: Exception) -> None:
        generation, step = self._doing
        before = self._failed or {"of": 0, "step": -1, "count": 0}
        is_same = (before["of"], before["step"]) == self._doing
        # What the peers do may go better the next time; memory is not there by then.
        may_pass = isinstance(error, WireError | ClusterError | TornError)
        self._failed = {
            "of": generation,
            "step": step,
            "why": str(error),
            "count": before["count"] + 1 if is_same else 1,
            "is_final": not may_pass,
        }


class _Job:
    """Makes one protection, mostly in a thread.

    Attributes:
        segment: At first one that may be used; then the one in which it is.
    """

    def __init__(
        self,
        run: str,
        host: str,
        order: Mapping[str, Any],
        peers: Peers,
        is_cancelled: threading.Event,
    ) -> None:
        self._run, self._host, self._peers = run, host, peers
        self._is_cancelled = is_cancelled
        self._expected = (order["step"], order["of"])
        self._group = Group(**{**order["group"], "hosts": (*order["group"]["hosts"],)})
        self._images: Sequence[Mapping[str, Any]] = order["images"]
        self._heads: dict[str, list[Buffer]] = {host: [] for host in self._group.hosts}
        self.segment: Segment | None = None

    def read_own(self, slots: Slots) -> None:
        """Reads the heads of this host's own images, in the loop."""
        for image in self._images:
            if image["host"] == self._host:
                segment = slots.find(image["name"])
                if segment is None:
                    raise ClusterError(f"image {image['name']} is not there any more")
                head = bytes(segment.memory[: image["head_bytes"]])
                self._heads[self._host].append(head)

    def make(self, slots: Slots, name: str) -> None:
        """Makes it; runs in the thread.

        Args:
            slots: Where a segment comes from, if the one that there is is too small.
            name: What to call that.
        """
        plan = self._plan()
        if self.segment is not None and self.segment.num_bytes < plan.num_bytes:
            slots.remove(self.segment)
            self.segment = None
        if self.segment is None:
            self.segment = slots.create(name, plan.num_bytes)
        writer = ProtectionWriter(self.segment.memory, plan)
        refs = {(image["host"], image["process"]): image for image in self._images}
        parts = []
        for key, want in enumerate(plan.wants):
            image = refs[want.host, want.process]
            place = (want.host, image["address"], image["name"])
            parts.append(Part(*place, want.offset, want.num_bytes, key))
        for part, data in self._read(parts):
            want = plan.wants[part.key]
            writer.add(want, part.offset - want.offset, data)
        writer.commit()

    def _plan(self) -> ProtectionPlan:
        others = [image for image in self._images if image["host"] != self._host]
        parts = [
            Part(x["host"], x["address"], x["name"], 0, x["head_bytes"], key)
            for key, x in enumerate(others)
        ]
        self._peers.keep_only(part.address for part in parts)
        # All are asked for before the first has come.
        found = [bytearray(part.num_bytes) for part in parts]
        for part, data in self._read(parts):
            found[part.key][part.offset : part.offset + part.num_bytes] = as_bytes(data)
        for image, data in zip(others, found, strict=True):
            self._heads[image["host"]].append(data)
        for data in (data for heads in self._heads.values() for data in heads):
            head = read_head(data)
            if (head.step, head.generation) != self._expected:
                raise TornError(
                    f"expected images of step and generation {self._expected}, found "
                    f"{(head.step, head.generation)}: they have been overwritten"
                )
        return ProtectionPlan.of(self._run, self._group, self._host, self._heads)

    def _read(self, parts: Sequence[Part]) -> Iterator[tuple[Part, Buffer]]:
        with contextlib.closing(self._peers.read(parts)) as chunks:
            for chunk in chunks:
                if self._is_cancelled.is_set():
                    raise ClusterError("it is not wanted any more")
                yield chunk
