"""`shardkit ckpt import`: what others have written, as a checkpoint of shardkit.

Owns the choice of a format. What comes out has a manifest, digests and checksums, and
no more leaves than the source: `Trainer.restore(remap=…)` says what begins anew.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from shardkit.checkpoint.families import Layout
from shardkit.checkpoint.huggingface import import_huggingface
from shardkit.checkpoint.mapping import counted
from shardkit.checkpoint.maxtext import from_maxtext, infer_maxtext
from shardkit.checkpoint.orbax_trees import from_linen, from_nnx
from shardkit.checkpoint.safetensors_files import open_safetensors
from shardkit.checkpoint.views import View
from shardkit.command.looks import check_format
from shardkit.command.options import (
    add_compress,
    add_limit,
    add_maxtext,
    add_step,
    names,
    number,
)
from shardkit.command.output import Output
from shardkit.command.sources import check_source, open_source
from shardkit.command.staging import check_step, write_step
from shardkit.report.terminal import format_bytes

__all__ = ["HELP", "add_arguments", "run"]

HELP = "make a checkpoint of what others have written"
_BODY = "params/params/"
Tree = Mapping[str, View]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Says what the verb takes."""
    add = parser.add_argument
    add("path", metavar="SRC", type=Path, help="a file or a directory")
    add("out", metavar="OUT", type=Path, help="a directory of checkpoints, new or old")
    add("--from", required=True, choices=[*_FORMATS], dest="source", help="the format")
    add_step(parser)
    add(
        "--as-step",
        metavar="N",
        type=number(0),
        default=0,
        help="under which step to write it; 0 by default",
    )
    add(
        "--scan-layers",
        action="store_true",
        help="huggingface, maxtext: stack the layers, as models.gpt does if asked to",
    )
    add(
        "--allow",
        metavar="KEY,…",
        type=names,
        default=[],
        help="huggingface: keys of config.json that may ask for something else",
    )
    add("--tree", choices=("nnx", "linen"), help="orbax: what Flax had stored")
    add("--model", metavar="PATH", default="", help="nnx: where the model is in it")
    add("--optimizer", metavar="PATH", help="nnx: where its optimizer is")
    add(
        "--numbered",
        metavar="NAME,…",
        type=names,
        default=[],
        help="linen: lists of modules, which it calls layers_0, layers_1, …",
    )
    add_maxtext(parser)
    add_compress(parser)
    add_limit(parser)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Imports one tree."""
    check_step(arguments.out, arguments.as_step)
    check_format(arguments.path, arguments.step, arguments.source)
    tree = _FORMATS[arguments.source](arguments, output)
    where = write_step(
        arguments.out,
        tree,
        output,
        step=arguments.as_step,
        limit_bytes=arguments.limit_mib << 20,
        compress=arguments.compress,
    )
    total = sum(view.nbytes for view in tree.values())
    report = {
        "source": str(arguments.path),
        "format": arguments.source,
        "directory": str(where),
        "step": arguments.as_step,
        "num_leaves": len(tree),
        "bytes": total,
    }
    if output.as_json:
        output.document(report)
    else:
        made = f"{counted(len(tree), 'leaf')}, {format_bytes(total)}"
        output.line(f"{where}: {made}, from {arguments.path}")
    return 0


def _huggingface(arguments: argparse.Namespace, output: Output) -> Tree:
    layout = Layout(scan_layers=arguments.scan_layers)
    return import_huggingface(arguments.path, layout, allow=arguments.allow)[1]


def _safetensors(arguments: argparse.Namespace, output: Output) -> Tree:
    return open_safetensors(arguments.path)


def _orbax(arguments: argparse.Namespace, output: Output) -> Tree:
    saved = open_source(arguments.path, arguments.step)
    if saved.manifest is not None:
        check_source(saved, output)
    tree = saved.views
    if arguments.tree == "nnx":
        model, optimizer = arguments.model, arguments.optimizer
        return from_nnx(tree, model=model, optimizer=optimizer).apply(tree)
    if arguments.tree == "linen":
        return from_linen(tree, numbered=arguments.numbered).apply(tree)
    return tree


def _maxtext(arguments: argparse.Namespace, output: Output) -> Tree:
    tree = open_source(arguments.path, arguments.step).views
    decoder, theirs = infer_maxtext(
        tree,
        rotates_pairs=arguments.rotates_pairs,
        normalizes_logits=not arguments.no_normalize_logits,
        scan_axis=1 if arguments.scan_axis is None else arguments.scan_axis,
    )
    params = {path: view for path, view in tree.items() if path.startswith(_BODY)}
    if others := len(tree) - len(params):
        left = counted(others, "leaf", "is", "are")
        output.note(f"{arguments.path}: {left} no params, and left behind")
    layout = Layout(scan_layers=arguments.scan_layers)
    return from_maxtext(decoder, theirs, layout).apply(params)


_FORMATS = {
    "huggingface": _huggingface,
    "safetensors": _safetensors,
    "orbax": _orbax,
    "maxtext": _maxtext,
}
