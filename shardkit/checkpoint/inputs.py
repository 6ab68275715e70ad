"""What a caller gives, checked before anything is read or written.

Owns the refusals of what could be written and never be found again: a step that is no
number, a place that is something else, a tree without leaves or with keys that have no
order. It looks at arguments and at names of files, and reads nothing.
"""

import contextlib
import operator
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardkit.errors import ConfigError

__all__ = [
    "MOST_STEPS",
    "check_place",
    "check_remap",
    "checked_path",
    "is_run",
    "named",
    "new_directories",
    "step_number",
]

MOST_STEPS = 10**18
"""Steps below it are found again by their names."""


def step_number(step: Any) -> int:
    """Returns a step as Python's whole number, whoever's it is.

    Raises:
        ConfigError: If it is none, or below 0.

    >>> import numpy as np
    >>> step_number(np.int64(2))
    2
    """
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        number = -1
    if not 0 <= number < MOST_STEPS:
        raise ConfigError(f"step: expected a whole number from 0, found {_short(step)}")
    return number


def checked_path(path: Any, call: str) -> Path:
    """Returns a path as one from the root.

    Args:
        path: What was given for it.
        call: How the call is written, to say so.

    Raises:
        ConfigError: If it is none.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(
            f"path: expected a directory as text or Path, found {_short(path)}; "
            f"write {call}"
        )
    return Path(path).absolute()


def check_place(directory: Path) -> None:
    """Refuses a place in which steps cannot be put.

    Raises:
        ConfigError: If a file is in the way.
    """
    for path in (directory, *directory.parents):
        if path.is_dir():
            return
        if path.exists() or path.is_symlink():
            what = "is a file" if path.is_file() else "is no directory"
            raise ConfigError(
                f"{directory}: cannot be a directory of checkpoints: {path} {what}; "
                "name another"
            )


def is_run(directory: Path) -> bool:
    """Whether it is the directory of a run, or that of its checkpoints."""
    if directory.name == "checkpoints" and (directory.parent / "config.toml").is_file():
        return True
    is_begun = (directory / "checkpoints").is_dir()
    is_begun |= (directory / "metrics.jsonl").is_file()
    return is_begun and (directory / "config.toml").is_file()


@contextlib.contextmanager
def new_directories(directory: Path) -> Iterator[None]:
    """Takes directories away again that were made for what has failed."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in missing:
            # Fails, as it should, on a directory that is not empty or not there.
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def check_remap(remap: Any, kind: type) -> None:
    """Refuses rules that are something else.

    Raises:
        ConfigError: Saying how they are made.
    """
    if remap is None or isinstance(remap, kind):
        return
    advice = "write sk.checkpoint.Remap([rule, …])"
    if isinstance(remap, str | os.PathLike):
        advice = f"a file of rules is read by sk.checkpoint.load_rules({str(remap)!r})"
    raise ConfigError(f"remap: expected a Remap, found {_short(remap)}; {advice}")


def named(tree: Any) -> list[tuple[str, Any]]:
    """Lists `(path, leaf)` as `named_leaves` does.

    Raises:
        ConfigError: If a dict in it has keys that have no order.
    """
    from shardkit.tree import named_leaves

    try:
        return named_leaves(tree)
    except (TypeError, ValueError) as error:
        if (keys := _mixed_keys(tree)) is None:
            raise
        raise ConfigError(
            f"tree: the keys of a dict must be all of one type, found {keys}; give "
            "them all as text"
        ) from error


def _mixed_keys(tree: Any) -> str | None:
    """Finds a dict that JAX cannot put in order."""
    values: list[Any] = []
    if isinstance(tree, Mapping):
        try:
            sorted(tree)
        except TypeError:
            return _short([*tree])
        values = [*tree.values()]
    elif isinstance(tree, list | tuple):
        values = [*tree]
    return next(filter(None, map(_mixed_keys, values)), None)


def _short(value: Any) -> str:
    text = repr(value)
    is_long = len(text) > 60 or "\n" in text
    return f"a {type(value).__name__}" if is_long else text
