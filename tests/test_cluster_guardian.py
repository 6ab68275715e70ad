"""The launched process, when the system has no more of something."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardkit.cluster import local
from shardkit.cluster.deadlines import Deadlines
from shardkit.cluster.local import LocalEngine
from shardkit.cluster.settings import Settings
from shardkit.cluster.split import plan_hosts

HERE = Path(__file__).parent


def make_settings(directory):
    return Settings(
        run="ab",
        token="secret",
        argv=("program",),
        directory=str(directory),
        hosts=plan_hosts(1, 1, 1),
        deadlines=Deadlines(request_s=0.5),
    )


def no_more(*_, **__):
    raise BlockingIOError(11, "Resource temporarily unavailable")


GUARDIAN = """
import asyncio, os, signal, sys
from shardkit.cluster import guardian
from test_cluster_guardian import make_settings, no_more

class Empty:
    def __init__(self, settings): pass
    def start(self, on_change): pass
    def hosts(self): return []
    async def close(self): pass

async def main():
    one = guardian.Guardian(make_settings(sys.argv[1]), Empty)
    running = asyncio.create_task(one.run())
    while one._link is None:
        await asyncio.sleep(0.01)
    guardian.Child = no_more
    os.kill(one._supervisor.pid, signal.SIGKILL)
    sys.exit(await asyncio.wait_for(running, 30))

asyncio.run(main())
"""


def test_a_supervisor_that_cannot_be_started_again_ends_the_run(tmp_path):
    # Not here, since JAX does not like processes that fork.
    done = subprocess.run(
        [sys.executable, "-c", GUARDIAN, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "no other supervisor can be started: [Errno 11]" in done.stderr


@pytest.mark.parametrize("tries", [1, 3])
def test_a_host_that_cannot_be_started_is_gone_and_may_be_tried_again(
    tmp_path, monkeypatch, tries
):
    async def run():
        told = []
        engine = LocalEngine(make_settings(tmp_path))
        engine.start(told.append)
        num_open = len(os.listdir("/proc/self/fd"))
        for _ in range(tries):
            engine.start_agent("host-0")
            await asyncio.sleep(0)
        assert len(os.listdir("/proc/self/fd")) == num_open
        return told, engine.hosts()

    monkeypatch.setattr(local, "Child", no_more)
    told, hosts = asyncio.run(run())
    assert len(told) == tries
    assert {info.is_there for info in told + hosts} == {False}
    assert "cannot be started: [Errno 11]" in told[0].why
