"""Writes a checkpoint from views, in bounded memory.

Owns the way from a tree of views, remapped or from another library, to a checkpoint
like those that a run saves: with a manifest, digests and checksums, there as a whole
or not at all.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shardkit.arguments import check_choice
from shardkit.checkpoint.block_sums import manifest_of
from shardkit.checkpoint.engine import CHUNK_BYTES, Engine
from shardkit.checkpoint.host_sums import HostSums
from shardkit.checkpoint.inputs import (
    check_place,
    checked_path,
    is_run,
    new_directories,
    step_number,
)
from shardkit.checkpoint.manifest import LeafRecord, Manifest
from shardkit.checkpoint.stored import check_savable, insert
from shardkit.checkpoint.streaming import Streamed
from shardkit.checkpoint.sums import seal
from shardkit.checkpoint.views import View
from shardkit.errors import ConfigError, RestoreError
from shardkit.layout import LeafLayout

__all__ = ["LIMIT_BYTES", "write_checkpoint"]

LIMIT_BYTES = 256 << 20
_CODECS = {
    "none": None,
    "zstd": None,
    "planes": {"id": "blosc", "cname": "zstd", "clevel": 3, "shuffle": 1},
}


def write_checkpoint(
    root: str | Path,
    tree: Mapping[str, View],
    *,
    like: Manifest | None = None,
    records: Mapping[str, LeafRecord] | None = None,
    step: int | None = None,
    limit_bytes: int = LIMIT_BYTES,
    compress: str = "none",
) -> Path:
    """Writes a tree as a step below a directory of checkpoints.

    Args:
        root: The directory of checkpoints; created if it is not there.
        tree: Path → what is to be written.
        like: The manifest of what the tree was made from, of which step, run and data
            are kept.
        records: What is known of paths: the logical axes, and which are random keys.
        step: Instead of `like`'s; 0 without one.
        limit_bytes: About how much memory it may take; a chunk of an array and what is
            read to make it have to fit several times.
        compress: `"none"`; `"zstd"`; or `"planes"`: zstd over planes of bytes, in
            which the exponents of floats lie together (lossless as all of them).

    Returns:
        The directory of the step.

    Raises:
        ConfigError: If there is no such compression, or something cannot be saved, or
            not there; nothing is written.
        RestoreError: If the step is there already, or something cannot be read.
    """
    check_choice("compress", compress, tuple(_CODECS))
    root = checked_path(root, "write_checkpoint(root, tree)")
    step = step_number((like.step if like else 0) if step is None else step)
    check_place(root)
    if is_run(root):
        raise ConfigError(f"{root}: is of a run; write to another directory")
    if (root / str(step)).exists():
        raise RestoreError(
            f"{root / str(step)}: is there already; write to another directory"
        )
    check_savable(
        LeafLayout(path, view.shape, view.dtype) for path, view in tree.items()
    )
    digests = {path: HostSums(view) for path, view in tree.items()}
    nested: dict[str, Any] = {}
    for path, view in tree.items():
        if math.prod(view.shape):
            streamed = Streamed(view, digests[path].add, _CODECS[compress])
            insert(nested, path, streamed)

    def finish(directory: Path) -> None:
        tables = {
            path: digest.table(limit_bytes // 16) for path, digest in digests.items()
        }
        seal(directory, _manifest(tree, tables, like, records or {}, step))

    with new_directories(root):
        engine = Engine(
            root,
            compress=compress == "zstd",
            chunk_bytes=min(CHUNK_BYTES, limit_bytes // 16),
        )
        try:
            engine.save(step, nested, finish)
        finally:
            engine.close()
    return root / str(step)


def _manifest(
    tree: Mapping[str, View],
    tables: Mapping[str, np.ndarray],
    like: Manifest | None,
    records: Mapping[str, LeafRecord],
    step: int,
) -> Manifest:
    leaves = []
    for path, view in tree.items():
        known = records.get(path)
        if known is None or known.stored_shape != view.shape:
            known = LeafRecord(view.shape, view.dtype.name)
        leaves.append(LeafLayout(path, known.shape, known.dtype, axes=known.axes))
    kept = ("run", "data", "random", "fingerprint", "mesh", "metrics")
    facts = {name: getattr(like, name) for name in kept} if like else {}
    return manifest_of(step, leaves, tables, **facts)
