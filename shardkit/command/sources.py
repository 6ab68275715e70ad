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

__all__ = [
    "INDEX_NAMES",
    "all_steps",
    "check_source",
    "is_safetensors",
    "kind_of",
    "lacks_checksums",
    "num_stored_bytes",
    "open_source",
    "other_steps",
]

INDEX_NAMES = ("model.safetensors", "model.safetensors.index.json")


def open_source(path: Path, step: int | None = None) -> Saved:
    """Opens a run, a directory of checkpoints, one step, or safetensors.

    Args:
        path: Where.
        step: Which, where there are several; the newest by default.

    Raises:
        RestoreError: If there is none, or what it says of itself is damaged.
        ConfigError: If it is one step, and not the one that is asked for.
    """
    if is_safetensors(path):
        if step is not None:
            raise ConfigError(f"--step {step}: {path} has no steps")
        return Saved(path, None, open_safetensors(path))
    try:
        saved = open_checkpoint(path, step)
    except DamagedError as error:
        if more := _beside(path, step):
            raise DamagedError(f"{error}\n{more}") from None
        raise
    found = saved.manifest.step if saved.manifest else step
    if step not in (None, found):
        raise ConfigError(f"--step {step}: {path} is of step {found}")
    return saved


def _beside(path: Path, step: int | None) -> str:
    steps = [n for n, _ in all_steps(path) if n is not None]
    if not steps:
        return ""
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return other_steps(root.absolute() / str(steps[-1] if step is None else step))


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


def is_safetensors(path: Path) -> bool:
    """Whether it is a file of safetensors, an index of some or a directory with one."""
    is_file = path.suffix in (".safetensors", ".json") and path.is_file()
    return is_file or any((path / name).is_file() for name in INDEX_NAMES)


def kind_of(saved: Saved) -> str:
    """Says who wrote it: `shardkit`, `orbax` or `safetensors`."""
    if saved.manifest is not None:
        return "shardkit"
    is_file = saved.directory.is_file()
    has_file = any((saved.directory / name).is_file() for name in INDEX_NAMES)
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
        output.note(f"{saved.directory}: {lacks_checksums(saved)}; taken as it is")
        return
    total = num_stored_bytes(saved.directory)
    with output.progress("checking", total) as tell:
        bad = saved.check_files(progress=tell)
    if bad:
        told = [f"{saved.directory}: damaged:", *(f"  {text}" for text in bad[:20])]
        told += filter(None, [other_steps(saved.directory)])
        raise DamagedError("\n".join(told))


def lacks_checksums(saved: Saved) -> str:
    """Says why something cannot be verified."""
    kind = {"orbax": "a plain tree of Orbax", "safetensors": "safetensors"}
    return f"is {kind[kind_of(saved)]}, which has no checksums"


def other_steps(item: Path) -> str:
    """Says which steps there are beside a damaged one; empty if there are none.

    Args:
        item: The directory of its arrays, or of the step.
    """
    step = item if item.name.isdecimal() else item.parent
    if not step.name.isdecimal():
        return ""
    others = [str(n) for n in saved_steps(step.parent) if str(n) != step.name]
    if not others:
        return ""
    word = "step" if len(others) == 1 else "steps"
    verb = "is" if len(others) == 1 else "are"
    return f"{word} {', '.join(others)} {verb} there; verify --all checks every step"
