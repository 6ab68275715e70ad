"""The lines of `metrics.jsonl`.

Owns their format and the file. Its invariant: each step stands once, in a file whose
every line is whole, also after a process died while writing, a run was resumed from
an earlier step, or steps were repeated because a device was lost.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from shardkit.words import format_mesh

__all__ = [
    "MetricsFile",
    "StepLike",
    "eval_record",
    "first_step_record",
    "groups_met",
    "phase_ms",
    "read_records",
    "reconfigure_record",
    "step_record",
    "write_atomically",
]

_RECONFIGURE_FIELDS = (
    "step",
    "from_devices",
    "to_devices",
    "from_mesh",
    "to_mesh",
    "consistency",
    "bytes_moved",
    "plain_bytes_moved",
    "phases",
    "was_ready",
    "certified",
    "move_certified",
)


class StepLike(Protocol):
    """What a report wants to know of a step; `sk.StepMetrics` has it."""

    @property
    def step(self) -> int:
        """Number of the step, from 0."""
        ...

    @property
    def loss(self) -> float:
        """Mean loss of the global batch."""
        ...

    @property
    def loss_bits(self) -> str:
        """Its float32 as 8 hex digits."""
        ...

    @property
    def num_devices(self) -> int:
        """Devices that computed it."""
        ...

    @property
    def mesh(self) -> Mapping[str, int]:
        """Mesh axes larger than 1, with their sizes."""
        ...

    @property
    def step_s(self) -> float | None:
        """Seconds that it took; None where that is not known."""
        ...

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second; None where that is not known."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """Whatever else was measured."""
        ...


def step_record(metrics: StepLike) -> dict[str, Any]:
    """Returns the line of a step: which loss, to the bit, on which devices.

    What is not finite, which JSON cannot write, is null; the bits of a loss remain.
    """
    return {
        "step": metrics.step,
        "loss": _finite(metrics.loss),
        "loss_bits": metrics.loss_bits,
        "num_devices": metrics.num_devices,
        "mesh": dict(metrics.mesh),
        "step_s": metrics.step_s,
        "tokens_per_s": metrics.tokens_per_s,
        "metrics": {name: _finite(x) for name, x in metrics.metrics.items()},
    }


def reconfigure_record(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the line of a change of devices."""
    return {
        "event": "reconfigure",
        **{name: fields[name] for name in _RECONFIGURE_FIELDS},
    }


def first_step_record(step: int, start_s: float, end_s: float) -> dict[str, Any]:
    """Returns the line of the first step after a change that did none itself.

    Args:
        step: Its number, which is also that of the change.
        start_s: When it was dispatched, in seconds since the change began.
        end_s: When its results were there, likewise.
    """
    times = {"start_s": round(start_s, 6), "end_s": round(end_s, 6)}
    return {"event": "first_step", "step": step, **times}


def phase_ms(phases: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Adds up the milliseconds of phases by name, in their order.

    >>> phase_ms([{"name": "move", "start_s": 0.25, "end_s": 0.5}])
    {'move': 250.0}
    """
    found: dict[str, float] = {}
    for phase in phases:
        spent_ms = 1e3 * (phase["end_s"] - phase["start_s"])
        found[phase["name"]] = found.get(phase["name"], 0.0) + spent_ms
    return found


def groups_met(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lists in which groups of devices steps were computed, each once.

    What is within a group enters the bits, and how many there are does not.

    >>> groups_met([{"mesh": {"data": 2}}, {"mesh": {"fsdp": 3, "tensor": 2}}])
    ['single device', 'tensor=2']
    """
    meshes = [record["mesh"] for record in records if "event" not in record]
    inner = [
        {axis: size for axis, size in mesh.items() if axis not in ("data", "fsdp")}
        for mesh in meshes
    ]
    return list(dict.fromkeys(map(format_mesh, inner)))


def eval_record(step: int, loss: float) -> dict[str, Any]:
    """Returns the line of an evaluation."""
    return {"event": "eval", "step": step, "loss": loss}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a metrics file, without one that was torn while written.

    Returns:
        The lines in order; none if there is no file.
    """
    if not path.exists():
        return []
    return [json.loads(line) for line in _whole_lines(path)]


class MetricsFile:
    """A metrics file being appended to; each line is on disk's way at once.

    Args:
        path: The file; made if it is missing.
    """

    def __init__(self, path: Path):
        self.path = path
        # Cuts a torn line, which the next one would otherwise be glued to.
        lines = _whole_lines(path) if path.exists() else []
        write_atomically(path, "".join(lines))
        self._last_step = max(
            (r["step"] for r in map(json.loads, lines) if "event" not in r), default=-1
        )
        self._file: IO[str] = path.open("a", encoding="utf-8")

    @property
    def last_step(self) -> int:
        """The newest step that is in it; -1 if none is."""
        return self._last_step

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a line; one that goes back in time first cuts what it repeats."""
        kind, step = record.get("event"), record["step"]
        # Steps are written late, so a change may stand before the steps that led to
        # it, but it never follows the step that it precedes, unless steps repeat.
        if kind in (None, "reconfigure") and step <= self._last_step:
            self.truncate(step)
        if kind is None:
            self._last_step = step
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def truncate(self, step: int) -> None:
        """Cuts every line of a step from `step` on, in one atomic move."""
        self._file.close()
        kept = [
            line for line in _whole_lines(self.path) if json.loads(line)["step"] < step
        ]
        write_atomically(self.path, "".join(kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._last_step = min(self._last_step, step - 1)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file, or leaves it as it was; never half of it."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not (lines[-1].endswith(b"\n") and _is_json(lines[-1])):
        lines.pop()
    return [line.decode() for line in lines]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
