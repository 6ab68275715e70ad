"""How a run stops before its end.

Owns what is kept when somebody asks for that. Invariant: it only ever ends in an
exception that says what is kept, and where the run stands then.
"""

from typing import NoReturn

from shardkit.controller import Controller
from shardkit.errors import Halted, Preempted, SaveError

__all__ = ["halt", "save_and_leave"]


def save_and_leave(controller: Controller) -> NoReturn:
    """Saves if there is where to and what, and stops.

    Raises:
        Preempted: When it has.
    """
    if not controller.can_save:
        raise Preempted(
            f"asked to leave before step {controller.step}; nothing is saved, since "
            "the trainer was made without checkpoint=…"
        )
    if controller.live is None and not controller.is_resumed:
        raise Preempted(
            f"asked to leave; nothing has changed since step {controller.step}"
        )
    with controller.waiter.ignoring():
        try:
            controller.save(wait=True)
        except SaveError as error:
            # It may have been the save before this one that failed.
            controller.events.emit("notice", message=str(error))
            controller.save(wait=True)
    raise Preempted(f"asked to leave; step {controller.step} is saved")


def halt(controller: Controller) -> NoReturn:
    """Stops with the state in a snapshot, from which other processes go on.

    Raises:
        Halted: When it is.
        SaveError: If it could not be taken.
    """
    controller.keep()
    raise Halted(f"halted before step {controller.step}, which is in a snapshot")
