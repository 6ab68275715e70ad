"""`shardkit ckpt merge`: an average of several checkpoints.

Owns which checkpoints are averaged, and with which weights. The arithmetic is
`shardkit.checkpoint.merge`'s.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardkit.checkpoint.mapping import counted
from shardkit.checkpoint.merge import (
    average,
    decay_weights,
    ema_weights,
    metric_weights,
)
from shardkit.checkpoint.reader import Saved
from shardkit.command.options import add_compress, add_limit, names, number, numbers
from shardkit.command.output import Output
from shardkit.command.sources import all_steps, check_source, open_source
from shardkit.command.staging import check_step, write_step
from shardkit.errors import ConfigError
from shardkit.report.terminal import format_bytes

__all__ = ["HELP", "add_arguments", "run"]

HELP = "average several checkpoints"
_NEEDED_BY = {"weights": "average", "metric": "metric", "decay": "ema"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Says what the verb takes."""
    add = parser.add_argument
    add("out", metavar="OUT", type=Path, help="a directory of checkpoints, new or old")
    add("paths", metavar="PATH", type=Path, nargs="+")
    add("--steps", metavar="N,…", type=names, help="which steps of a single PATH")
    add("--last", metavar="N", type=number(1), help="so many of its newest steps")
    add(
        "--how",
        required=True,
        choices=("average", "metric", "ema", "decay"),
        help="average: equal weights, or --weights; metric: by --metric of the last "
        "evaluation; ema: an average that keeps --decay of itself; decay: as if the "
        "learning rate had decayed (--shape)",
    )
    add("--weights", metavar="W,…", type=numbers, help="one for each checkpoint")
    add("--metric", metavar="NAME", help="such as loss")
    add("--temperature", metavar="T", type=float, help="weights exp(-metric / T)")
    add("--power", metavar="P", type=float, help="weights metric ** -P")
    add("--better", choices=("lower", "higher"), default="lower")
    add("--decay", metavar="D", type=float, help="from 0 to less than 1")
    add("--shape", choices=("linear", "cosine", "inverse_sqrt"), default="linear")
    add(
        "--params",
        metavar="NAME,…",
        type=names,
        default=["params"],
        help="what is averaged, params by default; the rest is the newest's",
    )
    add(
        "--rest",
        choices=("newest", "equal"),
        default="newest",
        help="take what is not averaged from the newest, or demand that it is equal",
    )
    add_compress(parser)
    add_limit(parser)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Merges, under the step of the newest."""
    for option, how in _NEEDED_BY.items():
        if getattr(arguments, option) is not None and arguments.how != how:
            raise ConfigError(f"command line: --{option} goes with --how {how}")
    found = _open(arguments)
    weights = _weights(found, arguments)
    merged = average(
        [saved.views for saved in found],
        weights,
        params=arguments.params,
        rest=arguments.rest,
    )
    newest = found[-1].manifest
    check_step(arguments.out, newest.step if newest else 0)
    for saved in found:
        check_source(saved, output)
    where = write_step(
        arguments.out,
        merged,
        output,
        # What was measured of one of them does not hold for their average.
        like=newest and dataclasses.replace(newest, metrics={}),
        records=newest.leaves if newest else None,
        limit_bytes=arguments.limit_mib << 20,
        compress=arguments.compress,
    )
    sources = [
        {
            "directory": str(saved.directory),
            "step": saved.manifest.step if saved.manifest else None,
            "weight": weight,
        }
        for saved, weight in zip(found, weights, strict=True)
    ]
    if output.as_json:
        output.document({"directory": str(where), "sources": sources})
        return 0
    _show(where, sources, sum(view.nbytes for view in merged.values()), output)
    return 0


def _show(
    where: Path, sources: list[dict[str, Any]], num_bytes: int, output: Output
) -> None:
    rows = [
        (
            "" if x["step"] is None else str(x["step"]),
            f"{x['weight']:.4f}",
            x["directory"],
        )
        for x in sources
    ]
    output.table(["step", "weight", "checkpoint"], rows, right=[0, 1])
    output.line(f"{where}: {format_bytes(num_bytes)}")


def _open(arguments: argparse.Namespace) -> list[Saved]:
    paths: list[Path] = arguments.paths
    if len(paths) > 1:
        if arguments.steps or arguments.last:
            raise ConfigError(
                "command line: --steps and --last choose among the steps of a single "
                "PATH; name each step's directory instead"
            )
        return sorted((open_source(path) for path in paths), key=_step)
    there = {step: path for step, path in all_steps(paths[0]) if step is not None}
    if arguments.steps:
        absent = [text for text in arguments.steps if text not in map(str, there)]
        if absent:
            raise ConfigError(
                f"--steps: expected steps of {paths[0]}, which has {[*there]}, found "
                f"{', '.join(absent)}"
            )
        chosen = sorted({int(text) for text in arguments.steps})
    else:
        chosen = sorted(there)
    if arguments.last:
        if arguments.last > len(chosen):
            raise ConfigError(
                f"--last {arguments.last}: {paths[0]} has "
                + counted(len(chosen), "step")
            )
        chosen = chosen[-arguments.last :]
    return [open_source(there[step]) for step in chosen] or [open_source(paths[0])]


def _step(saved: Saved) -> int:
    return saved.manifest.step if saved.manifest else 0


def _weights(found: Sequence[Saved], arguments: argparse.Namespace) -> list[float]:
    """Returns a weight for each checkpoint, of which the sum is 1."""
    if arguments.how == "ema":
        if arguments.decay is None:
            raise ConfigError("command line: --how ema needs --decay D")
        return ema_weights(arguments.decay, len(found))
    if arguments.how == "decay":
        return decay_weights(arguments.shape, len(found))
    if arguments.how == "metric":
        metrics = _metrics(found, arguments.metric)
        if (arguments.temperature is None) == (arguments.power is None):
            raise ConfigError(
                "command line: --how metric needs either --temperature T or --power P"
            )
        return metric_weights(
            metrics,
            temperature=arguments.temperature,
            power=arguments.power,
            better=arguments.better,
        )
    given = arguments.weights or [1.0] * len(found)
    total = sum(given)
    # What is wrong with them the library says.
    return [weight / total for weight in given] if total > 0 else given


def _metrics(found: Sequence[Saved], name: str | None) -> list[float]:
    if name is None:
        raise ConfigError("command line: --how metric needs --metric NAME")
    values = [(s.manifest.metrics if s.manifest else {}).get(name) for s in found]
    lacking = [
        str(saved.directory)
        for saved, value in zip(found, values, strict=True)
        if not isinstance(value, int | float)
    ]
    if lacking:
        raise ConfigError(
            f"--metric {name}: is not recorded in {', '.join(lacking)}; save after an "
            "evaluation"
        )
    return [float(value) for value in values if value is not None]
