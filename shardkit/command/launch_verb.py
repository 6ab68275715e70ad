"""`shardkit launch`: runs a command in several processes, and goes on without some.

Owns the command line of it. What is asked for is checked before anything is started;
the exit code is the run's.
"""

import argparse
import contextlib
import itertools
import os
import sys
from pathlib import Path

from shardkit.chaos.faults import parse_fault
from shardkit.cluster.deadlines import Deadlines
from shardkit.cluster.launch import (
    ENGINES,
    check_command,
    launch,
    new_run,
    open_directory,
)
from shardkit.cluster.protecting import groups_of
from shardkit.cluster.settings import Settings
from shardkit.cluster.split import plan_hosts
from shardkit.command.options import number, pairs
from shardkit.command.output import Output
from shardkit.errors import ConfigError
from shardkit.report.run_dir import claim
from shardkit.snapshot.groups import Redundancy
from shardkit.snapshot.parity import coefficient_tables

__all__ = ["EPILOG", "HELP", "add_arguments", "check_redundancy", "run"]

HELP = "run a command in several processes, and go on when some of them fail"
EPILOG = """\
The command is started once for every process, and once more for every standby. It has
to call shardkit.cluster.join, as train.py does:

  shardkit launch --processes 4 -- python train.py configs/tiny.toml

signals:
  SIGTERM  save and leave, to be gone on from; a second one ends everything at once
  SIGINT   end everything at once

exit codes:
  0    finished
  1    an error of the program's own, or nothing left to go on with
  2    bad input: a message says what and where
  75   left, the state is saved
  130  interrupted
  Others are the command's.
"""
_MOST_LOSSES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Says what the verb takes."""
    parser.add_argument(
        "--processes", metavar="N", type=number(1), required=True, help="how many"
    )
    parser.add_argument(
        "--hosts",
        metavar="H",
        type=number(1),
        help="on how many hosts, emulated on this machine [one a process]",
    )
    parser.add_argument(
        "--devices",
        metavar="N",
        type=number(1),
        help="how many devices all of them have together [as many as the command's own "
        "--devices says, or one a process]",
    )
    parser.add_argument(
        "--min-devices",
        metavar="N",
        type=number(1),
        default=1,
        help="wait when there are fewer [1]",
    )
    parser.add_argument(
        "--redundancy",
        metavar="none|mirror|parity[:M]",
        type=check_redundancy,
        default="none",
        help="how snapshots are protected against the loss of hosts [none]",
    )
    parser.add_argument(
        "--stragglers",
        choices=("balance", "ignore"),
        default="balance",
        help="what is done about slow processes: fewer microbatches for them, measured "
        "in a hundredth of the time, or nothing [balance]",
    )
    parser.add_argument(
        "--standbys",
        metavar="N",
        type=number(0),
        help="warm processes that each host keeps [as many as it runs]",
    )
    parser.add_argument(
        "--engine", choices=ENGINES, default="local", help="where hosts are [local]"
    )
    parser.add_argument(
        "--out-dir",
        metavar="DIR",
        type=Path,
        help="where the cluster keeps its state and what its processes print "
        "[runs/launch-NNN, which goes if all goes well]",
    )
    parser.add_argument(
        "--deadlines",
        metavar="NAME=SECONDS,…",
        type=pairs,
        default={},
        help="time limits that differ from those in shardkit/cluster/deadlines.py",
    )
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND@POINT:…",
        help="something that goes wrong on purpose; see shardkit chaos --help",
    )
    parser.add_argument("argv", metavar="COMMAND", nargs="*", help="after --")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Launches; returns the exit code of the run."""
    hosts = plan_hosts(
        arguments.processes,
        arguments.hosts or arguments.processes,
        arguments.devices or _devices_of(arguments.argv) or arguments.processes,
    )
    num_devices = sum(host.num_devices for host in hosts)
    if arguments.min_devices > num_devices:
        raise ConfigError(
            f"--min-devices: expected at most {num_devices}, all that there are, found "
            f"{arguments.min_devices}"
        )
    if arguments.redundancy != "none" and len(hosts) < 2:
        raise ConfigError(
            f"--redundancy {arguments.redundancy}: expected at least 2 hosts, since a "
            "host cannot protect itself; found 1"
        )
    _check_protection(arguments.redundancy, [host.host for host in hosts])
    argv = check_command(arguments.argv)
    faults = [str(parse_fault(text)) for text in arguments.fault]
    deadlines = _read_deadlines(arguments.deadlines)
    out_dir = arguments.out_dir or claim("launch")
    is_temporary = arguments.out_dir is None
    with open_directory(out_dir, is_temporary=is_temporary) as (directory, codes):
        run_id, token = new_run()
        settings = Settings(
            run=run_id,
            token=token,
            argv=argv,
            directory=str(directory.resolve()),
            hosts=hosts,
            min_devices=arguments.min_devices,
            redundancy=arguments.redundancy,
            stragglers=arguments.stragglers,
            standbys=arguments.standbys,
            deadlines=deadlines,
        )
        # Of all workers; how many threads XLA has enters the bits of products.
        os.environ.setdefault("PJRT_NPROC", str(max(8, num_devices)))
        os.environ["SHARDKIT_FAULTS"] = " ".join(faults)
        sys.stdout.flush()
        codes.append(launch(settings, engine=arguments.engine))
    return codes[0]


def _check_protection(text: str, hosts: list[str]) -> None:
    """Finds out now what would otherwise be found at the first snapshot."""
    redundancy = Redundancy.parse(text)
    for group in groups_of(hosts, redundancy):
        num_data = 1 if group.is_mirror else len(group.hosts) - group.num_losses
        coefficient_tables(num_data, group.num_losses)


def _devices_of(argv: list[str]) -> int | None:
    """Finds `--devices N` in a command, the last one if there are several."""
    found = None
    for word, after in itertools.pairwise([*argv, ""]):
        name, equals, text = word.partition("=")
        if name == "--devices" and (text if equals else after).isdecimal():
            found = int(text if equals else after) or None
    return found


def _read_deadlines(values: dict[str, str]) -> Deadlines:
    found = {}
    for name, text in values.items():
        try:
            found[name] = float(text)
        except ValueError:
            raise ConfigError(
                f"--deadlines: expected seconds, found {name}={text}"
            ) from None
    return Deadlines.read(found)


def check_redundancy(text: str) -> str:
    """Is the type of `--redundancy`.

    Example:
        >>> check_redundancy("parity:2")
        'parity:2'
    """
    with contextlib.suppress(ConfigError):
        if Redundancy.parse(text).num_losses <= _MOST_LOSSES:
            return text
    raise argparse.ArgumentTypeError(
        f"expected none, mirror, parity or parity:M with M from 1 to {_MOST_LOSSES}, "
        f"found {text!r}"
    )
