"""A worker's side of a cluster: what it is, what it tells, where snapshots go.

Owns `Member`. Invariants: telling never blocks; everything that waits has a
deadline, and says for whom; a worker whose agent is gone, or that has become part of
an older generation, ends itself at once. The supervisor may be away: steps go on for
as long as there are slots. Nothing here knows JAX.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shardkit.cluster.channel import Channel
from shardkit.cluster.deadlines import PHASES, Deadlines
from shardkit.cluster.fetching import Fetcher, Span
from shardkit.cluster.records import Assignment
from shardkit.cluster.slot import Slot
from shardkit.cluster.wire import Closed, Unanswered, WireError
from shardkit.errors import ClusterError, ShardkitError

__all__ = ["Member"]

_PAUSE_S = 0.005
"""Progress is told at most this often; the newest counts."""
_MAX_TEXT = 20000


class Member:
    """What a worker is in its generation, and its line to its agent.

    Made by `shardkit.cluster.join`.

    Args:
        channel: The line to the agent.
        assignment: What the agent said.
        deadlines: How long things may take.
        token: The run's secret, to reach other agents.
        on_lost: Called when this process must not go on; ends it by default.

    Attributes:
        assignment: What the agent said.
        deadlines: How long things may take.
    """

    def __init__(
        self,
        channel: Channel,
        assignment: Assignment,
        deadlines: Deadlines,
        token: str,
        *,
        on_lost: Callable[[], Any] | None = None,
    ) -> None:
        self.assignment, self.deadlines, self._channel = assignment, deadlines, channel
        self._on_lost = on_lost or _end_this_group
        self._fetcher = Fetcher(token, deadlines, assignment.host, self._locate)
        self._changed = threading.Condition()
        self._protected = -1
        self._begun = -1
        self._halt: dict[str, Any] | None = None
        self._replies: dict[int, dict[str, Any] | None] = {}
        self._num_requests = 0
        self._closed = False
        self._slots: dict[str, tuple[int, Slot]] = {}
        # An error before the first step is one at the step that was gone on from.
        begun = -1 if assignment.resume is None else assignment.resume.step
        self._newest: dict[str, Any] = {"step": begun, "phase": "start", "facts": {}}
        self._is_new = True
        for work in (self._listen, self._speak):
            name = f"shardkit-member{work.__name__}"
            threading.Thread(target=work, name=name, daemon=True).start()

    def progress(self, step: int, phase: str, **facts: Any) -> None:
        """Says how far this process is; never blocks.

        Args:
            step: How many steps are done.
            phase: What it does now: one of `PHASES`.
            **facts: JSON values of the step that is done, such as `loss`; `busy_s`,
                the seconds in which this process did work of its own, and `work`, how
                many microbatches that was, let stragglers be seen. `busy_step` says of
                which step, where one measurement is told with several.
        """
        assert phase in PHASES, phase
        # What JSON does not have would end the thread that sends, and nobody else.
        json.dumps(facts, allow_nan=False)
        with self._changed:
            self._newest = {"step": step, "phase": phase, "facts": facts}
            self._is_new = True
            self._changed.notify_all()

    def reserve(self, num_bytes: int) -> Slot:
        """Returns memory for the next image, of this size or more.

        Waits until what it held is not needed any more, which is when a newer step is
        whole on all hosts.

        Raises:
            Unanswered: If that takes too long.
            ClusterError: If the host has no room for it.
        """
        what = (
            f"memory for a snapshot of {num_bytes} bytes (the newest that is whole on "
            f"all hosts is of step {self.protected_step})"
        )
        question = {"type": "reserve", "num_bytes": num_bytes}
        # What it went on from is on devices by now; a map would keep its memory taken.
        self._fetcher.close()
        reply = self._ask(question, self.deadlines.slot_s, what)
        name, size = reply["name"], reply["num_bytes"]
        known = self._slots.get(name)
        if known is None or known[0] < size:
            self._slots[name] = (size, Slot(name, reply["path"], size))
            # One that was replaced by a larger one is not asked for again.
            while len(self._slots) > 2:
                self._slots.pop(next(iter(self._slots)))[1].close()
        return self._slots[name][1]

    def commit(self, slot: Slot, step: int, num_bytes: int | None = None) -> None:
        """Says that the image in a slot is complete.

        Args:
            slot: From `reserve`.
            step: How many steps are in it.
            num_bytes: Its size; all of the slot by default.

        Raises:
            Unanswered: If the agent does not take it in time.
            ClusterError: If the agent finds that it is not whole.
        """
        size = len(slot.memory) if num_bytes is None else num_bytes
        self._ask(
            {"type": "commit", "name": slot.name, "step": step, "num_bytes": size},
            self.deadlines.snapshot_s,
            f"whether the snapshot of step {step} is whole",
        )

    @property
    def protected_step(self) -> int:
        """The newest step known to be whole and protected on all hosts; -1 if none."""
        return self._protected

    def wait_protected(self, step: int, timeout_s: float) -> bool:
        """Waits until a step is whole and protected on all hosts, or given up.

        Returns:
            Whether the supervisor has said so in time.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._protected >= step, timeout_s)

    def fetch_all(self, spans: Sequence[Span]) -> list[memoryview]:
        """Returns bytes of images, from this host's memory and from others'.

        Raises:
            ClusterError: If an image is not there any more, or not so long.
            WireError: If its host does not answer.
        """
        try:
            return self._fetcher.fetch_all(spans)
        except (ShardkitError, OSError) as error:
            is_told = isinstance(error, ShardkitError)
            raise self._told(error if is_told else ClusterError(f"{error}")) from None

    def restored(self) -> None:
        """Says that the state is there, and how much of it came from other hosts."""
        self._tell({"type": "restored", "fetched_bytes": self._fetcher.num_bytes})

    def boundary(self, step: int) -> str:
        """Asks whether to do a step; to be called before each is dispatched.

        Answers at once, except while it is being agreed whether to halt before it.

        Returns:
            `"go"`, or `"halt"`: all processes get this for the same step. Whoever
            gets it sees that the state is in a snapshot, or on disk if `leaving()`,
            calls `halted`, and ends.

        Raises:
            Unanswered: If no agreement is found in time.
        """
        if self.assignment.leave:
            return "halt"
        limit_s = self.deadlines.halt_s
        with self._changed:
            if self._changed.wait_for(lambda: not self._is_open(step), limit_s):
                if self._halt is not None and step >= self._halt["step"]:
                    return "halt"
                self._begun = max(self._begun, step)
                return "go"
        raise self._told(
            Unanswered(
                f"the supervisor did not say for {limit_s:g} s whether all processes "
                f"halt before step {step}"
            )
        )

    def _is_open(self, step: int) -> bool:
        halt = self._halt
        return halt is not None and step >= halt["step"] and not halt["confirmed"]

    def leaving(self) -> bool:
        """Whether the halt that `boundary` told is for good: save and leave."""
        halt = self._halt
        return self.assignment.leave or bool(
            halt and halt["confirmed"] and halt["leave"]
        )

    def halted(self, step: int) -> None:
        """Says that this process has halted before a step and kept its state."""
        self._tell({"type": "halted", "step": step})

    def event(self, record: Mapping[str, Any]) -> None:
        """Tells the supervisor what people want to know, such as a loss."""
        self._tell({"type": "event", "record": dict(record)})

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Says that the program is done; the process is to end now."""
        self._tell({"type": "finished", "summary": dict(summary)})

    def failed(
        self, kind: str, message: str, traceback: str, step: int | None = None
    ) -> None:
        """Says why this process is about to end; uncaught errors do so by themselves.

        Args:
            kind: The name of the exception.
            message: What it says.
            traceback: Where it came from.
            step: How many steps were done; as last told, by default.
        """
        self._tell(
            {
                "type": "failed",
                "kind": kind,
                "message": message[:_MAX_TEXT],
                "traceback": traceback[-_MAX_TEXT:],
                "step": self._newest["step"] if step is None else step,
                # By the clock that its agent has too.
                "at_s": time.monotonic(),
            }
        )

    def disturb(self, kind: str) -> None:
        """Loses or delays, on purpose, what this process tells; see `Channel`."""
        self._channel.disturb(kind, self.deadlines.silence_s)

    def close(self) -> None:
        """Ends the line; the process may go on, but is not a member any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._fetcher.close()
        self._channel.close()

    def _tell(self, header: dict[str, Any]) -> None:
        # What was told before must not arrive later.
        self._flush()
        with contextlib.suppress(Closed):
            self._channel.send(header)

    def _ask(
        self, header: dict[str, Any], timeout_s: float, what: str
    ) -> dict[str, Any]:
        with self._changed:
            self._num_requests += 1
            id = self._num_requests
            self._replies[id] = None
        self._channel.send({**header, "id": id})
        with self._changed:
            answered = self._changed.wait_for(
                lambda: self._replies[id] is not None or self._closed, timeout_s
            )
            reply = self._replies.pop(id)
        peer = self._channel.peer
        if not answered:
            raise Unanswered(f"{peer} did not answer with {what} for {timeout_s:g} s")
        if reply is None:
            raise Closed(f"{peer} is gone; it was asked for {what}")
        if reply["type"] == "refused":
            raise ClusterError(f"{peer}: {reply['why']}")
        return reply

    def _told(self, error: ShardkitError) -> ShardkitError:
        # What ends this process is the cluster's trouble then, not the program's.
        self.failed(type(error).__name__, str(error), "")
        return error

    def _locate(self, name: str) -> str:
        reply = self._ask(
            {"type": "where", "name": name},
            self.deadlines.request_s,
            f"where the image {name} is",
        )
        return reply["path"]

    def _speak(self) -> None:
        """Sends the newest progress, and that this process lives."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_new or self._closed, self.deadlines.heartbeat_s
                )
                if self._closed:
                    return
            if not self._flush(always=True):
                return
            time.sleep(_PAUSE_S)

    def _flush(self, *, always: bool = False) -> bool:
        with self._changed:
            if not (self._is_new or always):
                return True
            self._is_new = False
            newest = self._newest
        try:
            self._channel.send({"type": "progress", **newest})
        except WireError:
            return False
        return True

    def _listen(self) -> None:
        try:
            while True:
                header = self._channel.receive().header
                if header["type"] == "stale":
                    break
                self._heard(header)
        except WireError:
            pass
        if not self._closed:
            self._on_lost()

    def _heard(self, header: dict[str, Any]) -> None:
        kind = header["type"]
        with self._changed:
            if kind == "protected" and header["of"] == self.assignment.generation:
                self._protected = max(self._protected, header["step"])
            elif kind == "propose":
                self._answer_proposal(header)
            elif kind in ("confirm", "release"):
                halt = self._halt
                if halt is not None and halt["step"] == header["step"]:
                    if kind == "confirm":
                        halt["confirmed"] = True
                    elif not halt["confirmed"]:
                        self._halt = None
            elif header.get("id") in self._replies:
                self._replies[header["id"]] = header
            self._changed.notify_all()

    def _answer_proposal(self, header: dict[str, Any]) -> None:
        step = header["step"]
        if self._halt is None or not self._halt["confirmed"]:
            self._halt = None
            if self._begun < step:
                self._halt = {
                    "step": step,
                    "leave": header["leave"],
                    "confirmed": False,
                }
        answer = {
            "type": "answered",
            "step": step,
            "accepted": self._halt is not None and self._halt["step"] == step,
            "begun": self._begun,
        }
        with contextlib.suppress(Closed):
            self._channel.send(answer)


def _end_this_group() -> None:
    # Nothing that was begun may be finished: others do it already.
    os.killpg(os.getpgrp(), signal.SIGKILL)
