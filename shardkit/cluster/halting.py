"""Halts: all processes of a generation stop before the same step.

Owns the reasons to halt and the agreement, in two steps so that nobody waits for a
step that others do not do: a step is proposed that nobody may have begun; only when
all have promised not to begin it is it confirmed. Invariant: a proposal is confirmed,
taken back or followed by the end of the generation within `halt_s`.
"""

from shardkit.cluster.causes import Cause, Verdict
from shardkit.cluster.live import Halt, Live
from shardkit.cluster.orders import Order, Tell
from shardkit.cluster.settings import Settings
from shardkit.cluster.spares import Spares
from shardkit.cluster.talk import Talk

__all__ = ["Halting"]


class Halting:
    """Brings generations to a halt.

    Args:
        settings: What the cluster was started with.
        spares: Who takes over, and what they are to compute.
        talk: How to reach them.
        orders: Where orders are put.
    """

    def __init__(
        self, settings: Settings, spares: Spares, talk: Talk, orders: list[Order]
    ) -> None:
        self._deadlines = settings.deadlines
        self._spares, self._talk, self._orders = spares, talk, orders
        self._roster = spares.roster
        self._not_before_s: float | None = None

    def deadline_s(self, halt: Halt) -> float:
        """When a halt has to be there at the latest."""
        is_saving = halt.confirmed and halt.leave
        deadlines = self._deadlines
        return halt.since_s + (deadlines.save_s if is_saving else deadlines.halt_s)

    def check(self, live: Live, verdict: Verdict | None, now_s: float) -> Cause | None:
        """Goes on with a halt, or begins one if there is a reason.

        Args:
            live: The generation that trains.
            verdict: Why the run is to end; None if it is not.
            now_s: The time.

        Returns:
            Why the generation has to be ended, if there is no agreement that had to
            be; None otherwise.
        """
        halt = live.halt
        if halt is None:
            if live.first_step_s is not None:
                self._look_for_reasons(live, verdict, now_s)
        elif now_s >= self.deadline_s(halt):
            return self._is_late(live, halt, now_s)
        elif not halt.confirmed:
            refused, found = halt.step, live.count_answers()
            if found == "accepted":
                halt.confirmed = True
            elif found == "refused":
                self._release(live, refused)
            if found != "open":
                self._tell_all(live)
        return None

    def _is_late(self, live: Live, halt: Halt, now_s: float) -> Cause | None:
        if halt.confirmed or halt.leave:
            limit_s = now_s - halt.since_s
            text = f"{halt.why}; not all had halted after {limit_s:.3g} s"
            return Cause(kind="halt", text=text)
        self._release(live, halt.step)
        live.halt = None
        self._not_before_s = now_s + self._deadlines.halt_s
        return None

    def _look_for_reasons(
        self, live: Live, verdict: Verdict | None, now_s: float
    ) -> None:
        if verdict is not None:
            self._propose(live, verdict.message, now_s, leave=True)
            return
        if self._not_before_s is not None and now_s < self._not_before_s:
            return
        new = [
            h.name for h in self._roster if h.name not in live.hosts and h.is_usable()
        ]
        if new:
            self._propose(live, f"{', '.join(new)} can take part", now_s)
            return
        self._spares.balance.check(live, now_s)
        if (why := self._spares.find_reason(live, now_s)) is not None:
            self._propose(live, why, now_s)

    def _propose(
        self, live: Live, why: str, now_s: float, *, leave: bool = False
    ) -> None:
        live.propose(why, leave=leave, now_s=now_s)
        self._orders.append(Tell(f"halting: {why}"))
        self._tell_all(live)

    def _tell_all(self, live: Live) -> None:
        for name in live.hosts:
            self._talk.halt(self._roster[name], live)

    def _release(self, live: Live, step: int) -> None:
        for name in live.hosts:
            self._talk.release(self._roster[name], live, step)
