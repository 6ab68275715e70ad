"""All hosts of a cluster: started, missed, ended, let in again.

Owns which host is asked to start or to end, and when. Invariant: every host that is
awaited has a deadline, after which it is ended and counted as lost; only one whose
engine says that it waits itself may take forever. Pure: times come
in, orders go out. Who takes part in a generation is not decided here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from shardkit.cluster.hosts import Host
from shardkit.cluster.orders import EndHost, Order, Save, StartHost, Tell
from shardkit.cluster.settings import Settings

__all__ = ["Roster"]


class Roster:
    """The hosts of a cluster.

    Args:
        settings: What the cluster was started with.
        orders: Where orders are put.

    Attributes:
        hosts: All hosts by name, those that are not there too.
        losses: Hosts that were lost and why, until somebody takes them.
    """

    def __init__(self, settings: Settings, orders: list[Order]) -> None:
        self._deadlines, self._limits = settings.deadlines, settings.limits
        self._orders = orders
        self.hosts = {plan.host: Host(plan) for plan in settings.hosts}
        self.losses: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts.values())

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def heard(self, report: Mapping[str, Any], now_s: float) -> Host | None:
        """Learns what an agent says; None if nothing is to be believed of it."""
        host = self.hosts.get(report["host"])
        if host is None or host.state == "ending":
            return None
        if report["incarnation"] in host.dead:
            return None
        if host.report.get("incarnation") not in (None, report["incarnation"]):
            # Another agent is there already: the one before took all it had with it.
            self.lost(host, "was restarted", now_s)
        host.heard(report, now_s)
        if host.count_failed_starts() >= self._limits.failed_starts:
            self.end(host, _spell_failed_starts(host), now_s)
            return None
        return host

    def gone(self, name: str, why: str, now_s: float) -> None:
        """Learns that a host is gone."""
        host = self.hosts[name]
        if host.state != "absent":
            self.lost(host, host.why if host.state == "ending" else why, now_s)

    def waits(self, name: str, why: str, now_s: float) -> None:
        """Learns what a host waits for before it can begin; nothing once it does."""
        host = self.hosts[name]
        if host.state == "starting" and why:
            host.why = f"waits {why}"
            host.enter("waiting", now_s)
            self._orders.append(Tell(f"{name} waits {why}"))
        elif host.state == "waiting" and not why:
            host.enter("starting", now_s)

    def check(self, now_s: float) -> None:
        """Does what is due."""
        for host in self:
            if host.until_s is not None and now_s >= host.until_s:
                host.until_s = None
            deadline_s = host.deadline_s(self._deadlines)
            if host.state == "absent":
                if host.until_s is None:
                    host.enter("starting", now_s)
                    self._orders.append(StartHost(host.name))
            elif deadline_s is not None and now_s >= deadline_s:
                self._is_late(host, now_s)

    def _is_late(self, host: Host, now_s: float) -> None:
        if host.state == "ending":
            self.lost(host, host.why, now_s)
        elif host.is_alive:
            limit_s = self._deadlines.silence_s
            self.end(host, f"was not heard for {limit_s:g} s (silence_s)", now_s)
        else:
            limit_s = self._deadlines.restart_s
            self.end(host, f"did not begin within {limit_s:g} s (restart_s)", now_s)

    def end(self, host: Host, why: str, now_s: float) -> None:
        """Has a host ended; it is lost once that is confirmed, or overdue."""
        host.enter("ending", now_s)
        host.why = why
        self._orders.append(EndHost(host.name, why))
        self.losses.append((host.name, why))

    def lost(self, host: Host, why: str, now_s: float) -> None:
        """Counts a host as lost."""
        self.losses.append((host.name, why))
        if host.lose(why, now_s, self._limits):
            assert host.until_s is not None
            wait_s = host.until_s - now_s
            text = f"{host.name} is lost too often; it is left out for {wait_s:g} s"
            self._orders.append(Tell(text))
        self._orders.append(Save())

    def take_losses(self) -> list[tuple[str, str]]:
        """Returns the hosts that were lost since the last time, and why."""
        losses = list(self.losses)
        self.losses.clear()
        return losses

    def next_s(self) -> float | None:
        """When to check at the latest."""
        times = [host.deadline_s(self._deadlines) for host in self]
        return min((time for time in times if time is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        """Returns what to remember of all hosts, as JSON values."""
        return {host.name: host.to_json() for host in self}

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Goes on where a supervisor before this one was."""
        for name, values in memory.items():
            for key, value in values.items():
                setattr(self.hosts[name], key, value)

    # Who there is.

    def usable(self) -> list[Host]:
        """Returns those that can take part in a generation now."""
        return [host for host in self if host.is_usable()]

    def coming(self) -> list[Host]:
        """Returns those that are there, and whose workers are not ready yet."""
        return [host for host in self if host.is_welcome and not host.is_usable()]

    def starting(self) -> list[Host]:
        """Returns those that were not heard yet."""
        return [host for host in self if host.state in ("starting", "unknown")]

    def num_devices(self) -> int:
        """Counts the devices of those that are usable."""
        return sum(host.plan.num_devices for host in self.usable())

    def failed_starts(self) -> list[dict[str, Any]]:
        """Returns workers that ended by themselves, at a time when none is assigned."""
        return [
            entry
            for host in self
            for entry in host.workers().values()
            if entry["state"] == "exited" and not entry["ended_by_us"]
        ]


def _spell_failed_starts(host: Host) -> str:
    entries = [e for e in host.workers().values() if e["state"] == "exited"]
    tail = entries[-1]["tail"][-1:] if entries else []
    return " ".join(["could not start its workers", *tail])
