"""Who gets how many microbatches, from one generation to the next.

Owns what was decided about slow processes, for whom it holds, and when something else
may be decided. Invariants: it holds for the very places that it was decided for, and
is forgotten with the first generation of others; decisions come ever more rarely,
since each costs a generation. What is decided is the stragglers' business.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from shardkit.cluster.hosts import Host
from shardkit.cluster.live import Live
from shardkit.cluster.roster import Roster
from shardkit.cluster.settings import Settings
from shardkit.cluster.stragglers import Decision, decide

__all__ = ["Balance"]

_SLOW_FACTOR = 8
"""A slow host is left out for this many times the first quarantine."""


class Balance:
    """Decides about slow processes, and keeps what was decided.

    Args:
        settings: What the cluster was started with.
        roster: Its hosts.
    """

    def __init__(self, settings: Settings, roster: Roster) -> None:
        self._settings, self._roster = settings, roster
        self._hosts: list[str] = []
        self._quotas: tuple[int, ...] = ()
        self._num_decisions = 0
        self._not_before_s = 0.0
        self._why: str | None = None
        self._since_s = 0.0

    def check(self, live: Live, now_s: float) -> None:
        """Decides, if there is a reason to, and keeps that for the next generation."""
        found = None if self._why is not None else self._decide(live, now_s)
        if found is None:
            return
        limits, given = self._settings.limits, [seat.assignment for seat in live.seats]
        live.speeds.clear()
        self._why, self._since_s = found.why, now_s
        self._hosts = [x.host for x in given if x.process_index not in found.leave_out]
        self._quotas = found.quotas
        rest_s = limits.straggler_rest_s * 2 ** min(self._num_decisions, 16)
        self._not_before_s = now_s + min(rest_s, limits.longest_quarantine_s)
        self._num_decisions += 1
        wait_s = limits.first_quarantine_s * _SLOW_FACTOR
        for process in found.leave_out:
            self._roster[given[process].host].set_aside("is slow", now_s, wait_s)

    def _decide(self, live: Live, now_s: float) -> Decision | None:
        speeds, limits = live.speeds.speeds(), self._settings.limits
        is_off = self._settings.stragglers != "balance"
        if is_off or now_s < self._not_before_s or not speeds:
            return None
        given = [seat.assignment for seat in live.seats]
        facts: dict[str, Any] = {
            "devices": {x.process_index: x.num_local_devices for x in given},
            "halves": live.speeds.halves(),
        }
        found = decide(speeds, live.speeds.work(), limits, **facts)
        if found is not None and not self._can_spare(live, found.leave_out):
            limits = dataclasses.replace(limits, leave_out_speed=0.0)
            found = decide(speeds, live.speeds.work(), limits, **facts)
        return found

    def _can_spare(self, live: Live, processes: Sequence[int]) -> bool:
        """Whether enough is left without the hosts of some processes, and no other."""
        out = {live.seats[process].assignment.host for process in processes}
        stay = [name for name in live.hosts if name not in out]
        hurt = [seat for seat in live.seats if seat.assignment.host in out]
        devices = sum(self._roster[name].plan.num_devices for name in stay)
        return len(hurt) == len(processes) and devices >= self._settings.min_devices

    def find_reason(self, now_s: float, *, is_set: bool) -> str | None:
        """Returns why to end the generation that runs; once for each decision.

        Args:
            now_s: The time.
            is_set: Whether those that would take over are as far as they will be; they
                are not waited for longer than nothing else is decided.
        """
        is_late = now_s >= self._since_s + self._settings.limits.straggler_rest_s
        if not (is_set or is_late):
            return None
        why, self._why = self._why, None
        return why

    def quotas(self, hosts: Sequence[Host]) -> tuple[int, ...] | None:
        """Returns the microbatches of each process of a generation.

        Args:
            hosts: Those that take part, in order.

        Returns:
            None where nothing was decided for just these.
        """
        names = [host.name for host in hosts for _ in range(host.plan.num_processes)]
        return self._quotas if names == self._hosts else None

    def take(self, hosts: Sequence[Host]) -> tuple[int, ...] | None:
        """Returns the same for a generation that is formed, which settles it."""
        found, self._why = self.quotas(hosts), None
        if found is None:
            self._hosts, self._quotas = [], ()
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns what to remember, as JSON values."""
        return {
            "hosts": self._hosts,
            "quotas": list(self._quotas),
            "num_decisions": self._num_decisions,
            "not_before_s": self._not_before_s,
        }

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Goes on where a supervisor before this one was."""
        self._hosts, self._quotas = list(memory["hosts"]), tuple(memory["quotas"])
        self._num_decisions = memory["num_decisions"]
        self._not_before_s = memory["not_before_s"]
