"""`shardkit status`: what a run of several processes is doing.

Owns the live table on a terminal and the single answer elsewhere. It asks the run's
supervisor and changes nothing.
"""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live

from shardkit.cluster.asking import Asker, Over, find_address, newest_run
from shardkit.cluster.status import Status
from shardkit.cluster.wire import WireError
from shardkit.command.options import number
from shardkit.command.output import Output, clean
from shardkit.report.status_table import render

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "show what a run started by `shardkit launch` is doing"
EPILOG = """\
exit codes:
  0    shown; a live table ends with the run, or by Ctrl-C
  1    the run has ended, or does not answer
  2    no such run
"""
_POLL_S = 0.5
_ASK_S = 2.0
_MAX_ROWS_ABOVE = 17
_PIPE_WIDTH = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Says what the verb takes."""
    parser.add_argument(
        "directory",
        metavar="DIR",
        type=Path,
        nargs="?",
        help="the run's directory; by default the newest in runs/",
    )
    parser.add_argument(
        "--once", action="store_true", help="show it once, as where there's no terminal"
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=number(1),
        default=20,
        help="how many seconds to wait for an answer [20]",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Shows the status of one run."""
    address = find_address(arguments.directory or newest_run(Path("runs")))
    is_live = output.console.is_terminal and not (arguments.once or output.as_json)
    if address.page and is_live:
        output.note(f"page  {address.page}")
    with Asker(address) as asker:
        try:
            if is_live:
                return _watch(asker, output.console, arguments.timeout)
            status = asker.ask(arguments.timeout)
        except WireError as error:
            print(clean(_explain(error)), file=sys.stderr)
            return 1
    if output.as_json:
        output.document(status.to_json())
        return 0
    console = output.console
    if not console.is_terminal:
        # A pipe has no width to break lines at.
        console = Console(width=_PIPE_WIDTH, highlight=False)
    console.print(render(status))
    return 0


def _explain(error: WireError) -> str:
    if isinstance(error, Over):
        return f"{error}: the run has ended, or it is on another machine."
    return f"{error}. A supervisor that is started again takes some seconds; try again."


def _watch(asker: Asker, console: Console, timeout_s: float) -> int:
    """Shows it again and again, until it ends or the viewer has seen enough."""
    status = asker.ask(timeout_s)
    heard_s = time.monotonic()
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                silent_s = time.monotonic() - heard_s
                note = f"no answer for {silent_s:.0f} s" if silent_s > _ASK_S else ""
                live.update(_fit(status, console, note), refresh=True)
                if status.state == "ended":
                    return 0
                time.sleep(_POLL_S)
                try:
                    status = asker.ask(min(_ASK_S, timeout_s))
                    heard_s = time.monotonic()
                except Over:
                    raise
                except WireError:
                    if time.monotonic() - heard_s > timeout_s:
                        raise
    except KeyboardInterrupt:
        return 0


def _fit(status: Status, console: Console, note: str) -> RenderableType:
    """Draws what the height of the terminal has room for."""
    rows = max(3, console.height - _MAX_ROWS_ABOVE)
    return render(status, max_rows=rows, note=note)
