"""Finding a checkpoint and opening it, without the mesh that saved it.

Owns `Saved`: the manifest and the arrays of one step, ours or any tree of Orbax's.
Nothing is read before it is asked for, and nothing is believed before it is verified.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from shardkit.checkpoint.manifest import FILE_NAME, Manifest
from shardkit.checkpoint.stored import (
    METADATA_NAME,
    StoredView,
    shared_context,
    tree_names,
)
from shardkit.checkpoint.sums import SUMS_NAME, check_sums
from shardkit.checkpoint.views import View
from shardkit.checkpoint.whereabouts import describe_absent
from shardkit.errors import DamagedError, RestoreError

__all__ = ["Saved", "find_item", "open_checkpoint", "open_item", "saved_steps"]

_ITEMS = ("state", "default", "params", "items")


@dataclasses.dataclass(frozen=True)
class Saved:
    """One saved state.

    Attributes:
        directory: Of the arrays.
        manifest: What is recorded of it; None for a tree that is not shardkit's.
        views: Path → stored array. Random keys are their words.
    """

    directory: Path
    manifest: Manifest | None
    views: Mapping[str, View]

    def check_files(
        self, *, progress: Callable[[int], None] = lambda num_bytes: None
    ) -> list[str]:
        """Reads every file, and says what is wrong; needs no JAX.

        Raises:
            RestoreError: If no checksums were saved with it.
        """
        if self.manifest is None:
            raise RestoreError(
                f"{self.directory}: has no checksums; only what shardkit has saved can "
                "be verified"
            )
        return check_sums(self.directory, progress=progress)

    def verified(self) -> "Saved":
        """Returns itself if all files are what was written.

        Raises:
            RestoreError: Naming the files that are not.
        """
        if self.manifest is not None and (bad := self.check_files()):
            raise DamagedError(
                f"{self.directory}: damaged:\n  " + "\n  ".join(bad[:20])
            )
        return self


def open_checkpoint(path: str | Path, step: int | None = None) -> Saved:
    """Opens a checkpoint.

    Args:
        path: Of a run, of its checkpoints, of one step or of the arrays themselves.
        step: Which, where there are several; the newest by default.

    Raises:
        RestoreError: If there is none, or what it says of itself is damaged.

    Example:
        >>> open_checkpoint("/nowhere")
        Traceback (most recent call last):
        ...
        shardkit.errors.RestoreError: /nowhere: there is no such path
    """
    saved = open_item(find_item(Path(path), step))
    if step is not None and saved.manifest and saved.manifest.step != step:
        if not _has_choice(Path(path)):
            raise RestoreError(
                f"{path}: expected a checkpoint of step {step}, found one of step "
                f"{saved.manifest.step}"
            )
        raise DamagedError(
            f"{saved.directory}: expected what was saved at step {step}, found step "
            f"{saved.manifest.step}"
        )
    return saved


def open_item(directory: Path) -> Saved:
    """Opens a directory of arrays.

    Raises:
        DamagedError: If it is none, or what it says of itself is damaged.
    """
    _check_kinds(directory)
    context = shared_context()
    if not (directory / FILE_NAME).exists():
        if (directory / SUMS_NAME).exists():
            raise DamagedError(f"{directory / FILE_NAME}: missing")
        return Saved(
            directory,
            None,
            {
                name: StoredView(directory, name, context=context)
                for name in tree_names(directory)
            },
        )
    manifest = Manifest.read(directory)
    views = {
        name: StoredView(directory, name, leaf.stored_shape, leaf.stored_dtype, context)
        for name, leaf in manifest.leaves.items()
    }
    return Saved(directory, manifest, views)


def find_item(path: Path, step: int | None = None) -> Path:
    """Finds the directory of arrays that a path stands for.

    Raises:
        RestoreError: If there is none.
    """
    if not path.is_dir():
        steps = saved_steps(path.absolute().parent)
        raise RestoreError(f"{path}: {describe_absent(path.absolute(), steps)}")
    path = path.absolute()
    if _is_item(path):
        return path
    for name in _ITEMS:
        if _is_item(path / name):
            return path / name
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = saved_steps(root)
    if not steps:
        raise RestoreError(f"{path}: {describe_absent(path)}")
    if step not in (None, *steps):
        there = ", ".join(map(str, steps))
        raise RestoreError(f"{root}: there is no step {step}; there are {there}")
    found = root / str(steps[-1] if step is None else step)
    for name in _ITEMS:
        if _is_item(found / name):
            return found / name
    raise DamagedError(f"{found}: expected arrays in one of {', '.join(_ITEMS)}")


def _has_choice(path: Path) -> bool:
    """Whether a path stands for several steps, and not for one."""
    return not any(_is_item(path / name) for name in ("", *_ITEMS))


def saved_steps(root: Path) -> list[int]:
    """The steps that are committed below a directory, oldest first."""
    if not root.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in root.iterdir()
        if re.fullmatch(r"0|[1-9][0-9]{0,17}", path.name) and path.is_dir()
    )


def _check_kinds(directory: Path) -> None:
    """Refuses pipes and the like, of which the reading would never end."""
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    _check_kinds(Path(entry.path))
                elif not entry.is_file() and not entry.is_dir() and _exists(entry):
                    raise DamagedError(f"{entry.path}: expected a file")
    except OSError as error:
        raise DamagedError(
            f"{error.filename}: cannot be read: {error.strerror}"
        ) from None


def _exists(entry: os.DirEntry[str]) -> bool:
    # A link to nowhere is as good as no file.
    return os.path.exists(entry.path)


def _is_item(path: Path) -> bool:
    return (path / METADATA_NAME).exists() or (path / FILE_NAME).exists()
