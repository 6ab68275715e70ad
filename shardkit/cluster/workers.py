"""The worker processes of one host, as its agent sees them.

Owns their start, what each last said, and their end. Invariants: standbys are started
one after the other, and no more than asked for; what a worker wrote to its standard
error is in a file, and its last lines in what is told of its end; ending a generation
ends the process groups of all its workers, and of older ones.
"""

import asyncio
import collections
import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardkit.cluster.processes import (
    Child,
    can_be_niced,
    set_niceness,
    spell_status,
)
from shardkit.cluster.records import Assignment
from shardkit.cluster.terminal import Terminal
from shardkit.cluster.wire import Link

__all__ = ["ALIVE", "Worker", "Workers"]

ALIVE = ("starting", "ready", "preparing", "hot", "running")
"""The states of a process that has not ended."""

_NUM_LINES = 40
_LINE_BYTES = 2000
_NICENESS = 10
_MOST_REMEMBERED = 4
_MOST_CHARACTERS = 150_000
"""Of what all that have ended said last; as JSON it has to fit into a header."""
_LAST_WORDS_S = 0.2
"""Who holds the connection of a process that has ended is not waited for longer."""


class Worker:
    """One worker process.

    Attributes:
        id: Its number on its host, never used again.
        state: `"starting"`, `"ready"`, `"preparing"`, `"hot"` (it has prepared),
            `"running"` or `"exited"`.
        link: Its connection; None before it joins.
        assignment: What it is; None for a standby.
        is_heard_out: Whether its connection has been read to its end.
        told: What it last said, as the report has it.
        prepares: Whether it would prepare for what it may become.
    """

    def __init__(self, id: int) -> None:
        self.id, self.state = id, "starting"
        self.child: Child | None = None
        self.link: Link | None = None
        self.assignment: Assignment | None = None
        self.told: dict[str, Any] = {"step": -1, "phase": "start", "facts": {}}
        self.tail: collections.deque[str] = collections.deque(maxlen=_NUM_LINES)
        self.started_s = self.heard_s = time.monotonic()
        self.ended_s: float | None = None
        self.failed_s: float | None = None
        self.is_ending = self.prepares = self.is_heard_out = False

    @property
    def generation(self) -> int | None:
        """The generation that it is in; None for a standby."""
        return None if self.assignment is None else self.assignment.generation

    def fail(self, header: dict[str, Any]) -> None:
        """Learns what it says of an error that ends it, and when that was."""
        self.told["failed"] = header
        if self.failed_s is None:
            self.failed_s = min(header["at_s"], time.monotonic())

    def report(self, most: int = _MOST_CHARACTERS) -> dict[str, Any]:
        """Says what is known of it, as JSON values.

        Args:
            most: How many characters its last words may have.
        """
        assert self.child is not None
        now_s = time.monotonic()
        found = {
            "worker": self.id,
            "pid": self.child.pid,
            "state": self.state,
            "prepares": self.prepares,
            "age_s": round(now_s - self.started_s, 3),
            "silent_s": round(now_s - self.heard_s, 3),
        }
        if self.assignment is not None:
            found["generation"] = self.assignment.generation
            found["process"] = self.assignment.process_index
            found |= self.told
        if failed := self.told.get("failed"):
            found["failed"] = failed | {
                "message": failed["message"][: most // 3],
                "traceback": failed["traceback"][-(most // 3) :],
            }
        if self.failed_s is not None:
            found["failed_age_s"] = now_s - self.failed_s
        if self.state == "exited":
            assert self.ended_s is not None
            assert self.child.returncode is not None
            found |= {
                "code": self.child.returncode,
                "status": spell_status(self.child.returncode),
                "ended_by_us": self.is_ending,
                "exit_age_s": now_s - self.ended_s,
                "tail": _last(self.tail, most // 3),
                "failed": found.get("failed"),
            }
        return found


def _last(lines: Iterable[str], most: int) -> list[str]:
    """Returns the last lines that have so many characters together."""
    found = collections.deque(lines)
    size = sum(map(len, found))
    while size > most:
        size -= len(found.popleft())
    return list(found)


class Workers:
    """All worker processes of a host.

    Args:
        host: The host's name.
        argv: The user's command.
        env: What workers get of the environment.
        directory: Where their output goes.
        on_change: Called when something happened that others should hear of.
        pass_fds: Which file descriptors they inherit.

    Attributes:
        all: The workers, by their number; also some that have ended.
    """

    def __init__(
        self,
        host: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        directory: Path,
        on_change: Callable[[], Any],
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._pass_fds = pass_fds
        self._host, self._argv, self._env = host, argv, env
        self._directory, self._on_change = directory, on_change
        self.all: dict[int, Worker] = {}
        self.keep = 0
        self._num_started = 0
        self._is_stopping = False
        self._base = os.getpriority(os.PRIO_PROCESS, 0)
        self._can_nice = can_be_niced()
        self._terminal, self._stdout = Terminal(), os.dup(1)

    def in_state(self, *states: str) -> list[Worker]:
        """Returns the workers that are in one of these states."""
        return [worker for worker in self.all.values() if worker.state in states]

    def report(self) -> list[dict[str, Any]]:
        """Says what is known of all, as JSON values; the more have ended, the less."""
        ended = [w for w in self.all.values() if w.state == "exited" or w.failed_s]
        most = _MOST_CHARACTERS // max(1, len(ended))
        return [worker.report(most) for worker in self.all.values()]

    def keep_standbys(self, count: int, *, at_once: bool) -> None:
        """Sees that there are so many workers without an assignment.

        Args:
            count: How many; those that are there already stay.
            at_once: Start all together and at full speed, since they are waited for;
                otherwise one by one, standing back behind those that train.
        """
        self.keep = count
        while not self._is_stopping:
            starting = self.in_state("starting")
            if len(starting) + len(self.in_state("ready")) >= count:
                break
            if starting and not at_once:
                break
            self._start(is_niced=not at_once)
        if at_once:
            for worker in self.in_state("starting"):
                self._set_niceness(worker, 0)

    def _start(self, *, is_niced: bool) -> None:
        worker = Worker(self._num_started)
        self._num_started += 1
        log = self._directory / f"{self._host}-{worker.id}.log"
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            worker.child = Child(
                self._argv,
                env={
                    **self._env,
                    "SHARDKIT_WORKER": str(worker.id),
                    "SHARDKIT_TERMINAL": str(self._stdout),
                },
                stdout=output,
                stderr=writing,
                on_exit=lambda code: self._ended(worker, stderr),
                pass_fds=(self._stdout, *self._pass_fds),
            )
        except OSError as error:
            os.close(reading)
            os.close(output)
            raise SystemExit(
                f"{self._argv[0]}: cannot be started: {error.strerror}"
            ) from None
        finally:
            os.close(writing)
        stderr = _Stderr(reading, output, worker, self._terminal)
        self.all[worker.id] = worker
        if is_niced:
            self._set_niceness(worker, _NICENESS)

    def _set_niceness(self, worker: Worker, more: int) -> None:
        if self._can_nice and worker.child is not None:
            set_niceness(worker.child.pid, self._base + more)

    def assign(self, worker: Worker, assignment: Assignment) -> None:
        """Makes a standby part of a generation."""
        self._set_niceness(worker, 0)
        worker.assignment, worker.state = assignment, "running"
        worker.heard_s = time.monotonic()
        # What is known of those before has been told.
        for id in [w.id for w in self.in_state("exited")]:
            if self.all[id].generation != assignment.generation:
                del self.all[id]

    def end(self, generation: int) -> bool:
        """Ends all of a generation and of older ones; whether all were heard out."""
        left = [
            worker
            for worker in self.in_state("running")
            if worker.generation is not None and worker.generation <= generation
        ]
        for worker in left:
            self._kill(worker)
        return not left

    def drop(self) -> None:
        """Ends those that have prepared."""
        for worker in self.in_state("preparing", "hot"):
            self._kill(worker)

    def end_all(self) -> None:
        """Ends every worker; no new one is started."""
        self._is_stopping = True
        for worker in self.in_state(*ALIVE):
            self._kill(worker)

    def heard_out(self, worker: Worker) -> None:
        """Learns that nothing more comes from a worker's connection."""
        worker.is_heard_out = True
        if worker.ended_s is not None:
            self._over(worker)

    def _kill(self, worker: Worker) -> None:
        # Who has ended by itself, and is only not heard out, was not ended by us.
        if worker.ended_s is None and not worker.is_ending:
            worker.is_ending = True
            assert worker.child is not None
            worker.child.kill()

    def _ended(self, worker: Worker, stderr: "_Stderr") -> None:
        stderr.finish()
        worker.ended_s = time.monotonic()
        if worker.link is None or worker.is_heard_out:
            self._over(worker)
        else:
            # What it said last may not have been read yet, and may be why it ended.
            loop = asyncio.get_running_loop()
            loop.call_later(_LAST_WORDS_S, worker.link.abort)

    def _over(self, worker: Worker) -> None:
        worker.state = "exited"
        standbys = [w for w in self.in_state("exited") if w.assignment is None]
        for old in standbys[:-_MOST_REMEMBERED]:
            del self.all[old.id]
        self._on_change()


class _Stderr:
    """A worker's standard error: kept, and shown if it is process 0."""

    def __init__(
        self, reading: int, log: int, worker: Worker, terminal: Terminal
    ) -> None:
        self._reading, self._log = reading, log
        self._worker, self._terminal = worker, terminal
        self._rest = b""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(reading, self._read)

    def _read(self) -> bool:
        try:
            data = os.read(self._reading, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._reading)
            return False
        with contextlib.suppress(OSError):
            os.write(self._log, data)
        assignment = self._worker.assignment
        if assignment is not None and assignment.process_index == 0:
            self._terminal.write(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-_LINE_BYTES:]
        for line in lines:
            self._worker.tail.append(line[-_LINE_BYTES:].decode(errors="replace"))
        return True

    def finish(self) -> None:
        """Reads what is left of a process that has ended."""
        while self._read():
            pass
        if self._rest:
            self._worker.tail.append(self._rest.decode(errors="replace"))
        self._loop.remove_reader(self._reading)
        os.close(self._reading)
        os.close(self._log)
