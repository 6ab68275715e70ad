"""The hosts of a cluster, as its supervisor sees them.

Owns who is there, who comes back when, and what each last reported. Invariants: a host
that was there is only taken for gone when its engine says so or `end_s` after it was
told to end it; one that is lost again and again waits longer each time.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from shardkit.cluster.deadlines import Deadlines
from shardkit.cluster.settings import Limits
from shardkit.cluster.split import HostPlan

__all__ = ["Host"]

_NUM_LAGS = 64
"""Of so many beats one came through at once, and clocks have hardly drifted."""


@dataclasses.dataclass(slots=True)
class Host:
    """One host.

    Attributes:
        plan: What it has.
        state: `"absent"`, `"unknown"` (there when this supervisor began), `"waiting"`
            (its engine has nowhere to start it), `"starting"`, `"alive"` or `"ending"`.
        since_s: Since when.
        seen_s: When it was last heard.
        until_s: Until when it is quarantined; None if it is not.
        why: Why it is, or was lost last.
        report: What its agent last said.
        said_s: When it said so, by the supervisor's clock.
        lags: How much later its beats of late were heard than its own clock says.
        losses: When it was lost, as far as that is remembered.
        num_quarantines: How often it was quarantined.
        dead: The agents that are gone, of which nothing more is believed.
    """

    plan: HostPlan
    state: str = "absent"
    since_s: float = 0.0
    seen_s: float = 0.0
    until_s: float | None = None
    why: str = ""
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    losses: list[float] = dataclasses.field(default_factory=list)
    num_quarantines: int = 0
    dead: set[str] = dataclasses.field(default_factory=set)
    said_s: float = 0.0
    lags: collections.deque[float] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_NUM_LAGS)
    )
    num_failed: int = 0
    failed_ids: set[int] = dataclasses.field(default_factory=set)

    @property
    def name(self) -> str:
        """Its name."""
        return self.plan.host

    @property
    def is_alive(self) -> bool:
        """Whether its agent is heard."""
        return self.state == "alive"

    @property
    def is_welcome(self) -> bool:
        """Whether it is there and may take part."""
        return self.is_alive and self.until_s is None

    def enter(self, state: str, now_s: float) -> None:
        """Changes its state."""
        self.state, self.since_s = state, now_s

    def heard(self, report: Mapping[str, Any], now_s: float) -> None:
        """Learns what its agent says."""
        lag = now_s - report["said_s"]
        if not self.is_alive:
            self.enter("alive", now_s)
        self.seen_s, self.report = now_s, dict(report)
        if report["beat"]:
            self.lags.append(lag)
        # The least that clocks and way took, of late, is how far the clocks are apart.
        self.said_s = report["said_s"] + min([lag, *self.lags])

    def workers(self) -> dict[int, dict[str, Any]]:
        """Returns what is known of its workers, by their number."""
        return {entry["worker"]: entry for entry in self.report.get("workers", ())}

    def ready(self) -> list[int]:
        """Returns its workers that wait for an assignment."""
        return sorted(
            id for id, entry in self.workers().items() if entry["state"] == "ready"
        )

    def count_standbys(self) -> int:
        """Counts those that could take part, prepared or not."""
        states = [entry["state"] for entry in self.workers().values()]
        return states.count("ready") + states.count("hot")

    def has_prepared(self) -> bool:
        """Whether it has workers that do, or did, prepare."""
        states = {entry["state"] for entry in self.workers().values()}
        return bool(states & {"preparing", "hot"})

    def can_prepare(self) -> bool:
        """Whether it has enough workers that would prepare to be the next."""
        found = [entry for entry in self.workers().values() if entry.get("prepares")]
        ready = [entry for entry in found if entry["state"] == "ready"]
        return self.is_usable() and len(ready) >= self.plan.num_processes

    def is_usable(self) -> bool:
        """Whether it can take part in a generation now."""
        has_port = self.report.get("port") is not None
        enough = len(self.ready()) >= self.plan.num_processes
        return self.is_welcome and has_port and enough

    def count_failed_starts(self) -> int:
        """Counts the standbys in a row that ended before they were ready."""
        entries = self.workers()
        if self.ready():
            self.num_failed = 0
        for id, entry in entries.items():
            is_failed = entry["state"] == "exited" and "generation" not in entry
            if is_failed and not entry["ended_by_us"] and id not in self.failed_ids:
                self.failed_ids.add(id)
                self.num_failed += 1
        return self.num_failed

    def lose(self, why: str, now_s: float, limits: Limits) -> bool:
        """Learns that it is gone; whether it is quarantined for that."""
        if self.is_alive and now_s - self.since_s > limits.flap_window_s:
            self.num_quarantines = 0
        self.enter("absent", now_s)
        self.dead.add(self.report.get("incarnation", ""))
        self.report, self.why = {}, why
        self.lags.clear()
        self.num_failed, self.failed_ids = 0, set()
        since_s = now_s - limits.flap_window_s
        self.losses = [loss for loss in self.losses if loss > since_s] + [now_s]
        if len(self.losses) <= limits.flaps:
            return False
        wait_s = limits.first_quarantine_s * 2**self.num_quarantines
        self.set_aside(why, now_s, min(wait_s, limits.longest_quarantine_s))
        return True

    def set_aside(self, why: str, now_s: float, wait_s: float) -> None:
        """Quarantines it."""
        self.num_quarantines += 1
        self.why, self.until_s = why, now_s + wait_s

    def deadline_s(self, deadlines: Deadlines) -> float | None:
        """When its state has to be looked at again."""
        limits = {
            "unknown": self.since_s + deadlines.restart_s,
            "starting": self.since_s + deadlines.restart_s,
            "ending": self.since_s + deadlines.end_s,
            "alive": self.seen_s + deadlines.silence_s,
        }
        times = [limits.get(self.state), self.until_s]
        return min((time for time in times if time is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        """Returns what to remember of it, as JSON values."""
        return {
            "until_s": self.until_s,
            "losses": self.losses,
            "num_quarantines": self.num_quarantines,
            "why": self.why,
        }
