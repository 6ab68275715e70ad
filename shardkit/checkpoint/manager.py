"""The checkpoints of a run: what is saved of a state, and how it is read again.

Owns saving a training state with its manifest in one atomic unit, in the background,
and restoring it onto any mesh. Invariant: what is restored has, block by block, the
digests of what was saved, or an error names the block. Storing, committing and
retention are Orbax's.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np

from shardkit.checkpoint.block_sums import BlockSums, held, manifest_of
from shardkit.checkpoint.config import CheckpointConfig
from shardkit.checkpoint.manifest import Manifest
from shardkit.checkpoint.mapping import counted
from shardkit.checkpoint.placing import Target, place
from shardkit.checkpoint.reader import Saved, open_item
from shardkit.checkpoint.stored import check_savable, insert
from shardkit.checkpoint.sums import check_sums, seal
from shardkit.errors import DamagedError, RestoreError
from shardkit.keys import raw
from shardkit.layout import SHARD_AXIS, LeafLayout
from shardkit.placement import Placement
from shardkit.state_moves import to_host
from shardkit.tree import format_table

__all__ = [
    "Checkpoints",
    "Facts",
    "agreed",
    "check_run",
    "compare_blocks",
    "compare_leaves",
    "load",
]


_ABSENT = object()
_IF_MEANT = "Give restore(remap=…) if that is meant."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What is saved beside a state; see `Manifest` for the fields."""

    run: Mapping[str, Any]
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    random: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


def fingerprint() -> dict[str, str]:
    """What the bits of a run depend on besides the program and its inputs."""
    found = {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }
    if found["platform"] == "cpu":
        # How XLA cuts a matrix product follows the size of its thread pool.
        found["threads"] = os.environ.get("PJRT_NPROC", f"unset, {os.cpu_count()}")
        found["machine"] = platform.machine()
    return found


