"""The lines of `events.jsonl`: what happened to a run, beside its steps.

Owns that file: when a process began and on what, on which devices steps ran, what was
saved, gone back to and said. Its invariant: it is only ever added to. `metrics.jsonl`
has each step once, as if nothing had happened; this says what did.
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardkit.events import Event
from shardkit.report.jsonl import MetricsFile, StepLike

__all__ = ["EventsFile"]

_KEPT = {
    "notice": ("message",),
    "checkpoint": ("step",),
    "reconfiguring": ("step", "from_mesh", "to_mesh", "consistency"),
    "reconfigure": ("step",),
    "restored": ("step",),
    "rewind": ("step", "repeats", "source"),
}


class EventsFile:
    """What happened to a run; written from `open` on, from any thread.

    Example:
        >>> import tempfile
        >>> from shardkit.report.jsonl import read_records
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     file = EventsFile()
        ...     file.append("begin", step=3)
        ...     file.open(Path(directory) / "events.jsonl")
        ...     file.close()
        ...     [record] = read_records(Path(directory) / "events.jsonl")
        >>> record["event"], record["step"]
        ('begin', 3)
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: MetricsFile | None = None
        self._waiting: list[dict[str, Any]] = []
        self._is_closed = False
        self._mesh: tuple[Mapping[str, int], tuple[int, ...]] | None = None
        self._step = 0

    def open(self, path: Path) -> None:
        """Goes on with a file, and writes what was told before."""
        with self._lock:
            self._file = MetricsFile(path)
            for record in self._waiting:
                self._file.append(record)
            self._waiting.clear()

    def append(self, name: str, /, *, step: int | None = None, **fields: Any) -> None:
        """Writes a line, with the time.

        Args:
            name: What happened.
            step: Before which step; None for the next one.
            **fields: What else is known of it; JSON values only.
        """
        moment = {"unix_s": round(time.time(), 3)}
        with self._lock:
            self._step = self._step if step is None else step
            record = {"event": name, "step": self._step, **moment, **fields}
            if self._file is not None:
                self._file.append(record)
            elif not self._is_closed:
                self._waiting.append(record)

    def event(self, event: Event) -> None:
        """Writes an event of a run's log, if it is one of those that are kept."""
        if event.name == "plan":
            self.append("plan", **event.fields)
        elif event.name in _KEPT:
            fields = {name: event.fields[name] for name in _KEPT[event.name]}
            self.append(event.name, **fields)

    def step(self, metrics: StepLike) -> None:
        """Notes a step, and writes where it ran if that is another place."""
        ids = tuple(getattr(metrics, "device_ids", ()))
        place = (dict(metrics.mesh), ids)
        if ids and place != self._mesh:
            self._mesh = place
            self.append("mesh", step=metrics.step, mesh=place[0], device_ids=list(ids))
        self._step = metrics.step + 1

    def close(self) -> None:
        """Closes the file; what a background thread still tells is not written."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file, self._is_closed = None, True
            self._waiting.clear()
