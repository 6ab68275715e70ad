"""Who is alive: the requests for another device count that reach a run.

Owns `Change` and its sources: a script, signals, a watched file. A source is asked
at every step boundary and answers at once. Importing this installs nothing; signal
handlers stand only while a run goes on, and only if `signals()` was asked for.
"""

import dataclasses
import json
import math
import signal
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from shardkit.errors import MembershipError

__all__ = [
    "Change",
    "Lost",
    "Membership",
    "check_source",
    "combine",
    "scripted",
    "signals",
    "watch_file",
]


@dataclasses.dataclass(frozen=True)
class Lost:
    """In a script: so many devices remain, and the memory of the others is gone.

    Attributes:
        num_devices: How many are left.

    Raises:
        MembershipError: If that is no whole number.
    """

    num_devices: int

    def __post_init__(self) -> None:
        if not isinstance(self.num_devices, int):
            raise MembershipError(
                "sk.Lost: expected how many devices are left, such as sk.Lost(6), "
                f"found {self.num_devices!r}"
            )


@dataclasses.dataclass(frozen=True)
class Change:
    """What a source asks for at a step boundary.

    Attributes:
        num_devices: How many devices of the pool to go on with; None for as many.
        lost: Whether the state on the devices that go is gone with them.
        leave: Save and stop.
        halt: Stop with the state in a snapshot, from which other processes go on.
        grace_s: For how many seconds the run may go on with the devices it has while
            the next program is made; lost devices give no time.
    """

    num_devices: int | None = None
    lost: bool = False
    leave: bool = False
    grace_s: float = 0.0
    halt: bool = False


class Membership(Protocol):
    """A source of changes."""

    @property
    def is_shared(self) -> bool:
        """Whether all processes of a run hear the same at the same step."""
        ...

    def start(self) -> Callable[[], None]:
        """Begins to listen; returns what ends it."""
        ...

    def poll(self, step: int, num_devices: int) -> Change | None:
        """Returns what is asked for before `step`, if anything.

        Args:
            step: The next step.
            num_devices: How many devices there are, or will be when the change that
                was announced last is made.
        """
        ...

    def leaving(self) -> bool:
        """Whether to save and stop as soon as possible; asked during long waits.

        Where `is_shared`, it must never be true, since processes wait for different
        times.
        """
        ...

    def check(self, num_pool: int) -> None:
        """Raises `MembershipError` for what can be seen to be impossible."""
        ...

    def expected(self) -> list[int]:
        """Device counts that are known to come, in order."""
        ...


class _Silent:
    """A source that needs no starting and cannot be known to be wrong."""

    is_shared = False

    def start(self) -> Callable[[], None]:
        return lambda: None

    def leaving(self) -> bool:
        return False

    def check(self, num_pool: int) -> None:
        pass

    def expected(self) -> list[int]:
        return []


class _Scripted(_Silent):
    is_shared = True

    def __init__(self, script: Mapping[int, int | Lost]) -> None:
        self._script = dict(script)
        self.start()

    def start(self) -> Callable[[], None]:
        self._reached = -1
        self._asked: int | None = None
        return lambda: None

    def expected(self) -> list[int]:
        changes = [self._script[step] for step in sorted(self._script)]
        return [x.num_devices if isinstance(x, Lost) else x for x in changes]

    def check(self, num_pool: int) -> None:
        counts = dict(zip(sorted(self._script), self.expected(), strict=True))
        bad = {s: n for s, n in counts.items() if s < 0 or not 1 <= n <= num_pool}
        if bad:
            raise MembershipError(
                "sk.scripted: expected steps from 0 and device counts from 1 to "
                f"{num_pool}, the size of the pool; found {bad}"
                + "; emulate more devices on the CPU with "
                "jax.config.update('jax_num_cpu_devices', 8)" * (num_pool == 1)
            )

    def poll(self, step: int, num_devices: int) -> Change | None:
        # A resumed run takes the newest entry that is not in its future; a run that
        # went back to a checkpoint stays with the devices that it had got to.
        self._reached = max(step, self._reached)
        due = [s for s in self._script if s <= self._reached]
        # Each entry asks once, so that other sources can move the run after it.
        if not due or max(due) == self._asked:
            return None
        self._asked = max(due)
        entry = self._script[self._asked]
        if isinstance(entry, Lost):
            return Change(entry.num_devices, lost=self._asked == step)
        return Change(entry)


