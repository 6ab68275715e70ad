"""All that a host keeps in memory of a run: images, and what protects others'.

Owns the parts that do so, and which of them an order or a question is for. Invariant:
once it is closed nothing of it is left. What is ordered is the supervisor's decision.
"""

from collections.abc import Callable, Mapping
from typing import Any

from shardkit.cluster.desk import Desk
from shardkit.cluster.fetching import serve_fetch
from shardkit.cluster.guards import Guards
from shardkit.cluster.peers import Peers
from shardkit.cluster.rebuilding import Rebuilding
from shardkit.cluster.records import Assignment
from shardkit.cluster.settings import Settings
from shardkit.cluster.slots import Slots
from shardkit.cluster.wire import Link
from shardkit.snapshot.segments import Segment, Segments

__all__ = ["HostMemory"]


class HostMemory:
    """What one host keeps.

    Args:
        settings: The cluster's.
        host: The name of the host.
        segments: Where everything is kept.
        on_change: Called when there is something to tell.
    """

    def __init__(
        self,
        settings: Settings,
        host: str,
        segments: Segments,
        on_change: Callable[[], Any],
    ) -> None:
        self._request_s = settings.deadlines.request_s
        self._slots = slots = Slots(segments)
        self._desk = Desk(slots)
        # What may wait for one peer must not hold up the other.
        first, second = (Peers(settings.token, settings.deadlines) for _ in range(2))
        self._guards = Guards(settings.run, host, slots, first, on_change)
        self._rebuilding = Rebuilding(host, slots, self._guards, second, on_change)

    def report(self) -> dict[str, Any]:
        """Says what there is, as JSON values."""
        return {
            "protected": list(self._slots.protected),
            "images": [image.to_json() for image in self._slots.images()],
            "rebuilds": self._rebuilding.report(),
            **self._guards.report(),
        }

    async def answer(
        self, assignment: Assignment, header: dict[str, Any]
    ) -> dict[str, Any]:
        """Answers a question of a worker."""
        return await self._desk.answer(assignment, header)

    async def serve(self, link: Link, header: dict[str, Any]) -> None:
        """Answers one `fetch` of a peer."""
        await serve_fetch(link, header, self._find, self._slots.path, self._request_s)

    def _find(self, name: str) -> Segment | None:
        return self._slots.find(name) or self._guards.find(name)

    def obey(self, header: Mapping[str, Any], payload: bytes, link: Link) -> None:
        """Does what the supervisor wants of it, if this is such an order."""
        kind = header["type"]
        if kind == "protect":
            self._guards.protect(header)
        elif kind == "survey":
            number, verify = header["number"], header["verify"]
            self._rebuilding.survey(link, number, verify=verify)
        elif kind == "rebuild":
            self._rebuilding.rebuild(header, payload)

    def protected(self, generation: int, step: int) -> None:
        """Learns which step is whole and protected on all hosts."""
        self._slots.protect(generation, step)
        self._guards.protected()
        self._desk.freed()

    def ending(self, up_to_generation: int) -> None:
        """Learns that nobody goes on with what these generations have begun."""
        self._guards.cancel(up_to_generation)

    def ended(self, up_to_generation: int) -> None:
        """Learns that their workers are gone."""
        self._slots.drop_torn(up_to_generation)

    def close(self) -> None:
        """Gives everything back."""
        self._guards.close()
        self._rebuilding.close()
        self._slots.clear()
