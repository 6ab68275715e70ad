"""Slow workers: fewer microbatches for them, or none.

Owns the decision and nothing else. Invariant: it depends on measured speeds alone,
and every process that takes part has one microbatch at least. Exactness does not
depend on who computes what, so that a decision can never be wrong, only late.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from shardkit.cluster.settings import Limits

__all__ = ["Decision", "Speeds", "decide", "share"]


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What to do about stragglers.

    Attributes:
        quotas: Microbatches of each process.
        leave_out: Processes to go on without.
        why: In words.
    """

    quotas: tuple[int, ...]
    leave_out: tuple[int, ...]
    why: str


class Speeds:
    """Measures how fast the processes of a generation are.

    Args:
        limits: Over how many steps.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._found: dict[int, dict[int, tuple[float, int]]] = {}

    def add(self, process: int, step: int, busy_s: float, work: int) -> None:
        """Learns what a process did in a step, and in how much time of its own."""
        if busy_s > 0 and work > 0:
            steps = self._found.setdefault(process, {})
            steps[step] = (busy_s, work)
            while len(steps) > self._limits.straggler_steps:
                del steps[next(iter(steps))]

    def speeds(self) -> dict[int, float]:
        """Returns microbatches per second, of each process that was measured enough."""
        return {
            process: 1 / statistics.median(busy / work for busy, work in steps.values())
            for process, steps in self._found.items()
            if len(steps) >= self._limits.straggler_steps
        }

    def work(self) -> dict[int, int]:
        """Returns how many microbatches each process did last."""
        return {
            process: next(reversed(steps.values()))[1]
            for process, steps in self._found.items()
        }

    def clear(self) -> None:
        """Begins anew."""
        self._found.clear()


def share(total: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """Shares microbatches so that all end together, as nearly as possible.

    Example:
        >>> share(8, [1.0, 1.0, 0.5])
        (4, 3, 1)
    """
    quotas = [1] * len(speeds)
    for _ in range(total - len(speeds)):
        ends = [
            (quota + 1) / speed for quota, speed in zip(quotas, speeds, strict=True)
        ]
        quotas[ends.index(min(ends))] += 1
    return tuple(quotas)


def decide(
    speeds: Mapping[int, float], work: Mapping[int, int], limits: Limits
) -> Decision | None:
    """Decides whether a change is worth its cost.

    Args:
        speeds: Microbatches per second of each process.
        work: How many each does now.
        limits: What is put up with.

    Example:
        >>> decide({0: 4.0, 1: 4.0, 2: 2.0}, {0: 4, 1: 4, 2: 4}, Limits()).quotas
        (5, 5, 2)
        >>> decide({0: 4.0, 1: 4.0, 2: 3.9}, {0: 4, 1: 4, 2: 4}, Limits())
        >>> decide({0: 4.0, 1: 4.0, 2: 0.1}, {0: 4, 1: 4, 2: 4}, Limits()).leave_out
        (2,)
    """
    if len(speeds) < 2 or set(speeds) != set(work):
        return None
    order = sorted(speeds)
    middle = statistics.median(speeds.values())
    least = limits.leave_out_speed * middle
    out = tuple(process for process in order if speeds[process] < least)
    stay = [process for process in order if process not in out]
    total, now_s = sum(work.values()), max(work[p] / speeds[p] for p in order)
    if total < len(stay):
        return None
    quotas = share(total, [speeds[process] for process in stay])
    then_s = max(q / speeds[p] for q, p in zip(quotas, stay, strict=True))
    if then_s > now_s * (1 - limits.straggler_gain):
        return None
    slow = [p for p in order if speeds[p] < middle] if not out else list(out)
    words = ", ".join(f"{p} ({speeds[p] / middle:.2g} of the median)" for p in slow)
    what = "is left out" if out else "gets fewer microbatches"
    return Decision(quotas, out, f"process {words} is slow and {what}")
