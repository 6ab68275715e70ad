"""The process that speaks with Ray, so that the launcher need not.

Owns the only connection to Ray: it chooses nodes, makes actors, hears of their end, and
ends them all when the launcher asks for it or is gone. Invariants: one host a node,
unless this process has started the cluster itself, which has one node only; what Ray
prints goes to a file; whatever the launcher must know is told again to its next driver,
should this one die. When to start and to end a host is not decided here.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardkit.cluster.ray_nodes import make_actor, pick_node, take_resources
from shardkit.cluster.settings import Settings
from shardkit.cluster.terminal import Terminal
from shardkit.cluster.wire import Link, WireError

__all__ = ["Driver", "main"]

_POLL_S = 0.25
_REACH_S = 0.5
"""How long an actor may take to answer that could not be reached before."""
_SHUN_S = 3.0
"""For how long nothing is started on a node on which an actor has died."""
_SHUN_SILENT_S = 20.0
"""Likewise where one was not reached, until Ray has found out whether the node is."""
_DRAIN_S = 2.0
_OBJECT_STORE_BYTES = 80 << 20


class _NodeLost(Exception):
    """The node of a host is no longer in the cluster."""


@dataclasses.dataclass(slots=True)
class _Host:
    name: str
    actor_name: str
    node: str = ""
    actor: Any = None
    is_ending: bool = False
    task: asyncio.Task[None] | None = None
    lost: asyncio.Future[str] | None = None


class Driver:
    """Serves one launcher.

    Args:
        link: The line to it.
        ray: The module, connected to its cluster.
        is_own: Whether the cluster is this process's own.
        terminals: Where what process 0 prints goes: `"out"` and `"err"`.
    """

    def __init__(
        self, link: Link, ray: Any, *, is_own: bool, terminals: Mapping[str, Terminal]
    ) -> None:
        self._link, self._ray, self._is_own = link, ray, is_own
        self._terminals = terminals
        self._hosts: dict[str, _Host] = {}
        self._nodes: list[dict[str, Any]] = []
        self._shunned: dict[str, float] = {}
        self._polled = asyncio.Event()

    async def run(self) -> None:
        """Serves until the launcher asks for the end, or is gone."""
        header = (await self._link.receive()).header
        self._settings = Settings.from_json(header["settings"])
        self._resources: dict[str, float] = header["resources"]
        self._nodes = await asyncio.to_thread(self._ray.nodes)
        for host in header["there"]:
            self._adopt(_Host(host["host"], host["actor"], node=host["node"]))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._link.abort)
        tasks = [asyncio.create_task(x) for x in (self._listen(), self._poll())]
        try:
            done, _ = await asyncio.wait(tasks, return_when="FIRST_COMPLETED")
        finally:
            for task in tasks:
                task.cancel()
            await self._close()
        for task in done:
            task.result()

    async def _listen(self) -> None:
        with contextlib.suppress(WireError):
            while True:
                header = (await self._link.receive()).header
                if header["type"] == "start":
                    host = _Host(header["host"], header["actor"])
                    self._begin(host)
                elif header["type"] == "end" and header["host"] in self._hosts:
                    self._end_soon(self._hosts[header["host"]])
                elif header["type"] == "close":
                    return

    def _begin(self, host: _Host) -> None:
        host.lost = asyncio.get_running_loop().create_future()
        self._hosts[host.name] = host
        host.task = asyncio.create_task(self._serve(host))

    def _adopt(self, host: _Host) -> None:
        """Goes on with a host that a driver before this one has started."""
        try:
            host.actor = self._ray.get_actor(host.actor_name, namespace=self._namespace)
        except ValueError:
            why = "lost its actor while nobody spoke with Ray"
            self._post("gone", host.name, why=why)
            return
        self._begin(host)

    @property
    def _namespace(self) -> str:
        return f"shardkit-{self._settings.run}"

    def _post(self, kind: str, host: str, **more: Any) -> None:
        self._link.post({"type": kind, "host": host, **more})

    # The life of a host.

    async def _serve(self, host: _Host) -> None:
        why = "was ended"
        try:
            if host.actor is None:
                await self._start(host)
            why = await self._follow(host)
        except _NodeLost as error:
            why = f"lost its node: {error}"
        except self._ray.exceptions.RayError as error:
            silent = self._ray.exceptions.ActorUnavailableError
            shun_s = _SHUN_SILENT_S if isinstance(error, silent) else _SHUN_S
            self._shunned[host.node] = time.monotonic() + shun_s
            why = await self._spell(host, error)
        finally:
            self._kill(host)
            del self._hosts[host.name]
            self._post("gone", host.name, why=why)

    async def _start(self, host: _Host) -> None:
        while True:
            node = await self._find_node(host)
            host.node = node["NodeID"]
            self._post("begins", host.name, node=host.node)
            num_hosts = len(self._settings.hosts) if self._is_own else 1
            try:
                host.actor = make_actor(
                    self._ray,
                    self._settings,
                    host.name,
                    name=host.actor_name,
                    namespace=self._namespace,
                    node=host.node,
                    ip="127.0.0.1" if self._is_own else node["NodeManagerAddress"],
                    resources=take_resources(node, self._resources, num_hosts),
                )
                await self._unless_lost(host, host.actor.is_there.remote())
                return
            except (_NodeLost, self._ray.exceptions.ActorUnschedulableError):
                # It left before anything was there: another will do.
                self._kill(host)
                self._shunned[host.node] = time.monotonic() + _SHUN_S
                host.node, host.actor = "", None
                host.lost = asyncio.get_running_loop().create_future()

    async def _find_node(self, host: _Host) -> Mapping[str, Any]:
        is_told = False
        while True:
            now_s = time.monotonic()
            hosts = collections.Counter(x.node for x in self._hosts.values() if x.node)
            nodes = [
                node
                for node in self._nodes
                if self._shunned.get(node["NodeID"], 0) < now_s
            ]
            node = pick_node(nodes, hosts, self._resources, shares=self._is_own)
            if node is not None:
                return node
            if not is_told:
                is_told = True
                there = sum(node["Alive"] for node in self._nodes)
                why = f"for a node of the Ray cluster: none of {there} is free for it"
                self._post("waits", host.name, why=why)
            polled = self._polled
            await polled.wait()

    async def _follow(self, host: _Host) -> str:
        """Passes on what a host says until it has ended; returns how it did."""
        caller = secrets.token_hex(4)
        while True:
            try:
                text = await self._unless_lost(host, host.actor.hear.remote(caller))
            except self._ray.exceptions.ActorUnavailableError as error:
                await self._reach(host, error)
                continue
            for news in json.loads(text):
                for name, terminal in self._terminals.items():
                    terminal.write(news.get(name, "").encode("latin-1"))
                if "ended" in news:
                    return news["ended"]

    async def _reach(self, host: _Host, error: Exception) -> None:
        """Tries once more to reach an actor, and raises the error if it is not."""
        try:
            async with asyncio.timeout(_REACH_S):
                await self._unless_lost(host, host.actor.is_there.remote())
        except TimeoutError:
            raise error from None

    async def _unless_lost(self, host: _Host, ref: Any) -> Any:
        """Returns what an actor answers, unless its node is lost before."""
        assert host.lost is not None
        call = asyncio.wrap_future(ref.future())
        await asyncio.wait([call, host.lost], return_when="FIRST_COMPLETED")
        if not call.done():
            call.cancel()
            raise _NodeLost(host.lost.result())
        return call.result()

    async def _spell(self, host: _Host, error: Exception) -> str:
        """Says why Ray has lost a host."""
        await self._look()
        if host.lost is not None and host.lost.done():
            return f"lost its node: {host.lost.result()}"
        if isinstance(error, self._ray.exceptions.ActorUnavailableError):
            return "cannot be reached by Ray any more"
        kind = type(error).__name__
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        known = [x for x in lines if x.startswith("The actor is")] or lines[-1:]
        return f"lost its actor ({kind}: {' '.join(known):.200})"

    async def _look(self) -> None:
        """Finds out which nodes there are."""
        self._nodes = await asyncio.to_thread(self._ray.nodes)
        known = {node["NodeID"]: node for node in self._nodes}
        for host in list(self._hosts.values()):
            node = known.get(host.node)
            if node is None or node["Alive"] or host.lost is None:
                continue
            if not host.lost.done():
                why = node.get("DeathReasonMessage") or "it left the Ray cluster"
                host.lost.set_result(f"{node['NodeManagerAddress']}, {why:.200}")

    async def _poll(self) -> None:
        """Watches the nodes."""
        while True:
            await self._look()
            polled, self._polled = self._polled, asyncio.Event()
            polled.set()
            await asyncio.sleep(_POLL_S)

    # Their end.

    def _end_soon(self, host: _Host, *, asks: bool = False) -> None:
        if host.is_ending or host.task is None:
            return
        host.is_ending = True
        if host.actor is None:
            host.task.cancel()
            return
        with contextlib.suppress(self._ray.exceptions.RayError):
            host.actor.end.remote(asks)
        # One that does not listen is ended by Ray; its agent follows.
        limit_s = self._settings.deadlines.end_s * (1.5 if asks else 0.5)
        asyncio.get_running_loop().call_later(limit_s, self._kill, host)

    def _kill(self, host: _Host) -> None:
        if host.actor is not None:
            with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
                self._ray.kill(host.actor, no_restart=True)

    async def _close(self) -> None:
        hosts = list(self._hosts.values())
        for host in hosts:
            self._end_soon(host, asks=True)
        tasks = [host.task for host in hosts if host.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=2 * self._settings.deadlines.end_s)
        for host in list(self._hosts.values()):
            self._kill(host)


def connect_to_ray(address: str, temporary: str, num_cpus: int) -> Any:
    """Returns Ray's module, connected.

    Args:
        address: Of a cluster; empty to start one here, for this process alone.
        temporary: Where one that is started keeps its files.
        num_cpus: How many processors it may give away.
    """
    import ray  # pyright: ignore[reportMissingImports]

    options: dict[str, Any] = {"address": address}
    if not address:
        options = {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": num_cpus,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_temp_dir": temporary,
        }
    ray.init(**options, log_to_driver=False, logging_level=logging.WARNING)
    return ray


def _take_streams(directory: str) -> dict[str, Terminal]:
    """Leaves the launcher's streams to the run, and gives Ray a file instead."""
    terminals = {"out": Terminal(os.dup(1)), "err": Terminal(os.dup(2))}
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    log = os.open(Path(directory) / "ray.log", flags, 0o600)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)
    return terminals


