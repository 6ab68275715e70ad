"""Who has stopped: progress that does not come within its window.

Owns the windows of a generation. Invariant: as long as anybody may still be at work,
nobody is called frozen, since who waits in a collective for a slow peer looks the same
as who has stopped; a process that cannot even say that it lives is, however. Pure:
time comes in, verdicts go out.
"""

import collections
import dataclasses
import statistics

from shardkit.cluster.deadlines import Deadlines

__all__ = ["Frozen", "Seen", "Watchdog"]

_NUM_STEPS = 20
_OF_A_STEP = ("step", "snapshot")


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """A verdict.

    Attributes:
        processes: Who has stopped, as far as can be told.
        for_s: For how long.
        why: The same in words.
    """

    processes: tuple[int, ...]
    for_s: float
    why: str


@dataclasses.dataclass(slots=True)
class Seen:
    """What was last heard of a process.

    Attributes:
        step: How many steps were done.
        phase: What it did.
        since_s: Since when.
        silent_since_s: When it last said that it lives; None if that is not known.
        is_done: Whether nothing more is expected of it.
    """

    step: int
    phase: str
    since_s: float
    silent_since_s: float | None = None
    is_done: bool = False


class Watchdog:
    """Follows the processes of one generation.

    Args:
        deadlines: The windows.
        num_processes: How many there are.
        now_s: When it begins.

    Attributes:
        step_s: What a step takes, the median of the last; None while unknown.
        step: The most steps that any process has done.

    Example:
        >>> dog = Watchdog(Deadlines(step_floor_s=5.0), 2, now_s=0.0)
        >>> for step in range(3):
        ...     for process in range(2):
        ...         dog.progress(process, step, "step", now_s=float(step))
        >>> dog.step_s, dog.frozen(now_s=11.9), dog.next_s()
        (1.0, None, 12.0)
        >>> dog.frozen(now_s=12.0).why
        'no process has come further than step 2 for 10 s'
    """

    def __init__(self, deadlines: Deadlines, num_processes: int, now_s: float) -> None:
        self._deadlines = deadlines
        self._seen = {
            process: Seen(-1, "start", now_s) for process in range(num_processes)
        }
        self._durations: collections.deque[float] = collections.deque(maxlen=_NUM_STEPS)
        self._stepped_s: float | None = None
        self.step_s: float | None = None
        self.step = -1

    def progress(self, process: int, step: int, phase: str, now_s: float) -> None:
        """Learns what a process does; saying the same again is no progress."""
        seen = self._seen[process]
        if (step, phase) == (seen.step, seen.phase):
            return
        seen.step, seen.phase, seen.since_s = step, phase, now_s
        if phase not in _OF_A_STEP:
            # What is saved or compiled in between is not part of a step.
            self._stepped_s = None
        if step > self.step:
            if self._stepped_s is not None:
                count = step - self.step
                self._durations.append((now_s - self._stepped_s) / count)
                self.step_s = statistics.median(self._durations)
            self._stepped_s = now_s if phase in _OF_A_STEP else None
            self.step = step

    def heard(self, process: int, silent_s: float, now_s: float) -> None:
        """Learns for how long a process has not said that it lives."""
        self._seen[process].silent_since_s = now_s - silent_s

    def done(self, process: int) -> None:
        """Learns that nothing more is to be expected of a process."""
        self._seen[process].is_done = True

    def seen(self, process: int) -> Seen:
        """Returns what was last heard of a process."""
        return self._seen[process]

    def _end_s(self, seen: Seen) -> float:
        return seen.since_s + self._deadlines.window_s(seen.phase, self.step_s)

    def next_s(self) -> float | None:
        """When to ask again at the latest; None if nobody is at work."""
        busy = [seen for seen in self._seen.values() if not seen.is_done]
        if not busy:
            return None
        times = [max(self._end_s(seen) for seen in busy)]
        for seen in busy:
            if seen.silent_since_s is not None:
                times.append(seen.silent_since_s + self._deadlines.mute_s)
        return min(times)

    def frozen(self, now_s: float) -> Frozen | None:
        """Says who has stopped, if anybody has."""
        busy = {p: seen for p, seen in self._seen.items() if not seen.is_done}
        if not busy:
            return None
        silence_s = {
            process: now_s - seen.silent_since_s
            for process, seen in busy.items()
            if seen.silent_since_s is not None
        }
        limit_s = self._deadlines.mute_s
        if mute := tuple(p for p, each in silence_s.items() if each >= limit_s):
            why = f"{_name(mute)} said nothing at all for {limit_s:g} s"
            return Frozen(mute, limit_s, why)
        if any(now_s < self._end_s(seen) for seen in busy.values()):
            return None
        return self._name_culprits(busy, silence_s, now_s)

    def _name_culprits(
        self, busy: dict[int, Seen], silence_s: dict[int, float], now_s: float
    ) -> Frozen:
        for_s = now_s - max(seen.since_s for seen in busy.values())
        # Who waits in a collective still says that it lives.
        limit_s = self._deadlines.silence_s
        quiet = tuple(p for p, each in silence_s.items() if each >= limit_s)
        if quiet:
            longest_s = max(silence_s[process] for process in quiet)
            why = f"{_name(quiet)} said nothing at all for {longest_s:.3g} s"
            return Frozen(quiet, for_s, why)
        least = min(seen.step for seen in busy.values())
        behind = tuple(p for p, seen in busy.items() if seen.step == least)
        if len(behind) == len(busy):
            phases = sorted({seen.phase for seen in busy.values()})
            doing = "" if phases == ["step"] else f" (busy with {', '.join(phases)})"
            why = f"no process has come further than step {least}{doing}"
        else:
            why = f"{_name(behind)} did not come further than step {least}"
        return Frozen(behind, for_s, f"{why} for {for_s:.3g} s")


def _name(processes: tuple[int, ...]) -> str:
    word = "process" if len(processes) == 1 else "processes"
    return f"{word} {', '.join(map(str, processes))}"
