"""`shardkit explain`: what the compiler made of a config's step.

Owns the command line of it. What is compiled is `explain_job`'s business, what is found
in that `shardkit.explain`'s, how it is shown that of `explain_tables` and
`explain_page`.
"""

import argparse
import dataclasses
from pathlib import Path

from shardkit import config as configs
from shardkit.command.options import (
    MOST_EMULATED,
    add_devices,
    can_write,
    counts,
    device_count,
)
from shardkit.command.output import Output
from shardkit.errors import ConfigError

__all__ = ["EPILOG", "FORBIDDEN", "HELP", "add_arguments", "run"]

HELP = "say what devices exchange in a config's step, why, and what lies where"
EPILOG = """\
The step is compiled, for emulated devices where there is no accelerator, and not run;
no data are read but those of a factory of your own. docs/explain.md says more.

  shardkit explain configs/tiny.toml --devices 8
  shardkit explain configs/tiny.toml --devices 8 --mesh tensor=2
  shardkit explain configs/tiny.toml --devices 8 --leaf 'params/*kernel*'
  shardkit explain configs/tiny.toml --devices 8 --forbid 'all-gather@fsdp>4MiB'

--forbid takes [total ]WHAT[@AXIS][>SIZE]: a kind of collective such as all-gather, a
cause such as resharding or gather, or * for any.

exit codes:
  0    done
  2    bad input: a message says what and where
  4    something is exchanged that --forbid forbids
"""
FORBIDDEN = 4
"""What it exits with if a rule is broken."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Says what the verb takes."""
    parser.add_argument("config", metavar="CONFIG.toml", type=Path)
    add_devices(parser)
    parser.add_argument(
        "--mesh",
        metavar="SIZES",
        type=counts,
        default={},
        help="sizes of mesh axes, over those of the config: data=1,tensor=2",
    )
    parser.add_argument(
        "--leaf",
        metavar="GLOB",
        action="append",
        default=[],
        help="draw these leaves; repeatable",
    )
    parser.add_argument(
        "--svg", metavar="FILE", type=Path, help="draw all leaves, or those of --leaf"
    )
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="write all of it as one page"
    )
    parser.add_argument(
        "--forbid",
        metavar="RULE",
        action="append",
        default=[],
        help="exit with 4 if this is exchanged; repeatable",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Explains one config."""
    config = configs.load(arguments.config)
    mesh = dataclasses.replace(config.mesh, **arguments.mesh)
    config = dataclasses.replace(config, mesh=mesh)
    num_devices = device_count(arguments, config.devices, MOST_EMULATED)
    written = {"--svg": arguments.svg, "--html": arguments.html}
    bad = [
        f"{name} {path}"
        for name, path in written.items()
        if path and not can_write(path)
    ]
    if bad:
        raise ConfigError(
            f"{', '.join(bad)}: expected a file in a directory that is there"
        )
    # What follows needs JAX, and what is above is refused without waiting for that.
    from shardkit.command.explain_document import document
    from shardkit.command.explain_job import explain
    from shardkit.command.explain_page import write_page
    from shardkit.command.explain_pictures import choose
    from shardkit.command.explain_tables import show, show_broken
    from shardkit.explain.forbid import find_broken, parse_rule
    from shardkit.explain.picture_svg import svg_file
    from shardkit.report.jsonl import write_atomically

    rules = [parse_rule(text) for text in arguments.forbid]
    job = explain(config, num_devices)
    groups = choose(job.leaves, arguments.leaf)
    broken = find_broken(rules, job.program.exchanged)
    if arguments.svg:
        write_atomically(arguments.svg, svg_file([x.picture for x in groups]))
    if arguments.html:
        write_page(arguments.html, str(arguments.config), job, groups, broken)
    if output.as_json:
        output.document(document(str(arguments.config), job, broken))
    else:
        show(str(arguments.config), job, groups if arguments.leaf else [], output)
        show_broken(broken, len(rules), output)
        for path in filter(None, (arguments.svg, arguments.html)):
            output.line(f"{path} shows it")
    return FORBIDDEN if broken else 0
