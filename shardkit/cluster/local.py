"""The engine of one machine: hosts are agents, and these are child processes.

Owns those processes. A host is emulated so that losing it loses what it had: its
workers end with their agent, and its segments are removed. Invariant: a host is gone
when nobody holds its life pipe any more, which every process of it inherits.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from shardkit.cluster.engine import HostInfo
from shardkit.cluster.processes import Child, spell_status
from shardkit.cluster.settings import Settings
from shardkit.cluster.threads import in_thread
from shardkit.snapshot.segments import Segments, reclaim

__all__ = ["LocalEngine"]

_MODULE = "shardkit.cluster.agent_process"


@dataclasses.dataclass(slots=True)
class _Agent:
    child: Child | None
    launcher: int
    life: int
    gone: asyncio.Event


class LocalEngine:
    """Agents as subprocesses of this process.

    Args:
        settings: The cluster's.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._on_change: Callable[[HostInfo], Any] = lambda info: None
        self._agents: dict[str, _Agent] = {}
        self._why: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, on_change: Callable[[HostInfo], Any]) -> None:
        """Begins; see `Engine.start`."""
        self._on_change = on_change

    def hosts(self) -> list[HostInfo]:
        """Returns all hosts."""
        return [
            HostInfo(
                host=plan.host,
                is_there=plan.host in self._agents,
                why=self._why.get(plan.host, ""),
            )
            for plan in self._settings.hosts
        ]

    def start_agent(self, host: str) -> None:
        """Starts the agent of a host that is not there."""
        if host in self._agents:
            return
        settings_end, launcher = os.pipe()
        life, held = os.pipe()
        agent = _Agent(None, launcher, life, asyncio.Event())
        self._agents[host] = agent
        try:
            agent.child = Child(
                [
                    sys.executable,
                    "-m",
                    "shardkit.cluster.agent_process",
                    host,
                    str(held),
                ],
                env=os.environ,
                stdin=settings_end,
                stdout=1,
                stderr=2,
                pass_fds=(held,),
                on_exit=lambda code: self._ended(host, agent, code),
                # It has memory to give back.
                death_signal=signal.SIGTERM,
            )
        except OSError as error:
            os.close(launcher)
            os.close(life)
            del self._agents[host]
            self._why[host] = f"cannot be started: {error}"
            info = HostInfo(host=host, is_there=False, why=self._why[host])
            # The supervisor tries it again, later each time.
            asyncio.get_running_loop().call_soon(self._on_change, info)
            return
        finally:
            os.close(settings_end)
            os.close(held)
        settings = json.dumps(self._settings.to_json()).encode()
        with contextlib.suppress(BrokenPipeError):
            os.write(launcher, settings + b"\n")

    def end_host(self, host: str) -> None:
        """Ends a host at once; `on_change` follows."""
        agent = self._agents.get(host)
        if agent is not None and agent.child is not None:
            agent.child.kill()

    def _ended(self, host: str, agent: _Agent, code: int) -> None:
        self._why[host] = f"lost its agent, which {spell_status(code)}"
        os.close(agent.launcher)
        loop = asyncio.get_running_loop()
        # Its workers follow it, but not in the same instant.
        limit = loop.call_later(
            self._settings.deadlines.end_s, self._gone, host, agent, None
        )
        loop.add_reader(agent.life, self._gone, host, agent, limit)

    def _gone(
        self, host: str, agent: _Agent, limit: asyncio.TimerHandle | None
    ) -> None:
        if limit is not None:
            limit.cancel()
        asyncio.get_running_loop().remove_reader(agent.life)
        os.close(agent.life)
        task = asyncio.ensure_future(self._clean_up(host, agent))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _clean_up(self, host: str, agent: _Agent) -> None:
        # To give gigabytes back takes longer than a supervisor may be silent.
        await in_thread(Segments(self._settings.run, host).unlink_all)
        del self._agents[host]
        agent.gone.set()
        self._on_change(HostInfo(host=host, is_there=False, why=self._why[host]))

    async def close(self) -> None:
        """Ends all hosts: asks them, and after `end_s` does not ask any more."""
        agents = list(self._agents.values())
        for agent in agents:
            if agent.child is not None:
                agent.child.terminate()
        waits = [asyncio.create_task(agent.gone.wait()) for agent in agents]
        if waits:
            await asyncio.wait(waits, timeout=self._settings.deadlines.end_s)
        for agent in list(self._agents.values()):
            if agent.child is not None:
                agent.child.kill()
        if waits:
            await asyncio.wait(waits, timeout=self._settings.deadlines.end_s)
        reclaim(self._settings.run)
