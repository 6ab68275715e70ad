"""`shardkit ckpt remap`: one layout becomes another, by rules in TOML.

Owns reading the rules, the dry run, and what the new checkpoint keeps of the old one's
records. The rules themselves are `shardkit.checkpoint.remap`'s.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shardkit.checkpoint.manifest import LeafRecord, Manifest
from shardkit.checkpoint.mapping import Mapped, MappingTable, counted
from shardkit.checkpoint.remap import load_rules
from shardkit.command.options import add_compress, add_limit, add_step
from shardkit.command.output import Output
from shardkit.command.sources import check_source, open_source
from shardkit.command.staging import check_step, write_step
from shardkit.errors import ConfigError, RestoreError
from shardkit.report.terminal import format_bytes

__all__ = ["HELP", "add_arguments", "kept_records", "run"]

HELP = "make another tree of a checkpoint, by rules"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Says what the verb takes."""
    parser.add_argument("path", metavar="PATH", type=Path)
    parser.add_argument(
        "out",
        metavar="OUT",
        type=Path,
        nargs="?",
        help="a directory of checkpoints, new or old; not needed for a dry run",
    )
    add_step(parser)
    parser.add_argument(
        "--rules", metavar="RULES.toml", type=Path, required=True, help="the rules"
    )
    parser.add_argument(
        "--like",
        metavar="PATH",
        type=Path,
        help="a checkpoint whose leaves have to come out, all and no others",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the whole mapping, write nothing"
    )
    add_compress(parser)
    add_limit(parser)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Remaps one step."""
    out: Path = arguments.out or Path()
    if arguments.out is None and not arguments.dry_run:
        raise ConfigError("command line: OUT is missing; or say --dry-run")
    remap = load_rules(arguments.rules)
    saved = open_source(arguments.path, arguments.step)
    wanted = open_source(arguments.like).views if arguments.like else None
    table = remap.plan(saved.views, wanted)
    report = {"source": str(saved.directory), "directory": None, **_report(table)}
    if arguments.dry_run:
        _show_plan(table, report, output)
        if not table.is_complete:
            raise RestoreError(
                f"{counted(len(table.wrong()), 'path', 'is', 'are')} unaccounted for"
            )
        return 0
    views = remap.apply(saved.views, wanted)
    check_step(out, saved.manifest.step if saved.manifest else 0)
    check_source(saved, output)
    where = write_step(
        out,
        views,
        output,
        like=saved.manifest,
        records=kept_records(saved.manifest, table.rows),
        limit_bytes=arguments.limit_mib << 20,
        compress=arguments.compress,
    )
    report["directory"] = str(where)
    if output.as_json:
        output.document(report)
    else:
        total = format_bytes(sum(view.nbytes for view in views.values()))
        output.line(
            f"{where}: {counted(len(views), 'leaf')}, {total}, from {saved.directory}"
        )
    return 0


def kept_records(
    manifest: Manifest | None, rows: Iterable[Mapped]
) -> dict[str, LeafRecord]:
    """Finds what is still known of leaves that have been renamed at most."""
    if manifest is None:
        return {}
    return {
        row.target: manifest.leaves[row.sources[0]]
        for row in rows
        if len(row.sources) == 1 and not row.ops and row.sources[0] in manifest.leaves
    }


def _report(table: MappingTable) -> dict[str, Any]:
    return {
        "complete": table.is_complete,
        "leaves": [
            {
                "target": row.target,
                "shape": row.shape,
                "dtype": row.dtype,
                "sources": row.sources,
                "ops": row.ops,
                "rule": row.rule,
            }
            for row in table.rows
        ],
        "dropped": table.dropped,
        "allowed": table.allowed,
        "unmatched": table.unmatched,
        "missing": table.missing,
        "problems": [{"where": a, "problem": b} for a, b in table.problems],
    }


def _show_plan(table: MappingTable, report: dict[str, Any], output: Output) -> None:
    if output.as_json:
        output.document(report)
        return
    rows = [
        (
            row.target,
            f"{row.dtype}{list(row.shape)}",
            _shorten(row.sources),
            row.ops,
            "" if row.rule is None else str(row.rule),
        )
        for row in table.rows
    ]
    if output.console.is_terminal:
        # Two paths have no room beside one another.
        for target, array, sources, ops, rule in rows:
            output.line(f"{target}  {array}")
            by = f"{ops} (rule {rule})" if rule else ""
            output.line(f"    <- {sources}  {by}".rstrip(), style="dim")
    else:
        output.table(["leaf", "array", "made of", "by", "rule"], rows)
    left = {
        "dropped": table.dropped,
        "allowed to be left out": table.allowed,
        "taken by no rule": table.unmatched,
        "wanted and made by no rule": table.missing,
        "problems": [f"{where}: {problem}" for where, problem in table.problems],
    }
    for what, paths in left.items():
        if paths:
            output.line()
            output.line(f"{what} ({len(paths)}):", style="bold")
            for path in paths:
                output.line(f"  {path}")


def _shorten(sources: tuple[str, ...]) -> str:
    if len(sources) <= 2:
        return ", ".join(sources) or "nothing"
    return f"{sources[0]} … {sources[-1]} ({len(sources)})"
