"""The trace of a run, which Perfetto and Chrome's trace viewer open.

Owns `trace.json`, in the object form of Google's Trace Event Format: steps, changes of
devices with their phases, compilations, evaluations and checkpoints on the row `run`,
and what background threads compile on rows of their own. Its invariants: the file is
whole JSON after every event, whatever ends the process then; times go forward, also
from one process of the run to the next; it has at most `MAX_EVENTS` events.

Where `metrics.jsonl` has each step once, this tells what took time: a step that was
repeated took it twice, and stands here twice.
"""

import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from shardkit.events import Event
from shardkit.report.jsonl import StepLike, write_atomically

__all__ = ["MAX_EVENTS", "TraceFile"]

MAX_EVENTS = 100_000
"""Beyond, the older half goes: some 20 MB, which viewers still open at once."""

_END = b"\n]}\n"
# Trace viewers take process 0 for the idle one.
_PROCESS = 1
# They say what follows, or what their reader has seen already.
_UNTRACED = ("notice", "plan", "reconfiguring", "restored", "last_steps")


class TraceFile:
    """A trace file being appended to, from any thread.

    Args:
        path: The file. One that is there is gone on with; what cannot be read of it,
            since a machine went down while writing, is dropped.
        label: What to call the run.
        max_events: How many events it may have.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory) / "trace.json"
        ...     trace = TraceFile(path, label="run")
        ...     trace.mark("begin", step=0)
        ...     names = [e["name"] for e in json.loads(path.read_text())["traceEvents"]]
        ...     trace.close()
        >>> names
        ['process_name', 'thread_name', 'begin']
    """

    def __init__(self, path: Path, *, label: str, max_events: int = MAX_EVENTS):
        self._path, self._label, self._max_events = path, label, max_events
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        head, lines = _read(path)
        now_s, unix_s = time.monotonic(), time.time()
        self._begun_unix_s: float = head.get("begun_unix_s", unix_s)
        self._rows: dict[str, int] = head.get("rows", {"run": 1})
        last_s = max(map(_end_s, lines), default=0.0)
        # What `time.monotonic` counts from is another thing in another process, and
        # another machine's clock may be behind.
        self._origin_s = now_s - max(unix_s - self._begun_unix_s, last_s)
        self._last_step_s = -math.inf
        self._write_anew(lines)

    def event(self, event: Event) -> None:
        """Writes an event of a run's log, with its phases if it has any."""
        if event.name in _UNTRACED:
            return
        fields = dict(event.fields)
        phases = fields.pop("phases", ())
        span = (event.start_s, event.end_s)
        rows = [(_title(event.name, fields), event.name, *span, fields)]
        shared = {"step": fields.get("step"), "devices": fields.get("to_devices")}
        for phase in phases:
            start_s, end_s = (event.start_s + phase[x] for x in ("start_s", "end_s"))
            args = {**shared, "bytes": phase["bytes"]}
            rows.append((_words(phase["name"]), "phase", start_s, end_s, args))
        self._append(_row_of(event.thread), rows)

    def step(self, metrics: StepLike) -> None:
        """Writes a step that the host has just seen the end of."""
        now_s = time.monotonic()
        # How long after its end a step is told varies; still steps may not overlap.
        start_s = max(now_s - (metrics.step_s or 0.0), self._last_step_s)
        self._last_step_s = now_s
        args = {
            "step": metrics.step,
            "devices": metrics.num_devices,
            "loss": metrics.loss,
        }
        name = f"step {metrics.step}"
        self._append("run", [(name, "step", start_s, now_s, args)])

    def mark(self, name: str, **fields: Any) -> None:
        """Marks a moment."""
        now_s = time.monotonic()
        self._append("run", [(name, name, now_s, now_s, fields)])

    def close(self) -> None:
        """Closes the file; what a background thread still tells is not written."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _append(self, row: str, rows: list[tuple[str, str, float, float, Any]]) -> None:
        with self._lock:
            if self._file is None:
                return
            if row not in self._rows:
                self._rows[row] = len(self._rows) + 1
                self._write_anew(_read(self._path)[1])
            lines = [self._line(row, *values) for values in rows]
            self._put(self._file, "".join(f",\n{line}" for line in lines).encode())
            self._num_events += len(lines)
            if self._num_events > self._max_events:
                self._write_anew(_read(self._path)[1])

    def _line(
        self, row: str, name: str, kind: str, start_s: float, end_s: float, args: Any
    ) -> str:
        moment = {"ph": "i", "s": "t"}
        spent = {"ph": "X", "dur": round(1e6 * (end_s - start_s), 3)}
        event = {
            "name": name,
            "cat": kind,
            **(spent if end_s > start_s or kind == "phase" else moment),
            "ts": round(1e6 * (start_s - self._origin_s), 3),
            "pid": _PROCESS,
            "tid": self._rows[row],
            "args": _finite(args),
        }
        return json.dumps(event, allow_nan=False)

    def _put(self, file: IO[bytes], text: bytes) -> None:
        """Puts text before the end, in one write, so that there always is an end."""
        file.seek(self._size)
        file.write(text + _END)
        self._size += len(text)

    def _write_anew(self, lines: list[str]) -> None:
        """Writes a file with these events, the newest of them, and opens it."""
        if self._file is not None:
            self._file.close()
        if len(lines) > self._max_events:
            lines = lines[-(self._max_events // 2) :]
        head = json.dumps(
            {
                "displayTimeUnit": "ms",
                "otherData": {"begun_unix_s": self._begun_unix_s, "rows": self._rows},
            }
        )
        text = f'{head[:-1]}, "traceEvents": [\n' + ",\n".join(
            [*map(json.dumps, self._names()), *lines]
        )
        write_atomically(self._path, text + _END.decode())
        self._file = self._path.open("r+b", buffering=0)
        self._size, self._num_events = len(text.encode()), len(lines)

    def _names(self) -> Iterator[dict[str, Any]]:
        """What a viewer calls the process and the rows."""
        common = {"ph": "M", "pid": _PROCESS}
        yield {"name": "process_name", **common, "args": {"name": self._label}}
        for row, number in self._rows.items():
            yield {
                "name": "thread_name",
                **common,
                "tid": number,
                "args": {"name": row},
            }


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads what an earlier process noted of the file, and the lines of its events."""
    if not path.exists():
        return {}, []
    text = path.read_text(encoding="utf-8", errors="replace")
    first, _, rest = text.partition("\n")
    head = _parse(first + "]}").get("otherData")
    if not head:
        return {}, []
    lines = [line.rstrip(",") for line in rest.splitlines()]
    return head, [x for x in lines if _parse(x).get("ph", "M") != "M"]


def _parse(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _end_s(line: str) -> float:
    event = _parse(line)
    return (event["ts"] + event.get("dur", 0.0)) / 1e6


def _row_of(thread: str) -> str:
    """Whoever works in the background says so by its name; others are waited for."""
    name = thread.removeprefix("shardkit-")
    return "run" if name == thread else name


def _title(name: str, fields: Mapping[str, Any]) -> str:
    if name == "reconfigure":
        return f"{fields['from_devices']} -> {fields['to_devices']} devices"
    if name == "compile":
        return f"compile {fields['program']}"
    return _words(name)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _finite(args: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what is not known, and what JSON cannot say."""

    def is_sayable(value: Any) -> bool:
        return math.isfinite(value) if isinstance(value, float) else value is not None

    return {name: value for name, value in args.items() if is_sayable(value)}
