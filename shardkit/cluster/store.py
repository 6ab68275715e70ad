"""Snapshots of a process of a cluster, kept where they outlive it.

Owns `MemberStore`, the `snapshot.store.Store` of a worker: images are written into
segments of its host's agent, and what a new generation goes on from is read from this
host's memory or from another's. Invariant: only what the supervisor named is read. It
takes no snapshots, and protects none.
"""

from collections.abc import Sequence

from shardkit.cluster.member import Member, Slot
from shardkit.cluster.records import Assignment, Resume
from shardkit.cluster.remote_images import open_images
from shardkit.snapshot.groups import Redundancy
from shardkit.snapshot.image import Image

__all__ = ["MemberStore"]


class MemberStore:
    """See `snapshot.store.Store`.

    Args:
        assignment: What the process is, or will be if it is ever needed.
        run: The id of the run.
    """

    def __init__(self, assignment: Assignment, run: str) -> None:
        self.run, self.generation = run, 0
        self.num_losses = Redundancy.parse(assignment.redundancy).num_losses
        self._hosts = assignment.hosts
        self._member: Member | None = None
        self._resume: Resume | None = None

    def join(self, member: Member) -> None:
        """Becomes of use: the process is a part of a generation now."""
        self._member, assignment = member, member.assignment
        self.generation, self._resume = assignment.generation, assignment.resume

    @property
    def _joined(self) -> Member:
        assert self._member is not None, "a standby has no snapshots"
        return self._member

    def host(self, process: int) -> str:
        """The host of a process of this generation."""
        return self._hosts[process]

    def reserve(self, num_bytes: int) -> Slot:
        """Returns a segment once nobody needs what is in it; see `Member.reserve`."""
        return self._joined.reserve(num_bytes)

    def commit(self, slot: Slot, step: int) -> None:
        """Hands an image over to the agent, which protects it."""
        self._joined.commit(slot, step)

    def steps(self) -> list[int]:
        """The step that this generation goes on from; others are the supervisor's."""
        return [] if self._resume is None else [self._resume.step]

    def images(self, step: int) -> Sequence[Image]:
        """The images of that step."""
        assert self._resume is not None
        assert step == self._resume.step
        return open_images(self._joined, self._resume.images)

    def forget(self, step: int | None = None) -> None:
        """Goes on from none of them."""
        self._resume = None
