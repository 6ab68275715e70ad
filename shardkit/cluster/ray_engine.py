"""The engine of many machines: hosts are actors of Ray, one on every node.

Owns the launcher's side: which hosts are wanted and which are there, and the process
that speaks with Ray (`ray_driver`), which is started again if it dies; Ray itself is
never loaded into the launcher. Invariants: a host that finds no free node waits for one
and says so; a node that joins is taken at once; at the end no actor is left, and of a
cluster that was started for the run alone nothing at all.

Which cluster: that of `RAY_ADDRESS`; otherwise one of one node is started, on loopback
and with a token of its own, where all hosts are emulated. Hosts are tied to nodes
(`NodeAffinitySchedulingStrategy`) and not to the bundles of a placement group, since a
group waits until all of its nodes are there, and a run may begin and go on with fewer.
Ray restarts none: when a host comes back is the supervisor's choice.

Nodes need what the command needs (the same packages, its working directory, `--out-dir`
and `--out` at the same paths), and get the launcher's variables that begin with `JAX_`,
`XLA_`, `NCCL_` and the like. Ray gives all that it starts a niceness of 15, which only
root can take back; better start it with RAY_worker_niceness=0. The supervisor listens
on the launcher's address as Ray knows it, agents on their nodes'. The run's token goes
to the agents over Ray: who can read along there could start anything there anyway.

A host is said to be gone when its actor or node is; its agent, if it still lives, reads
the end of the actor and ends what it has, and without a supervisor it does that too.

A host takes all accelerators of its node, or what `resources` says, and so little of
its processors that it only keeps off nodes that offer none, as the heads of many
clusters do. Not tried: GPUs and TPUs on Ray, clusters of several machines, autoscalers;
`ray://` is refused.
"""

import asyncio
import contextlib
import importlib.util
import json
import math
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardkit.cluster.engine import HostInfo
from shardkit.cluster.guardian import Guardian
from shardkit.cluster.processes import Child, spell_status
from shardkit.cluster.settings import Settings
from shardkit.cluster.terminal import Terminal
from shardkit.cluster.wire import Closed, Link, WireError
from shardkit.errors import ClusterError, ConfigError

__all__ = ["RayEngine", "check_ray", "run_on_ray"]

_MODULE = "shardkit.cluster.ray_driver"
_RESOURCES = {"CPU": 0.01}
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


