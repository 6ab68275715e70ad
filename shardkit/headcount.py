"""How many devices a run has, and which of them it uses.

Owns that number, and the question whether another one moves the state: groups that are
not full leave devices idle, and so does a move that would not pay any more. Invariant:
a mesh that was chosen is told before anything is done about it. It moves nothing.
"""

from collections.abc import Mapping

from shardkit.events import EventLog
from shardkit.placement import Placement
from shardkit.placements import Placements
from shardkit.words import format_plan

__all__ = ["Headcount"]


class Headcount:
    """The devices of a run.

    Args:
        placements: Where it can be.
        events: Where a mesh that was chosen is told.

    Attributes:
        num_devices: How many there are, or were when the run last had a state.
        end: The step at which the run ends, once that is known.
    """

    def __init__(self, placements: Placements, events: EventLog) -> None:
        self.num_devices = len(placements.pool)
        self.end: int | None = None
        self._placements, self._events = placements, events

    def begin(
        self, num_devices: int, step: int, saved_on: Mapping[str, int] | None
    ) -> Placement:
        """Returns where a state is to begin that is on no devices.

        Args:
            num_devices: How many there are.
            step: The next step.
            saved_on: The mesh that it was saved on, if it was.
        """
        self.num_devices = num_devices
        self._placements.leave(saved_on)
        self._tell(num_devices, step)
        return self._placements.on(num_devices)

    def stand(self, placement: Placement, step: int) -> None:
        """Notes where the state is before a step."""
        left = None if self.end is None else max(self.end - step, 0)
        self._placements.stand(placement, self.num_devices, left)

    def moves(self, placement: Placement, step: int, num_devices: int) -> bool:
        """Whether a change to so many devices moves the state.

        If it does not, they are what the run has from now on.

        Args:
            placement: Where it is.
            step: The next step.
            num_devices: How many there are now.
        """
        self.stand(placement, step)
        self._tell(num_devices, step)
        if self._placements.on(num_devices).mesh is not placement.mesh:
            return True
        self.num_devices = num_devices
        found = f"{num_devices} devices, of which {placement.num_devices} are in use"
        self._events.emit("notice", message=f"step {step}: {found}, as before")
        return False

    def _tell(self, num_devices: int, step: int) -> None:
        plan = self._placements.plan(num_devices)
        if plan is not None:
            fields = {"step": step, **plan}
            self._events.emit("plan", message=format_plan(fields), **fields)
