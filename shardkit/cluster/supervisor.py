"""The process that decides: a shell of sockets and time around the state machine.

Owns the connections to the agents, to the launcher and to those who ask for the status,
and the file from which the next supervisor goes on if this one dies. Invariant: what
must survive is written before anything is done that depends on it. What to decide is
the machine's business.
"""

import asyncio
import json
import socket
import sys
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardkit.cluster.agent import MAX_CONTENT_BYTES
from shardkit.cluster.generations import Machine
from shardkit.cluster.kept_recoveries import keep_recoveries
from shardkit.cluster.orders import EndHost, EndRun, Order, Save, Send, StartHost, Tell
from shardkit.cluster.processes import die_with_parent
from shardkit.cluster.salvage import Answer
from shardkit.cluster.settings import Settings, read_private, write_private
from shardkit.cluster.tally import History, make_status
from shardkit.cluster.web import StatusPage, derive_token
from shardkit.cluster.wire import Link, WireError, accept
from shardkit.snapshot.recovery import Report

__all__ = ["Supervisor", "main"]


class Supervisor:
    """Serves one cluster.

    Args:
        settings: What it was started with.
        launcher: The line to the launcher, whose engine starts and ends hosts.
        there: The hosts whose agents are there already.
    """

    def __init__(self, settings: Settings, launcher: Link, there: list[str]) -> None:
        self._settings, self._launcher = settings, launcher
        self._file = Path(settings.directory) / "state.json"
        memory = read_private(self._file) or {}
        if memory.get("run") != settings.run:
            memory = {}
        self._history = History(memory.get("history"))
        self._loop = asyncio.get_running_loop()
        self._machine = Machine(
            settings,
            self._loop.time(),
            memory=memory.get("machine"),
            there=there,
        )
        self._agents: dict[str, Link] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._over = asyncio.Event()
        self._unsaved = ""

    async def run(self, listener: socket.socket) -> None:
        """Serves until the launcher ends it, or is gone."""
        server = await asyncio.start_server(self._met, sock=listener)
        page = await self._open_page()
        beat = asyncio.create_task(self._beat())
        self._carry_out(self._machine.tick(self._loop.time()))
        try:
            while True:
                header = (await self._launcher.receive()).header
                now_s = self._loop.time()
                if header["type"] == "gone":
                    orders = self._machine.gone(header["host"], header["why"], now_s)
                    self._carry_out(orders)
                elif header["type"] == "waits":
                    orders = self._machine.waits(header["host"], header["why"], now_s)
                    self._carry_out(orders)
                elif header["type"] == "leave":
                    self._carry_out(self._machine.leave(header["why"], now_s))
        except WireError:
            pass
        finally:
            beat.cancel()
            server.close()
            await page.close()

    async def _open_page(self) -> StatusPage:
        """Serves the page where the supervisor before this one did, if it can."""
        path = Path(self._settings.directory) / "address.json"
        known = read_private(path) or {}
        token = derive_token(self._settings.token)
        try:
            port = urllib.parse.urlsplit(known.get("page", "")).port or 0
            page = await StatusPage.open(self._status, port=port, token=token)
        except OSError:
            page = await StatusPage.open(self._status, token=token)
        if page.url != known.get("page"):
            write_private(path, {**known, "page": page.url})
            self._launcher.post({"type": "tell", "text": f"watch it at {page.url}"})
        return page

    def _status(self) -> dict[str, Any]:
        now_s = self._loop.time()
        return make_status(self._settings, self._machine, self._history, now_s)

    async def _beat(self) -> None:
        while True:
            for link in (self._launcher, *self._agents.values()):
                link.post({"type": "beat"})
            self._carry_out(self._machine.tick(self._loop.time()))
            await asyncio.sleep(self._settings.deadlines.heartbeat_s)

    def _carry_out(self, orders: list[Order]) -> None:
        if any(isinstance(order, Save) for order in orders):
            self._save()
            self._keep_recoveries()
        for order in orders:
            match order:
                case Send(host, header, payload):
                    if host in self._agents:
                        self._agents[host].post(header, payload)
                case StartHost(host):
                    self._launcher.post({"type": "start", "host": host})
                case EndHost(host, why):
                    self._launcher.post({"type": "end", "host": host, "why": why})
                case Tell(text):
                    self._launcher.post({"type": "tell", "text": text})
                case EndRun(code, message):
                    self._launcher.post(
                        {"type": "ended", "code": code, "message": message}
                    )
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        next_s = self._machine.next_s()
        self._timer = None
        if next_s is not None:
            # A deadline that changes nothing must not keep this busy.
            at_s = max(next_s, self._loop.time() + 0.001)
            self._timer = self._loop.call_at(at_s, self._tick)

    def _tick(self) -> None:
        self._carry_out(self._machine.tick(self._loop.time()))

    def _save(self) -> None:
        values = {
            "run": self._settings.run,
            "machine": self._machine.to_json(),
            "history": self._history.to_json(),
        }
        try:
            write_private(self._file, values)
            self._unsaved = ""
        except OSError as error:
            # The run goes on; only a supervisor after this one would know less.
            if self._unsaved != str(error):
                self._unsaved = str(error)
                text = f"what the supervisor knows cannot be saved: {error}"
                self._launcher.post({"type": "tell", "text": text})

    def _keep_recoveries(self) -> None:
        offset_s = time.time() - self._loop.time()
        keep_recoveries(
            self._history.facts.get("out"),
            [recovery.record(offset_s) for recovery in self._machine.recoveries],
            begun_unix_s=self._history.began_unix_s,
        )

    async def _met(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        deadlines = self._settings.deadlines
        try:
            link = await accept(
                reader, writer, self._settings.token, deadlines.connect_s
            )
        except WireError:
            return
        try:
            header = (await link.receive(timeout_s=deadlines.request_s)).header
            if header["type"] == "hello":
                await self._serve_agent(link, header["host"])
            else:
                await self._serve_person(link, header)
        except (WireError, KeyError, TypeError):
            pass
        finally:
            link.abort()

    async def _serve_agent(self, link: Link, host: str) -> None:
        link.peer = f"the agent of {host}"
        found: dict[str, Report] = {}
        try:
            while True:
                header, payload = await link.receive(
                    max_payload_bytes=MAX_CONTENT_BYTES
                )
                if header["type"] == "found":
                    found[header["name"]] = Report(host, header["name"], payload)
                elif header["type"] == "surveyed":
                    reports = list(found.values())
                    found.clear()
                    answer = Answer(header["number"], reports, header["damaged"])
                    if self._agents.get(host) is link:
                        now_s = self._loop.time()
                        self._carry_out(self._machine.surveyed(host, answer, now_s))
                elif header["type"] == "report":
                    if self._is_stale(header):
                        link.post({"type": "stop"})
                        continue
                    self._agents[host] = link
                    now_s = self._loop.time()
                    self._carry_out(self._machine.heard(header, now_s))
                    self._read_losses()
                elif header["type"] == "event":
                    if header["generation"] == self._machine.generation:
                        self._history.read(header["record"])
        finally:
            if self._agents.get(host) is link:
                del self._agents[host]

    def _is_stale(self, report: Mapping[str, Any]) -> bool:
        """Whether an agent speaks whose host was given up."""
        host = self._machine.hosts.get(report["host"])
        return host is None or report["incarnation"] in host.dead

    def _read_losses(self) -> None:
        live = self._machine.live
        if live is not None and live.entries[0]:
            entry = live.entries[0]
            self._history.read({**entry["facts"], "step": entry["step"]})

    async def _serve_person(self, link: Link, header: Mapping[str, Any]) -> None:
        while header["type"] == "status":
            status = self._status()
            try:
                link.post({"type": "status", "status": status})
            except WireError:
                # After many recoveries it does not fit into a header any more.
                link.post({"type": "status"}, json.dumps(status).encode())
            header = (await link.receive()).header


async def _serve(listener: socket.socket, control: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=control)
    launcher = Link(reader, writer, "the launcher")
    header = (await launcher.receive()).header
    settings = Settings.from_json(header["settings"])
    await Supervisor(settings, launcher, header["there"]).run(listener)


def main(argv: list[str]) -> int:
    """Is the process of a supervisor.

    Args:
        argv: The file descriptors of the listening socket and of the line to the
            launcher, and the launcher's process id.
    """
    listener, control, parent = map(int, argv)
    die_with_parent(parent)
    asyncio.run(_serve(socket.socket(fileno=listener), socket.socket(fileno=control)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
