"""`shardkit chaos`: hurts a run on this machine, to see that it goes on.

Owns which process is hurt when; how is the deeds'. It only hurts what belongs to the
run that it was pointed at.
"""

import argparse
import os
import signal
import time
from pathlib import Path
from typing import Any

from shardkit.chaos.deeds import corrupt_newest, kill_supervisor, parent_of, slow_down
from shardkit.chaos.faults import random_faults
from shardkit.cluster.asking import Asker, Over, find_address, newest_run
from shardkit.command.output import Output
from shardkit.errors import ClusterError, ConfigError

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "hurt a running cluster on this machine, at random but by a seed"
KINDS = ("kill", "freeze", "host", "slow", "corrupt", "supervisor")
EPILOG = """\
kinds: kill (SIGKILL for a process), freeze (SIGSTOP), host (its agent with all that is
its), slow (half the speed for 20 s), corrupt (a bit of the newest snapshot), supervisor

Faults at certain points of a run are asked for when it is launched:
  shardkit launch --fault kill@snapshot:step=7,process=2 -- python train.py …
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what this verb takes."""
    parser.add_argument(
        "path",
        nargs="?",
        type=Path,
        metavar="DIR",
        help="the run's directory; by default the newest in runs/",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of what happens to whom [0]"
    )
    parser.add_argument("--faults", type=int, default=10, help="how many [10]")
    parser.add_argument(
        "--every",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="the mean time between two [30]",
    )
    parser.add_argument(
        "--kinds",
        default="kill",
        help=f"of {','.join(KINDS)}; with commas between [kill]",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Hurts the run until all faults are done, or it has ended."""
    kinds = arguments.kinds.split(",")
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ConfigError(
            f"--kinds: unknown {', '.join(unknown)}; there are {', '.join(KINDS)}"
        )
    if arguments.faults < 1 or not arguments.every > 0:
        raise ConfigError("--faults and --every: expected more than 0")
    address = find_address(arguments.path or newest_run(Path("runs")))
    asker, start_s, done = Asker(address), time.monotonic(), []
    faults = random_faults(
        arguments.seed,
        num_faults=arguments.faults,
        mean_s=arguments.every,
        kinds=kinds,
        num_processes=1 << 30,
    )
    for at_s, kind, number in faults:
        if output.stopped.wait(max(0.0, start_s + at_s - time.monotonic())):
            break
        try:
            whom = _hurt(kind, number, asker, address.path.parent)
        except Over:
            break
        done.append({"at_s": round(at_s, 2), "kind": kind, "whom": whom})
        if not output.as_json:
            output.line(f"{at_s:8.1f} s  {kind}  {whom}")
    if output.as_json:
        output.document({"faults": done})
    return 0


def _hurt(kind: str, number: int, asker: Asker, directory: Path) -> str:
    """Does one fault, and says to whom."""
    if kind == "supervisor":
        kill_supervisor(directory)
        return "the supervisor"
    status = asker.ask(10.0)
    found = [
        (host.host, worker.process, worker.pid)
        for host in status.hosts
        for worker in host.workers
        if worker.pid is not None
    ]
    if not found:
        return "nobody: there is no process"
    host, process, pid = found[number % len(found)]
    deeds: dict[str, Any] = {
        "kill": lambda: os.kill(pid, signal.SIGKILL),
        "freeze": lambda: os.kill(pid, signal.SIGSTOP),
        "host": lambda: os.kill(parent_of(pid), signal.SIGKILL),
        "slow": lambda: slow_down(pid),
        "corrupt": lambda: corrupt_newest(status.run, host),
    }
    try:
        deeds[kind]()
    except (ProcessLookupError, FileNotFoundError):
        return f"nobody: process {process} on {host} had just ended"
    except PermissionError:
        raise ClusterError(f"process {process} on {host} is another user's") from None
    return f"process {process} on {host}"
