"""Whether the arrays of a checkpoint are those that were saved, block by block.

Owns reading all of them on the host, in bounded memory. Invariant: everything is read,
and everything that is bad is found, however much there is of it.
"""

import dataclasses
import math
from collections.abc import Callable

from shardkit.checkpoint.host_sums import HostSums
from shardkit.checkpoint.manifest import LeafRecord
from shardkit.checkpoint.placing import read_ahead
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
    itemsize, sums = view.dtype.itemsize, HostSums(view)
    boxes = list(iter_boxes(view.shape, itemsize, _BOX_BYTES))
    jobs = ((math.prod(box_shape(box)) * itemsize, view, box) for box in boxes)
    for box, data in zip(boxes, read_ahead(jobs, _LIMIT_BYTES), strict=True):
        sums.add(box, data)
        progress(data.nbytes)
    return [
        BadBlock(path, number, box, "not what was saved")
        for number, box in record.differing(sums.table(_BOX_BYTES))
    ]
