"""Writing that is there as a whole in the end, or leaves nothing.

Owns the directory beside the target in which everything is made first. What exists is
never replaced; further steps may join those of a directory of checkpoints.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from shardkit.checkpoint.inputs import check_place, is_run
from shardkit.checkpoint.manifest import LeafRecord, Manifest
from shardkit.checkpoint.reader import saved_steps
from shardkit.checkpoint.views import Box, View
from shardkit.command.output import Output
from shardkit.errors import ConfigError, RestoreError, ShardkitError, reason

__all__ = ["check_new", "check_step", "staged", "told", "write_step"]

_PATIENCE_S = 10


def write_step(
    out: Path,
    tree: Mapping[str, View],
    output: Output,
    *,
    limit_bytes: int,
    like: Manifest | None = None,
    records: Mapping[str, LeafRecord] | None = None,
    step: int | None = None,
    compress: str = "none",
) -> Path:
    """Writes a tree as a step of a directory of checkpoints, showing how far it is.

    See `write_checkpoint` for the arguments.

    Raises:
        ConfigError: If the directory holds something else.
        RestoreError: If the step is there, or something cannot be read or written.
    """
    from shardkit.checkpoint.store import write_checkpoint

    number = (like.step if like else 0) if step is None else step
    check_step(out, number)
    total = sum(view.nbytes for view in tree.values())
    with staged(out) as staging, output.progress("writing", total) as tell:
        write_checkpoint(
            staging,
            told(tree, tell),
            like=like,
            records=records,
            step=number,
            limit_bytes=limit_bytes,
            compress=compress,
        )
        out.mkdir(exist_ok=True)
        os.rename(staging / str(number), out / str(number))
    return out / str(number)


def check_step(out: Path, step: int) -> None:
    """Refuses a directory to which a step cannot be added.

    Raises:
        ConfigError: If it holds something else than checkpoints, or this step.
    """
    check_place(out.absolute())
    if is_run(out.absolute()):
        raise ConfigError(
            f"{out}: is of a run, which saves there itself; name another directory"
        )
    if not out.exists():
        return
    steps = saved_steps(out)
    if not out.is_dir() or (any(out.iterdir()) and not steps):
        raise ConfigError(
            f"{out}: expected a new directory, or one of checkpoints, found something "
            "else; name another"
        )
    if step in steps:
        raise ConfigError(f"{out}: step {step} is there already; name another")


def check_new(out: Path) -> None:
    """Refuses a path at which there is something.

    Raises:
        ConfigError: Unless it is new, or an empty directory.
    """
    is_empty = out.is_dir() and not any(out.iterdir())
    if (out.exists() or out.is_symlink()) and not is_empty:
        raise ConfigError(f"{out}: is there already; name another")


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yields a path beside `out`; whatever is left there in the end goes away.

    Raises:
        RestoreError: If something cannot be written.
    """
    out = out.absolute()
    staging = out.with_name(f".{out.name}.{os.getpid()}.partial")
    missing = [path for path in (out, *out.parents) if not path.exists()]
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        yield staging
    except ShardkitError:
        raise
    except (OSError, ValueError) as error:
        raise RestoreError(f"{out}: cannot be written: {reason(error):.500}") from error
    finally:
        _remove(staging)
        for path in missing:
            # Fails, as it should, on a directory that is not empty or not there.
            with contextlib.suppress(OSError):
                path.rmdir()


def _remove(path: Path) -> None:
    # Threads of a write that has failed may be at their last file.
    deadline_s = time.monotonic() + _PATIENCE_S
    while path.exists() and time.monotonic() < deadline_s:
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.05)


def told(tree: Mapping[str, View], tell: Callable[[int], None]) -> Mapping[str, View]:
    """Returns views that tell of the bytes that are read of them."""
    return {path: _Told(view, tell) for path, view in tree.items()}


class _Told(View):
    def __init__(self, view: View, tell: Callable[[int], None]) -> None:
        self.shape, self.dtype = view.shape, view.dtype
        self._view, self._tell = view, tell

    def read(self, box: Box) -> np.ndarray:
        """Reads, and tells: see `View.read`."""
        self._tell(0)
        found = self._view.read(box)
        self._tell(found.nbytes)
        return found
