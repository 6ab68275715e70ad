"""Tells a supervisor how far a training process is.

Owns which event means which phase of work, of which each has its own window. It knows
a run by its events and metrics only.
"""

import math
import threading
from collections.abc import Mapping
from typing import Any

from shardkit.cluster.member import Member
from shardkit.events import Event

__all__ = ["Watch"]

_PHASES = {
    "compile": "compile",
    "reconfigure": "compile",
    "eval": "eval",
    "checkpoint": "save",
    "restore": "restore",
}


class Watch:
    """Follows a run's events.

    Args:
        member: Whom to tell.

    Attributes:
        steps: Where the run ends; what is done there is no step.
    """

    def __init__(self, member: Member) -> None:
        self._member, self._step = member, 0
        self.steps: float = math.inf

    @property
    def _phase(self) -> str:
        """What goes on when nothing else does: in the end, what is left is saved."""
        return "step" if self._step < self.steps else "save"

    def begin(self, name: str, fields: Mapping[str, Any]) -> None:
        """Hears that something begins; steps follow one another without a word."""
        # What a thread of ours does beside the steps holds none of them up.
        if name in _PHASES and not _is_beside():
            self._member.progress(fields.get("step", self._step), _PHASES[name])

    def event(self, event: Event) -> None:
        """Hears that something has ended."""
        if event.name in _PHASES and not _is_beside():
            if event.name == "restore":
                self._member.restored()
            self._member.progress(self._step, self._phase)

    def step(self, metrics: Any, **facts: Any) -> None:
        """Hears that a step is done.

        Args:
            metrics: Of the step.
            **facts: What else is to be told, as `Member.progress` has it.
        """
        self._step = metrics.step + 1
        if math.isfinite(metrics.loss):
            facts["loss"] = metrics.loss
        self._member.progress(self._step, self._phase, **facts)


def _is_beside() -> bool:
    return threading.current_thread().name.startswith("shardkit-")
