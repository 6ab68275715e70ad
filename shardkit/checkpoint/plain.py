"""Writes a tree as Orbax alone would, for those who have no shardkit.

Owns the way from views to a directory that `StandardCheckpointer` restores. It takes
the paths of a tree as they are, and no manifest is beside it.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shardkit.checkpoint.engine import CHUNK_BYTES, ITEM, Engine
from shardkit.checkpoint.stored import insert
from shardkit.checkpoint.streaming import Streamed
from shardkit.checkpoint.views import Box, View
from shardkit.errors import RestoreError

__all__ = ["write_orbax"]


def write_orbax(
    directory: str | Path,
    tree: Mapping[str, View],
    staging: Path,
    *,
    limit_bytes: int = 256 << 20,
) -> None:
    """Writes a tree, in bounded memory.

    Args:
        directory: New, or empty; it is there as a whole or not at all.
        tree: Path → what is to be written; numbers in paths are names to Orbax.
        staging: A new directory on the same disk, for what is not complete. It stays.
        limit_bytes: About how much memory it may take.

    Raises:
        RestoreError: If something cannot be read, or has no elements, which Orbax does
            not store.
    """
    nested: dict[str, Any] = {}
    if empty := [path for path, view in tree.items() if not math.prod(view.shape)]:
        raise RestoreError(
            f"{directory}: Orbax stores no arrays without elements, such as "
            f"{', '.join(empty[:6])}; leave them out"
        )
    for path, view in tree.items():
        insert(nested, path, Streamed(view, _ignore))
    engine = Engine(staging, chunk_bytes=min(CHUNK_BYTES, limit_bytes // 16))
    try:
        engine.save(0, nested, lambda directory: None)
    finally:
        engine.close()
    os.rename(staging / "0" / ITEM, directory)


def _ignore(box: Box, data: np.ndarray) -> None:
    pass
