"""Changes with notice: the run goes on while the next program is made.

Owns `Overlap`: it keeps an announced change back until what the change needs is ready,
or its grace is over, and makes it ready in a thread of its own. Invariant: at most one
change is kept back, the newest; nobody waits for the thread. What being ready takes,
and how a change is made, it does not know.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from shardkit.background import Background
from shardkit.events import EventLog
from shardkit.membership import Change

__all__ = ["Overlap"]


@dataclasses.dataclass
class _Kept:
    change: Change
    deadline_s: float
    prepare: Callable[[], Any]
    is_ready: threading.Event = dataclasses.field(default_factory=threading.Event)

    def make(self) -> None:
        """Makes what it waits for; where that fails, the change itself will tell."""
        try:
            self.prepare()
        finally:
            self.is_ready.set()


class Overlap:
    """Keeps one announced change back.

    Args:
        preparing: Device count → what makes the change to it ready, in any thread; or
            None if nothing need be done.
        events: Where changes that are kept back are announced.

    Example:
        >>> events = EventLog()
        >>> events.subscribe(lambda event: print(event.name, event.fields))
        >>> program = threading.Event()
        >>> overlap = Overlap(lambda num_devices: program.wait, events)
        >>> overlap.next(Change(6, grace_s=60), step=3, num_devices=8)
        announced {'step': 3, 'from_devices': 8, 'to_devices': 6}
        Change(num_devices=None, lost=False, leave=False, grace_s=0.0, halt=False)
        >>> program.set()
        >>> overlap.wait(timeout_s=5)
        True
        >>> overlap.next(Change(), step=4, num_devices=8).num_devices
        6
    """

    def __init__(
        self,
        preparing: Callable[[int], Callable[[], Any] | None],
        events: EventLog,
    ) -> None:
        self._preparing, self._events = preparing, events
        self._kept: _Kept | None = None
        self._background = Background("shardkit-overlap", self._take)
        self._queued: _Kept | None = None

    @property
    def num_asked(self) -> int | None:
        """The device count of the change that is kept back."""
        return self._kept.change.num_devices if self._kept else None

    def next(
        self, change: Change, *, step: int, num_devices: int, can_wait: bool = True
    ) -> Change:
        """Returns the change to make before `step`, if any.

        Args:
            change: What has just been asked for, if anything; it replaces what was
                kept back, even if it asks for the devices that there are.
            step: The next step.
            num_devices: How many devices there are.
            can_wait: Whether steps can go on as things are.
        """
        if change.num_devices is not None:
            change = self._replace(change, step, num_devices, can_wait)
        kept = self._kept
        if kept is None:
            return change
        is_over = kept.is_ready.is_set() or time.monotonic() >= kept.deadline_s
        if not can_wait or is_over:
            self._drop()
            return kept.change
        return change

    def _replace(
        self, change: Change, step: int, num_devices: int, can_wait: bool
    ) -> Change:
        """Keeps a change back, or returns it if it cannot wait or need not."""
        assert change.num_devices is not None
        counts = {"from_devices": num_devices, "to_devices": change.num_devices}
        deadline_s = time.monotonic() + change.grace_s
        if self._kept and change.num_devices == num_devices:
            self._events.emit("announced", step=step, **counts)
        elif self._kept and change.num_devices == self.num_asked and not change.lost:
            self._kept.deadline_s = deadline_s
            return Change()
        self._drop()
        waits = can_wait and not change.lost and change.grace_s > 0
        if change.num_devices == num_devices or not waits:
            return change
        prepare = self._preparing(change.num_devices)
        if prepare is None:
            return change
        self._events.emit("announced", step=step, **counts)
        self._kept = _Kept(change, deadline_s, prepare)
        self._begin(self._kept)
        return Change()

    def _drop(self) -> None:
        self._kept = None
        with self._background.changed:
            self._queued = None

    def begin_anew(self) -> None:
        """Lets a change that is kept back wait for what it needs now.

        To be called where that has become something else; its grace goes on.
        """
        kept = self._kept
        if kept is None:
            return
        assert kept.change.num_devices is not None
        prepare = self._preparing(kept.change.num_devices)
        if prepare is None:
            kept.is_ready.set()
            return
        self._kept = _Kept(kept.change, kept.deadline_s, prepare)
        self._begin(self._kept)

    def _begin(self, kept: _Kept) -> None:
        with self._background.changed:
            self._queued = kept
            self._background.begin()

    def _take(self) -> Callable[[], None] | None:
        kept, self._queued = self._queued, None
        return None if kept is None else kept.make

    def wait(self, timeout_s: float) -> bool:
        """Waits until nothing is being made; whether that was so in time."""
        return self._background.wait(timeout_s)

    def close(self) -> None:
        """Forgets what is kept back; a second call does nothing.

        What is being compiled cannot be stopped, and ends by itself.
        """
        self._drop()
