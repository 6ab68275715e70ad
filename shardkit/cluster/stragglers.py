"""Slow workers: fewer microbatches for them, or none.

Owns the decision and nothing else. Invariant: it depends on measured speeds alone,
and every process that takes part has one microbatch at least. Exactness does not
depend on who computes what, so that a decision can never be wrong, only late, or in
vain.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from shardkit.cluster.settings import Limits

__all__ = ["Decision", "Speeds", "decide", "share", "step_time"]

_Pairs = list[tuple[float, int]]


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What to do about stragglers.

    Attributes:
        quotas: Microbatches of each process that stays.
        leave_out: Processes to go on without.
        why: In words.
    """

    quotas: tuple[int, ...]
    leave_out: tuple[int, ...]
    why: str


class Speeds:
    """Measures how fast the processes of a generation are.

    What is compared was measured by all of them before the same steps, since what else
    a machine has to do comes and goes.

    Args:
        limits: Over how many such steps.
        num_processes: How many processes there are.
    """

    def __init__(self, limits: Limits, num_processes: int) -> None:
        self._num, self._count = max(2, limits.straggler_steps), num_processes
        self._open: dict[int, dict[int, tuple[float, int]]] = {}
        self._found: dict[int, dict[int, tuple[float, int]]] = {}

    def add(self, process: int, step: int, busy_s: float, work: int) -> None:
        """Learns what a process did in a step, and in how much time of its own."""
        if busy_s <= 0 or work <= 0 or step in self._found:
            return
        told = self._open.setdefault(step, {})
        told[process] = (busy_s, work)
        if len(told) == self._count:
            self._found[step] = self._open.pop(step)
        for steps in (self._open, self._found):
            while len(steps) > self._num:
                del steps[next(iter(steps))]

    def speeds(self) -> dict[int, float]:
        """Returns microbatches per second of each process; nothing until that is known.

        Who is stopped every other instant is seen to be slow now and not then, so that
        no single measurement tells, nor the one in the middle: work and time are
        added up. The slowest of each half counts for nothing, since anything may hold a
        process up once.
        """
        return {p: _speed(older + newer) for p, (older, newer) in self._kept().items()}

    def halves(self) -> list[dict[int, float]]:
        """Returns the same of the older and of the newer half of what was measured."""
        kept = self._kept().items()
        return [{p: _speed(halves[i]) for p, halves in kept} for i in (0, 1)]

    def _kept(self) -> dict[int, tuple[_Pairs, _Pairs]]:
        if len(self._found) < self._num:
            return {}
        steps, middle = list(self._found.values()), self._num // 2
        older, newer = steps[:middle], steps[middle:]
        return {
            process: (_pairs(older, process), _pairs(newer, process))
            for process in range(self._count)
        }

    def work(self) -> dict[int, int]:
        """Returns how many microbatches each process did last; nothing at first."""
        newest = next(reversed(self._found.values()), {})
        return {process: work for process, (_, work) in newest.items()}

    def clear(self) -> None:
        """Begins anew."""
        self._open.clear()
        self._found.clear()


def _pairs(steps: Sequence[Mapping[int, tuple[float, int]]], process: int) -> _Pairs:
    pairs = [step[process] for step in steps]
    return sorted(pairs, key=lambda pair: pair[0] / pair[1])[:-1] or pairs


def _speed(pairs: _Pairs) -> float:
    return sum(work for _, work in pairs) / sum(busy_s for busy_s, _ in pairs)


def share(
    total: int, speeds: Sequence[float], devices: Sequence[int] = ()
) -> tuple[int, ...]:
    """Shares microbatches so that the last one is done as early as can be.

    Args:
        total: How many.
        speeds: Microbatches per second of each process, with all its devices.
        devices: How many these are; 1 each by default.

    Example:
        >>> share(8, [1.0, 1.0, 0.5])
        (4, 3, 1)
        >>> share(12, [2.0, 1.0], devices=[2, 2])
        (8, 4)
    """
    devices = devices or [1] * len(speeds)
    quotas = [1] * len(speeds)
    for _ in range(total - len(speeds)):
        more = zip(quotas, speeds, devices, strict=True)
        ends = [(_time(q + 1, speed, n), (q + 1) / speed) for q, speed, n in more]
        quotas[ends.index(min(ends))] += 1
    return tuple(quotas)


def step_time(
    work: Mapping[int, int], speeds: Mapping[int, float], devices: Mapping[int, int]
) -> float:
    """Returns how long the slowest of some processes takes, in seconds.

    Args:
        work: Microbatches of each process.
        speeds: How many each does in a second, with all its devices.
        devices: How many these are; 1 if not named.
    """
    return max(_time(q, speeds[p], devices.get(p, 1)) for p, q in work.items())


def _time(quota: int, speed: float, num_devices: int) -> float:
    # The devices of a process work side by side, each on whole microbatches.
    return -(-quota // num_devices) * num_devices / speed


def decide(
    speeds: Mapping[int, float],
    work: Mapping[int, int],
    limits: Limits,
    *,
    devices: Mapping[int, int] | None = None,
    halves: Sequence[Mapping[int, float]] = (),
) -> Decision | None:
    """Decides whether a change is worth its cost.

    Args:
        speeds: Microbatches per second of each process.
        work: How many each does now.
        limits: What is put up with.
        devices: How many each has; 1 if not named.
        halves: The same speeds as parts of the measurements have them: the change must
            be worth it by each, so that what does not last changes nothing.

    Example:
        >>> decide({0: 4.0, 1: 4.0, 2: 2.0}, {0: 4, 1: 4, 2: 4}, Limits()).quotas
        (5, 5, 2)
        >>> decide({0: 4.0, 1: 4.0, 2: 3.9}, {0: 4, 1: 4, 2: 4}, Limits())
        >>> decide({0: 4.0, 1: 4.0, 2: 0.1}, {0: 4, 1: 4, 2: 4}, Limits()).leave_out
        (2,)
    """
    if len(speeds) < 2 or set(speeds) != set(work):
        return None
    order, devices = sorted(speeds), devices or {}
    middle = statistics.median(speeds.values())
    least = limits.leave_out_speed * middle
    out = tuple(process for process in order if speeds[process] < least)
    stay = [process for process in order if process not in out]
    total = sum(work.values())
    if total < len(stay):
        return None
    each = [devices.get(process, 1) for process in stay]
    quotas = share(total, [speeds[process] for process in stay], each)
    then, part = dict(zip(stay, quotas, strict=True)), 1 - limits.straggler_gain
    for found in (speeds, *halves):
        now_s = step_time(work, found, devices)
        if step_time(then, found, devices) > now_s * part:
            return None
    slow = [p for p in order if speeds[p] < middle * part] if not out else list(out)
    words = ", ".join(f"{p} ({speeds[p] / middle:.2g} of the median)" for p in slow)
    who = f"process {words} is slow" if slow else "no process is slow any more"
    shares = [", ".join(str(x[p]) for p in sorted(x)) for x in (work, then)]
    what = "left out" if out else f"microbatches {shares[0]} become {shares[1]}"
    return Decision(quotas, out, f"{who}: {what}")
