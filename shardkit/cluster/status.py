"""What a run of several processes says of itself, as data.

Owns the shape of the status that the supervisor serves. Invariant: any JSON object can
be read; what is missing, unknown or of another type is as if it had not been said, so
that a viewer and a run of different versions get on with each other. It asks nobody,
draws nothing, and needs no JAX.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Self, TypeVar, get_args, get_type_hints

from shardkit.errors import ConfigError

__all__ = [
    "STATES",
    "HostStatus",
    "Phase",
    "RecoveryStatus",
    "SnapshotStatus",
    "Status",
    "WorkerStatus",
]

STATES = ("forming", "running", "recovering", "waiting", "halting", "ended")
"""What a run can be doing."""

MAX_TEXT = 2000
"""Characters of a text that are kept: enough for a cause, not for a traceback."""

T = TypeVar("T")


def _text(value: Any) -> str | None:
    """Spells out what a terminal would obey: a cause may quote a program's output."""
    if not isinstance(value, str):
        return None
    value = value[:MAX_TEXT]
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in value)


def _whole(value: Any) -> int | None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return value if is_whole and -(2**63) <= value < 2**63 else None


def _real(value: Any) -> float | None:
    """Reads a number, or the spelling of one that JSON does not have."""
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _many(parse: Callable[[Any], T | None]) -> Callable[[Any], tuple[T, ...]]:
    def parse_all(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list | tuple):
            return ()
        return tuple(x for x in map(parse, value) if x is not None)

    return parse_all


def _axes(value: Any) -> dict[str, int] | None:
    if not isinstance(value, Mapping):
        return None
    pairs = {_text(axis): _whole(size) for axis, size in value.items()}
    return {a: n for a, n in pairs.items() if a is not None and n is not None}


def _point(value: Any) -> tuple[int, float] | None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    step, loss = _whole(value[0]), _real(value[1])
    return None if step is None or loss is None else (step, loss)


Text = Annotated[str | None, _text]
Whole = Annotated[int | None, _whole]
Real = Annotated[float | None, _real]


class _Record:
    """Reads and writes the dataclasses below."""

    __slots__ = ()

    @classmethod
    def from_json(cls, said: Any) -> Self | None:
        """Reads one; None if `said` is no JSON object."""
        if not isinstance(said, Mapping):
            return None
        found = {}
        for name, parse in _parsers(cls).items():
            value = parse(said.get(name))
            if value is not None:
                found[name] = value
        return cls(**found)

    def to_json(self) -> dict[str, Any]:
        """Writes one; numbers that JSON does not have are spelled as text."""
        return _spell(dataclasses.asdict(self))  # pyright: ignore[reportArgumentType]


@functools.cache
def _parsers(record: type) -> dict[str, Callable[[Any], Any]]:
    hints = get_type_hints(record, include_extras=True)
    return {name: get_args(hint)[1] for name, hint in hints.items()}


