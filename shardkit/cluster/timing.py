"""What a recovery took, phase by phase.

Owns that record. Times are of the supervisor's monotonic clock; the phases follow one
another without gaps: detect, end, choose, form, restore, first_step.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from shardkit.cluster.choosing import Choice
from shardkit.cluster.live import Live

__all__ = ["Recovery"]


@dataclasses.dataclass(slots=True)
class Recovery:
    """From one generation to the next.

    Attributes:
        generation: The one that ended, and once there is one, the one that followed.
        cause: Why it ended, in words.
        step: How far it was; after choosing, what is gone on from.
        reached: After choosing, how far it was.
        protected: The newest step that was whole.
        noticed_s: When that was noticed.
        detect_s: How long before that it happened, in seconds.
        rebuilt_bytes: What was lost and made again.
        fetched_bytes: What processes have read of other hosts' images.
    """

    generation: int
    cause: str
    step: int
    protected: int
    noticed_s: float
    detect_s: float
    reached: int = 0
    lost_steps: int = 0
    rebuilt_bytes: int = 0
    fetched_bytes: int = 0
    said: str = ""
    ended_s: float | None = None
    chosen_s: float | None = None
    formed_s: float | None = None
    restored_s: float | None = None
    stepped_s: float | None = None

    def chose(self, choice: Choice, now_s: float) -> None:
        """Learns what is gone on from; may be called again."""
        step = 0 if choice.resume is None else choice.resume.step
        self.reached = self.step if self.chosen_s is None else self.reached
        self.lost_steps, self.step = max(0, self.reached - step), step
        self.rebuilt_bytes, self.said = choice.rebuilt_bytes, choice.said
        self.chosen_s = now_s

    def formed(self, generation: int, now_s: float) -> None:
        """Learns that the next generation is assigned."""
        self.generation, self.formed_s = generation, now_s

    def stepped(self, live: Live) -> None:
        """Learns that it has done its first step."""
        self.restored_s, self.stepped_s = live.restored_s, live.first_step_s

    def spell(self) -> str:
        """Says what happened, in one line."""
        text = f"{self.cause}; going on from step {self.step}"
        if self.lost_steps:
            text += f", {self.lost_steps} steps lost"
        return f"{text}; {self.said}" if self.said else text

    def phases(self) -> list[tuple[str, float]]:
        """Returns how long each phase took, as far as it is over, in seconds."""
        times = [
            ("detect", self.noticed_s),
            ("end", self.ended_s),
            ("choose", self.chosen_s),
            ("form", self.formed_s),
            ("restore", self.restored_s),
            ("first_step", self.stepped_s),
        ]
        found, before_s = [], self.noticed_s - self.detect_s
        for name, time_s in times:
            if time_s is None:
                break
            found.append((name, max(0.0, time_s - before_s)))
            before_s = time_s
        return found

    def record(self, unix_offset_s: float) -> dict[str, Any]:
        """Returns what people see of it, as JSON values."""
        phases = self.phases()
        return {
            "generation": self.generation,
            "cause": self.cause,
            "step": self.step,
            "lost_steps": self.lost_steps,
            "started_s": round(self.noticed_s - self.detect_s + unix_offset_s, 6),
            "total_s": round(sum(s for _, s in phases), 6),
            "phases": [{"name": name, "s": round(s, 6)} for name, s in phases],
            "rebuilt_bytes": self.rebuilt_bytes,
            "fetched_bytes": self.fetched_bytes,
            "said": self.said,
            "is_over": self.stepped_s is not None,
        }

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Recovery":
        """Reads what `to_json` made."""
        return cls(**values)
