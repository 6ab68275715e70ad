"""What it took to go on after failures, kept with the run itself.

Owns `recoveries.json` in the directory of a run, which is still there when that of its
launch is gone. Invariant: what was kept by an earlier launch of the same run stays.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["RECOVERIES_NAME", "keep_recoveries"]

RECOVERIES_NAME = "recoveries.json"


def keep_recoveries(
    out: str | None, recoveries: Sequence[Mapping[str, Any]], *, begun_unix_s: float
) -> None:
    """Writes the recoveries that are over, if the run's directory is here.

    It may be on another host, and a run goes on without: nothing is raised.

    Args:
        out: Where the run is kept, as it has said; None if it has not.
        recoveries: As `Recovery.record` gives them, oldest first.
        begun_unix_s: When this launch began; what is of a time before stays.
    """
    directory = None if out is None else Path(out)
    ours = [dict(each) for each in recoveries if each["is_over"]]
    if directory is None or not ours or not (directory / "config.toml").is_file():
        return
    path, known, before = directory / RECOVERIES_NAME, [], []
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(path.read_bytes())
        before = [each for each in known if each["started_s"] < begun_unix_s]
    if known == [*before, *ours]:
        return
    draft = path.with_name(f".{path.name}.partial")
    try:
        draft.write_text(json.dumps([*before, *ours]) + "\n", encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
