"""A run that is to end, and the state that it is to leave behind.

Owns why a run ends and with which code. Invariants: the first reason stays the reason;
the end comes at `leave_s` at the latest, or after a few attempts to save, whether or
not the state was saved, and it is said which.
"""

from typing import Any

from shardkit.cluster.causes import Verdict
from shardkit.cluster.choosing import Choice
from shardkit.cluster.exits import LEFT
from shardkit.cluster.live import Live
from shardkit.cluster.settings import Settings

__all__ = ["Verdict", "Verdicts"]


class Verdicts:
    """Follows a run to its end.

    Args:
        settings: What the cluster was started with.

    Attributes:
        current: Why the run is to end; None if it is not.
    """

    def __init__(self, settings: Settings) -> None:
        self._leave_s = settings.deadlines.leave_s
        self._most_failed = settings.limits.same_crashes
        self._until_s: float | None = None
        self._num_failed = 0
        self.current: Verdict | None = None

    @property
    def code(self) -> int:
        """The exit code of the run."""
        assert self.current is not None
        return self.current.code

    def add(self, verdict: Verdict | None) -> None:
        """Learns of a reason to end, if there is one."""
        self.current = self.current or verdict

    def leave(self, why: str, now_s: float) -> None:
        """Learns that somebody asked to leave."""
        self.add(Verdict(LEFT, why, saves=True))
        self._until_s = self._until_s or now_s + self._leave_s

    def next_s(self) -> float | None:
        """When the run ends at the latest; None while it is not to."""
        return self._until_s

    def find_late(self, now_s: float) -> str | None:
        """Returns what to say if leaving took too long; None if it did not."""
        if self._until_s is None or now_s < self._until_s:
            return None
        return f"could not save and leave within {self._leave_s:g} s (leave_s)"

    def find_vain(self, resumable: Choice) -> str | None:
        """Returns what to say if there is nothing to save, and nothing to go on for."""
        verdict = self.current
        if verdict is None or (verdict.saves and resumable.resume is not None):
            return None
        return self._spell(resumable)

    def after(self, live: Live, resumable: Choice) -> str | None:
        """Returns what to say if the run ends with a generation.

        Args:
            live: The generation, all of which has ended.
            resumable: What it has left in memory.
        """
        is_leaving = live.leave or (live.halt is not None and live.halt.leave)
        verdict = self.current
        if verdict is None or not is_leaving:
            return None
        if {entry.get("code") for entry in live.entries} <= {0, LEFT}:
            return f"{verdict.message}\nthe state is saved"
        self._num_failed += 1
        return self._spell(resumable) if self._num_failed > self._most_failed else None

    def _spell(self, resumable: Choice) -> str:
        assert self.current is not None
        if resumable.resume is None:
            return self.current.message
        step = resumable.resume.step
        return f"{self.current.message}\nthe state of step {step} could not be saved"

    def to_json(self) -> dict[str, Any] | None:
        """Returns what to remember, as JSON values."""
        verdict = self.current
        if verdict is None:
            return None
        return {
            "code": verdict.code,
            "message": verdict.message,
            "saves": verdict.saves,
        }

    def remember(self, memory: dict[str, Any] | None, now_s: float) -> None:
        """Goes on where a supervisor before this one was."""
        if memory is not None:
            self.current = Verdict(**memory)
            self._until_s = now_s + self._leave_s
