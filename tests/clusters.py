"""Clusters of counters for tests: started, watched, hurt, and looked after."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from shardkit.cluster import Assignment
from shardkit.cluster.channel import Channel
from shardkit.cluster.wire import WireError
from shardkit.snapshot.segments import reclaim

ROOT = Path(__file__).parents[1]
LAUNCHER = ROOT / "tests" / "workers" / "launch_counter.py"
LIMIT_S = 60
ASSIGNMENT = Assignment(
    generation=3,
    process_index=0,
    num_processes=1,
    coordinator="127.0.0.1:1",
    num_devices=1,
    num_local_devices=1,
    device_offset=0,
    host="host-0",
    hosts=("host-0",),
)


def wait_for(look, what, limit_s=LIMIT_S):
    """Returns the first true thing that `look` finds."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        if found := look():
            return found
        time.sleep(0.005)
    raise AssertionError(f"waited {limit_s} s for {what}")


def environment():
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    return {**os.environ, "PYTHONPATH": path}


class Cluster:
    """A cluster of counters in a process of its own."""

    def __init__(self, directory, *, steps=40, counter=None, **options):
        self.directory, self.out = directory / "cluster", directory / "out"
        self.out.mkdir(exist_ok=True)
        counter = {"out": str(self.out), "steps": steps, **(counter or {})}
        options = {"directory": str(self.directory), "counter": counter, **options}
        self.process = subprocess.Popen(
            [sys.executable, str(LAUNCHER), json.dumps(options)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.run = None
        self._channel = None

    def notes(self, **wanted):
        """What the counters have noted, of which all `wanted` hold."""
        try:
            lines = (self.out / "notes.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        found = [json.loads(line) for line in lines]
        return [x for x in found if wanted.items() <= x.items()]

    def wait_step(self, step, generation=None):
        """Waits until a step is done, by a generation or one after it."""

        def look():
            notes = self.notes(what="step")
            return any(
                x["step"] >= step and x["generation"] >= (generation or 0)
                for x in notes
            )

        wait_for(look, f"step {step} of generation {generation}: {self.notes()[-3:]}")

    def seats(self, generation):
        """Waits for all processes of a generation; returns them in order."""

        def look():
            found = self.notes(what="begin", generation=generation)
            return len(found) > 0 and len(found) == found[0]["num_processes"] and found

        found = wait_for(look, f"all processes of generation {generation}")
        return sorted(found, key=lambda x: x["process"])

    def status(self):
        """What the supervisor says."""
        for _ in range(3):
            with contextlib.suppress(WireError):
                if self._channel is None:
                    where = self.address()
                    self._channel = Channel(
                        where["address"], where["token"], "the supervisor", 10
                    )
                self._channel.send({"type": "status"})
                reply = self._channel.receive(timeout_s=10, what="the status")
                return reply.header["status"]
            if self._channel is not None:
                self._channel.close()
            self._channel = None
        raise AssertionError("the supervisor does not answer")

    def address(self):
        path = self.directory / "address.json"
        wait_for(path.exists, "the address")
        assert path.stat().st_mode & 0o777 == 0o600
        found = json.loads(path.read_text())
        self.run = found["run"]
        return found

    def wait_status(self, look, what="the status"):
        """Waits until the status is as wanted, and returns it."""
        found = {}

        def ask():
            found.update(self.status())
            return look(found)

        wait_for(ask, what)
        return found

    def wait_standbys(self, hosts=None):
        """Waits until every host has its standbys."""

        def look(status):
            return all(
                host["standbys"] >= max(1, len(host["workers"]))
                for host in status["hosts"]
                if hosts is None or host["host"] in hosts
            )

        return self.wait_status(look, "standbys")

    def processes(self):
        """All processes of this cluster but the launcher: (pid, command line)."""
        found = []
        for path in Path("/proc").iterdir():
            if path.name.isdecimal():
                with contextlib.suppress(OSError):
                    line = (path / "cmdline").read_bytes().decode().replace("\0", " ")
                    group = os.getsid(int(path.name))
                    is_ours = str(self.out) in line or self._is_child(path)
                    if is_ours and int(path.name) != self.process.pid and group:
                        found.append((int(path.name), line))
        return found

    def _is_child(self, path):
        text = (path / "stat").read_text().rpartition(")")[2].split()
        return int(text[1]) == self.process.pid and text[0] != "Z"

    def pid_of(self, text):
        """The process whose command line has a text."""
        return next(pid for pid, line in self.processes() if text in line)

    def segments(self):
        run = self.run or self.address()["run"]
        return [path.name for path in Path("/dev/shm").glob(f"shardkit-{run}-*")]

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def finish(self, code=0, limit_s=LIMIT_S):
        """Waits for its end; nothing of it may be left. Returns stdout and stderr."""
        try:
            output, errors = self.process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise
        assert self.process.returncode == code, (self.process.returncode, errors)
        assert not self.processes(), self.processes()
        if self.run is not None:
            assert not self.segments()
        return output, errors

    def digest(self):
        return (self.out / "digest").read_text()

    def end(self):
        """Ends whatever is left."""
        if self._channel is not None:
            self._channel.close()
        pids = [pid for pid, _ in self.processes()]
        for pid in [self.process.pid, *pids]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        if self.run is not None:
            # Agents that are killed give nothing back.
            reclaim(self.run)
        for stream in (self.process.stdout, self.process.stderr):
            stream.close()


@functools.cache
def expected_digest(steps):
    """What an uninterrupted counter of one process comes to, computed right here."""
    import hashlib
    import struct

    from workers import counter

    class Alone:
        index, count = 0, 1

        def sum(self, values):
            return values

    state = [1] * counter.SIZE
    for step in range(steps):
        state = counter.advance(state, step, Alone())
    return hashlib.sha256(struct.pack(f"{counter.SIZE}Q", *state)).hexdigest()