def check_ray(address: str) -> None:
    """Finds out, without loading it, whether Ray can be used.

    Args:
        address: Of the cluster; empty for one of its own.

    Raises:
        ConfigError: If it cannot.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "--engine ray: Ray is not installed; pip install 'shardkit[ray]', or use "
            "--engine local"
        )
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS={address}: expected the address of a cluster to be part of, "
            "such as 10.0.0.1:6379; start the run on one of its nodes, as ray job "
            "submit does"
        )


class RayEngine:
    """Agents on the nodes of a Ray cluster.

    Args:
        settings: The cluster's; `bind` replaces them once the address is known.
        address: Of the Ray cluster; empty to start one on this machine.
        resources: What each host takes of its node, as Ray counts it.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        address: str = "",
        resources: Mapping[str, float] | None = None,
    ) -> None:
        self._settings, self._address = settings, address
        self._resources = {**_RESOURCES, **(resources or {})}
        self._on_change: Callable[[HostInfo], Any] = lambda info: None
        self._known = {
            plan.host: HostInfo(host=plan.host, is_there=False)
            for plan in settings.hosts
        }
        self._actors: dict[str, dict[str, str]] = {}
        self._num_started = 0
        self._temporary = ""
        self._terminal = Terminal()
        self._driver: Child | None = None
        self._link: Link | None = None
        self._ended = asyncio.Event()
        self._is_closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> str:
        """Connects to the Ray cluster, or starts one.

        Returns:
            Where this machine can be reached by the nodes.

        Raises:
            ClusterError: If that is not possible.
        """
        try:
            await self._try_address()
            return await self._start_driver()
        except WireError as error:
            log = Path(self._settings.directory) / "ray.log"
            where = f"the cluster at {self._address}" if self._address else "Ray"
            said = f"; what Ray said is in {log}" if log.exists() else ""
            raise ClusterError(
                f"--engine ray: no connection to {where}: {error}{said}"
            ) from None

    async def _try_address(self) -> None:
        """Finds out at once what Ray would find out in minutes."""
        with contextlib.suppress(ValueError):
            host, port = self._address.rsplit(":", 1)
            limit_s = self._settings.deadlines.connect_s
            try:
                async with asyncio.timeout(limit_s):
                    _, writer = await asyncio.open_connection(host, int(port))
            except OSError as error:
                why = error.strerror or f"no answer for {limit_s:g} s (connect_s)"
                raise Closed(why) from None
            writer.close()

    def bind(self, settings: Settings) -> "RayEngine":
        """Learns where the supervisor listens; returns itself."""
        self._settings = settings
        return self

    def start(self, on_change: Callable[[HostInfo], Any]) -> None:
        """Begins; see `Engine.start`."""
        self._on_change = on_change
        self._run(self._keep_driver())

    def hosts(self) -> list[HostInfo]:
        """Returns all hosts."""
        return list(self._known.values())

    def start_agent(self, host: str) -> None:
        """Starts the agent of a host that is not there, as soon as a node is free."""
        info = self._known[host]
        if info.is_there:
            return
        if host in self._actors:
            # A supervisor after the one that was told asks for it again.
            asyncio.get_running_loop().call_soon(self._on_change, info)
            return
        # Never the name of one that may still be ending.
        self._num_started += 1
        name = f"{host}.{self._num_started}"
        self._actors[host] = {"host": host, "actor": name, "node": ""}
        self._known[host] = HostInfo(host=host, is_there=True, why=info.why)
        self._post({"type": "start", **self._actors[host]})

    def end_host(self, host: str) -> None:
        """Ends a host at once; `on_change` follows."""
        self._post({"type": "end", "host": host})

    async def close(self) -> None:
        """Ends all hosts, and the Ray cluster if it was started for them."""
        self._is_closing = True
        self._post({"type": "close"})
        if self._driver is not None:
            # Agents are asked, then ended; then Ray's own processes are.
            limit_s = 4 * self._settings.deadlines.end_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), limit_s)
            self._driver.kill()
        for task in self._tasks:
            task.cancel()
        if self._link is not None:
            self._link.abort()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _post(self, header: Mapping[str, Any]) -> None:
        if self._link is not None:
            self._link.post(header)

    def _run(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The driver.

    async def _start_driver(self) -> str:
        ours, theirs = socket.socketpair()
        env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        if not self._address:
            env = {k: v for k, v in env.items() if k != "RAY_ADDRESS"} | {
                # Ray's name for: a cluster that is for this machine alone.
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
                # By default all that Ray starts stands back behind anything else.
                "RAY_worker_niceness": "0",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
            }
            # A path of a socket may not be long.
            self._temporary = tempfile.mkdtemp(prefix="shardkit-ray-", dir="/tmp")
        num_cpus = self._resources.get("CPU", 0) * len(self._settings.hosts)
        options = {
            "directory": self._settings.directory,
            "address": self._address,
            "temporary": self._temporary,
            "num_cpus": max(1, math.ceil(num_cpus)),
        }
        self._ended = asyncio.Event()
        self._driver = Child(
            [
                *(sys.executable, "-m", _MODULE),
                *(str(theirs.fileno()), json.dumps(options)),
            ],
            env=env,
            stdout=1,
            stderr=2,
            pass_fds=(theirs.fileno(),),
            on_exit=lambda code: self._ended.set(),
            # It has actors to end, and maybe a cluster.
            death_signal=signal.SIGTERM,
        )
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        link = Link(reader, writer, "the process that speaks with Ray")
        limit_s = self._settings.deadlines.start_s
        try:
            header = (await link.receive(timeout_s=limit_s, what="an address")).header
            if header["type"] != "opened":
                raise Closed(header["why"])
        except WireError:
            self._driver.kill()
            link.abort()
            raise
        self._link = link
        return header["ip"]

    async def _keep_driver(self) -> None:
        """Tells a driver what it must know, and starts another when it is gone."""
        pause_s = _PAUSE_S
        while True:
            if self._link is not None:
                pause_s = _PAUSE_S
                await self._serve(self._link)
                self._link.abort()
                self._link = None
            assert self._driver is not None
            await self._ended.wait()
            shutil.rmtree(self._temporary, ignore_errors=True)
            if self._is_closing:
                return
            status = spell_status(self._driver.returncode or 0)
            text = f"the process that speaks with Ray {status}; starting another"
            self._terminal.line(f"shardkit: {text}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            with contextlib.suppress(WireError):
                await self._start_driver()

    async def _serve(self, link: Link) -> None:
        there = [actor for actor in self._actors.values() if actor["node"]]
        link.post(
            {
                "type": "begin",
                "settings": self._settings.to_json(),
                "resources": self._resources,
                "there": there,
            }
        )
        for actor in self._actors.values():
            if not actor["node"]:
                link.post({"type": "start", **actor})
        with contextlib.suppress(WireError):
            while True:
                self._heard((await link.receive()).header)

    def _heard(self, header: Mapping[str, Any]) -> None:
        kind, host = header["type"], header["host"]
        why = header.get("why", "")
        before = self._known[host].why
        if kind == "begins":
            self._actors[host]["node"] = header["node"]
            info = HostInfo(host=host, is_there=True, why=before)
        elif kind == "waits":
            self._actors[host]["node"] = ""
            info = HostInfo(host=host, is_there=False, why=before, waits=why)
        else:
            self._actors.pop(host, None)
            info = HostInfo(host=host, is_there=False, why=why)
        self._known[host] = info
        self._on_change(info)


async def run_on_ray(
    settings: Settings,
    *,
    address: str | None = None,
    resources: Mapping[str, float] | None = None,
) -> int:
    """Runs a cluster on the nodes of another, and returns the exit code.

    Args:
        settings: What to run.
        address: Of the Ray cluster; empty to start one. By default `RAY_ADDRESS`.
        resources: What each host takes of its node.

    Raises:
        ConfigError: If Ray cannot be used.
        ClusterError: If there is no connection to it.
    """
    if address is None:
        address = os.environ.get("RAY_ADDRESS", "")
    address = "" if address == "local" else address
    check_ray(address)
    engine = RayEngine(settings, address=address, resources=resources)
    try:
        ip = await engine.open()
        return await Guardian(settings, engine.bind, ip=ip).run()
    finally:
        await engine.close()
