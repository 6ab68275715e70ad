"""The agent of a host: its workers, its segments, its line to the supervisor.

Owns what happens on one host, by the orders of a supervisor that it does not trust to
be there: it reconnects to the same address, and tells its whole state whenever that
changes and at every heartbeat, so that no lost message matters. Invariants: orders and
workers of an older generation are refused; without its launcher, or without a
supervisor for `orphan_s`, it ends everything it has, segments too. It decides nothing.
"""

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

from shardkit.cluster.deadlines import ENVIRONMENT
from shardkit.cluster.host_memory import HostMemory
from shardkit.cluster.jax_job import environment_for_jax
from shardkit.cluster.ports import FreshPort
from shardkit.cluster.records import Assignment
from shardkit.cluster.settings import Settings
from shardkit.cluster.wire import Link, WireError, accept, connect
from shardkit.cluster.workers import ALIVE, Worker, Workers
from shardkit.snapshot.segments import Segments

__all__ = ["MAX_CONTENT_BYTES", "Agent"]

_RETRY_S = 0.02
MAX_CONTENT_BYTES = 64 << 20
"""What is said of one segment at most."""
_PAUSE_S = 0.02
"""Mere progress of steps is told at most this often."""
_ENVIRONMENT = ("SHARDKIT_AGENT", "SHARDKIT_TOKEN", ENVIRONMENT)


