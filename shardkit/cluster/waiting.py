"""A run that has too few devices, and waits for more.

Owns that wait. Invariant: it is told once when it begins, and is over after `wait_s`.
What follows then is not decided here.
"""

from shardkit.cluster.orders import Order, Tell
from shardkit.cluster.roster import Roster
from shardkit.cluster.settings import Settings

__all__ = ["Waiting"]


class Waiting:
    """Waits for hosts.

    Args:
        settings: What the cluster was started with.
        roster: Its hosts.
        orders: Where orders are put.

    Attributes:
        until_s: When it is over; None while nothing is waited for.
    """

    def __init__(self, settings: Settings, roster: Roster, orders: list[Order]) -> None:
        self._limit_s, self._least = settings.deadlines.wait_s, settings.min_devices
        self._roster, self._orders = roster, orders
        self.until_s: float | None = None

    def check(self, now_s: float) -> str | None:
        """Begins to wait, or goes on; returns what to say once it is over."""
        if self.until_s is None:
            self.until_s = now_s + self._limit_s
            self._orders.append(Tell(f"waiting {self.spell(now_s)}"))
        if now_s < self.until_s:
            return None
        self.until_s = now_s + self._limit_s
        return (
            f"waited {self._limit_s:g} s (wait_s) for enough devices: "
            f"{self._roster.num_devices()} of at least {self._least} are there"
        )

    def spell(self, now_s: float) -> str:
        """Says what is waited for; only while something is."""
        assert self.until_s is not None
        there = self._roster.num_devices()
        return (
            f"for {max(0, self._least - there)} more devices: {there} of at least "
            f"{self._least}, gives up in {max(0.0, self.until_s - now_s):.0f} s"
        )
