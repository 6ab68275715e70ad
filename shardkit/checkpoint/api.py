"""Checkpoints for a loop of one's own: any tree of arrays, saved and restored.

Owns `save`, `restore` and `verify`, for those without a `Trainer`. Invariant: what is
restored has, block by block, the digests of what was saved, or an error names the
block. It keeps no steps and runs nothing in the background.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from shardkit.checkpoint.block_sums import BlockSums, manifest_of
from shardkit.checkpoint.check import check_blocks
from shardkit.checkpoint.engine import Engine
from shardkit.checkpoint.host_sums import HostSums
from shardkit.checkpoint.inputs import (
    check_place,
    check_remap,
    checked_path,
    is_run,
    named,
    new_directories,
    step_number,
)
from shardkit.checkpoint.manager import (
    agreed,
    compare_blocks,
    compare_leaves,
    fingerprint,
)
from shardkit.checkpoint.mapping import counted
from shardkit.checkpoint.placing import Target, place
from shardkit.checkpoint.reader import open_checkpoint, saved_steps
from shardkit.checkpoint.remap import Remap
from shardkit.checkpoint.stored import check_savable, insert
from shardkit.checkpoint.sums import seal
from shardkit.checkpoint.views import ArrayView, whole_box
from shardkit.errors import ConfigError, DamagedError, RestoreError
from shardkit.keys import raw
from shardkit.layout import LeafLayout
from shardkit.tree import format_table

__all__ = ["restore", "save", "verify"]


def save(path: str | Path, tree: Any, *, step: int = 0) -> Path:
    """Saves a tree, and returns when it is committed.

    Args:
        path: The directory of checkpoints; created if it is not there.
        tree: Of JAX arrays on any mesh, random keys among them, numpy arrays and
            numbers. Several processes call it together.
        step: Under which number, from 0.

    Returns:
        The directory of the step.

    Raises:
        ConfigError: If something cannot be saved, or not there; nothing is written.
        RestoreError: If the step is there already.
        SaveError: If it cannot be written; what was begun is gone again.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = save(directory, {"w": jnp.arange(3.0)})
        ...     print(restore(directory, {"w": jnp.zeros(3)}))
        {'w': Array([0., 1., 2.], dtype=float32)}
    """
    path, step = checked_path(path, "save(path, tree)"), step_number(step)
    check_place(path)
    if is_run(path):
        raise ConfigError(
            f"{path}: is of a run, which saves there itself; name another directory"
        )
    if step in saved_steps(path):
        raise RestoreError(f"{path / str(step)}: is there already; name another step")
    pairs = [
        (name, x if isinstance(x, jax.Array) else _as_array(name, x))
        for name, x in named(tree)
    ]
    layouts = [LeafLayout(name, x.shape, x.dtype) for name, x in pairs]
    check_savable(layouts)
    leaves: dict[str, Any] = dict(pairs)
    on_devices = BlockSums(
        (layout, leaves[layout.path])
        for layout in layouts
        if isinstance(leaves[layout.path], jax.Array)
    )
    on_devices.share()
    nested: dict[str, Any] = {}
    for name, x in leaves.items():
        if x.size:
            insert(nested, name, raw(x) if isinstance(x, jax.Array) else x)

    known = fingerprint()

    def finish(directory: Path) -> None:
        tables = on_devices.result()
        for name, x in leaves.items():
            if name not in tables:
                tables[name] = HostSums(ArrayView(np.asarray(x))).table(1 << 24)
        seal(directory, manifest_of(step, layouts, tables, fingerprint=known))

    with new_directories(path):
        engine = Engine(path)
        try:
            engine.save(step, nested, finish)
        finally:
            engine.close()
    return path / str(step)


def restore(
    path: str | Path,
    like: Any,
    *,
    step: int | None = None,
    remap: Remap | None = None,
) -> Any:
    """Restores a tree onto any mesh.

    What shardkit has saved is verified: by the digests of its blocks, or before rules
    are applied by the checksums of its files. Plain Orbax has neither.

    Args:
        path: Of a run, of its checkpoints or of one step.
        like: A tree of arrays, or of `jax.ShapeDtypeStruct` with shardings, each of
            which says where its leaf goes; without one, to the first device. For
            numpy's arrays, and numbers, numpy's come back.
        step: Which; the newest by default.
        remap: Rules that make this tree of what was saved.

    Raises:
        ConfigError: If an argument is something else than is asked for.
        RestoreError: Naming every leaf that is missing, extra, reshaped or recast.
        DamagedError: Naming every block that is damaged.
    """
    path = checked_path(path, "restore(path, like)")
    step = None if step is None else step_number(step)
    check_remap(remap, Remap)
    saved = open_checkpoint(path, step)
    wanted = {name: _abstract(leaf) for name, leaf in named(like)}
    if remap is None:
        advice = "Ask for what was saved, or give rules that make this of it (remap=…)."
        compare_leaves(saved, wanted, "that are asked for", advice)
        views = saved.views
    else:
        # Keys are remapped as the words that they consist of.
        specs = {name: _stored(leaf) for name, leaf in wanted.items()}
        views = remap.apply(saved.verified().views, specs)
    if missing := [name for name in wanted if name not in views]:
        raise RestoreError(
            f"{saved.directory}: no rule makes {', '.join(missing[:20])}; leave them "
            "out of the tree that is asked for"
        )
    targets = [
        Target(name, leaf.shape, leaf.dtype, leaf.sharding or _first_device())
        for name, leaf in wanted.items()
        if isinstance(leaf, jax.ShapeDtypeStruct)
    ]
    sums, arrays = BlockSums(), {}
    with agreed(str(saved.directory)):
        for target, array in zip(targets, place(views, targets), strict=True):
            arrays[target.path] = array
            # While the next leaf is read, devices digest this one.
            sums.add(LeafLayout(target.path, target.shape, target.dtype), array)
    sums.share()
    tables = sums.result()
    for name in wanted.keys() - arrays.keys():
        arrays[name] = views[name].read(whole_box(views[name].shape))
        tables[name] = HostSums(ArrayView(arrays[name])).table(1 << 24)
    if remap is None and saved.manifest is not None:
        compare_blocks(saved, tables)
    return jax.tree.structure(like).unflatten([arrays[name] for name in wanted])


def verify(path: str | Path, *, step: int | None = None, blocks: bool = False) -> None:
    """Reads everything, and compares it with its checksums.

    Args:
        path: Of a run, of its checkpoints or of one step.
        step: Which; the newest by default.
        blocks: Whether to decode all arrays, too, and compare the digests of their
            blocks: whether what was written is what was in memory.

    Raises:
        DamagedError: Naming every file, or leaf and block, that is damaged.
        RestoreError: If there is nothing, or no checksums were saved.
    """
    path = checked_path(path, "verify(path)")
    saved = open_checkpoint(path, None if step is None else step_number(step))
    if bad := saved.check_files():
        raise DamagedError(f"{saved.directory}: damaged:\n  " + "\n  ".join(bad[:20]))
    if blocks and (found := check_blocks(saved)):
        rows = [(x.path, f"block {x.number}", x.problem) for x in found[:20]]
        raise DamagedError(
            f"{saved.directory}: {counted(len(found), 'block', 'is', 'are')} damaged\n"
            + format_table(rows)
        )


def _as_array(name: str, leaf: Any) -> np.ndarray:
    try:
        return np.asarray(leaf)
    except ValueError:
        raise ConfigError(f"{name}: is no array: {type(leaf).__name__}") from None


def _abstract(leaf: Any) -> Any:
    """What a leaf asks for: of numpy's arrays themselves, of JAX's without data."""
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf)


def _stored(leaf: Any) -> Any:
    is_host = isinstance(leaf, np.ndarray)
    return leaf if is_host else jax.eval_shape(raw, leaf.update(sharding=None))


def _first_device() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.local_devices()[0])
