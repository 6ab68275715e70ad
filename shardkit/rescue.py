"""What a run goes on from when shards were lost.

Owns the choice among snapshots and checkpoints. Invariant: the newest step that is
whole wins, host memory before a disk. The live state is the controller's.
"""

from shardkit.errors import LostStateError
from shardkit.placement import Placement
from shardkit.snapshot.snapshots import Snapshots
from shardkit.state import TrainState

__all__ = ["newest_snapshot"]


def newest_snapshot(
    snapshots: Snapshots, placement: Placement, saved_steps: list[int]
) -> tuple[int, TrainState] | None:
    """Reads the newest snapshot that is whole, unless a checkpoint is newer.

    Args:
        snapshots: Those of the run.
        placement: Where the state goes.
        saved_steps: The steps of its checkpoints, oldest first.

    Returns:
        The step and the state; None if there is nothing of use.
    """
    # What is on its way may still arrive, and is newer than anything else.
    snapshots.wait()
    newest = snapshots.newest_step
    if newest is None or (saved_steps and saved_steps[-1] > newest):
        return None
    try:
        return snapshots.load(placement.layout, placement.mesh)
    except LostStateError:
        return None
