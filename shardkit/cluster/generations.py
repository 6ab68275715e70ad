"""The state machine of a cluster: what happens in, orders out.

Owns membership and generations, for every engine. Pure: it has no clock, no sockets
and no processes; the time comes with every event, and what is to be done goes out as
orders. Invariants: a generation is only assigned when all processes of those before
are known to be gone, and its number is greater than theirs; every state has a deadline,
after which the machine goes on without whoever did not answer; without progress it
ends after a bounded number of generations. What was lost on the way is told again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from shardkit.cluster.aftermath import Aftermath
from shardkit.cluster.causes import Cause, spell_start
from shardkit.cluster.exits import LEFT, find_failures, find_frozen, find_halt
from shardkit.cluster.halting import Halting
from shardkit.cluster.hosts import Host
from shardkit.cluster.live import Halt, Live, Seat
from shardkit.cluster.orders import EndRun, Order, Save
from shardkit.cluster.protecting import Protecting
from shardkit.cluster.roster import Roster
from shardkit.cluster.salvage import Answer, Salvage
from shardkit.cluster.settings import Settings
from shardkit.cluster.spares import Spares
from shardkit.cluster.talk import Talk
from shardkit.cluster.timing import Recovery
from shardkit.cluster.verdicts import Verdict, Verdicts
from shardkit.cluster.waiting import Waiting

__all__ = ["Machine"]


class Machine:
    """Decides what a cluster does next.

    Args:
        settings: What the cluster was started with.
        now_s: The time.
        memory: What `to_json` gave in the life of a supervisor before, if there was
            one; hosts are asked again what they have.
        there: The hosts whose agents are there already.

    Attributes:
        state: `"forming"`, `"running"`, `"ending"`, `"choosing"` or `"ended"`.
        generation: The newest.
        live: The generation that runs or is being ended; None if there is none.
        hosts: All hosts by name, those that are not there too.
        waiting: What is waited for, if there are too few devices.
        protecting: Which steps are protected.
        salvage: What is left of the generation before.
    """

    def __init__(
        self,
        settings: Settings,
        now_s: float,
        *,
        memory: Mapping[str, Any] | None = None,
        there: Sequence[str] = (),
    ) -> None:
        self._settings = settings
        self._deadlines, self._limits = settings.deadlines, settings.limits
        self._orders: list[Order] = []
        self._roster = Roster(settings, self._orders)
        self._talk = Talk(settings, self._orders)
        self._spares = Spares(settings, self._roster, self._talk)
        self._halting = Halting(settings, self._spares, self._talk, self._orders)
        self.hosts = self._roster.hosts
        self.waiting = Waiting(settings, self._roster, self._orders)
        self.protecting = Protecting(settings, self._roster, self._orders)
        self.salvage = Salvage(settings, self._roster, self._orders)
        self.state, self.generation = "forming", 0
        self.live: Live | None = None
        self._since_s = now_s
        self._closing_s: float | None = None
        self._grace_until_s: float | None = None
        self._aftermath = Aftermath(settings.limits, self._orders)
        self._verdicts = Verdicts(settings)
        for name in there:
            self.hosts[name].enter("unknown", now_s)
        if memory is not None:
            self._remember(memory, now_s)

    @property
    def recoveries(self) -> list[Recovery]:
        """What it took to go on, each time."""
        return self._aftermath.recoveries

    # What happens.

    def heard(self, report: Mapping[str, Any], now_s: float) -> list[Order]:
        """Learns what the agent of a host says; returns what to do."""
        if self.state == "ended":
            return []
        host = self._roster.heard(report, now_s)
        if host is not None:
            if self.live is not None:
                self.live.read(host, now_s)
            if report["beat"]:
                self._repeat(host)
        return self._advance(now_s)

    def _repeat(self, host: Host) -> None:
        live = self.live if self.state == "running" else None
        is_ending = self.state == "ending"
        self._talk.repeat(host, live, self.generation if is_ending else None)
        if live is not None:
            self.protecting.repeat(host, live)
        elif self.state == "choosing":
            self.salvage.repeat(host)

    def surveyed(self, host: str, answer: Answer, now_s: float) -> list[Order]:
        """Learns what a host has in memory."""
        self.salvage.surveyed(host, answer)
        return self._advance(now_s)

    def gone(self, name: str, why: str, now_s: float) -> list[Order]:
        """Learns that the agent of a host is gone, and all it had with it."""
        if self.state != "ended":
            self._roster.gone(name, why, now_s)
        return self._advance(now_s)

    def waits(self, name: str, why: str, now_s: float) -> list[Order]:
        """Learns what a host waits for before it can begin; nothing once it does."""
        if self.state != "ended":
            self._roster.waits(name, why, now_s)
        return self._advance(now_s)

    def leave(self, why: str, now_s: float) -> list[Order]:
        """Learns that the run is to save and leave."""
        if self.state != "ended":
            self._verdicts.leave(why, now_s)
            self._orders.append(Save())
        return self._advance(now_s)

    def tick(self, now_s: float) -> list[Order]:
        """Learns that time has passed; to be called at `next_s` at the latest."""
        return self._advance(now_s)

    def next_s(self) -> float | None:
        """When to look again at the latest; None only once the run has ended."""
        if self.state == "ended":
            return None
        times = [self._roster.next_s(), self._deadline_s(), self._verdicts.next_s()]
        return min(time for time in times if time is not None)

    def _deadline_s(self) -> float:
        if self.state == "ending":
            return self._since_s + self._deadlines.end_s
        if self.state == "choosing":
            return self.salvage.deadline_s()
        if self.live is not None:
            times = [self.live.watchdog.next_s(), self._grace_until_s]
            times.append(self.protecting.deadline_s())
            if self.live.first_step_s is None:
                times.append(self.live.since_s + self._deadlines.first_step_s)
            if self.live.halt is not None:
                times.append(self._halting.deadline_s(self.live.halt))
            found = [time for time in times if time is not None]
            # Without anybody at work, what is left is for its processes to end.
            since_s = self._closing_s or self._since_s
            return min(found, default=since_s + self._deadlines.exit_s)
        if self.waiting.until_s is not None:
            return self.waiting.until_s
        return self._since_s + self._deadlines.form_s

    # What follows from it.

    def _advance(self, now_s: float) -> list[Order]:
        while self.state != "ended":
            before = (self.state, self.generation)
            self._check_hosts(now_s)
            if (message := self._verdicts.find_late(now_s)) is not None:
                self._end(1, message)
            elif self.state == "running":
                self._check_live(now_s)
            elif self.state == "ending":
                self._check_ending(now_s)
            elif self.state == "choosing":
                if self.salvage.check(now_s):
                    self._settle(now_s)
            elif self.salvage.is_stale():
                self._choose(now_s)
            else:
                self._try_form(now_s)
            if before == (self.state, self.generation):
                break
        orders = list(self._orders)
        self._orders.clear()
        return orders

    def _check_hosts(self, now_s: float) -> None:
        self._roster.check(now_s)
        for name, why in self._roster.take_losses():
            if self.live is not None and name in self.live.hosts:
                self._fail(Cause(kind="lost", text=f"{name} {why}"), now_s)

    def _fail(self, cause: Cause, now_s: float) -> None:
        """Ends the generation that is live, if that was not begun already."""
        self._aftermath.add(cause)
        if self.state != "running":
            return
        assert self.live is not None
        self.state, self._since_s = "ending", now_s
        self._aftermath.begin(cause, self.live, now_s)
        for host in self._roster:
            self._talk.end(host, self.generation)
            self._talk.keep(host, None)

    def _check_live(self, now_s: float) -> None:
        live = self.live
        assert live is not None
        failures = find_failures(live, self._roster)
        if failures and self._awaits_others(live, failures, now_s):
            return
        for cause in failures:
            self._fail(cause, now_s)
        if self.state == "running":
            self._check_done(live, now_s)
        if self.state != "running":
            return
        while self.protecting.check(live, now_s):
            self._protected(live)
        if (cause := find_frozen(live, self._deadlines, now_s)) is not None:
            self._fail(cause, now_s)
        elif live.first_step_s is not None:
            self._began_to_step(live, now_s)
        if self.state == "running" and not live.leave:
            self._check_halt(live, now_s)

    def _awaits_others(self, live: Live, failures: list[Cause], now_s: float) -> bool:
        """Whether to hear first how the others end, since one has crashed."""
        if any(cause.kind not in ("crash", "verdict") for cause in failures):
            return False
        if self._grace_until_s is None:
            self._grace_until_s = now_s + self._deadlines.grace_s
        are_left = len(live.exited()) < len(live.seats)
        return are_left and now_s < self._grace_until_s

    def _check_halt(self, live: Live, now_s: float) -> None:
        was_confirmed = live.halt is not None and live.halt.confirmed
        cause = self._halting.check(live, self._verdicts.current, now_s)
        if cause is not None:
            self._fail(cause, now_s)
        elif live.halt is not None and live.halt.confirmed and not was_confirmed:
            # The next supervisor must know it, since nothing takes it back.
            self._orders.append(Save())

    def _check_done(self, live: Live, now_s: float) -> None:
        if (cause := find_halt(live)) is not None:
            self._fail(cause, now_s)
        elif len(live.exited()) == len(live.seats):
            self._end(max(entry["code"] for entry in live.entries), "")
        elif live.all_have("finished"):
            self._closing_s = self._closing_s or now_s
            if now_s >= self._closing_s + self._deadlines.exit_s:
                self._end(0, "")

    def _protected(self, live: Live) -> None:
        self._aftermath.protected(live)
        for name in live.hosts:
            self._talk.protected(self._roster[name], live)

    def _began_to_step(self, live: Live, now_s: float) -> None:
        self._aftermath.stepped(live)
        for name in live.hosts:
            self._talk.keep(self._roster[name], live)
        self._spares.check(live, now_s)

    # From one generation to the next.

    def _check_ending(self, now_s: float) -> None:
        limit_s = self._deadlines.end_s
        is_late = now_s >= self._since_s + limit_s
        is_open = False
        for host in self._roster:
            if host.is_alive and host.report["ended"] < self.generation:
                is_open = True
                if is_late:
                    why = f"did not end its workers within {limit_s:g} s (end_s)"
                    self._roster.end(host, why, now_s)
            is_open = is_open or host.state in ("unknown", "ending")
        if not is_open:
            self._aftermath.ended(now_s)
            self._choose(now_s)

    def _choose(self, now_s: float) -> None:
        """All of a generation is gone: finds out what is left of it."""
        self.state, live = "choosing", self.live
        verify = live is not None and live.found_damage
        self.salvage.begin(now_s, self._aftermath.best, verify=verify)

    def _settle(self, now_s: float) -> None:
        """It is known what to go on from."""
        live, choice = self.live, self.salvage.choice
        if live is None:
            self._aftermath.chose_anew(choice, now_s)
        else:
            self._verdicts.add(self._aftermath.judge(live, choice, now_s))
            if (message := self._verdicts.after(live, choice)) is not None:
                self._end(self._verdicts.code, message)
        self.live, self._since_s, self.waiting.until_s = None, now_s, None
        if self.state != "ended":
            self.state = "forming"
        for host in self._roster:
            self._talk.keep(host, None)
        self._orders.append(Save())

    def _try_form(self, now_s: float) -> None:
        usable, coming = self._roster.usable(), self._roster.coming()
        if self.generation == 0:
            # At first, those that were just asked to start are worth waiting for.
            coming += self._roster.starting()
            for entry in self._roster.failed_starts():
                # Others would fare no better.
                return self._end(entry["code"] or 2, spell_start(entry))
        if (message := self._verdicts.find_vain(self.salvage.choice)) is not None:
            self._end(self._verdicts.code, message)
            return
        is_late = now_s >= self._since_s + self._deadlines.form_s
        usable, coming = self._spares.prefer(usable, coming)
        devices = sum(host.plan.num_devices for host in usable)
        least = self._settings.min_devices if self._verdicts.current is None else 1
        if usable and devices >= least and (is_late or not coming):
            self._form(usable, now_s)
        elif is_late or not coming:
            message = self.waiting.check(now_s)
            if message is None:
                return
            if usable and self.salvage.choice.resume is not None:
                self._verdicts.add(Verdict(LEFT, message, saves=True))
            else:
                self._end(1, f"{message}\nno state could be saved")

    def _form(self, usable: list[Host], now_s: float) -> None:
        self.generation += 1
        facts: dict[str, Any] = {
            "generation": self.generation,
            "resume": self.salvage.choice.resume,
            "quotas": self._spares.balance.take(usable),
            "redundancy": self._settings.redundancy,
            "attempt": self._aftermath.crashes.barren,
            "leave": self._verdicts.current is not None,
        }
        seats = self._spares.seats(usable, **facts)
        self._begin(seats, now_s)
        self._aftermath.formed(self.generation, now_s)
        # Written before anybody hears of it, so that no number is ever used twice.
        self._orders.append(Save())
        for seat in seats:
            self._talk.assign(self._roster[seat.assignment.host], seat)
        for host in self._roster:
            self._talk.keep(host, self.live)

    def _begin(self, seats: Sequence[Seat], now_s: float) -> None:
        self.live = Live(seats, self._deadlines, self._limits, now_s)
        self.protecting.begin(self.live)
        self.state, self._since_s, self._closing_s = "running", now_s, None
        self.waiting.until_s = self._grace_until_s = None

    def _end(self, code: int, message: str) -> None:
        self.state = "ended"
        self._orders.append(EndRun(code, message))

    # What survives.

    def to_json(self) -> dict[str, Any]:
        """Returns what the next supervisor has to know, as JSON values."""
        live = self.live
        return {
            "generation": self.generation,
            "state": self.state,
            "halt": live.halt.to_json() if live and live.halt else None,
            "seats": [] if live is None else [seat.to_json() for seat in live.seats],
            "hosts": self._roster.to_json(),
            "verdict": self._verdicts.to_json(),
            "balance": self._spares.balance.to_json(),
            "salvage": self.salvage.number,
            **self._aftermath.to_json(),
        }

    def _remember(self, memory: Mapping[str, Any], now_s: float) -> None:
        self.generation, self.salvage.number = memory["generation"], memory["salvage"]
        self._aftermath.remember(memory)
        self._roster.remember(memory["hosts"])
        self._verdicts.remember(memory["verdict"], now_s)
        self._spares.balance.remember(memory["balance"])
        if memory["seats"]:
            self._begin([Seat.from_json(seat) for seat in memory["seats"]], now_s)
            assert self.live is not None
            if memory["halt"] and memory["halt"]["confirmed"]:
                self.live.halt = Halt(**{**memory["halt"], "since_s": now_s})
            # What was being ended is ended again, and asked for again what it left.
            if memory["state"] != "running":
                text = "the supervisor was lost while a generation was ended"
                self._fail(Cause(kind="halt", text=text), now_s)
        elif self.generation > 0:
            self.state = "ending"
