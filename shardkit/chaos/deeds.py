"""How each fault is done, to this process or to another one.

Owns the deeds. Invariant: what is done ends with the process that it is done to; what
goes on beside it is bounded in time. It chooses neither when nor whom.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from shardkit.chaos.faults import Fault
from shardkit.errors import ShardkitError
from shardkit.snapshot.head import IMAGE, read_head
from shardkit.snapshot.segments import Segments

__all__ = [
    "Deeds",
    "InjectedError",
    "corrupt_newest",
    "kill_supervisor",
    "parent_of",
    "slow_down",
]

_SLOW_S = 20.0
_BRAKE = """
import os, signal, sys, time
pid, end_s = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
part = float(sys.argv[3])
try:
    while time.monotonic() < end_s:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.02 * part / (1 - part))
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.02)
except ProcessLookupError:
    pass
"""


class InjectedError(ShardkitError, RuntimeError):
    """An error that somebody asked for."""


class Deeds:
    """Does faults to this process and its host.

    Args:
        run: The run's id.
        host: The name of this host.
        disturb: Loses or delays this process's messages for some seconds: told
            `"drop"` or `"delay"`.
        kill_supervisor: Ends the supervisor by SIGKILL.
    """

    def __init__(
        self,
        run: str,
        host: str,
        *,
        disturb: Callable[[str], None],
        kill_supervisor: Callable[[], None],
    ) -> None:
        self._deeds: dict[str, Callable[[], object]] = {
            "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
            "host": lambda: os.kill(os.getppid(), signal.SIGKILL),
            "error": _fail,
            "exhaust": exhaust_memory,
            "slow": lambda: slow_down(os.getpid()),
            "corrupt": lambda: corrupt_newest(run, host),
            "drop": lambda: disturb("drop"),
            "delay": lambda: disturb("delay"),
            "supervisor": kill_supervisor,
        }

    def __call__(self, fault: Fault) -> None:
        """Does a fault.

        Raises:
            InjectedError, MemoryError: If that is what the fault is.
        """
        print(f"fault: {fault}", file=sys.stderr, flush=True)
        self._deeds[fault.kind]()


def _fail() -> None:
    raise InjectedError("this error was asked for")


def exhaust_memory() -> None:
    """Leaves this process no more memory than it has.

    Raises:
        MemoryError: When it asks for more.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    held = []
    while True:
        held.append(bytearray(16 << 20))


def slow_down(
    pid: int, *, for_s: float = _SLOW_S, part: float = 0.5
) -> "subprocess.Popen[bytes]":
    """Halves the speed of a process by stopping it every other instant.

    Args:
        pid: Which.
        for_s: For how long; less if it ends.
        part: Which part of the time it is stopped, if not half of it.

    Returns:
        The process that does it.
    """
    command = [sys.executable, "-c", _BRAKE, str(pid), str(for_s), str(part)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


def corrupt_newest(run: str, host: str) -> None:
    """Flips a bit in the middle of the image that was written last on a host."""
    segments, found = Segments(run, host), []
    for name in segments.names():
        # It may be gone by now, or being written.
        with contextlib.suppress(ShardkitError), segments.open(name) as segment:
            head = read_head(segment.memory)
            # Times of files say nothing: they are written through a map.
            if head.magic == IMAGE:
                found.append((head.generation, head.step, name))
    if found:
        with (
            contextlib.suppress(ShardkitError),
            segments.open(max(found)[-1]) as newest,
        ):
            newest.memory[newest.num_bytes // 2] ^= 1


def kill_supervisor(directory: Path) -> None:
    """Ends the supervisor of a cluster on this machine by SIGKILL.

    Args:
        directory: Where the cluster keeps its state.
    """
    launcher = json.loads((directory / "address.json").read_bytes())["pid"]
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in map(int, children):
        with contextlib.suppress(OSError):
            if b"shardkit.cluster.supervisor" in _command(child):
                os.kill(child, signal.SIGKILL)


def parent_of(pid: int) -> int:
    """Returns the parent of a process: a worker's is its host's agent."""
    # What is before the last bracket is the command, which may hold anything.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
