"""Orbax, as far as shardkit asks it to store and to commit.

Owns the one adapter to `orbax.checkpoint`: a directory of numbered checkpoints, each
written in the background and there as a whole or not at all. Invariant: what `finish`
writes is part of that whole. It knows nothing of meshes, manifests or digests.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from shardkit.checkpoint.inputs import check_place
from shardkit.checkpoint.reader import saved_steps
from shardkit.checkpoint.streaming import handlers
from shardkit.errors import RestoreError, SaveError, ShardkitError, reason

__all__ = ["ITEM", "Engine", "Keep"]

ITEM = "state"
"""The directory below a step in which the arrays are."""

CHUNK_BYTES = 16 << 20

_APART_BYTES = 1 << 20
"""Stacked layers of that many bytes are stored apart, so that each is read alone."""

_PATIENCE_S = 5

Keep = checkpoint_managers.PreservationPolicy
Finish = Callable[[Path], None]


class _Handler(ocp.PyTreeCheckpointHandler):
    """Orbax's own handler of trees, which lets others add to what it commits."""

    def __init__(self, *, use_compression: bool) -> None:
        super().__init__(
            use_compression=use_compression, type_handler_registry=handlers()
        )
        self.finish: Finish = lambda directory: None

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        # What it holds on to is as large as what was saved.
        finish, self.finish = self.finish, lambda directory: None
        if jax.process_index() == 0:
            finish(Path(directory))


def _apart(array: Any) -> tuple[int, ...]:
    """The dims of which every index is stored apart."""
    sharding = getattr(array, "sharding", None)
    shape = sharding.shard_shape(array.shape) if sharding else array.shape
    rest_bytes = math.prod(shape[1:]) * array.dtype.itemsize
    return (0,) if len(shape) > 2 and rest_bytes >= _APART_BYTES else ()


class Engine:
    """A directory of checkpoints, by step.

    Args:
        directory: Created if it is not there.
        keep: Which checkpoints stay; None for all.
        compress: Whether arrays are compressed by zstd.
        chunk_bytes: What is read at once at least; a larger shard is stored in several.

    Raises:
        ConfigError: If a file is in the way.
        RestoreError: If the directory cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: Keep | None = None,
        compress: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.directory, self._chunk_bytes = directory, chunk_bytes
        self._handler = _Handler(use_compression=compress)
        self._unfinished: int | None = None
        check_place(directory)
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(ITEM, ocp.args.PyTreeSave, self._handler)
        # What is not complete is no checkpoint; it goes when a run begins.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep, cleanup_tmp_directories=True
        )
        try:
            self._manager = ocp.CheckpointManager(
                directory, options=options, handler_registry=registry
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RestoreError(
                f"{directory}: cannot be used: {reason(error)}"
            ) from error

    def steps(self) -> list[int]:
        """What is saved or being saved, by whomever, oldest first."""
        return sorted({*self._manager.all_steps(), *saved_steps(self.directory)})

    def item(self, step: int) -> Path:
        """Where the arrays of a step are."""
        return self.directory / str(step) / ITEM

    def save(
        self,
        step: int,
        tree: Any,
        finish: Finish,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to save; returns when the arrays may change.

        Args:
            step: The number of the checkpoint.
            tree: Nested dicts of arrays, or of what is `Streamed`.
            finish: Called in another thread with the directory of the arrays, when
                they are written and before they are committed.
            metrics: For what keeps the best.

        Raises:
            SaveError: If it, or the one before, could not be saved.
        """
        # The one before is committed first, as Orbax would see to it too.
        self.wait()
        if (self.directory / str(step)).exists():
            # Orbax would delete it before it writes another.
            raise RestoreError(
                f"{self.directory}: step {step} has been saved by another run "
                "meanwhile. Give every run a directory of its own."
            )
        self._handler.finish, self._unfinished = finish, step
        save_args = jax.tree.map(
            lambda x: ocp.SaveArgs(
                chunk_byte_size=self._chunk_bytes, shard_axes=_apart(x)
            ),
            tree,
        )
        item = ocp.args.PyTreeSave(tree, save_args=save_args)
        with self._telling():
            self._manager.save(
                step,
                args=ocp.args.Composite(**{ITEM: item}),
                metrics=dict(metrics) if metrics else None,
                # Without it nothing would be saved, nor said, before an abandoned step.
                force=True,
            )

    def delete(self, step: int) -> None:
        """Deletes a checkpoint, if it is not being deleted already."""
        if step in self._manager.all_steps():
            with self._telling():
                self._manager.delete(step)

    def wait(self) -> None:
        """Waits until what was saved is committed.

        Raises:
            SaveError: If it could not be.
        """
        with self._telling():
            self._manager.wait_until_finished()

    def reload(self) -> None:
        """Waits, and looks at the directory anew."""
        self.wait()
        self._manager.reload()

    def close(self) -> None:
        """Waits, and ends Orbax's threads."""
        with self._telling():
            self._manager.close()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except ShardkitError:
            # What was read while it was written has its own to say.
            self._discard()
            raise
        except (OSError, ValueError, RuntimeError) as error:
            self._discard()
            raise SaveError(
                f"{self.directory}: could not be saved: {reason(error)}. What was "
                "saved before is whole."
            ) from error

    def _discard(self) -> None:
        """Removes what was begun and cannot be finished: it may have filled a disk."""
        step, self._unfinished = self._unfinished, None
        if step is None or jax.process_index() != 0:
            return
        # The threads of a write that has failed may be at their last file.
        deadline_s = time.monotonic() + _PATIENCE_S
        while left := [*self.directory.glob(f"{step}.orbax-checkpoint-tmp*")]:
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
            if time.monotonic() > deadline_s:
                return
            time.sleep(0.02)
