"""What the benchmarks of recovery share: groups of processes that end, and tables.

A member of a group prints a line of JSON per event: `{"event": …, "t": …}`, with the
time of the machine's clock, which all processes share.
"""

import json
import os
import queue
import socket
import statistics
import subprocess
import tempfile
import threading
import time

DEADLINE_S = 240


class FailedError(Exception):
    """A round that did not get to its end."""


class Group:
    """Processes that print a line of JSON per event; ends those that it started."""

    def __init__(self):
        self.heard = queue.Queue()
        self.members = {}
        self._all = []
        self.errors = tempfile.TemporaryFile("w+")

    def start(self, member, command, **env):
        """Starts a process, as a new member or in the place of one that ended."""
        process = subprocess.Popen(
            command,
            env=os.environ | env,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.members[member] = process
        self._all.append(process)
        threading.Thread(
            target=self._listen, args=(member, process), daemon=True
        ).start()

    def _listen(self, member, process):
        for line in process.stdout:
            if line.startswith("{"):
                self.heard.put((member, process.pid, json.loads(line)))
        process.wait()
        ended = {"event": "ended", "t": time.time(), "code": process.returncode}
        self.heard.put((member, process.pid, ended))

    def events(self, may_end=()):
        """Yields `(member, event)` of processes that are members, to a deadline."""
        end_s = time.monotonic() + DEADLINE_S
        while True:
            try:
                left_s = max(0.0, end_s - time.monotonic())
                member, pid, event = self.heard.get(timeout=left_s)
            except queue.Empty:
                self.fail(f"nothing happened for {DEADLINE_S} s")
            if pid != self.members[member].pid:
                continue
            if event["event"] == "ended" and pid not in may_end:
                self.fail(f"process {member} ended with code {event['code']}")
            yield member, event

    def fail(self, message):
        """Gives the round up, with the end of what the members complained of."""
        self.errors.seek(0)
        raise FailedError(f"{message}:\n{self.errors.read()[-3000:]}")

    def until(self, name, members, wanted=lambda event: True):
        """Until each has said it; returns when the last did, and what each said."""
        missing, said = set(members), {}
        for member, event in self.events():
            if event["event"] == name and member in missing and wanted(event):
                missing.remove(member)
                said[member] = event
                if not missing:
                    break
        return max(event["t"] for event in said.values()), said

    def kill(self, member):
        """Ends one by SIGKILL; returns when that was, and its process id."""
        killed_s = time.time()
        self.members[member].kill()
        return killed_s, self.members[member].pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._all:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.errors.close()


def free_port():
    """Returns a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def say(event, **fields):
    """Tells the process that started this one."""
    print(json.dumps({"event": event, "t": time.time(), **fields}), flush=True)


def repeat(measure, number):
    """Returns what the rounds found, and how those ended that failed."""
    found, failures = [], []
    for _ in range(number):
        try:
            found.append(measure())
        except FailedError as error:
            failures.append(str(error))
    return found, failures


def table(title, rounds, failures):
    """Prints the median and the spread of every phase."""
    print(f"\n{title}; load {os.getloadavg()[0]:.1f}\n")
    if failures:
        print(f"{len(failures)} rounds failed; the last: {failures[-1]}\n")
    print("| phase | s, median [all] |\n|---|---|", flush=True)
    for name in dict.fromkeys(name for found in rounds for name in found):
        values = sorted(r[name] for r in rounds if name in r)
        spread = ", ".join(f"{x:.2f}" for x in values)
        print(f"| {name} | {statistics.median(values):.2f} [{spread}] |", flush=True)


def versions(python, *names):
    """Returns the versions of a Python and of packages that it has."""
    code = """
import sys
from importlib.metadata import version

print(sys.version.split()[0], *[f"{n} {version(n)}" for n in sys.argv[1:]], sep=", ")
"""
    command = [python, "-c", code, *names]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return out.stdout.strip()
