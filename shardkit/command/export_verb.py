"""`shardkit ckpt export`: a checkpoint as others read it.

Owns the choice of a format and of what goes into it. The formats are those of
`shardkit.checkpoint`.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardkit.checkpoint.families import infer_decoder, infer_layout
from shardkit.checkpoint.huggingface import export_huggingface
from shardkit.checkpoint.manifest import Manifest
from shardkit.checkpoint.mapping import counted
from shardkit.checkpoint.maxtext import MaxTextLayout, to_maxtext
from shardkit.checkpoint.orbax_trees import to_linen, to_nnx
from shardkit.checkpoint.reader import Saved
from shardkit.checkpoint.safetensors_files import write_safetensors
from shardkit.checkpoint.views import View
from shardkit.command.options import (
    add_limit,
    add_maxtext,
    add_step,
    names,
    number,
    read_json,
    recorded_config,
)
from shardkit.command.output import Output
from shardkit.command.sources import check_source, open_source
from shardkit.command.staging import check_new, staged, told
from shardkit.errors import ConfigError, RestoreError
from shardkit.report.terminal import format_bytes

__all__ = ["HELP", "add_arguments", "run"]

HELP = "write a checkpoint in a format of others"
Tree = Mapping[str, View]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Says what the verb takes."""
    add = parser.add_argument
    add("path", metavar="PATH", type=Path)
    add(
        "out", metavar="OUT", type=Path, help="new; a .safetensors file, or a directory"
    )
    add("--to", required=True, choices=[*_FORMATS], help="the format")
    add_step(parser)
    add(
        "--prefix",
        metavar="PATH/",
        help="what is exported: ema/ for averaged parameters. By default params/, and "
        "everything for safetensors and orbax",
    )
    add("--config", metavar="FILE.json", type=Path, help="more keys for config.json")
    add(
        "--max-sequence-length",
        metavar="N",
        type=number(1),
        help="of a Llama, where the run has not recorded it",
    )
    add("--rope-theta", metavar="X", type=float, help="likewise")
    add("--shard-mib", metavar="N", type=number(1), help="cut safetensors above this")
    add("--tree", choices=("nnx", "linen"), help="orbax: as Flax would have stored it")
    add(
        "--numbered",
        metavar="NAME,…",
        type=names,
        default=[],
        help="orbax, linen: lists of modules, to be called layers_0, layers_1, …",
    )
    add_maxtext(parser)
    add_limit(parser)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Exports one step."""
    check_new(arguments.out)
    saved = open_source(arguments.path, arguments.step)
    default = "params/" if arguments.to in ("huggingface", "maxtext") else ""
    prefix = default if arguments.prefix is None else arguments.prefix
    chosen = {p: view for p, view in saved.views.items() if p.startswith(prefix)}
    if not chosen:
        raise RestoreError(f"{saved.directory}: has nothing under {prefix!r}")
    # What is unfit for the format is said before anything is read.
    tree, write = _FORMATS[arguments.to](chosen, prefix, saved, arguments)
    check_source(saved, output)
    total = sum(view.nbytes for view in tree.values())
    with staged(arguments.out) as staging, output.progress("writing", total) as tell:
        write(told(tree, tell), staging)
    report = {
        "source": str(saved.directory),
        "step": saved.manifest.step if saved.manifest else None,
        "directory": str(arguments.out),
        "format": arguments.to,
        "num_leaves": len(tree),
        "bytes": total,
    }
    if output.as_json:
        output.document(report)
    else:
        output.line(
            f"{arguments.out}: {counted(len(tree), 'leaf')}, {format_bytes(total)}, "
            f"as {arguments.to}, from {saved.directory}"
        )
    return 0


def _huggingface(
    tree: Tree, prefix: str, saved: Saved, arguments: argparse.Namespace
) -> tuple[Tree, Any]:
    # `models.gpt` records what it was made with, where the run's config says it.
    recorded = _recorded_options(saved.manifest)
    options: dict[str, Any] = {
        "prefix": prefix,
        "max_sequence_length": arguments.max_sequence_length
        or recorded.get("max_sequence_length"),
        "rope_theta": arguments.rope_theta or recorded.get("rope_theta"),
        "config": read_json(arguments.config) if arguments.config else None,
        "limit_bytes": arguments.limit_mib << 20,
        **_shards(arguments),
    }
    family = infer_decoder(tree, infer_layout(tree, prefix)).family
    needed = ("max_sequence_length", "rope_theta") if family == "llama" else ()
    if absent := [name for name in needed if options[name] is None]:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in absent)
        raise ConfigError(
            f"{saved.directory}: is a Llama, of which neither weights nor records tell "
            f"all; give {flags}, as the model was made"
        )
    return tree, lambda tree, _: export_huggingface(arguments.out, tree, **options)


def _safetensors(
    tree: Tree, prefix: str, saved: Saved, arguments: argparse.Namespace
) -> tuple[Tree, Any]:
    options = {"limit_bytes": arguments.limit_mib << 20, **_shards(arguments)}
    return tree, lambda tree, _: write_safetensors(arguments.out, tree, **options)


def _orbax(
    tree: Tree, prefix: str, saved: Saved, arguments: argparse.Namespace
) -> tuple[Tree, Any]:
    if arguments.tree == "nnx":
        optimizer = (
            "optimizer" if any(p.startswith("opt_state/") for p in tree) else None
        )
        tree = to_nnx(tree, optimizer=optimizer).apply(tree)
    elif arguments.tree == "linen":
        has_value = any(p.startswith("params/") and p.endswith("/value") for p in tree)
        suffix = "/value" if has_value else ""
        tree = to_linen(numbered=arguments.numbered, suffix=suffix).apply(tree)

    def write(tree: Tree, staging: Path) -> None:
        from shardkit.checkpoint.plain import write_orbax

        limit_bytes = arguments.limit_mib << 20
        write_orbax(arguments.out, tree, staging, limit_bytes=limit_bytes)

    return tree, write


def _maxtext(
    tree: Tree, prefix: str, saved: Saved, arguments: argparse.Namespace
) -> tuple[Tree, Any]:
    ours = infer_layout(tree, prefix)
    theirs = MaxTextLayout(
        scan_axis=arguments.scan_axis,
        rotates_pairs=arguments.rotates_pairs,
        normalizes_logits=not arguments.no_normalize_logits,
    )
    made = to_maxtext(infer_decoder(tree, ours), ours, theirs).apply(tree)
    plain = argparse.Namespace(**{**vars(arguments), "tree": None})
    return _orbax(made, "", saved, plain)


_FORMATS = {
    "huggingface": _huggingface,
    "safetensors": _safetensors,
    "orbax": _orbax,
    "maxtext": _maxtext,
}


def _shards(arguments: argparse.Namespace) -> dict[str, int]:
    if arguments.shard_mib is None:
        return {}
    return {"max_shard_bytes": arguments.shard_mib << 20}


def _recorded_options(manifest: Manifest | None) -> dict[str, Any]:
    prefix = "model.options."
    return {
        key.removeprefix(prefix): value
        for key, value in recorded_config(manifest).items()
        if key.startswith(prefix) and isinstance(value, int | float)
    }
