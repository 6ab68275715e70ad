"""Child processes: started in groups of their own, ended whole, heard of at once.

Owns how a child is started, how its end is noticed and put into words, and that it
ends with its parent. Invariant: when `on_exit` is called the child is reaped and no
process of its group is left. Why it runs or ends is for others to decide.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Child", "can_be_niced", "die_with_parent", "set_niceness", "spell_status"]

_PR_SET_PDEATHSIG = 1


def spell_status(returncode: int) -> str:
    """Says how a process ended.

    Args:
        returncode: As `subprocess` has it: negative for a signal.

    Example:
        >>> spell_status(-9), spell_status(3)
        ('was killed by SIGKILL', 'exited with code 3')
    """
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"was killed by {name}"


def _load_prctl() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return ctypes.CDLL(None, use_errno=True).prctl


def die_with_parent(parent: int | None = None) -> None:
    """Asks the kernel to end this process when the thread that started it ends.

    Linux only; elsewhere the connections that break must do.

    Args:
        parent: The process id that the parent is known to have; if it is gone
            already, this process ends here.
    """
    prctl = _load_prctl()
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


class Child:
    """A process in a group of its own.

    Args:
        argv: Its command.
        env: Its environment.
        stdout: Where its standard output goes: a file descriptor.
        stderr: Likewise.
        on_exit: Called in the event loop once it has ended, with how.
        stdin: Likewise; nothing by default.
        pass_fds: Which file descriptors it inherits.
        death_signal: What it gets when its parent ends; Linux only.

    Attributes:
        pid: Its process id, which is its group's too.
        returncode: How it ended, as `subprocess` has it; None while it lives.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        stdout: int,
        stderr: int,
        on_exit: Callable[[int], Any],
        stdin: int = subprocess.DEVNULL,
        pass_fds: Sequence[int] = (),
        death_signal: int = signal.SIGKILL,
    ) -> None:
        prctl, parent = _load_prctl(), os.getpid()

        def before_exec() -> None:
            if prctl is not None:
                prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

        self._popen = subprocess.Popen(
            argv,
            env=dict(env),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            # It takes no lock that a thread of the parent could hold meanwhile.
            preexec_fn=before_exec,
        )
        self.pid, self.returncode = self._popen.pid, None
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._watch()

    def _watch(self) -> None:
        try:
            pidfd = os.pidfd_open(self.pid)
        except (AttributeError, OSError):
            threading.Thread(target=self._wait_in_thread, daemon=True).start()
            return

        def ended() -> None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
            self._reap()

        self._loop.add_reader(pidfd, ended)

    def _wait_in_thread(self) -> None:
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._reap)

    def _reap(self) -> None:
        # While it is a zombie its number cannot be anybody else's.
        self._signal_group(signal.SIGKILL)
        self.returncode = self._popen.wait()
        self._on_exit(self.returncode)

    def kill(self) -> None:
        """Ends it and all of its group; `on_exit` follows."""
        if self.returncode is None:
            self._signal_group(signal.SIGKILL)

    def terminate(self) -> None:
        """Asks it alone to end."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def can_be_niced() -> bool:
    """Returns whether niceness given to a process can be taken back again."""
    found: list[bool] = []

    def probe() -> None:
        # Niceness is a thread's own on Linux, so that only this one may stay nice.
        id = threading.get_native_id()
        try:
            before = os.getpriority(os.PRIO_PROCESS, id)
            os.setpriority(os.PRIO_PROCESS, id, before + 1)
            os.setpriority(os.PRIO_PROCESS, id, before)
        except OSError:
            return
        found.append(True)

    if not sys.platform.startswith("linux"):
        return False
    thread = threading.Thread(target=probe)
    thread.start()
    thread.join()
    return bool(found)


def set_niceness(pid: int, niceness: int) -> None:
    """Sets the niceness of every thread of a process; Linux only."""
    with contextlib.suppress(OSError):
        for id in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, int(id), niceness)
