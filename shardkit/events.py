"""Named phases and facts of a run, to which reports and tests listen.

Owns the event log. A log is passed explicitly to whatever emits into it; there is
no global one. Listeners are called in the emitting thread, in order.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Event", "EventLog"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        name: What it was, such as `"compile"` or `"reconfigure"`.
        start_s: When it began, in seconds of `time.monotonic`.
        end_s: When it ended; equal to `start_s` for a mere fact.
        fields: What else is known of it; JSON values only.
    """

    name: str
    start_s: float
    end_s: float
    fields: dict[str, Any]

    @property
    def duration_s(self) -> float:
        """Seconds from start to end."""
        return self.end_s - self.start_s


class EventLog:
    """Collects events and hands each one to the listeners.

    What a `Trainer` emits, and with which fields: `"notice"` (`message`), `"compile"`
    (`program`), `"reconfiguring"` and `"reconfigure"` (`step`, `from_devices`,
    `to_devices`, and afterwards the meshes, `bytes_moved`, `phases_s`, `certified`),
    `"eval"` (`step`, `loss`, the metrics), `"checkpoint"` (`step`), `"rewind"`
    (`step`, `repeats`). Without a listener notices are logged as warnings.

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

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Calls `listener` with every event from now on."""
        self._listeners.append(listener)

    def emit(self, name: str, **fields: Any) -> None:
        """Records a fact that takes no time."""
        now = time.monotonic()
        self._send(Event(name=name, start_s=now, end_s=now, fields=fields))

    @contextlib.contextmanager
    def phase(self, name: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Times a block; what is put into the yielded dict becomes its fields."""
        start_s = time.monotonic()
        yield fields
        self._send(
            Event(name=name, start_s=start_s, end_s=time.monotonic(), fields=fields)
        )

    def _send(self, event: Event) -> None:
        if event.name == "notice" and not self._listeners:
            logging.getLogger("shardkit").warning("%s", event.fields["message"])
        for listener in self._listeners:
            listener(event)
