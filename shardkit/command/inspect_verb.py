"""`shardkit ckpt inspect`: what is in a checkpoint, without reading its arrays.

Owns the table of leaves and what is said above and below it. It verifies nothing.
"""

import argparse
from pathlib import Path
from typing import Any

from shardkit.checkpoint.manifest import LeafRecord
from shardkit.checkpoint.mapping import counted
from shardkit.checkpoint.reader import Saved
from shardkit.command.facts import format_facts
from shardkit.command.mesh_pieces import (
    Piece,
    check_rules,
    cut_all,
    recorded_rules,
)
from shardkit.command.options import add_step, counts, pairs, recorded_config
from shardkit.command.output import Output
from shardkit.command.sources import all_steps, kind_of, open_source
from shardkit.errors import ConfigError
from shardkit.report.terminal import format_bytes, format_mesh

__all__ = ["HELP", "add_arguments", "run"]

HELP = "show leaves, sizes and what is known of the run"
_FACTS = ("digest", "run", "data", "random", "fingerprint", "mesh", "metrics")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Says what the verb takes."""
    parser.add_argument("path", metavar="PATH", type=Path)
    add_step(parser)
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,…",
        type=counts,
        help="also show what each device of such a mesh would hold: fsdp=4,data=2",
    )
    parser.add_argument(
        "--axis-rules",
        metavar="NAME=AXIS,…",
        type=pairs,
        help="logical axis to mesh axis, instead of those that the run has recorded",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Shows one checkpoint."""
    if arguments.axis_rules and not arguments.mesh:
        raise ConfigError("command line: --axis-rules goes with --mesh AXIS=N,…")
    saved = open_source(arguments.path, arguments.step)
    leaves = _leaves(saved)
    check_rules(arguments.axis_rules or {}, leaves.values())
    pieces = None
    if arguments.mesh:
        pieces = cut_all(leaves, _rules(saved, arguments), arguments.mesh)
    report = _report(saved, leaves, pieces, arguments)
    if output.as_json:
        output.document(report)
        return 0
    _show(saved, leaves, pieces, report, output, arguments.axis_rules is not None)
    return 0


def _leaves(saved: Saved) -> dict[str, LeafRecord]:
    if saved.manifest is not None:
        return dict(saved.manifest.leaves)
    return {
        path: LeafRecord(view.shape, view.dtype.name)
        for path, view in saved.views.items()
    }


def _rules(saved: Saved, arguments: argparse.Namespace) -> dict[str, str]:
    """Returns the axis rules that are given, or those that the run has recorded."""
    return arguments.axis_rules or recorded_rules(recorded_config(saved.manifest))


def _report(
    saved: Saved,
    leaves: dict[str, LeafRecord],
    pieces: dict[str, Piece | None] | None,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    manifest = saved.manifest
    report: dict[str, Any] = {
        "directory": str(saved.directory),
        "format": kind_of(saved),
        "step": manifest.step if manifest else None,
        "steps": [s for s, _ in all_steps(arguments.path) if s is not None],
        "num_leaves": len(leaves),
        "bytes": sum(leaf.nbytes for leaf in leaves.values()),
        **{name: getattr(manifest, name, None) for name in _FACTS},
        "leaves": [
            {
                "path": path,
                "shape": leaf.shape,
                "dtype": leaf.dtype,
                "bytes": leaf.nbytes,
                "axes": leaf.axes,
                "layers": leaf.layers,
                "blocks": len(leaf.blocks),
            }
            for path, leaf in leaves.items()
        ],
    }
    if pieces is None:
        return report
    for entry in report["leaves"]:
        piece = pieces[entry["path"]]
        entry["piece"] = piece and {
            "dim": piece.dim,
            "shape": piece.shape,
            "bytes": piece.nbytes,
            "padded": piece.is_padded,
        }
    num_devices = 1
    for size in arguments.mesh.values():
        num_devices *= size
    report["on_mesh"] = {
        "mesh": arguments.mesh,
        "devices": num_devices,
        "axis_rules": _rules(saved, arguments),
        "bytes_per_device": sum(piece.nbytes for piece in pieces.values() if piece),
        "unknown_leaves": sum(piece is None for piece in pieces.values()),
    }
    return report


def _show(
    saved: Saved,
    leaves: dict[str, LeafRecord],
    pieces: dict[str, Piece | None] | None,
    report: dict[str, Any],
    output: Output,
    has_rules: bool,
) -> None:
    output.line(str(saved.directory), style="bold")
    output.facts(format_facts(report, saved.manifest))
    output.line()
    header = ["leaf", "array", "bytes", "axes", "on each device"]
    rows = [
        (
            path,
            f"{leaf.dtype}{list(leaf.shape)}",
            format_bytes(leaf.nbytes),
            # What a mesh makes of them says more, where both have no room.
            "" if pieces and output.is_narrow else _format_axes(leaf),
            "" if pieces is None else _format_piece(leaf, pieces[path]),
        )
        for path, leaf in leaves.items()
    ]
    output.table(header, rows, right=[2], is_tree=True)
    if pieces is None:
        return
    found = report["on_mesh"]
    output.line()
    least = "at least " if found["unknown_leaves"] else ""
    output.line(
        f"Each of {found['devices']} devices ({format_mesh(found['mesh'])}) holds "
        f"{least}{format_bytes(found['bytes_per_device'])} of "
        f"{format_bytes(report['bytes'])}."
    )
    if found["axis_rules"]:
        rules = ", ".join(
            f"{name}={axis}" for name, axis in found["axis_rules"].items()
        )
        model = "" if has_rules else "; a model may have more, see --axis-rules"
        output.line(f"By the axis rules {rules}{model}.")
    if found["unknown_leaves"]:
        output.line(
            f"Of {counted(found['unknown_leaves'], 'leaf')} the axes or the rules are "
            "not recorded. Rules can be given: --axis-rules NAME=AXIS,…"
        )


def _format_axes(leaf: LeafRecord) -> str:
    """Writes the logical axes, and how many layers are stacked.

    >>> _format_axes(LeafRecord((4, 8), "float32", axes=("layers", None)))
    'layers=4 -'
    """
    return " ".join(
        f"layers={leaf.layers}" if name == "layers" else name or "-"
        for name in leaf.axes or ()
    )


def _format_piece(leaf: LeafRecord, piece: Piece | None) -> str:
    if piece is None:
        return "unknown"
    if piece.dim is None:
        return "whole"
    size = f"{piece.shape[piece.dim]} of {leaf.shape[piece.dim]}"
    return f"dim {piece.dim}: {size}{' +pad' if piece.is_padded else ''}"