async def _serve(control: socket.socket, options: Mapping[str, Any]) -> None:
    terminals = _take_streams(options["directory"])
    reader, writer = await asyncio.open_connection(sock=control)
    link = Link(reader, writer, "the launcher")
    address = options["address"]
    try:
        # It sets signal handlers, which only the main thread may.
        ray = connect_to_ray(address, options["temporary"], options["num_cpus"])
    except Exception as error:
        link.post({"type": "failed", "why": f"{type(error).__name__}: {error}"})
        await link.writer.drain()
        return
    try:
        ip = ray.util.get_node_ip_address() if address else "127.0.0.1"
        link.post({"type": "opened", "ip": ip})
        await Driver(link, ray, is_own=not address, terminals=terminals).run()
    finally:
        ray.shutdown()
        for terminal in terminals.values():
            terminal.close(_DRAIN_S)
        if not address:
            shutil.rmtree(options["temporary"], ignore_errors=True)
        link.close()


def main(argv: list[str]) -> int:
    """Is the driver's process.

    Args:
        argv: The file descriptor of the line to the launcher, and JSON: `directory`,
            `address`, `temporary` and `num_cpus`, as for `connect_to_ray`.
    """
    control = socket.socket(fileno=int(argv[0]))
    asyncio.run(_serve(control, json.loads(argv[1])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
