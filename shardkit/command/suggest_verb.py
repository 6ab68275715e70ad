"""`shardkit suggest`: which dims `tensor` should cut, found from a config's own loss.

Owns the command line of it and the tables that it prints. No device is used and
nothing is compiled. What is found is the business of `planner.tensor_rules`.
"""

import argparse
import dataclasses
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardkit import config as configs
from shardkit.command.options import number
from shardkit.command.output import Output
from shardkit.config.toml import dump_toml
from shardkit.report.terminal import format_bytes

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "find tensor-parallel axes from the loss, as rules to accept or edit"
EPILOG = """\
The rules are printed to be pasted into the config; docs/tensor-rules.md explains them.

  shardkit suggest configs/vit.toml
  shardkit suggest configs/gpt2_124m.toml --tensor 4

exit codes:
  0    rules were found
  1    none were: there are no two products of which one sum would close a cut
  2    bad input: a message says what and where
"""
_KINDS = {
    "row": "sums that close pairs",
    "lookup": "rows of tables",
    "sum": "sums over what is cut",
    "argmax": "places of largest elements, from every device",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Says what the verb takes."""
    parser.add_argument("config", metavar="CONFIG.toml", type=Path)
    parser.add_argument(
        "--tensor",
        metavar="K",
        type=number(2),
        help="the size of the axis; what it does not divide stays whole [left open]",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Finds the rules of one config."""
    config = configs.load(arguments.config)
    # What follows needs JAX, and what is above is refused without waiting for that.
    from shardkit.build import placement_rules
    from shardkit.command.plan_job import (
        abstract_microbatch,
        find_modules,
        read_configured_model,
    )
    from shardkit.planner.tensor_rules import find_tensor_rules

    find_modules()
    model, _ = read_configured_model(config)
    found = find_tensor_rules(
        model,
        abstract_microbatch(config),
        size=arguments.tensor,
        **placement_rules(config, model),
    )
    if output.as_json:
        output.document({"config": str(arguments.config), **dataclasses.asdict(found)})
    else:
        _show(found, arguments, output)
    return 0 if found.pairs else 1


def _show(found: Any, arguments: argparse.Namespace, output: Output) -> None:
    num = sum(leaf.dim >= 0 for leaf in found.leaves)
    title = f"{arguments.config}: tensor cuts {num} of {len(found.leaves)} parameters"
    output.line(title, style="bold")
    if found.pairs:
        output.facts({"pieces": _pieces(found)})
    output.line()
    header = ["parameter", "shape", "", "cut", "why"]
    output.table(header, [*_rows(found.leaves)], right=[2])
    output.line()
    if not found.pairs:
        why = "every cut would take more than a sum for two products"
        if any("does not divide" in leaf.reason for leaf in found.leaves):
            why = f"{found.size} divides none of the dims that could be cut"
        output.line(f"None found: {why}.")
        return
    _show_exchanges(found, output)
    output.line()
    _show_rules(found.written, output)


def _pieces(found: Any) -> str:
    if found.size is not None:
        return str(found.size)
    divided: dict[int, list[str]] = {}
    for pair in found.pairs:
        name = _any_number((pair.columns or pair.tables)[0])
        names = divided.setdefault(pair.divisor, [])
        names += [name] * (name not in names)
    each = [f"{size} for {', '.join(names)}" for size, names in divided.items()]
    return f"left open, any number that divides {'; '.join(each)}"


def _rows(leaves: Any) -> Iterator[tuple[str, ...]]:
    """One row for parameters that differ in numbers of their paths alone."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for leaf in leaves:
        reason = re.sub(r"\bpair \d+", "its pair", _any_number(_near(leaf)))
        key = (_any_number(leaf.path), leaf.shape, leaf.dim, reason)
        groups.setdefault(key, []).append(leaf)
    for (path, shape, dim, reason), group in groups.items():
        first = group[0]
        is_alone = len(group) == 1
        yield (
            first.path if is_alone else path,
            "×".join(map(str, shape)) or "scalar",
            "" if is_alone else f"×{len(group)}",
            "-" if dim < 0 else f"dim {dim}",
            _near(first) if is_alone else reason,
        )


def _near(leaf: Any) -> str:
    """The reason, with what is named in it as seen from the parameter's parents."""
    parents, text = leaf.path.split("/")[:-1], leaf.reason
    for length in range(len(parents), 0, -1):
        text = text.replace("/".join(parents[:length]) + "/", "")
    return text


def _any_number(text: str) -> str:
    """Stars for the numbers in paths.

    >>> _any_number("dim 0: layers/3/mlp_1")
    'dim 0: layers/*/mlp_*'
    """
    return re.sub(r"(?<=[/_])\d+\b|\b\d+(?=/)", "*", text)


def _show_exchanges(found: Any, output: Output) -> None:
    rows = []
    for exchange in found.exchanges:
        size = format_bytes(exchange.num_bytes)
        if exchange.kind == "all-gather":
            size += " a device"
        rows.append((exchange.kind, str(exchange.count), size, _KINDS[exchange.of]))
    header = ["loss of a microbatch", "count", "bytes", "of what"]
    output.table(header, rows, right=[1, 2])


def _show_rules(written: Any, output: Output) -> None:
    """Writes what is to be pasted, and what cannot be said that way."""
    if written.axis_rules or written.path_rules:
        said = "For the config, in place of its rules for the same, before the others:"
        output.line(said, style="dim")
        table = {
            "axis_rules": {n: axis or "" for n, axis in written.axis_rules.items()},
            "path_rules": _plain(written.path_rules),
        }
        kept = {name: rules for name, rules in table.items() if rules}
        output.line(dump_toml(kept).rstrip())
        output.line()
        output.line("For a program:", style="dim")
        for name in kept:
            rules = getattr(written, name)
            output.line(f"{name}={{")
            for key, value in rules.items():
                output.line(f"    {key!r}: {value!r},")
            output.line("},")
    for place, note in enumerate(written.notes):
        if place or written.axis_rules or written.path_rules:
            output.line()
        for line in textwrap.wrap(f"{note[0].upper()}{note[1:]}.", 98):
            output.line(line)


def _plain(rules: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names as TOML has them, which knows no None."""
    return {glob: [name or "" for name in names] for glob, names in rules.items()}
