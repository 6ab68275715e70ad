"""Standbys that have prepared together for the generation that is likeliest to come.

Owns which standbys those are. What a process can do before it is known what to go on
from takes most of a recovery: to meet the others, to load programs. So while a
generation runs, the standbys of its hosts prepare to be just like it. Invariant: they
take part in a generation all together, in the same order, or not at all; one that is
lost takes the others with it. Pure, like the state machine.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from shardkit.cluster.balance import Balance
from shardkit.cluster.forming import make_seats
from shardkit.cluster.hosts import Host
from shardkit.cluster.live import Live, Seat
from shardkit.cluster.roster import Roster
from shardkit.cluster.settings import Settings
from shardkit.cluster.talk import Talk

__all__ = ["Spares"]


class Spares:
    """The standbys that have prepared together.

    Args:
        settings: What the cluster was started with.
        roster: Its hosts.
        talk: Tells their agents.

    Attributes:
        roster: Its hosts.
        balance: What was decided about slow processes, for the next generation.
    """

    def __init__(self, settings: Settings, roster: Roster, talk: Talk) -> None:
        self._settings, self.roster, self._talk = settings, roster, talk
        self.balance = Balance(settings, roster)
        self._seats: list[Seat] = []
        self._since_s = 0.0

    def check(self, live: Live, now_s: float) -> None:
        """Has standbys prepare, once the generation that runs leaves time for it."""
        hosts = [self.roster[name] for name in live.hosts]
        if self._seats and self._quotas != self.balance.quotas(hosts):
            self.drop()
        if self._seats:
            self._look_after(now_s)
            return
        if any(host.has_prepared() for host in hosts):
            # Those of a supervisor before this one.
            self.drop()
        if live.leave or not all(host.can_prepare() for host in hosts):
            return
        if live.num_settled() < self._settings.limits.settle_steps:
            return
        self._since_s = now_s
        self._seats = make_seats(
            hosts,
            generation=0,
            resume=None,
            quotas=self.balance.quotas(hosts),
            redundancy=self._settings.redundancy,
            attempt=0,
            leave=False,
        )
        for seat in self._seats:
            self._talk.prepare(self.roster[seat.assignment.host], seat)

    def _look_after(self, now_s: float) -> None:
        """Ends all if one has ended, or takes too long."""
        age_s, deadlines = now_s - self._since_s, self._settings.deadlines
        states = self._states()
        # What was asked for last may not be in their reports yet.
        is_broken = age_s > deadlines.request_s and "ready" in states
        is_late = age_s > deadlines.compile_s and "preparing" in states
        if is_broken or is_late or states - {"ready", "preparing", "hot"}:
            self.drop()

    def find_reason(self, live: Live, now_s: float) -> str | None:
        """Returns why to go on otherwise, once who would has prepared, if anybody does.

        Args:
            live: The generation that trains.
            now_s: The time.
        """
        hosts = [self.roster[name] for name in live.hosts]
        prepares = any(host.has_prepared() or host.can_prepare() for host in hosts)
        are_same = all(host.is_welcome for host in hosts)
        is_set = not (prepares and are_same) or self.hosts() == hosts
        return self.balance.find_reason(now_s, is_set=is_set)

    def hosts(self) -> list[Host]:
        """Returns the hosts whose standbys could take over at once, in order."""
        if self._states() != {"hot"}:
            return []
        names = dict.fromkeys(seat.assignment.host for seat in self._seats)
        found = [self.roster[name] for name in names]
        is_wanted = self._quotas == self.balance.quotas(found)
        return found if is_wanted and all(host.is_welcome for host in found) else []

    def prefer(
        self, usable: list[Host], coming: list[Host]
    ) -> tuple[list[Host], list[Host]]:
        """Waits for nobody if those that have prepared are all that there are.

        Args:
            usable: The hosts that could take part.
            coming: Those that are worth waiting for.

        Returns:
            The same, as it is to be taken.
        """
        spares = self.hosts()
        if spares and all(host in spares for host in usable + coming):
            return spares, []
        return usable, coming

    def seats(self, hosts: Sequence[Host], **facts: Any) -> list[Seat]:
        """Returns a generation: of those that have prepared for it, or of others.

        Args:
            hosts: Who is to take part, in order.
            **facts: As `make_seats` has them.
        """
        found = self.hosts()
        if not found or found != list(hosts) or facts["quotas"] != self._quotas:
            self.drop()
            return make_seats(hosts, **facts)
        seats, self._seats = self._seats, []
        return [
            Seat(seat.worker, dataclasses.replace(seat.assignment, **facts))
            for seat in seats
        ]

    def drop(self) -> None:
        """Ends them."""
        self._seats = []
        for host in self.roster:
            if host.has_prepared():
                self._talk.drop_spares(host)

    def _states(self) -> set[str]:
        return {
            self.roster[seat.assignment.host]
            .workers()
            .get(seat.worker, {})
            .get("state", "gone")
            for seat in self._seats
        }

    @property
    def _quotas(self) -> tuple[int, ...] | None:
        return self._seats[0].assignment.quotas
