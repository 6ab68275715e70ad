"""Which step is protected, and by whom: every step of a generation, one at a time.

Owns the order to protect, and when a step counts as protected. Invariants: a step is
ordered once all processes have committed it, and counts once all hosts have what they
keep for their group; one that cannot be protected is given up before a step that waits
for it is taken for frozen, and that is said once. Pure: times come in, orders go out.
Without redundancy a step counts as soon as it is committed.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from shardkit.cluster.hosts import Host
from shardkit.cluster.live import Live
from shardkit.cluster.orders import Order, Send, Tell
from shardkit.cluster.roster import Roster
from shardkit.cluster.settings import Settings
from shardkit.snapshot.cost import Cost, ImageSize, predict
from shardkit.snapshot.groups import Group, Redundancy, describe_limits, form_groups

__all__ = ["Protecting", "groups_of"]

_GROUP_SIZE = 8
_MOST_FAILURES = 3
"""So often in a row a host may fail to protect a step."""


def groups_of(hosts: Iterable[str], redundancy: Redundancy) -> tuple[Group, ...]:
    """Forms the groups of a generation: as small as `num_losses` allows, and handy.

    >>> [g.hosts for g in groups_of(["a", "b"], Redundancy.parse("parity:8"))]
    [('a', 'b')]
    """
    return form_groups(hosts, redundancy, max(_GROUP_SIZE, 2 * redundancy.num_losses))


class Protecting:
    """Has the steps of generations protected.

    Args:
        settings: What the cluster was started with.
        roster: Its hosts.
        orders: Where orders are put.

    Attributes:
        costs: What snapshots take on each host, as predicted; empty before the first.
    """

    def __init__(self, settings: Settings, roster: Roster, orders: list[Order]) -> None:
        self._roster, self._orders = roster, orders
        self._deadlines = settings.deadlines
        self._redundancy = Redundancy.parse(settings.redundancy)
        self._groups: tuple[Group, ...] = ()
        self._said: set[str] = set()
        self._step, self._since_s, self._limit_s = -1, 0.0, 0.0
        self.costs: dict[str, Cost] = {}

    def begin(self, live: Live) -> None:
        """Learns of a new generation."""
        self._groups = groups_of(live.hosts, self._redundancy)
        self._step = -1
        self.costs = {}
        for text in describe_limits(live.hosts, self._redundancy, self._groups):
            self._say(text)

    def deadline_s(self) -> float | None:
        """When to check again at the latest; None if nothing is being protected."""
        return None if self._step < 0 else self._since_s + self._limit_s

    def check(self, live: Live, now_s: float) -> bool:
        """Goes on with the step that is being protected, or begins with a newer one.

        Returns:
            Whether a newer step is protected now. All hosts are to be told, and this
            called again, before the next is ordered: for that they give up whatever
            protection they do not know to count.
        """
        images = self._images(live)
        newest = live.newest_whole(images)
        if not self._groups:
            is_newer = live.protect(newest, now_s)
            if is_newer and not self.costs:
                self._predict(live, images)
            return is_newer
        if self._step >= 0 and self._is_over(live, now_s):
            is_newer, self._step = live.protect(self._step, now_s), -1
            if is_newer:
                if not self.costs:
                    self._predict(live, images)
                # Who begins with the next one gives up what it does not know to be
                # protected, so that this has to be told first.
                return True
        if self._step < 0 and newest > live.protected:
            self._step, self._since_s = newest, now_s
            window_s = self._deadlines.window_s("step", live.watchdog.step_s)
            self._limit_s = window_s / 2
            for name in live.hosts:
                self.repeat(self._roster[name], live)
        return False

    def repeat(self, host: Host, live: Live) -> None:
        """Orders again what the report of a host shows that it has not done."""
        if self._step < 0 or not host.is_alive or host.name not in live.hosts:
            return
        if [live.generation, self._step] in host.report["guards"]:
            return
        group = next(group for group in self._groups if host.name in group.hosts)
        images = [
            {
                "host": name,
                "address": self._roster[name].report["address"],
                **{key: image[key] for key in ("name", "process", "head_bytes")},
            }
            for name, image in self._images(live)
            if name in group.hosts and image["step"] == self._step
        ]
        header = {
            "type": "protect",
            "of": live.generation,
            "step": self._step,
            "group": dataclasses.asdict(group),
            "images": images,
        }
        self._orders.append(Send(host.name, header))

    def _images(self, live: Live) -> list[tuple[str, dict[str, Any]]]:
        return [
            (host.name, image)
            for host in self._roster
            if host.is_alive
            for image in host.report["images"]
            if image["generation"] == live.generation
        ]

    def _is_over(self, live: Live, now_s: float) -> bool:
        """Whether all hosts have what they keep of a step, or never will."""
        hosts = [self._roster[name] for name in live.hosts]
        if not all(host.is_alive for host in hosts):
            # The generation ends with it; nothing is concluded before.
            return False
        is_late = now_s >= self._since_s + self._limit_s
        return all([self._is_done(host, live, is_late=is_late) for host in hosts])

    def _is_done(self, host: Host, live: Live, *, is_late: bool) -> bool:
        if [live.generation, self._step] in host.report["guards"]:
            self._said.discard(host.name)
            return True
        failed = host.report["guard_failed"]
        if failed and (failed["of"], failed["step"]) == (live.generation, self._step):
            if is_late or failed["is_final"] or failed["count"] >= _MOST_FAILURES:
                self._cannot(host.name, failed["why"])
                return True
        elif is_late:
            limit_s = self._limit_s
            self._cannot(host.name, f"it took more than {limit_s:g} s")
            return True
        return False

    def _cannot(self, name: str, why: str) -> None:
        if name not in self._said:
            self._said.add(name)
            text = (
                f"{name} cannot protect step {self._step}, so that the loss of a host "
                f"may cost all steps since the last checkpoint: {why}"
            )
            self._orders.append(Tell(text))

    def _predict(
        self, live: Live, images: Sequence[tuple[str, dict[str, Any]]]
    ) -> None:
        sizes: dict[str, list[ImageSize]] = {name: [] for name in live.hosts}
        for name, image in images:
            if image["step"] == live.protected and name in sizes:
                keys = ("num_bytes", "protected_bytes", "head_bytes")
                sizes[name].append(ImageSize(*(image[key] for key in keys)))
        self.costs = predict(sizes, self._groups)
        if self._groups:
            most = max(self.costs.values(), key=lambda cost: cost.total_bytes)
            self._say(
                f"snapshots take up to {most.snapshot_bytes / 1e6:.1f} MB of a host's "
                f"memory, what protects them {most.protection_bytes / 1e6:.1f} MB"
            )

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._orders.append(Tell(text))
