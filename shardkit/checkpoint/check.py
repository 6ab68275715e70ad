"""Whether the arrays of a checkpoint are those that were saved, block by block.

Owns reading all of them on the host, in bounded memory. Invariant: everything is read,
and everything that is bad is found, however much there is of it.
"""

import dataclasses
from collections.abc import Callable, Iterator

from shardkit.checkpoint.host_sums import HostSums
from shardkit.checkpoint.manifest import LeafRecord
from shardkit.checkpoint.placing import Job, read_ahead
from shardkit.checkpoint.reader import Saved
from shardkit.checkpoint.views import Box, View, box_shape, iter_boxes
from shardkit.errors import DamagedError, RestoreError

__all__ = ["BadBlock", "check_blocks"]

_LIMIT_BYTES = 128 << 20
_BOX_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class BadBlock:
    """Something that is not what was saved.

    Attributes:
        path: Of the leaf.
        number: Of the block in row-major order; None for the whole leaf.
        box: Which elements it holds; None for the whole leaf.
        problem: What is wrong.
    """

    path: str
    number: int | None
    box: Box | None
    problem: str


def check_blocks(
    saved: Saved, *, progress: Callable[[int], None] = lambda num_bytes: None
) -> list[BadBlock]:
    """Reads all arrays and compares the digest of every block.

    Args:
        saved: What shardkit has saved.
        progress: Is told of bytes that have been read.

    Raises:
        RestoreError: If it is not shardkit's.
    """
    if saved.manifest is None:
        raise RestoreError(f"{saved.directory}: has no digests")
    bad: list[BadBlock] = []
    for path, record in saved.manifest.leaves.items():
        if not record.blocks:
            bad.append(BadBlock(path, None, None, "has no digests"))
            continue
        try:
            bad += _check_leaf(path, record, saved.views[path], progress)
        except DamagedError as error:
            problem = str(error).removeprefix(f"{saved.directory}: {path} ")
            bad.append(BadBlock(path, None, None, problem))
    return bad


def _check_leaf(
    path: str, record: LeafRecord, view: View, progress: Callable[[int], None]
) -> list[BadBlock]:
    boxes = list(iter_boxes(view.shape, view.dtype.itemsize, _BOX_BYTES))
    itemsize, sums = view.dtype.itemsize, HostSums(view)

    def jobs() -> Iterator[Job]:
        for box in boxes:
            size = itemsize
            for num in box_shape(box):
                size *= num
            yield size, view, box

    for box, data in zip(boxes, read_ahead(jobs(), _LIMIT_BYTES), strict=True):
        sums.add(box, data)
        progress(data.nbytes)
    differs = (record.lanes() != sums.table(_BOX_BYTES)).any(axis=1)
    grid = record.grid
    return [
        BadBlock(path, number, grid.box(index), "not what was saved")
        for number, index in enumerate(grid if differs.any() else ())
        if differs[number]
    ]
