"""Which mesh a number of devices means.

Owns the question that is asked before devices are laid out, at the start and at every
change, and its answer where sizes were given. Invariant: an answer depends on what is
asked alone, so that all processes get the same one, and a guess the same as the change.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from shardkit.mesh import MeshSpec

__all__ = ["Chosen", "FixedMesh", "MeshChooser"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """An answer.

    Attributes:
        sizes: Mesh axis → size, of every axis.
        notes: Where this is not what was asked for, in words.
        plan: Why it was chosen, as the event `"plan"` has it; None if it was given.
    """

    sizes: Mapping[str, int]
    notes: tuple[str, ...] = ()
    plan: Mapping[str, Any] | None = None


class MeshChooser(Protocol):
    """What is asked."""

    @property
    def chooses_groups(self) -> bool:
        """Whether sizes of `tensor`, `expert` or `context` are chosen, too."""
        ...

    def choose(
        self,
        num_devices: int,
        *,
        old: Mapping[str, int] | None = None,
        horizon: int | None = None,
        steps_left: int | None = None,
    ) -> Chosen:
        """Returns the mesh for a number of devices; some may be left idle.

        Args:
            num_devices: How many there are.
            old: Mesh axis → size, of where the state is, or was when it was saved; None
                for a new one.
            horizon: How many steps were left when the state came to `old`, which says
                where a move would go; None if it is on no devices, or has no end.
            steps_left: How many are left now, for which a move has to pay; None if it
                is to be made in any case.

        Raises:
            MeshError: If there are too few devices for the sizes that were given.
            ConfigError: If no mesh fits into their memory.
        """
        ...


@dataclasses.dataclass(frozen=True)
class FixedMesh:
    """The mesh that somebody has asked for.

    Example:
        >>> FixedMesh(MeshSpec(data=-1, fsdp=2)).choose(6).sizes["data"]
        3
    """

    spec: MeshSpec
    chooses_groups = False

    def choose(self, num_devices: int, **_: Any) -> Chosen:
        """See `MeshChooser`; where the state is does not matter."""
        notes = (f"mesh: {note}" for note in self.spec.decisions(num_devices))
        return Chosen(sizes=self.spec.sizes(num_devices), notes=tuple(notes))
