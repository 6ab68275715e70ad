"""Named phases and facts of a run, to which reports and tests listen.

Owns the event log, and what a phase of a change is. A log is passed explicitly to
whatever emits into it; there is no global one. Listeners are called in the emitting
thread, in order.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Event", "EventLog", "Phase"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        name: What it was, such as `"compile"` or `"reconfigure"`.
        start_s: When it began, in seconds of `time.monotonic`.
        end_s: When it ended; equal to `start_s` for a mere fact.
        fields: What else is known of it; JSON values only.
        thread: The name of the thread that it happened in.
    """

    name: str
    start_s: float
    end_s: float
    fields: dict[str, Any]
    thread: str

    @property
    def duration_s(self) -> float:
        """Seconds from start to end."""
        return self.end_s - self.start_s


@dataclasses.dataclass(frozen=True, slots=True)
class Phase:
    """A part of a change of devices.

    Attributes:
        name: What was done, such as `"move"`.
        start_s: When it began, in seconds since the change did.
        end_s: When it ended, likewise, with its results there.
        num_bytes: What it moved from device to device.

    Example:
        >>> Phase("move", 0.25, 0.5, 44).record()
        {'name': 'move', 'start_s': 0.25, 'end_s': 0.5, 'bytes': 44}
    """

    name: str
    start_s: float
    end_s: float
    num_bytes: int = 0

    def record(self) -> dict[str, Any]:
        """Returns it as JSON values, to the microsecond."""
        return {
            "name": self.name,
            "start_s": round(self.start_s, 6),
            "end_s": round(self.end_s, 6),
            "bytes": self.num_bytes,
        }


class EventLog:
    """Collects events and hands each one to the listeners.

    What a `Trainer` emits, and with which fields:

    - `"notice"`: `message`. Without a listener it is logged as a warning.
    - `"compile"`: `program` and `devices`, how many it is for; maybe in another thread.
    - `"announced"`: `step`, `from_devices`, `to_devices`. A change that waits for its
      program, or one that is taken back, `to_devices` being what there is.
    - `"plan"`, where the mesh is chosen, before anything follows from it: `step`,
      `message` (in words, which are logged where nobody listens), `num_devices`,
      `num_idle`, `mesh`, `step_s`, `time_s`, `memory_bytes`, `memory`,
      `limit_bytes`, `runners_up` and `too_large` (each with `why`), `notes`,
      `consistency` with the mesh before (None for the first), `steps_left`, `move_s`,
      `profile`, `measured_by`.
    - `"reconfiguring"` and `"reconfigure"`, which lasts as long as the change: `step`,
      `from_devices`, `to_devices`, `from_mesh`, `to_mesh`, `consistency` (`"exact"`, or
      `"equivalent"` to rounding), and afterwards `bytes_moved`, `plain_bytes_moved`
      (what the pool's order of devices would have taken), `phases` (each as
      `Phase.record` gives it), `was_ready`, `certified` (whether a step had the same
      bits on both sides; None if none was compared) and `move_certified` (whether the
      state that was moved was compared).
    - `"first_step"`: `step`. The first step after a change that did none itself, from
      its dispatch until its results are there.
    - `"snapshot"`, while the state is on its way to host memory, in a thread: `step`,
      `bytes`, `stall_s` (what the training thread waited), `copy_s` (from when the
      state was computed).
    - `"last_steps"`: `step`, `recent`. When the state of an earlier process has been
      read, what is known of the steps before it, oldest first, as
      `snapshot.recent.LastStep.from_json` reads it: that process may not have come to
      tell them.
    - `"eval"`: `step`, `loss`, the metrics. `"checkpoint"`: `step`.
    - `"restored"`: `step`, when its state has been read. `"rewind"`: `step`,
      `repeats`, `source` (`"snapshot"` or `"checkpoint"`).

    Example:
        >>> log = EventLog()
        >>> seen = []
        >>> log.subscribe(seen.append)
        >>> with log.phase("move") as fields:
        ...     fields["bytes"] = 44
        >>> seen[0].name, seen[0].fields
        ('move', {'bytes': 44})
    """

    def __init__(self) -> None:
        self._listeners: list[Callable[[Event], None]] = []
        self._beginners: list[Callable[[str, dict[str, Any]], None]] = []

    def subscribe(
        self,
        listener: Callable[[Event], None] | None = None,
        *,
        begins: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> None:
        """Calls listeners from now on.

        Args:
            listener: Is given every event when it ends.
            begins: Is given the name and the fields of what takes time when it
                begins, in the thread that does it, which waits for it.
        """
        if listener is not None:
            self._listeners.append(listener)
        if begins is not None:
            self._beginners.append(begins)

    def begin(self, name: str, /, **fields: Any) -> None:
        """Says that something begins; `emit` is to say that it ends."""
        for listener in self._beginners:
            listener(name, fields)

    def emit(
        self, name: str, /, *, since_s: float | None = None, **fields: Any
    ) -> None:
        """Records what ends now.

        Args:
            name: What it is.
            since_s: When it began, in seconds of `time.monotonic`; None for a fact
                that takes no time.
            **fields: What else is known of it.
        """
        now_s = time.monotonic()
        self._send(
            Event(
                name=name,
                start_s=now_s if since_s is None else since_s,
                end_s=now_s,
                fields=fields,
                thread=threading.current_thread().name,
            )
        )

    @contextlib.contextmanager
    def phase(self, name: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Times a block; what is put into the yielded dict becomes its fields."""
        start_s = time.monotonic()
        self.begin(name, **fields)
        yield fields
        self.emit(name, since_s=start_s, **fields)

    def _send(self, event: Event) -> None:
        if event.name in ("notice", "plan") and not self._listeners:
            logging.getLogger("shardkit").warning("%s", event.fields["message"])
        for listener in self._listeners:
            listener(event)