class Checkpoints:
    """The checkpoints in one directory.

    Args:
        config: Where, and how many.

    Attributes:
        directory: Where, as an absolute path.
        abandoned: Steps that were gone back from, which the next save removes.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self._config = config
        self.directory = Path(config.directory).absolute()
        self._best = config.best_metric if config.keep_best else None
        self.abandoned: set[int] = set()

    @functools.cached_property
    def _engine(self) -> Any:
        # Orbax takes a second to load, and not every run saves.
        from shardkit.checkpoint.engine import Engine
        from shardkit.checkpoint.retention import retention

        return Engine(
            self.directory,
            keep=retention(self._config, self._metrics),
            compress=self._config.compress,
        )

    def begin(self) -> None:
        """Takes the directory: what is incomplete there goes.

        Raises:
            RestoreError: If it cannot be used.
        """
        _ = self._engine

    def steps(self) -> list[int]:
        """What is saved or being saved, oldest first, without what was left."""
        return sorted(set(self._engine.steps()) - self.abandoned)

    def go_back(self, step: int) -> None:
        """Takes a step for the newest; the next save removes what is after it."""
        self.abandoned = {s for s in self._engine.steps() if s > step}

    def save(self, step: int, state: Any, placement: Placement, facts: Facts) -> None:
        """Starts to save a state; returns when the state may change."""
        leaves: list[LeafLayout] = jax.tree.leaves(placement.layout)
        arrays = jax.tree.leaves(state)
        digest = _digests(leaves, arrays)
        check_savable(leaves)
        count = placement.mesh.shape[SHARD_AXIS]
        tree: dict[str, Any] = {}
        for leaf, array in zip(leaves, arrays, strict=True):
            if array.size:
                # Padding is nothing that anybody else should see.
                padded = leaf.is_padded(count)
                insert(tree, leaf.path, to_host(array, leaf) if padded else raw(array))
        known = {"fingerprint": fingerprint(), "mesh": dict(placement.mesh.shape)}

        def finish(directory: Path) -> None:
            told = dataclasses.asdict(facts)
            seal(directory, manifest_of(step, leaves, digest(), **told, **known))

        # Before the rest is counted, lest an earlier one go in their stead.
        for other in self.abandoned:
            self._engine.delete(other)
        self.abandoned = set()
        best = {k: float(v) for k, v in facts.metrics.items() if k == self._best}
        self._engine.save(step, tree, finish, best)

    def _metrics(self, step: int) -> dict[str, float]:
        """What is recorded of the quality of a step, if it is whole."""
        try:
            return dict(Manifest.read(self._engine.item(step)).metrics)
        except RestoreError:
            return {}

    def wait(self) -> None:
        """Waits until what is being saved is committed."""
        self._engine.wait()

    def reload(self) -> None:
        """Waits, and looks at the directory anew."""
        self._engine.reload()

    def open(self, step: int) -> Saved:
        """Opens what was saved at a step.

        Raises:
            DamagedError: If it is not there, or its manifest cannot be read.
        """
        saved = open_item(self._engine.item(step))
        if saved.manifest is None or saved.manifest.step != step:
            raise DamagedError(
                f"{saved.directory}: not what shardkit saved at step {step}"
            )
        return saved

    def close(self) -> None:
        """Waits for what is being written."""
        self._engine.close()


def check_run(saved: Saved, run: Mapping[str, Any]) -> list[str]:
    """Compares what was saved with the run that wants to go on from it.

    Returns:
        What differs in the environment, and could therefore change bits.

    Raises:
        RestoreError: If the checkpoint is of another run.
    """
    assert saved.manifest is not None
    before, now = saved.manifest.run, json.loads(json.dumps(run))
    if not before:
        raise RestoreError(
            f"{saved.directory}: no run is recorded with it: it was imported, or saved "
            f"without a Trainer. {_IF_MEANT}"
        )
    rows = [
        (key, f"saved {_spell(old)}", f"now {_spell(new)}")
        for key, old, new in _differing(before, now)
    ]
    if rows:
        raise RestoreError(
            f"{saved.directory}: the checkpoint is of another run\n{_listed(rows)}\n"
            f"{_IF_MEANT}"
        )
    known = saved.manifest.fingerprint
    return [
        f"{key} was {known.get(key)!s:.80}, is {value}"
        for key, value in fingerprint().items()
        if known.get(key) != value
    ]


def _differing(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Yields what differs, of a config its keys: `(name, saved, now)`."""
    for key in sorted(now.keys() | before.keys()):
        old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if isinstance(old, dict) and isinstance(new, dict):
            for name, *values in _differing(old, new):
                yield f"{key} {name}", *values
        elif before.get(key) != now.get(key):
            yield key, old, new


def _spell(value: Any) -> str:
    if value is _ABSENT or value is None:
        return "not recorded" if value is _ABSENT else "none"
    if isinstance(value, dict):
        return f"a table of {len(value)} keys"
    return f"{value!r:.200}"


def load(saved: Saved, placement: Placement, *, verify: bool = True) -> Any:
    """Restores a state onto a placement, and compares the digest of every block.

    Args:
        saved: The manifest, and the views to read.
        placement: Where to.
        verify: Whether the views are what the manifest's digests are of. Those that
            rules have made are not, and what they leave out begins anew.

    Raises:
        RestoreError: Naming every leaf that is missing, extra, reshaped or recast, or
            every block that is damaged, and the files that are.
    """
    leaves, treedef = jax.tree.flatten(placement.layout)
    if verify:
        compare_leaves(
            saved,
            {leaf.path: leaf for leaf in leaves},
            "of this run",
            "Restore with the model and the optimizer that were saved, or give rules "
            "that make one of the other (Trainer.restore(remap=…)).",
        )
    # What rules may leave out begins anew.
    arrays = _begun(placement, {leaf.path for leaf in leaves} - saved.views.keys())
    read = [leaf for leaf in leaves if leaf.path not in arrays]
    targets = [Target.of_leaf(leaf, placement.mesh) for leaf in read]
    sums = BlockSums()
    with agreed(str(saved.directory)):
        for leaf, array in zip(read, place(saved.views, targets), strict=True):
            # On their way to the next leaf, devices digest this one.
            if verify:
                sums.add(leaf, array)
            arrays[leaf.path] = array
    if verify:
        sums.share()
        compare_blocks(saved, sums.result())
    return treedef.unflatten([arrays[leaf.path] for leaf in leaves])


