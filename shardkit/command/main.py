"""The command line of `shardkit`, and how it ends.

Owns the parser, signals and exit codes. Invariants: reading a command line never
imports JAX, and neither does a verb that can do without; whatever a user can mend ends
in one message on standard error.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from shardkit.command import (
    calibrate_verb,
    chaos_verb,
    diff_verb,
    explain_verb,
    export_verb,
    import_verb,
    inspect_verb,
    launch_verb,
    merge_verb,
    plan_verb,
    remap_verb,
    report_verb,
    status_verb,
    suggest_verb,
    verify_verb,
)
from shardkit.command.output import Output, clean
from shardkit.errors import ConfigError, ShardkitError, reason

__all__ = ["main", "run"]

_VERBS = {
    "inspect": inspect_verb,
    "verify": verify_verb,
    "diff": diff_verb,
    "remap": remap_verb,
    "merge": merge_verb,
    "export": export_verb,
    "import": import_verb,
}
_COMMANDS = {
    "plan": plan_verb,
    "suggest": suggest_verb,
    "explain": explain_verb,
    "calibrate": calibrate_verb,
    "launch": launch_verb,
    "status": status_verb,
    "chaos": chaos_verb,
    "report": report_verb,
}
_BAD_INPUT = 2
_EPILOG = """\
PATH is the directory of a run, of its checkpoints or of one step, of shardkit's or
plain Orbax; inspect, diff, remap and export read safetensors, too.

exit codes:
  0    done; whole (verify); the same (diff)
  1    damaged (verify); different (diff)
  2    bad input: a message says what and where
  130  interrupted; what was being written is gone again
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; see {self.prog} --help")


def main(argv: Sequence[str]) -> int:
    """Runs a command line, without the program's name, and returns the exit code.

    Raises:
        SystemExit: With code 0, after `--help`.
    """
    output, ended = Output("--json" in argv), []
    try:
        with _listening(output, ended):
            arguments = _parser().parse_args(argv)
            if arguments.command in ("ckpt", "plan", "suggest"):
                # Files are read, digests computed and shapes followed on the host;
                # what a launch starts is to find its accelerators.
                os.environ.setdefault("JAX_PLATFORMS", "cpu")
            return arguments.run(arguments, output)
    except KeyboardInterrupt:
        pass
    except (ShardkitError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        # What was interrupted may fail of that first.
        if not ended:
            print(clean(_spell(error)), file=sys.stderr)
            return _BAD_INPUT
    print("interrupted", file=sys.stderr)
    return ended[0] if ended else 128 + signal.SIGINT


def run() -> NoReturn:
    """Is the process: runs its command line and exits."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore
    # What fails in a thread of Orbax's is logged there, and raised here once more.
    logging.basicConfig(
        level=os.environ.get("SHARDKIT_LOG_LEVEL", "CRITICAL").upper(),
        format="%(levelname)s %(name)s: %(message)s",
    )
    logging.captureWarnings(True)
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has seen enough; flushing at exit must not fail of it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="shardkit",
        description="Training on JAX that changes its device count.",
        allow_abbrev=False,
    )
    groups = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    ckpt = groups.add_parser(
        "ckpt",
        help="look at, check, compare and convert checkpoints",
        description="Looks at, checks, compares and converts checkpoints.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs: Any = ckpt.add_subparsers(required=True, metavar="VERB", dest="verb")
    for name, module in _VERBS.items():
        _add(verbs, name, module)
    for name, module in _COMMANDS.items():
        _add(groups, name, module)
    return parser


def _add(parsers: Any, name: str, module: Any) -> None:
    verb = parsers.add_parser(
        name,
        help=module.HELP,
        description=f"{module.HELP[0].upper()}{module.HELP[1:]}.",
        epilog=getattr(module, "EPILOG", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(verb)
    verb.add_argument(
        "--json", action="store_true", help="one JSON document, for machines"
    )
    verb.set_defaults(run=module.run)


@contextlib.contextmanager
def _listening(output: Output, ended: list[int]) -> Iterator[None]:
    """Ends the threads of a command that is interrupted, not just this one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        ended.append(128 + number)
        output.stopped.set()
        # Who reports progress ends by itself, and then nothing writes any more.
        if not output.is_reporting or len(ended) > 1:
            raise KeyboardInterrupt

    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _spell(error: Exception) -> str:
    if isinstance(error, ShardkitError):
        return f"{type(error).__name__}: {error}"
    where = getattr(error, "filename", None)
    text = f"{where}: {reason(error)}" if where else reason(error)
    return f"{type(error).__name__}: {text:.500}"
