"""What a path on the command line stands for.

Owns opening a path, whatever made it, and the check before anything is made of it.
"""

from pathlib import Path

from shardkit.checkpoint.manifest import FILE_NAME
from shardkit.checkpoint.reader import Saved, open_checkpoint, saved_steps
from shardkit.checkpoint.safetensors_files import open_safetensors
from shardkit.checkpoint.stored import METADATA_NAME
from shardkit.command.output import Output
from shardkit.errors import ConfigError, DamagedError

__all__ = ["all_steps", "check_source", "kind_of", "num_stored_bytes", "open_source"]

_INDEX = ("model.safetensors", "model.safetensors.index.json")


def open_source(path: Path, step: int | None = None) -> Saved:
    """Opens a run, a directory of checkpoints, one step, or safetensors.

    Args:
        path: Where.
        step: Which, where there are several; the newest by default.

    Raises:
        RestoreError: If there is none, or what it says of itself is damaged.
        ConfigError: If it is one step, and not the one that is asked for.
    """
    is_file = path.suffix in (".safetensors", ".json") and path.is_file()
    if is_file or any((path / name).is_file() for name in _INDEX):
        if step is not None:
            raise ConfigError(f"--step {step}: {path} has no steps")
        return Saved(path, None, open_safetensors(path))
    saved = open_checkpoint(path, step)
    found = saved.manifest.step if saved.manifest else step
    if step not in (None, found):
        raise ConfigError(f"--step {step}: {path} is of step {found}")
    return saved


def all_steps(path: Path) -> list[tuple[int | None, Path]]:
    """Lists the steps of a run or a directory of checkpoints, oldest first.

    Returns:
        `(step, its directory)`; a single one without number for a path that is one
        step itself.
    """
    if any((path / name).exists() for name in (METADATA_NAME, FILE_NAME)):
        return [(None, path)]
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = saved_steps(root)
    return [(step, root / str(step)) for step in steps] or [(None, path)]


def kind_of(saved: Saved) -> str:
    """Says who wrote it: `shardkit`, `orbax` or `safetensors`."""
    if saved.manifest is not None:
        return "shardkit"
    is_file = saved.directory.is_file()
    has_file = any((saved.directory / name).is_file() for name in _INDEX)
    return "safetensors" if is_file or has_file else "orbax"


def num_stored_bytes(directory: Path) -> int:
    """The bytes of all files under a directory."""
    return sum(p.lstat().st_size for p in directory.rglob("*") if p.is_file())


def check_source(saved: Saved, output: Output) -> None:
    """Reads every file once, so that nothing is made of what is damaged.

    Raises:
        DamagedError: Naming the files that are not what was written.
    """
    if saved.manifest is None:
        output.note(f"{saved.directory}: has no checksums, and is taken as it is")
        return
    total = num_stored_bytes(saved.directory)
    with output.progress("checking", total) as tell:
        bad = saved.check_files(progress=tell)
    if bad:
        raise DamagedError(f"{saved.directory}: damaged:\n  " + "\n  ".join(bad[:20]))
