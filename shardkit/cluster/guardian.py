"""The launched process: small, so that nothing in it can fail.

Owns the run's exit code, the listening socket that supervisors inherit, the supervisor
and the engine. Invariants: a supervisor that dies, or is not heard any more, is
started again at the same address; when this process ends, so does everything of the
run, and no memory of it is left. What happens in the run it does not know.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardkit.cluster.engine import Engine, HostInfo
from shardkit.cluster.processes import Child, spell_status
from shardkit.cluster.settings import Settings, write_private
from shardkit.cluster.terminal import Terminal
from shardkit.cluster.wire import Link, WireError

__all__ = ["Guardian"]

_DEATHS_WINDOW_S = 60.0
_MOST_FAILURES = 5
"""So often may supervisors end by themselves within the window."""
_MOST_DEATHS = 50
"""And so often be ended by others."""


class Guardian:
    """Runs a cluster until it ends.

    Args:
        settings: What it is started with, without an address.
        make_engine: Makes the engine, once the address is known.
        ip: Where to listen.
    """

    def __init__(
        self,
        settings: Settings,
        make_engine: Callable[[Settings], Engine],
        *,
        ip: str = "127.0.0.1",
    ) -> None:
        self._listener = socket.create_server((ip, 0), backlog=128)
        port = self._listener.getsockname()[1]
        values = settings.to_json() | {"address": f"{ip}:{port}"}
        self._settings = Settings.from_json(values)
        self._engine = make_engine(self._settings)
        self._terminal = Terminal()
        self._supervisor: Child | None = None
        self._link: Link | None = None
        self._heard_s = 0.0
        self._deaths: list[tuple[float, bool]] = []
        self._leaving = ""

    async def run(self) -> int:
        """Runs it and returns the exit code."""
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._ended: asyncio.Future[tuple[int, str]] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        write_private(
            Path(self._settings.directory) / "address.json",
            {
                "address": self._settings.address,
                "token": self._settings.token,
                "run": self._settings.run,
                "pid": os.getpid(),
            },
        )
        self._engine.start(self._host_changed)
        watching = asyncio.create_task(self._watch())
        try:
            await self._start_supervisor()
            code, message = await self._ended
        finally:
            watching.cancel()
            await self._close()
        if message:
            self._terminal.line(f"shardkit: {message}")
        self._terminal.close(self._settings.deadlines.request_s)
        return code

    async def _close(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.kill()
        await self._engine.close()
        self._listener.close()
        (Path(self._settings.directory) / "address.json").unlink(missing_ok=True)

    def _finish(self, code: int, message: str) -> None:
        if not self._ended.done():
            self._ended.set_result((code, message))

    def _signalled(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT or self._leaving:
            self._finish(128 + number, "interrupted")
            return
        self._leaving = f"asked to leave by {name}"
        self._post({"type": "leave", "why": self._leaving})

    def _post(self, header: dict[str, Any]) -> None:
        if self._link is not None:
            self._link.post(header)

    # The supervisor.

    async def _start_supervisor(self) -> None:
        ours, theirs = socket.socketpair()
        self._heard_s = self._loop.time() + self._settings.deadlines.restart_s
        try:
            child = Child(
                [
                    *(sys.executable, "-m", "shardkit.cluster.supervisor"),
                    *map(str, (self._listener.fileno(), theirs.fileno(), os.getpid())),
                ],
                env=os.environ,
                stdout=1,
                stderr=2,
                pass_fds=(self._listener.fileno(), theirs.fileno()),
                on_exit=lambda code: self._supervisor_ended(child, code),
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._supervisor = child
        reader, writer = await asyncio.open_connection(sock=ours)
        self._link = Link(reader, writer, "the supervisor")
        there = [info.host for info in self._engine.hosts() if info.is_there]
        self._link.post(
            {"type": "settings", "settings": self._settings.to_json(), "there": there}
        )
        if self._leaving:
            self._post({"type": "leave", "why": self._leaving})
        self._listening = asyncio.create_task(self._listen(self._link))

    async def _listen(self, link: Link) -> None:
        try:
            while True:
                self._obey((await link.receive()).header)
        except WireError:
            link.abort()

    def _obey(self, header: dict[str, Any]) -> None:
        self._heard_s = self._loop.time()
        kind = header["type"]
        if kind == "start":
            self._engine.start_agent(header["host"])
        elif kind == "end":
            self._engine.end_host(header["host"])
            # One that is gone already can say so no more.
            self._tell_if_gone(header["host"])
        elif kind == "tell":
            self._terminal.line(f"shardkit: {header['text']}")
        elif kind == "ended":
            self._finish(header["code"], header["message"])

    def _tell_if_gone(self, host: str) -> None:
        for info in self._engine.hosts():
            if info.host == host and not info.is_there:
                self._host_changed(info)

    def _host_changed(self, info: HostInfo) -> None:
        if info.is_there or info.waits:
            self._post({"type": "waits", "host": info.host, "why": info.waits})
        else:
            self._post({"type": "gone", "host": info.host, "why": info.why})

    def _supervisor_ended(self, child: Child, code: int) -> None:
        if child is not self._supervisor or self._ended.done():
            return
        now_s = self._loop.time()
        begin_s = now_s - _DEATHS_WINDOW_S
        self._deaths = [death for death in self._deaths if death[0] > begin_s]
        self._deaths.append((now_s, code >= 0))
        status, num_failures = spell_status(code), sum(own for _, own in self._deaths)
        if num_failures > _MOST_FAILURES or len(self._deaths) > _MOST_DEATHS:
            count = len(self._deaths)
            self._finish(1, f"the supervisor {status}; {count} ended within a minute")
            return
        self._terminal.line(f"shardkit: the supervisor {status}; starting another")
        self._starting = asyncio.create_task(self._start_another())

    async def _start_another(self) -> None:
        try:
            await self._start_supervisor()
        except OSError as error:
            # Nobody else would ever try again.
            self._finish(1, f"no other supervisor can be started: {error}")

    async def _watch(self) -> None:
        """Ends a supervisor that is there and does nothing."""
        deadlines = self._settings.deadlines
        while True:
            await asyncio.sleep(deadlines.heartbeat_s)
            late = self._loop.time() - self._heard_s > deadlines.silence_s
            if late and self._supervisor is not None:
                self._supervisor.kill()
