"""What a supervisor says to agents, and says again when it seems lost.

Owns these messages. Invariant: each can be said any number of times; an agent that has
heard it does nothing the second time. When to say what is the state machine's business.
"""

from typing import Any

from shardkit.cluster.hosts import Host
from shardkit.cluster.live import Live, Seat
from shardkit.cluster.orders import Order, Send
from shardkit.cluster.settings import Settings

__all__ = ["Talk"]


class Talk:
    """Says things to agents that are there.

    Args:
        settings: What the cluster was started with.
        orders: Where orders are put.
    """

    def __init__(self, settings: Settings, orders: list[Order]) -> None:
        self._settings, self._orders = settings, orders

    def _send(self, host: Host, header: dict[str, Any]) -> None:
        if host.is_alive:
            self._orders.append(Send(host.name, header))

    def assign(self, host: Host, seat: Seat) -> None:
        """Makes a standby part of a generation."""
        self._send(
            host,
            {
                "type": "assign",
                "worker": seat.worker,
                "assignment": seat.assignment.to_json(),
            },
        )

    def prepare(self, host: Host, seat: Seat) -> None:
        """Has a standby prepare for what it may become."""
        self._send(
            host,
            {
                "type": "prepare",
                "worker": seat.worker,
                "assignment": seat.assignment.to_json(),
            },
        )

    def drop_spares(self, host: Host) -> None:
        """Has standbys ended that have prepared."""
        self._send(host, {"type": "drop"})

    def end(self, host: Host, generation: int) -> None:
        """Has all workers of a generation ended, and of those before."""
        self._send(host, {"type": "end", "of": generation})

    def protected(self, host: Host, live: Live) -> None:
        """Says which step is whole and protected."""
        self._send(
            host,
            {"type": "protected", "of": live.generation, "step": live.protected},
        )

    def halt(self, host: Host, live: Live) -> None:
        """Says where the agreement on a halt stands."""
        halt = live.halt
        if halt is None:
            return
        kind = "confirm" if halt.confirmed else "propose"
        self._send(
            host,
            {
                "type": kind,
                "of": live.generation,
                "step": halt.step,
                "leave": halt.leave,
            },
        )

    def release(self, host: Host, live: Live, step: int) -> None:
        """Takes a proposal back."""
        self._send(host, {"type": "release", "of": live.generation, "step": step})

    def keep(self, host: Host, live: Live | None) -> None:
        """Says how many standbys a host is to have.

        Args:
            host: The host.
            live: The generation that trains; None while workers are waited for.
        """
        count = host.plan.num_processes
        if live is not None and host.name in live.hosts:
            wanted = self._settings.standbys
            # The first steps have the machine for themselves.
            settled = live.num_settled() >= self._settings.limits.settle_steps
            if not settled or live.leave:
                count = 0
            elif wanted is not None:
                count = wanted
        if host.is_alive and (live is None or host.report.get("keep") != count):
            host.report["keep"] = count
            self._send(host, {"type": "keep", "count": count, "at_once": live is None})

    def repeat(self, host: Host, live: Live | None, ending: int | None) -> None:
        """Says again what the report of a host shows that it has not heard.

        Args:
            host: The host.
            live: The generation that trains; None if there is none.
            ending: The generation that is being ended; None if none is.
        """
        self.keep(host, live)
        if ending is not None:
            if host.report["ended"] < ending:
                self.end(host, ending)
            return
        if live is None or host.name not in live.hosts:
            for entry in host.workers().values():
                if entry["state"] == "running":
                    self.end(host, entry["generation"])
            return
        known = host.workers()
        for seat in live.seats:
            entry = known.get(seat.worker, {})
            if seat.assignment.host == host.name and entry.get("state") == "ready":
                self.assign(host, seat)
        for entry in known.values():
            answer = entry.get("answered")
            if answer and answer["accepted"] and live.halt is None:
                # A supervisor before this one has proposed it.
                self.release(host, live, answer["step"])
        newest = [live.generation, live.protected]
        if live.protected >= 0 and host.report["protected"] != newest:
            self.protected(host, live)
        self.halt(host, live)
