"""Why generations ended, and what it took to go on each time.

Owns the causes of the end that is going on, and the records of all recoveries.
Invariant: of several causes one is the root, and what a failure does to its peers is
never that. What follows from it is the state machine's business.
"""

from collections.abc import Mapping
from typing import Any

from shardkit.cluster.causes import Cause, Crashes, Verdict
from shardkit.cluster.choosing import Choice
from shardkit.cluster.exits import find_deaths
from shardkit.cluster.live import Live
from shardkit.cluster.orders import Order, Save, Tell
from shardkit.cluster.settings import Limits
from shardkit.cluster.timing import Recovery

__all__ = ["Aftermath"]

_MOST_RECOVERIES = 200


class Aftermath:
    """Follows a cluster from one generation to the next.

    Args:
        limits: What is put up with.
        orders: Where orders are put.

    Attributes:
        best: The newest step that was ever protected; -1 if none.
        crashes: What has gone wrong so far.
        recoveries: What it took to go on, each time.
    """

    def __init__(self, limits: Limits, orders: list[Order]) -> None:
        self._limits, self._orders = limits, orders
        self._causes: list[Cause] = []
        self.best = self._best_start = -1
        self.crashes = Crashes(limits)
        self.recoveries: list[Recovery] = []

    def to_json(self) -> dict[str, Any]:
        """Returns what to remember, as JSON values."""
        return {
            "best": self.best,
            "crashes": self.crashes.to_json(),
            "recoveries": [recovery.to_json() for recovery in self.recoveries],
        }

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Goes on where a supervisor before this one was."""
        self.best = memory["best"]
        self.crashes = Crashes(self._limits, memory["crashes"])
        self.recoveries = [Recovery.from_json(each) for each in memory["recoveries"]]

    def add(self, cause: Cause) -> bool:
        """Learns of a cause; whether it is a new one."""
        is_new = cause not in self._causes
        if is_new:
            self._causes.append(cause)
        return is_new

    def begin(self, cause: Cause, live: Live, now_s: float) -> None:
        """Learns that a generation is being ended because of a cause."""
        detect_s = 0.0 if cause.at_s is None else max(0.0, now_s - cause.at_s)
        names = (live.generation, cause.text, live.step, live.protected)
        self.recoveries.append(Recovery(*names, now_s, detect_s))
        del self.recoveries[:-_MOST_RECOVERIES]

    def ended(self, now_s: float) -> None:
        """Learns that all of a generation is gone."""
        if self.recoveries and self.recoveries[-1].ended_s is None:
            self.recoveries[-1].ended_s = now_s

    def judge(self, live: Live, choice: Choice, now_s: float) -> Verdict | None:
        """Learns what is gone on from; whether the run is to end all the same."""
        # When each ended is known best now that all have been heard.
        deaths = find_deaths(live)
        texts = {cause.text for cause in deaths}
        causes = [cause for cause in self._causes if cause.text not in texts] + deaths
        root, verdict = self.crashes.judge(causes, live.step)
        self._causes = []
        recovery = self.recoveries[-1]
        recovery.cause = root.text
        recovery.chose(choice, now_s)
        if root.kind != "halt":
            self._orders.append(Tell(recovery.spell()))
        return verdict

    def chose_anew(self, choice: Choice, now_s: float) -> None:
        """Learns that what was to be gone on from was lost before anybody did."""
        if self.recoveries and self.recoveries[-1].formed_s is None:
            self.recoveries[-1].chose(choice, now_s)
            self._orders.append(Tell(self.recoveries[-1].spell()))

    def formed(self, generation: int, now_s: float) -> None:
        """Learns that the next generation is assigned."""
        if self.recoveries:
            self.recoveries[-1].formed(generation, now_s)

    def protected(self, live: Live) -> None:
        """Learns that a newer step of a generation is protected."""
        if live.protected > self.best:
            self.best = live.protected
            self.crashes.progressed()

    def stepped(self, live: Live) -> None:
        """Learns that it has done its first step; may be called again."""
        if live.resume_step is not None and live.resume_step > self._best_start:
            # Where there are no snapshots, coming back later on disk is progress.
            self._best_start = live.resume_step
            self.crashes.progressed()
        if not self.recoveries:
            return
        last = self.recoveries[-1]
        # A host may say so after another one has done the step.
        last.fetched_bytes = live.fetched_bytes
        if last.stepped_s is None:
            last.stepped(live)
            self._orders.append(Save())
