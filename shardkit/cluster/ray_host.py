"""A host on a node of a Ray cluster: its actor, and what stands before its agent.

Owns the actor's side: it starts the ordinary agent, tells how that ended, and passes on
what process 0 prints. No Ray here: the driver makes an actor of `RayHost`, and nothing
but JSON text goes in or out. Invariants: the agent ends with the actor, because it
reads from it; "ended" is only said when all of the host's processes are gone, and its
memory with them.

Ray ends an actor's children by SIGKILL. An agent has memory to give back, so it is made
a grandchild: its parent does nothing but wait for it.
"""

import collections
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from shardkit.cluster.processes import spell_status
from shardkit.snapshot.segments import Segments

__all__ = ["RayHost", "main"]

_MOST_WAITING = 1000
_READ_BYTES = 1 << 16


class RayHost:
    """One host, as an actor. Its methods run in threads, several at once.

    Args:
        text: What to start, as JSON: `settings`, `host`, `ip` (where the agent
            listens), `cwd`, `env` (what to add to the node's environment) and `unset`
            (what to take out of it).

    Raises:
        FileNotFoundError: If the node has no such directory.
    """

    def __init__(self, text: str) -> None:
        order = json.loads(text)
        settings = order["settings"]
        self._run, self._host = settings["run"], order["host"]
        self._end_s = settings["deadlines"]["end_s"]
        self._linger_s = settings["deadlines"]["request_s"]
        self._news: collections.deque[dict[str, Any]]
        self._news = collections.deque(maxlen=_MOST_WAITING)
        self._changed = threading.Condition()
        self._caller, self._ended = "", ""
        with contextlib.suppress(OSError):
            # What trains is not in the background, as Ray has it.
            os.setpriority(os.PRIO_PROCESS, 0, 0)
        # An agent that was killed together with its actor has left it.
        Segments(self._run, self._host).unlink_all()
        Path(settings["directory"]).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._life, held = os.pipe()
        try:
            self._popen = subprocess.Popen(
                [
                    *(sys.executable, "-m", "shardkit.cluster.ray_host"),
                    *(self._host, str(held), order["ip"]),
                ],
                cwd=order["cwd"],
                env=_environment(order),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(held,),
                start_new_session=True,
            )
        finally:
            os.close(held)
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps(settings).encode() + b"\n")
        self._popen.stdin.flush()
        threading.Thread(target=self._wait, daemon=True).start()

    def is_there(self) -> bool:
        """Returns once the actor was made."""
        return True

    def hear(self, caller: str) -> str:
        """Returns what is new, as JSON, once there is something.

        Args:
            caller: Who asks; whoever asked before is sent away with nothing.
        """
        with self._changed:
            self._caller = caller
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._news or self._ended or self._caller != caller
            )
            if self._caller != caller:
                return "[]"
            found = list(self._news)
            self._news.clear()
            if self._ended:
                found.append({"ended": self._ended})
            return json.dumps(found)

    def end(self, asks: bool) -> None:
        """Ends the agent.

        Args:
            asks: Whether it may give back what it has by itself.
        """
        assert self._popen.stdin is not None
        if asks:
            self._popen.stdin.close()
            try:
                self._popen.wait(self._end_s)
            except subprocess.TimeoutExpired:
                self.end(False)
        elif self._popen.returncode is None:
            # The agent is in the group of its parent, its workers are not.
            os.killpg(self._popen.pid, signal.SIGKILL)

    def _tell(self, **news: Any) -> None:
        with self._changed:
            self._news.append(news)
            self._changed.notify_all()

    def _read(self, stream: IO[bytes], name: str) -> None:
        while data := os.read(stream.fileno(), _READ_BYTES):
            self._tell(**{name: data.decode("latin-1")})

    def _wait(self) -> None:
        streams = {"out": self._popen.stdout, "err": self._popen.stderr}
        readers = [
            threading.Thread(target=self._read, args=(stream, name), daemon=True)
            for name, stream in streams.items()
        ]
        for reader in readers:
            reader.start()
        code = self._popen.wait()
        # Its workers follow it, but not in the same instant.
        select.select([self._life], [], [], self._end_s)
        Segments(self._run, self._host).unlink_all()
        for reader in readers:
            reader.join(self._end_s)
        with self._changed:
            self._ended = f"lost its agent, which {spell_status(code)}"
            self._changed.notify_all()
        # Whoever hears of it ends this actor; without anybody it ends itself.
        time.sleep(self._linger_s)
        os._exit(0)


def _environment(order: dict[str, Any]) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in order["unset"]}
    return env | order["env"]


def main(argv: list[str]) -> int:
    """Is the parent of an agent: ends as that does, and does nothing else.

    Args:
        argv: What the agent gets.
    """
    life = int(argv[1])
    agent = subprocess.Popen(
        [sys.executable, "-m", "shardkit.cluster.agent_process", *argv],
        pass_fds=(life,),
    )
    os.close(life)
    code = agent.wait()
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