def wanted_views(placement: Placement) -> dict[str, jax.ShapeDtypeStruct]:
    """What has to be read for a state: path → shape and dtype; keys as their words."""
    leaves = jax.tree.leaves(placement.layout)
    return {leaf.path: jax.eval_shape(raw, leaf.abstract) for leaf in leaves}


def _begun(placement: Placement, paths: set[str]) -> dict[str, Any]:
    """The given leaves of a state before its first step."""
    if not paths:
        return {}
    leaves = jax.tree.leaves(placement.layout)
    arrays = jax.tree.leaves(placement.init())
    return {
        leaf.path: array
        for leaf, array in zip(leaves, arrays, strict=True)
        if leaf.path in paths
    }


def compare_blocks(saved: Saved, found: Mapping[str, np.ndarray]) -> None:
    """Compares the digests of all blocks with those that were saved.

    Raises:
        DamagedError: Naming leaf, block and files.
    """
    assert saved.manifest is not None
    bad = []
    for path, table in found.items():
        record = saved.manifest.leaves[path]
        for number, box in record.differing(table):
            place = ", ".join(f"{a}:{b}" for a, b in box)
            bad.append((path, f"block {number} of {len(record.grid)}", f"[{place}]"))
    if bad:
        files = check_sums(saved.directory) or ["none of its files has changed"]
        raise DamagedError(
            f"{saved.directory}: damaged: "
            f"{counted(len(bad), 'block', 'is', 'are')} not what was saved\n"
            + _listed(bad, 20)
            + "\nfiles:\n  "
            + "\n  ".join(files[:20])
        )


def _digests(
    leaves: Sequence[LeafLayout], arrays: Sequence[jax.Array]
) -> Callable[[], Mapping[str, np.ndarray]]:
    """Returns what waits for the digests of arrays that may change from now on."""
    if jax.process_count() == 1 and jax.default_backend() == "cpu":
        # CPUs digest in the time of the next step, so there it is put off.
        later = [held(array) for array in arrays]
        return lambda: BlockSums(
            (leaf, array()) for leaf, array in zip(leaves, later, strict=True)
        ).result()
    sums = BlockSums(zip(leaves, arrays, strict=True))
    sums.share()
    return sums.result


@contextlib.contextmanager
def agreed(where: str) -> Iterator[None]:
    """Ends for all processes alike: none goes on, and waits, if one has failed.

    Raises:
        RestoreError: If another process has failed; else what this one raised.
    """
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = multihost_utils.process_allgather(np.array(problem is not None))
        ranks = np.flatnonzero(failed)
        if problem is None and len(ranks):
            problem = DamagedError(
                f"{where}: processes {ranks.tolist()} cannot read it"
            )
    if problem is not None:
        raise problem


def _listed(rows: list[tuple[str, ...]], limit: int = 500) -> str:
    more = f"\n  and {len(rows) - limit} more" if len(rows) > limit else ""
    return format_table(rows[:limit]) + more


def compare_leaves(
    saved: Saved, wanted: Mapping[str, Any], whose: str, advice: str
) -> None:
    """Compares what was saved with what is wanted.

    Args:
        saved: The one.
        wanted: The other: path → anything with shape and dtype.
        whose: What the wanted leaves are, to say so.
        advice: What to do.

    Raises:
        RestoreError: Naming every leaf that is missing, extra, reshaped or recast.
    """
    there = saved.views if saved.manifest is None else saved.manifest.leaves
    expected, found = (
        {path: f"{x.dtype}{list(x.shape)}" for path, x in leaves.items()}
        for leaves in (wanted, there)
    )
    rows = [
        (
            path,
            f"expected {expected.get(path, 'nothing')}",
            f"found {found.get(path, 'nothing')}",
        )
        for path in sorted(expected.keys() | found.keys())
        if expected.get(path) != found.get(path)
    ]
    if rows:
        raise RestoreError(
            f"{saved.directory}: {counted(len(rows), 'leaf')} of the checkpoint "
            f"{'is not that' if len(rows) == 1 else 'are not those'} {whose}\n"
            f"{_listed(rows)}\n{advice}"
        )
