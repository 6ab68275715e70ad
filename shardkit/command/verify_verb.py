"""`shardkit ckpt verify`: reads everything, and says whether it is what was written.

Owns which steps are read and how the findings are told. Files are compared without
JAX; blocks need it, on the host.
"""

import argparse
from pathlib import Path
from typing import Any

from shardkit.checkpoint.mapping import counted
from shardkit.checkpoint.reader import Saved
from shardkit.command.options import add_step
from shardkit.command.output import Output
from shardkit.command.sources import (
    all_steps,
    lacks_checksums,
    num_stored_bytes,
    open_source,
    other_steps,
)
from shardkit.errors import ConfigError, DamagedError, RestoreError
from shardkit.report.terminal import format_bytes

__all__ = ["HELP", "add_arguments", "run"]

HELP = "read everything and compare it with its checksums"
_MOST_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Says what the verb takes."""
    parser.add_argument("path", metavar="PATH", type=Path)
    add_step(parser)
    parser.add_argument(
        "--all", action="store_true", help="every step, not only the newest"
    )
    parser.add_argument(
        "--blocks",
        action="store_true",
        help="also decode every array and compare the digests of its blocks",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Verifies one step or all: 0 if whole, 1 if damaged."""
    if arguments.all and arguments.step is not None:
        raise ConfigError("command line: --all and --step exclude one another")
    targets = (
        [path for _, path in all_steps(arguments.path)]
        if arguments.all
        else [arguments.path]
    )
    found = [_verify(path, arguments, output) for path in targets]
    is_whole = all(entry["whole"] for entry in found)
    if output.as_json:
        output.document({"whole": is_whole, "steps": found})
    return 0 if is_whole else 1


def _verify(
    path: Path, arguments: argparse.Namespace, output: Output
) -> dict[str, Any]:
    try:
        saved = open_source(path, arguments.step)
    except DamagedError as error:
        first, _, more = str(error).partition("\n")
        entry = {
            "directory": str(path),
            "step": None,
            "bytes": 0,
            "files": [first],
        }
        more = "" if arguments.all else more
        return _told({**entry, "num_blocks": None, "blocks": []}, output, more)
    if saved.manifest is None:
        raise RestoreError(
            f"{saved.directory}: {lacks_checksums(saved)}; only what shardkit has "
            "saved can be verified"
        )
    total = num_stored_bytes(saved.directory)
    with output.progress(f"files of step {saved.manifest.step}", total) as tell:
        files = saved.check_files(progress=tell)
    entry = {
        "directory": str(saved.directory),
        "step": saved.manifest.step,
        "bytes": total,
        "files": files,
        "num_blocks": None,
        "blocks": [],
    }
    if arguments.blocks:
        entry |= _check_blocks(saved, output)
    is_one = arguments.all or arguments.step is not None
    return _told(entry, output, "" if is_one else other_steps(saved.directory))


def _check_blocks(saved: Saved, output: Output) -> dict[str, Any]:
    from shardkit.checkpoint.check import check_blocks

    assert saved.manifest is not None
    step, total = saved.manifest.step, saved.manifest.nbytes
    with output.progress(f"blocks of step {step}", total) as tell:
        bad = check_blocks(saved, progress=tell)
    num_blocks = sum(len(leaf.blocks) for leaf in saved.manifest.leaves.values())
    blocks = [
        {"leaf": x.path, "block": x.number, "box": x.box, "problem": x.problem}
        for x in bad
    ]
    return {"num_blocks": num_blocks, "blocks": blocks}


def _told(entry: dict[str, Any], output: Output, more: str) -> dict[str, Any]:
    """Shows what was found of a step, and says whether it is whole.

    Args:
        entry: What was found.
        output: Where to.
        more: What to add if it is damaged.
    """
    entry["whole"] = not (entry["files"] or entry["blocks"])
    if output.as_json:
        return entry
    read = format_bytes(entry["bytes"])
    if entry["num_blocks"] is not None:
        read += f", {counted(entry['num_blocks'], 'block')}"
    if entry["whole"]:
        output.line(f"{entry['directory']}: whole ({read} read)", style="green")
        return entry
    output.line(f"{entry['directory']}: damaged", style="bold red")
    for text in entry["files"][:_MOST_SHOWN]:
        output.line(f"  {text}")
    shown = entry["blocks"][:_MOST_SHOWN]
    for x in shown:
        if x["block"] is None:
            output.line(f"  {x['leaf']}: {x['problem']}")
    rows = [
        (f"  {x['leaf']}", str(x["block"]), _format_box(x["box"]))
        for x in shown
        if x["block"] is not None
    ]
    if rows:
        output.table(["  leaf", "block", "of the elements"], rows, right=[1])
    for name in ("files", "blocks"):
        if (num := len(entry[name]) - _MOST_SHOWN) > 0:
            output.line(f"  and {num} more {name}; --json has them all")
    if entry["files"] and entry["num_blocks"] and not entry["blocks"]:
        num = counted(entry["num_blocks"], "block")
        output.line(
            f"  but every array is what was saved ({num} read): it can be restored, "
            "and not remapped"
        )
    if more:
        output.line(more)
    return entry


def _format_box(box: Any) -> str:
    return f"[{', '.join(f'{start}:{stop}' for start, stop in box)}]"
