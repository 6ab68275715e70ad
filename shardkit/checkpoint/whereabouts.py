"""What is at a path that holds no checkpoint, in words.

Owns the sentences that say where one may be instead. It looks at names of files only.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["describe_absent"]

_MOST_LISTED = 12


def describe_absent(path: Path, steps: Sequence[int] = ()) -> str:
    """Says what there is at a path, or near to it.

    Args:
        path: At which there is no checkpoint.
        steps: What there is beside it, if its name is that of a step.

    >>> describe_absent(Path("/nowhere"))
    'there is no such path'
    """
    if path.is_file():
        return "is a file; expected a run, a directory of checkpoints or one step"
    if path.is_dir():
        return _describe_directory(path)
    if path.is_symlink():
        return "is a link to nothing"
    if path.exists():
        return "is no directory"
    if steps and re.fullmatch("[0-9]+", path.name):
        return f"there is no step {path.name}; there are {', '.join(map(str, steps))}"
    if not path.parent.is_dir():
        above = next((p for p in path.parents if p.exists()), path.parent)
        return f"there is no such path{_close(path, above)}"
    return f"there is no such path{_close(path, path.parent)}"


def _describe_directory(path: Path) -> str:
    try:
        inside = sorted(each for each in path.iterdir() if each.is_dir())
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    runs = [each.name for each in inside if _has_steps(each)]
    if runs:
        more = ", …" if len(runs) > _MOST_LISTED else ""
        some = ", ".join(runs[:_MOST_LISTED])
        return f"holds no checkpoint, but there are some in {some}{more}"
    is_run = (path / "config.toml").is_file()
    return "is a run that has saved no checkpoint" if is_run else "holds no checkpoint"


def _has_steps(path: Path) -> bool:
    for root in (path / "checkpoints", path):
        try:
            if any(re.fullmatch("[0-9]{1,18}", each.name) for each in root.iterdir()):
                return True
        except OSError:
            continue
    return False


def _close(path: Path, above: Path) -> str:
    """Names what is called nearly so, in the last directory that is there."""
    name = path.relative_to(above).parts[0] if path != above else path.name
    try:
        names = [each.name for each in above.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {above / close[0]}?" if close else ""
