"""`shardkit report`: the page of a run, and what several runs have in common.

Owns the command line of it. What is in a page and what a comparison finds are
`shardkit.report`'s business; nothing is trained, and nothing but pages is written.
"""

import argparse
from pathlib import Path
from typing import Any

from shardkit.command.output import Output
from shardkit.errors import ConfigError
from shardkit.report.comparison import Comparison, compare_stored
from shardkit.report.comparison_page import write_comparison
from shardkit.report.jsonl import write_atomically
from shardkit.report.page import render_page
from shardkit.report.page_data import page_data
from shardkit.report.stored_run import StoredRun
from shardkit.report.terminal import format_bytes

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "write the page of a run, or compare runs bit by bit"
EPILOG = """\
RUN is the directory of a run of train.py, finished or not: of one its report.html is
written anew, of several the first is compared with each of the others.

  shardkit report runs/tiny-001
  shardkit report runs/tiny-001 runs/tiny-002 --out both.html

exit codes:
  0    done; the runs agree, or differ as they may
  1    runs differ that should have the same bits
  2    bad input: a message says what and where
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Says what the verb takes."""
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    parser.add_argument(
        "--out",
        metavar="FILE.html",
        type=Path,
        help="where the page goes [report.html in the run; of several runs, nowhere]",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Writes the page of one run, or compares several: 1 if they are wrong."""
    out = arguments.out
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        what = "a directory" if out.is_dir() else "no directory for it"
        raise ConfigError(f"--out {out}: expected a file to write, found {what}")
    runs = _read(arguments.runs)
    if len(runs) == 1:
        _report_one(runs[0], out or runs[0].path / "report.html", output)
        return 0
    found = [compare_stored(runs[0], other) for other in runs[1:]]
    if out is not None:
        write_comparison(out, runs, found)
    if output.as_json:
        output.document(_document(runs, found, out))
    else:
        for other, each in zip(runs[1:], found, strict=True):
            output.line(f"{other.path} beside {runs[0].path}", style="bold")
            output.facts(each.rows())
        if out is not None:
            output.line(f"{out} shows it")
    return 1 if any(each.is_wrong for each in found) else 0


def _read(paths: list[Path]) -> list[StoredRun]:
    """Reads all runs, and tells of all that cannot be read at once."""
    runs, problems = [], []
    for path in paths:
        try:
            runs.append(StoredRun.read(path))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return runs


def _report_one(stored: StoredRun, out: Path, output: Output) -> None:
    data = page_data(stored)
    page = render_page(data)
    write_atomically(out, page)
    if output.as_json:
        output.document({**_facts(stored), "page": str(out)})
        return
    output.line(f"{out}  {format_bytes(len(page.encode()))}", style="bold")
    rows = {"state": data.state}
    rows |= {name: f"{value}  {more}".rstrip() for name, value, more in data.facts}
    output.facts(rows | dict(data.details))


def _facts(stored: StoredRun) -> dict[str, Any]:
    last = stored.steps[-1] if stored.steps else {}
    return {
        "run": str(stored.path),
        "steps": stored.num_steps,
        "is_finished": stored.is_finished,
        "final_loss": last.get("loss"),
        "final_loss_bits": last.get("loss_bits"),
        "state_digest": stored.summary.get("state_digest"),
        "num_reconfigurations": sum(
            record.get("event") == "reconfigure" for record in stored.records
        ),
        "num_recoveries": len(stored.recoveries),
    }


def _document(
    runs: list[StoredRun], found: list[Comparison], out: Path | None
) -> dict[str, Any]:
    pairs = [
        {"a": str(runs[0].path), "b": str(other.path), **each.to_dict()}
        for other, each in zip(runs[1:], found, strict=True)
    ]
    page = None if out is None else str(out)
    is_ok = not any(each.is_wrong for each in found)
    return {"runs": [*map(_facts, runs)], "pairs": pairs, "page": page, "ok": is_ok}
