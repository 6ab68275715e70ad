"""What a supervisor's state machine asks of the world around it.

Owns the orders. They are values: nothing happens before somebody carries them out, and
an order that is lost is given again when the next heartbeat shows that it was.
"""

import dataclasses
from typing import Any

__all__ = ["EndHost", "EndRun", "Order", "Save", "Send", "StartHost", "Tell"]


@dataclasses.dataclass(frozen=True, slots=True)
class StartHost:
    """Start the agent of a host."""

    host: str


@dataclasses.dataclass(frozen=True, slots=True)
class EndHost:
    """End the agent of a host and all it has, and say when it is gone."""

    host: str
    why: str


@dataclasses.dataclass(frozen=True, slots=True)
class Send:
    """Send a message to the agent of a host.

    Attributes:
        host: The host.
        header: The message.
        payload: What goes with it.
    """

    host: str
    header: dict[str, Any]
    payload: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True)
class Save:
    """Write down what must survive, before anything that comes after this is done."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tell:
    """Tell people."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class EndRun:
    """End the run.

    Attributes:
        code: Its exit code.
        message: Why, where that is not as it should be.
    """

    code: int
    message: str


Order = StartHost | EndHost | Send | Save | Tell | EndRun