class Agent:
    """What runs on one host.

    Args:
        settings: The cluster's.
        host: The name of the host.
        segments: Where images are kept.
        ip: Where workers and peers reach it.
        pass_fds: File descriptors that workers inherit.
    """

    def __init__(
        self,
        settings: Settings,
        host: str,
        segments: Segments,
        *,
        ip: str = "127.0.0.1",
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._settings, self._host, self._ip = settings, host, ip
        self._pass_fds = pass_fds
        self._incarnation = secrets.token_hex(8)
        self._memory = HostMemory(settings, host, segments, self._soon)
        self._served: dict[asyncio.Task[Any], Link] = {}
        self._generation = 0
        self._ended = 0
        self._end_wanted = 0
        self._supervisor: Link | None = None
        self._heard_s = time.monotonic()
        self._told_s = 0.0
        self._is_telling = False
        self._timer: asyncio.TimerHandle | None = None
        self._over = asyncio.Event()
        self._port = FreshPort(ip)
        self._why = ""

    async def run(self) -> str:
        """Serves until it is told to end; returns why it did."""
        server = await asyncio.start_server(self._met, self._ip, 0)
        port = server.sockets[0].getsockname()[1]
        self._address = f"{self._ip}:{port}"
        env = {k: v for k, v in os.environ.items() if k not in _ENVIRONMENT}
        env |= {
            "SHARDKIT_AGENT": self._address,
            "SHARDKIT_TOKEN": self._settings.token,
            ENVIRONMENT: self._settings.deadlines.spell(),
            "SHARDKIT_RUN": self._settings.run,
            "SHARDKIT_DIRECTORY": self._settings.directory,
            "SHARDKIT_STRAGGLERS": self._settings.stragglers,
        }
        logs = Path(self._settings.directory) / "workers"
        logs.mkdir(mode=0o700, exist_ok=True)
        self._workers = Workers(
            self._host,
            self._settings.argv,
            environment_for_jax(env),
            logs,
            self._worker_ended,
            self._pass_fds,
        )
        self._port.hold()
        works = (self._serve_supervisor(), self._beat())
        tasks = [asyncio.create_task(work) for work in works]
        try:
            over = asyncio.create_task(self._over.wait())
            await asyncio.wait([over, *tasks], return_when="FIRST_COMPLETED")
            for task in tasks:
                if task.done() and (error := task.exception()) is not None:
                    self._why = f"{type(error).__name__}: {error}"
        finally:
            for task in tasks:
                task.cancel()
            server.close()
            await self._end_everything()
        return self._why

    def stop(self, why: str) -> None:
        """Ends it and everything it has."""
        self._why = self._why or why
        self._over.set()

    async def _end_everything(self) -> None:
        self._workers.end_all()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.deadlines.end_s):
                while self._workers.in_state(*ALIVE):
                    await asyncio.sleep(0.005)
        self._memory.close()
        for link in self._served.values():
            link.abort()
        if self._served:
            await asyncio.wait(list(self._served), timeout=1)

    # What the supervisor hears, and says.

    async def _serve_supervisor(self) -> None:
        settings = self._settings
        while True:
            try:
                link = await connect(
                    settings.address,
                    settings.token,
                    "the supervisor",
                    settings.deadlines.restart_s,
                )
            except WireError:
                await asyncio.sleep(_RETRY_S)
                continue
            self._supervisor = link
            link.post({"type": "hello", "host": self._host, "pid": os.getpid()})
            self._tell(beat=True)
            with contextlib.suppress(WireError):
                while True:
                    header, payload = await link.receive(
                        max_payload_bytes=MAX_CONTENT_BYTES
                    )
                    self._heard_s = time.monotonic()
                    self._obey(header, payload)
            self._supervisor = None
            link.abort()

    async def _beat(self) -> None:
        deadlines = self._settings.deadlines
        while True:
            await asyncio.sleep(deadlines.heartbeat_s)
            self._tell(beat=True)
            now_s = time.monotonic()
            if now_s - self._heard_s > deadlines.orphan_s:
                self.stop(f"no supervisor was heard for {deadlines.orphan_s:g} s")
            for worker in self._workers.in_state("starting"):
                if now_s - worker.started_s > deadlines.start_s:
                    assert worker.child is not None
                    worker.tail.append(
                        f"it was not ready after {deadlines.start_s:g} s (start_s)"
                    )
                    worker.child.kill()
            self._keep()

    def _soon(self, *, at_once: bool = True) -> None:
        """Tells the state once all that happens now has happened."""
        loop = asyncio.get_running_loop()
        if at_once and not self._is_telling:
            self._is_telling = True
            loop.call_soon(self._tell)
        elif not (at_once or self._is_telling or self._timer):
            delay_s = max(0.0, self._told_s + _PAUSE_S - time.monotonic())
            self._timer = loop.call_later(delay_s, self._tell)

    def _tell(self, *, beat: bool = False) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._is_telling, self._timer = False, None
        self._told_s = time.monotonic()
        if self._supervisor is None:
            return
        self._supervisor.post(
            {
                "type": "report",
                "host": self._host,
                "incarnation": self._incarnation,
                "beat": beat,
                "said_s": self._told_s,
                "address": self._address,
                "port": self._port.number,
                "generation": self._generation,
                "ended": self._ended,
                "keep": self._workers.keep,
                "workers": self._workers.report(),
                **self._memory.report(),
            }
        )

    def _obey(self, header: dict[str, Any], payload: bytes) -> None:
        kind = header["type"]
        if kind == "keep":
            self._workers.keep = header["count"]
            self._keep(at_once=header["at_once"])
        elif kind == "assign":
            self._assign(header)
        elif kind == "prepare":
            self._prepare(header)
        elif kind == "drop":
            self._workers.drop()
        elif kind == "end":
            self._end_wanted = max(self._end_wanted, header["of"])
            self._try_end()
        elif kind == "protected":
            self._protected(header["of"], header["step"])
        elif kind in ("propose", "confirm", "release"):
            if header["of"] == self._generation:
                for worker in self._members():
                    self._pass_on(worker, header)
                    if kind == "release":
                        worker.told.pop("answered", None)
        elif kind == "stop":
            self.stop("the supervisor ended it")
        elif self._supervisor is not None:
            self._memory.obey(header, payload, self._supervisor)

    def _keep(self, *, at_once: bool = False) -> None:
        self._workers.keep_standbys(self._workers.keep, at_once=at_once)

    def _members(self) -> list[Worker]:
        return [
            worker
            for worker in self._workers.in_state("running")
            if worker.generation == self._generation and not worker.is_ending
        ]

    def _pass_on(self, worker: Worker, header: dict[str, Any]) -> None:
        if worker.link is not None:
            worker.link.post(header)

    def _assign(self, header: dict[str, Any]) -> None:
        assignment = Assignment.from_json(header["assignment"])
        worker = self._workers.all.get(header["worker"])
        is_stale = assignment.generation <= self._end_wanted
        if is_stale or assignment.generation < self._generation:
            return
        can = worker is not None and worker.state in ("ready", "hot")
        if worker is None or worker.link is None or not can:
            return
        if assignment.generation > self._generation:
            self._generation = assignment.generation
            # Should one be left, it must not meet the new ones.
            self._workers.end(assignment.generation - 1)
        if assignment.process_index == 0 and worker.state == "ready":
            self._port.give()
        self._workers.assign(worker, assignment)
        worker.link.post({"type": "assign", "assignment": header["assignment"]})
        self._soon()

    def _prepare(self, header: dict[str, Any]) -> None:
        """Hands on what a standby is to prepare for."""
        worker = self._workers.all.get(header["worker"])
        if worker is None or worker.state != "ready" or worker.link is None:
            return
        worker.state = "preparing"
        if header["assignment"]["process_index"] == 0:
            self._port.give()
        worker.link.post(header)
        self._keep()
        self._soon()

    def _try_end(self) -> None:
        self._memory.ending(self._end_wanted)
        if self._ended < self._end_wanted and self._workers.end(self._end_wanted):
            self._ended = self._end_wanted
            self._generation = max(self._generation, self._ended)
            self._memory.ended(self._ended)
            self._port.hold()
            self._soon()

    def _protected(self, generation: int, step: int) -> None:
        self._memory.protected(generation, step)
        for worker in self._members():
            self._pass_on(worker, {"type": "protected", "of": generation, "step": step})

    def _worker_ended(self) -> None:
        self._try_end()
        self._soon()

    # Workers and peers.

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
        task = asyncio.current_task()
        assert task is not None
        self._served[task] = link
        try:
            header = (await link.receive(timeout_s=deadlines.request_s)).header
            if header["type"] == "worker":
                await self._serve_worker(link, header)
            else:
                await self._serve_peer(link, header)
        except (WireError, TimeoutError, KeyError, TypeError):
            pass
        finally:
            del self._served[task]
            link.abort()

    async def _serve_peer(self, link: Link, header: dict[str, Any]) -> None:
        while header["type"] == "fetch":
            await self._memory.serve(link, header)
            header = (await link.receive()).header

    async def _serve_worker(self, link: Link, header: dict[str, Any]) -> None:
        worker = self._workers.all.get(header["worker"])
        if worker is None or worker.state != "starting" or worker.link is not None:
            link.post({"type": "stale"})
            return
        worker.link, link.peer = link, f"worker {worker.id} of {self._host}"
        waiting: set[asyncio.Task[None]] = set()
        try:
            while True:
                header = (await link.receive()).header
                worker.heard_s = time.monotonic()
                if work := self._worker_said(worker, header):
                    task = asyncio.ensure_future(work)
                    waiting.add(task)
                    task.add_done_callback(waiting.discard)
        finally:
            for task in waiting:
                task.cancel()
            self._workers.heard_out(worker)

    def _worker_said(
        self, worker: Worker, header: dict[str, Any]
    ) -> Awaitable[None] | None:
        kind = header["type"]
        if kind == "ready":
            if worker.state in ("starting", "preparing"):
                worker.prepares = header["prepares"]
                worker.state = "ready" if worker.state == "starting" else "hot"
                self._soon()
                self._keep()
            return None
        if worker.generation != self._generation:
            self._pass_on(worker, {"type": "stale"})
            return None
        if kind == "failed":
            # Also of one that is being ended: it had failed before it was killed.
            worker.fail(header)
            self._soon()
        elif worker.is_ending:
            self._pass_on(worker, {"type": "stale"})
        elif kind == "progress":
            before = worker.told["phase"]
            worker.told |= {key: header[key] for key in ("step", "phase", "facts")}
            self._soon(at_once=before != header["phase"])
        elif kind in ("answered", "restored", "halted", "finished"):
            worker.told[kind] = header
            self._soon()
        elif kind == "event" and self._supervisor is not None:
            assert worker.assignment is not None
            self._supervisor.post(
                {
                    "type": "event",
                    "generation": worker.generation,
                    "process": worker.assignment.process_index,
                    "record": header["record"],
                }
            )
        elif kind in ("reserve", "commit", "where"):
            return self._answer(worker, header)
        return None

    async def _answer(self, worker: Worker, header: dict[str, Any]) -> None:
        assert worker.assignment is not None
        reply = await self._memory.answer(worker.assignment, header)
        self._pass_on(worker, {**reply, "id": header["id"]})
        if header["type"] == "commit":
            self._soon()