class _Signals(_Silent):
    """SIGUSR1: one device fewer. SIGUSR2: one more. SIGTERM: save and leave."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._delta = 0
        self._leave = False

    def start(self) -> Callable[[], None]:
        def handle(number: int, frame: Any) -> None:
            if number == signal.SIGTERM:
                self._leave = True
            else:
                self._delta += 1 if number == signal.SIGUSR2 else -1

        numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
        before = {number: signal.signal(number, handle) for number in numbers}

        def stop() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        return stop

    def leaving(self) -> bool:
        return self._leave

    def poll(self, step: int, num_devices: int) -> Change | None:
        if self._leave:
            return Change(leave=True)
        delta, self._delta = self._delta, 0
        if not delta:
            return None
        return Change(num_devices + delta, grace_s=self._grace_s)


class _WatchedFile(_Silent):
    def __init__(self, path: str | Path, grace_s: float) -> None:
        self._path, self._grace_s = Path(path), grace_s
        self._seen: tuple[int, int] | None = None
        self._told: str | None = None

    def poll(self, step: int, num_devices: int) -> Change | None:
        try:
            text = self._read()
        except FileNotFoundError:
            text = None
        except (OSError, ValueError) as error:
            trouble = getattr(error, "strerror", None) or str(error)
            if trouble == self._told:
                return None
            self._told = trouble
            raise MembershipError(
                f"{self._path}: expected a file that can be read, or none, found: "
                f"{trouble}. Put a file there, or watch another path."
            ) from None
        self._told = None
        return None if text is None else self._parse(text)

    def _read(self) -> str | None:
        """Reads what was written since the last time; None if nothing was."""
        status = self._path.stat()
        # Anything else may have no end, or wait for someone to write.
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp == self._seen:
            return None
        text = self._path.read_text(encoding="utf-8", errors="replace")
        self._seen = stamp
        return text

    def _parse(self, text: str) -> Change:
        try:
            request = json.loads(text)
            count, lost = request["num_devices"], request.get("lost", False)
            grace_s = request.get("grace_s", self._grace_s)
            known = not set(request) - {"num_devices", "lost", "grace_s"}
            if not (known and type(count) is int and type(lost) is bool):
                raise ValueError
            _check_grace(grace_s)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise MembershipError(
                f'{self._path}: expected {{"num_devices": N}}, or with "lost": true '
                f'or "grace_s": SECONDS too, found {text[:80]!r}. '
                "Write the file elsewhere and move it here, so that it is never seen "
                "half-written."
            ) from None
        return Change(count, lost=lost, grace_s=0.0 if lost else grace_s)


class _Combined:
    @property
    def is_shared(self) -> bool:
        return all(source.is_shared for source in self._sources)

    def __init__(self, sources: tuple[Membership, ...]) -> None:
        self._sources = sources
        self._untold: list[MembershipError] = []

    def start(self) -> Callable[[], None]:
        stops = [source.start() for source in self._sources]

        def stop() -> None:
            for end in reversed(stops):
                end()

        return stop

    def leaving(self) -> bool:
        return any(source.leaving() for source in self._sources)

    def check(self, num_pool: int) -> None:
        for source in self._sources:
            source.check(num_pool)

    def expected(self) -> list[int]:
        return [count for source in self._sources for count in source.expected()]

    def poll(self, step: int, num_devices: int) -> Change | None:
        found = []
        for source in self._sources:
            try:
                change = source.poll(step, num_devices)
            except MembershipError as error:
                # Others may ask only once, so that they are heard first.
                self._untold.append(error)
            else:
                found += [] if change is None else [change]
        if self._untold and not found:
            raise self._untold.pop(0)
        leaving = [change for change in found if change.leave or change.halt]
        moving = [c for c in found if c.num_devices not in (None, num_devices)]
        return next(iter([*leaving, *reversed(moving)]), None)


def scripted(script: Mapping[int, int | Lost]) -> Membership:
    """Changes the device count at given steps.

    Args:
        script: Step → device count from the beginning of that step on, or `Lost`.

    Example:
        >>> scripted({20: 6, 40: Lost(3)}).poll(40, 6)
        Change(num_devices=3, lost=True, leave=False, grace_s=0.0, halt=False)
    """
    return _Scripted(script)


def signals(*, grace_s: float = 30.0) -> Membership:
    """Listens to SIGUSR1 (one fewer), SIGUSR2 (one more), SIGTERM (save and leave).

    The handlers stand while `Trainer.run` goes on. Only a main thread can have them.

    Args:
        grace_s: For how long steps go on as they are, at most, while the program for
            the next device count is compiled beside them; 0 makes them wait for it.

    Raises:
        MembershipError: If `grace_s` is not a time.
    """
    _check_grace(grace_s)
    return _Signals(grace_s)


def watch_file(path: str | Path, *, grace_s: float = 30.0) -> Membership:
    """Follows a JSON file: `{"num_devices": 6}`, or with `"lost": true`.

    A file that is not there asks for nothing. What cannot be read or understood is
    told once, as a notice, and the run goes on.

    Args:
        path: The file.
        grace_s: As for `signals`; `"grace_s"` in the file comes first.

    Raises:
        MembershipError: If `grace_s` is not a time.
    """
    _check_grace(grace_s)
    return _WatchedFile(path, grace_s)


def _check_grace(grace_s: Any) -> None:
    is_number = isinstance(grace_s, int | float) and not isinstance(grace_s, bool)
    if not (is_number and 0 <= grace_s < math.inf):
        raise MembershipError(
            f"grace_s: expected a number of seconds from 0 on, found {grace_s!r}"
        )


def check_source(membership: Any, num_pool: int, num_processes: int) -> None:
    """Checks a source before a run listens to it.

    Args:
        membership: The source.
        num_pool: How many devices there are.
        num_processes: How many processes have to hear the same.

    Raises:
        MembershipError: If it is none, or cannot be used there.
    """
    if not hasattr(membership, "poll"):
        raise MembershipError(
            "Trainer.run: membership must be made by sk.scripted, sk.signals, "
            f"sk.watch_file or sk.combine, found {membership!r}"
        )
    membership.check(num_pool)
    if num_processes > 1 and not membership.is_shared:
        raise MembershipError(
            "several processes must change at the same step, which signals and "
            "watched files cannot promise; use sk.scripted there"
        )


def combine(*sources: Membership) -> Membership:
    """Listens to several sources; leaving comes first, then the last that moves.

    Example:
        >>> combine(scripted({0: 4}), scripted({})).poll(0, 8)
        Change(num_devices=4, lost=False, leave=False, grace_s=0.0, halt=False)
    """
    return _Combined(sources)