def _spell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _spell(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_spell(each) for each in value]
    return value


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WorkerStatus(_Record):
    """One process of the generation.

    Attributes:
        process: Its index.
        pid: Its number on its host.
        step: The step it is at.
        phase: What it is doing there.
        age_s: How long ago it was heard of.
        speed: Its speed over that of the median process.
    """

    process: Whole = None
    pid: Whole = None
    step: Whole = None
    phase: Text = None
    age_s: Real = None
    speed: Real = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HostStatus(_Record):
    """One host.

    Attributes:
        host: Its name.
        state: `alive`, `lost`, `quarantined` or `returning`.
        workers: Its processes.
        standbys: How many wait to take the place of one.
        flaps: How often it went and came back.
        until_s: How long it is still kept out.
        image_bytes: What images take of its memory.
        protection_bytes: What protects those of other hosts takes.
        predicted_bytes: What both were said to take; for a moment after a recovery it
            is more, since what was gone back to is kept until there is a newer step.
    """

    host: Annotated[str, _text] = "?"
    state: Annotated[str, _text] = "unknown"
    workers: Annotated[tuple[WorkerStatus, ...], _many(WorkerStatus.from_json)] = ()
    standbys: Whole = None
    flaps: Whole = None
    until_s: Real = None
    image_bytes: Whole = None
    protection_bytes: Whole = None
    predicted_bytes: Whole = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotStatus(_Record):
    """The newest snapshot that is whole.

    Attributes:
        step: Of which step.
        age_s: How long ago it became whole.
        bytes: What it takes on all hosts, without what protects it.
        protection_bytes: What protects it takes.
        predicted_bytes: What the snapshots of all hosts were said to take, with what
            protects them.
    """

    step: Whole = None
    age_s: Real = None
    bytes: Whole = None
    protection_bytes: Whole = None
    predicted_bytes: Whole = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Phase(_Record):
    """A part of a recovery, and the seconds it took."""

    name: Annotated[str, _text] = "?"
    s: Annotated[float, _real] = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryStatus(_Record):
    """One recovery.

    Attributes:
        generation: The one that it began.
        cause: What happened, in words.
        step: The step it went back to.
        lost_steps: How many steps were computed again.
        started_s: When, in seconds since 1970.
        total_s: How long it took; None while it goes on.
        phases: What the time went to, in order.
        rebuilt_bytes: What was lost and made again from what protected it.
        fetched_bytes: What processes have read of other hosts' images.
    """

    generation: Whole = None
    cause: Text = None
    step: Whole = None
    lost_steps: Whole = None
    started_s: Real = None
    total_s: Real = None
    phases: Annotated[tuple[Phase, ...], _many(Phase.from_json)] = ()
    rebuilt_bytes: Whole = None
    fetched_bytes: Whole = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Status(_Record):
    """A whole run at one moment.

    Attributes:
        run: Its id.
        out: Where it writes.
        state: One of `STATES`.
        generation: Counts the times that its processes were started.
        step: The step that was last completed.
        steps: Where it ends.
        loss: At `step`.
        step_s: Seconds that a step takes.
        devices: How many it computes on.
        mesh: The size of each mesh axis.
        redundancy: `none`, `mirror`, `parity` or `parity:M`.
        snapshot: The newest that is whole; None before the first.
        hosts: In order of their names.
        recoveries: Oldest first.
        losses: `(step, loss)`, thinned.
        goodput: Useful steps over those that were possible, from 0 to 1.
        waits: What is waited for, in words.

    >>> status = Status.from_json({"step": 7, "loss": "nan", "devices": "many"})
    >>> status.step, status.loss, status.devices, status.hosts
    (7, nan, None, ())
    """

    run: Annotated[str, _text] = "?"
    out: Text = None
    state: Annotated[str, _text] = "unknown"
    generation: Whole = None
    step: Whole = None
    steps: Whole = None
    loss: Real = None
    step_s: Real = None
    devices: Whole = None
    mesh: Annotated[Mapping[str, int], _axes] = dataclasses.field(default_factory=dict)
    redundancy: Text = None
    snapshot: Annotated[SnapshotStatus | None, SnapshotStatus.from_json] = None
    hosts: Annotated[tuple[HostStatus, ...], _many(HostStatus.from_json)] = ()
    recoveries: Annotated[
        tuple[RecoveryStatus, ...], _many(RecoveryStatus.from_json)
    ] = ()
    losses: Annotated[tuple[tuple[int, float], ...], _many(_point)] = ()
    goodput: Real = None
    waits: Annotated[tuple[str, ...], _many(_text)] = ()

    @classmethod
    def from_json(cls, said: Any) -> Self:
        """Reads what a supervisor said.

        Raises:
            ConfigError: If it is no JSON object.
        """
        found = super(Status, cls).from_json(said)
        if found is None:
            raise ConfigError(
                f"status: expected a JSON object, found {type(said).__name__}; "
                "is it a supervisor of shardkit that answers there?"
            )
        return found
