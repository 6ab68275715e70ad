"""Where hosts come from: what every engine can do.

Owns that protocol. Invariant: a host is only said to be gone when all of its processes
are, and its memory with them. When to start and to end one is the supervisor's choice.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Engine", "HostInfo"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HostInfo:
    """What an engine knows of a host.

    Attributes:
        host: Its name.
        is_there: Whether its agent was started and is not gone.
        why: How it ended last; empty if it never did.
        waits: What it waits for before it can begin; empty if it does not.
    """

    host: str
    is_there: bool
    why: str = ""
    waits: str = ""


class Engine(Protocol):
    """Starts and ends the agents of hosts. All methods return at once."""

    def start(self, on_change: Callable[[HostInfo], Any]) -> None:
        """Begins; `on_change` hears of every host that came or went by itself."""
        ...

    def hosts(self) -> list[HostInfo]:
        """Returns all hosts."""
        ...

    def start_agent(self, host: str) -> None:
        """Starts the agent of a host that is not there.

        Where that has to wait, `on_change` hears of it, and again when it begins.
        """
        ...

    def end_host(self, host: str) -> None:
        """Ends a host at once; `on_change` follows."""
        ...

    async def close(self) -> None:
        """Ends all hosts, and what they have in memory."""
        ...
