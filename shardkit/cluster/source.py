"""What a supervisor asks of a process between two steps.

Owns `Supervised`, a source of changes for `Trainer.run`. Invariant: all processes of
a generation hear the same before the same step, since they have agreed on it.
"""

from collections.abc import Callable, Mapping

from shardkit.cluster.member import Member
from shardkit.membership import Change, scripted

__all__ = ["Supervised"]


class Supervised:
    """A script of device counts, and a supervisor that can halt everything.

    Args:
        member: The process, as its cluster knows it.
        script: Step → device count; what is more than there is means all there is.
        num_pool: How many devices there are.
        least: The fewest that can be gone on with: one for each process.
    """

    is_shared = True

    def __init__(
        self, member: Member, script: Mapping[int, int], num_pool: int, least: int
    ) -> None:
        counts = {step: min(max(n, least), num_pool) for step, n in script.items()}
        self._member, self._script = member, scripted(counts)

    def start(self) -> Callable[[], None]:
        """Begins with the script; the supervisor is always heard."""
        return self._script.start()

    def leaving(self) -> bool:
        """Never during a wait: others may not be waiting."""
        return False

    def check(self, num_pool: int) -> None:
        """Checks the script."""
        self._script.check(num_pool)

    def expected(self) -> list[int]:
        """What the script says is to come."""
        return self._script.expected()

    def poll(self, step: int, num_devices: int) -> Change | None:
        """Halts where all have agreed to; otherwise as scripted."""
        if self._member.boundary(step) == "halt":
            if self._member.leaving():
                return Change(leave=True)
            return Change(halt=True)
        return self._script.poll(step, num_devices)
