"""`shardkit ckpt diff`: which leaves differ, and by how much.

Owns the comparison of two trees. Invariant: where both have digests, only blocks with
different ones are read, unless all is to be; nothing is held but a box of each side.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardkit.blocks import Blocks
from shardkit.checkpoint.mapping import counted
from shardkit.checkpoint.reader import Saved
from shardkit.checkpoint.views import Box, View, box_shape, iter_boxes
from shardkit.command.differences import Difference
from shardkit.command.options import number
from shardkit.command.output import Output
from shardkit.command.sources import open_source

__all__ = ["HELP", "add_arguments", "run"]

HELP = "compare two checkpoints leaf by leaf"
_BOX_BYTES = 8 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Says what the verb takes."""
    parser.add_argument("a", metavar="A", type=Path)
    parser.add_argument("b", metavar="B", type=Path)
    for side in "ab":
        parser.add_argument(
            f"--step-{side}",
            metavar="N",
            type=number(0),
            help=f"which step of {side.upper()}; the newest by default",
        )
    parser.add_argument(
        "--full",
        action="store_true",
        help="read everything, also where the digests are the same",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Compares two checkpoints: 0 if they are the same, 1 if not."""
    a = open_source(arguments.a, arguments.step_a)
    b = open_source(arguments.b, arguments.step_b)
    rows = [_alone(path, "a", a) for path in a.views if path not in b.views]
    rows += [_alone(path, "b", b) for path in b.views if path not in a.views]
    both = [path for path in a.views if path in b.views]
    todo: list[tuple[str, list[Box]]] = []
    num_unread = 0
    for path in both:
        described = [_describe(saved, path) for saved in (a, b)]
        if described[0] != described[1]:
            rows.append(_row(path, "array", *described))
        elif boxes := list(_boxes(a, b, path, arguments.full)):
            todo.append((path, boxes))
        else:
            num_unread += bool(math.prod(a.views[path].shape))
    total = sum(
        math.prod(box_shape(box)) * a.views[path].dtype.itemsize
        for path, boxes in todo
        for box in boxes
    )
    with output.progress("comparing", total) as tell:
        for path, boxes in todo:
            found = Difference.none(a.views[path].dtype)
            for box in boxes:
                left, right = a.views[path].read(box), b.views[path].read(box)
                found = found.joined(left, right)
                tell(left.nbytes)
            if found.num_elements:
                size = math.prod(a.views[path].shape)
                described = _describe(a, path)
                row = _row(path, "values", described, described)
                rows.append({**row, "of": size, **dataclasses.asdict(found)})
    report = {
        "a": {"directory": str(a.directory), "step": _step(a)},
        "b": {"directory": str(b.directory), "step": _step(b)},
        "same": not rows,
        "num_leaves": len(a.views.keys() | b.views.keys()),
        "bytes_compared": total,
        # Of these just the digests are known to be the same, which were recorded.
        "leaves_unread": num_unread,
        "leaves": rows,
    }
    if output.as_json:
        output.document(report)
    else:
        _show(report, output)
    return 1 if rows else 0


def _boxes(a: Saved, b: Saved, path: str, full: bool) -> Iterator[Box]:
    """Lists what has to be read of a leaf that has the same shape on both sides."""
    view: View = a.views[path]
    if full or a.manifest is None or b.manifest is None:
        yield from iter_boxes(view.shape, view.dtype.itemsize, _BOX_BYTES)
        return
    sums = [saved.manifest.leaves[path].lanes() for saved in (a, b) if saved.manifest]
    if any(not len(lanes) for lanes in sums):
        yield from iter_boxes(view.shape, view.dtype.itemsize, _BOX_BYTES)
        return
    blocks = Blocks.of(view.shape, view.dtype.itemsize)
    differs = (sums[0] != sums[1]).any(axis=1)
    for index, is_other in zip(blocks, differs, strict=True):
        if not is_other:
            continue
        block = blocks.box(index)
        # A block that is one long row is read in parts.
        for part in iter_boxes(box_shape(block), view.dtype.itemsize, _BOX_BYTES):
            yield tuple(
                (first + start, first + stop)
                for (first, _), (start, stop) in zip(block, part, strict=True)
            )


def _describe(saved: Saved, path: str) -> str:
    if saved.manifest is None:
        return saved.views[path].describe()
    leaf = saved.manifest.leaves[path]
    # Words of keys are what is stored of them.
    return f"{leaf.stored_dtype.name}{list(leaf.stored_shape)}"


def _alone(path: str, side: str, saved: Saved) -> dict[str, Any]:
    found = {side: _describe(saved, path)}
    return _row(path, f"only in {side}", found.get("a"), found.get("b"))


def _row(path: str, what: str, a: str | None, b: str | None) -> dict[str, Any]:
    return {"leaf": path, "differs": what, "a": a, "b": b}


def _step(saved: Saved) -> int | None:
    return saved.manifest.step if saved.manifest else None


def _show(report: dict[str, Any], output: Output) -> None:
    for side in "ab":
        step = report[side]["step"]
        text = "" if step is None else f"  step {step}"
        output.line(f"{side.upper()}  {report[side]['directory']}{text}")
    unread, total = report["leaves_unread"], report["num_leaves"]
    if report["same"]:
        text = f"the same: {counted(total, 'leaf')}"
        if unread:
            what = "nothing was read" if unread == total else f"{unread} were not read"
            text = (
                f"the same by their recorded digests: {counted(total, 'leaf')}; {what} "
                "(--full reads)"
            )
        output.line(text, style="green")
        return
    output.line()
    rows = []
    for row in report["leaves"]:
        array = row["a"] or row["b"]
        if row["differs"] == "array":
            array = f"{row['a']} | {row['b']}"
        num = "" if "of" not in row else f"{row['num_elements']:,} of {row['of']:,}"
        num = "all" if row.get("of") == row.get("num_elements", -1) else num
        largest = "" if row.get("max_abs") is None else f"{row['max_abs']:.4g}"
        ulp = "" if row.get("max_ulp") is None else _format_ulp(row["max_ulp"])
        what = "shape or dtype" if row["differs"] == "array" else row["differs"]
        what = "" if what == "values" else what.replace(" a", " A").replace(" b", " B")
        rows.append((row["leaf"], array, what, num, largest, ulp))
    header = ["leaf", "array", "differs", "elements", "max abs", "max ulp"]
    output.table(header, rows, right=[3, 4, 5], is_tree=True)
    output.line()
    verb = "differs" if len(rows) == 1 else "differ"
    output.line(f"{len(rows)} of {counted(total, 'leaf')} {verb}")
    if unread:
        others = counted(unread, "leaf", "has", "have")
        output.line(f"{others} the same recorded digests, and nothing of them was read")


def _format_ulp(ulp: int) -> str:
    return f"{ulp:,}" if ulp < 10**6 else f"{ulp:.1e}"
