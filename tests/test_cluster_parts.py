"""The arithmetic, the files and the children of a cluster."""

import asyncio
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from clusters import ASSIGNMENT
from hypothesis import given
from hypothesis import strategies as st

from shardkit.cluster import join
from shardkit.cluster.agent import Agent
from shardkit.cluster.asking import Address, Asker
from shardkit.cluster.deadlines import Deadlines
from shardkit.cluster.hosts import Host
from shardkit.cluster.processes import spell_status
from shardkit.cluster.settings import Limits, Settings, read_private, write_private
from shardkit.cluster.split import plan_hosts, split
from shardkit.cluster.stragglers import share
from shardkit.cluster.supervisor import Supervisor
from shardkit.cluster.watchdog import Watchdog
from shardkit.cluster.wire import WireError, accept, encode
from shardkit.cluster.workers import Worker, Workers
from shardkit.errors import ClusterError, ConfigError


@given(st.integers(0, 200), st.integers(1, 40))
def test_a_split_is_even_and_leaves_nothing(count, parts):
    found = split(count, parts)
    assert (sum(found), len(found)) == (count, parts)
    assert max(found) - min(found) <= 1
    assert found == sorted(found, reverse=True)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 30), st.data())
def test_hosts_that_are_left_always_have_the_devices_they_get(
    processes, hosts, devices, data
):
    if hosts > processes or devices < processes:
        with pytest.raises(ConfigError):
            plan_hosts(processes, hosts, devices)
        return
    plans = plan_hosts(processes, hosts, devices)
    left = data.draw(st.lists(st.sampled_from(plans), min_size=1, unique=True))
    left.sort(key=plans.index)
    local = iter(
        split(sum(p.num_devices for p in left), sum(p.num_processes for p in left))
    )
    for plan in left:
        assert (
            sum(next(local) for _ in range(plan.num_processes)) <= plan.num_devices + 1
        )


@given(st.integers(1, 60), st.lists(st.floats(0.1, 10), min_size=1, max_size=8))
def test_shares_add_up_and_everybody_has_one(total, speeds):
    total = max(total, len(speeds))
    found = share(total, speeds)
    assert sum(found) == total
    assert min(found) >= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"silence_s": 100}, "silence_s = 100 must be below end_s = 8.0"),
        ({"heartbeat_s": 2.0}, "at most a quarter of silence_s = 3.0"),
        ({"form_s": 0}, "form_s = 0 must be a number above 0"),
        ({"silense_s": 1}, "silense_s unknown; known: compile_s"),
        ({"step_factor": 1}, "step_factor = 1 must be at least 2"),
    ],
)
def test_deadlines_in_the_wrong_order_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Deadlines.read(values)


def test_settings_survive_json():
    settings = Settings(
        run="ab",
        token="t",
        argv=("a", "b"),
        directory="/d",
        hosts=plan_hosts(2, 2, 5),
        deadlines=Deadlines(form_s=50),
    )
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_private_files_are_private_and_whole(tmp_path):
    path = tmp_path / "a.json"
    write_private(path, {"token": "x"})
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_private(path) == {"token": "x"}
    path.write_text("{")
    assert read_private(path) is None
    assert read_private(tmp_path / "b.json") is None
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_who_waits_for_a_slow_save_is_not_frozen():
    dog = Watchdog(Deadlines(), 2, 0.0)
    for step in range(5):
        for process in (0, 1):
            dog.progress(process, step, "step", float(step))
    dog.progress(0, 4, "save", 4.5)
    assert dog.frozen(300.0) is None
    dog.progress(0, 5, "step", 301.0)
    dog.progress(1, 5, "step", 301.0)
    assert dog.step_s == 1.0
    assert dog.frozen(310.9) is None
    assert dog.frozen(311.0) is not None


def test_a_process_that_cannot_even_say_it_lives_is_named():
    dog = Watchdog(Deadlines(), 3, 0.0)
    for process in (0, 1, 2):
        dog.progress(process, 7, "step", 0.0)
        dog.heard(process, 0.0, 100.0)
    dog.heard(1, 99.0, 100.0)
    dog.progress(0, 7, "eval", 50.0)
    found = dog.frozen(100.0)
    assert found.processes == (1,)
    assert found.why == "process 1 said nothing at all for 60 s"


def test_who_is_behind_is_named():
    dog = Watchdog(Deadlines(), 2, 0.0)
    dog.progress(0, 4, "step", 1.0)
    dog.progress(1, 3, "step", 1.0)
    assert dog.frozen(10**4).why.startswith(
        "process 1 did not come further than step 3"
    )


def test_statuses_have_the_names_of_signals():
    assert spell_status(-11) == "was killed by SIGSEGV"
    assert spell_status(-60) == "was killed by signal 60"


CHILD = """
import asyncio, os, subprocess, sys, time
from shardkit.cluster.processes import Child

program = "import subprocess; subprocess.run(['sleep', '1000'])"

async def main():
    ended = asyncio.get_running_loop().create_future()
    reading, writing = os.pipe()
    argv, say = [sys.executable, "-c", program], ended.set_result
    child = Child(argv, env=os.environ, stdout=writing, stderr=2, on_exit=say)
    os.close(writing)
    await asyncio.sleep(0.3)
    begun_s = time.monotonic()
    os.kill(child.pid, 9)
    assert await asyncio.wait_for(ended, 5) == -9
    # Nobody of the group has the pipe any more.
    assert await asyncio.to_thread(os.read, reading, 1) == b""
    assert time.monotonic() - begun_s < 1

asyncio.run(main())
"""


def test_a_child_ends_with_all_of_its_group():
    # Not here, since JAX does not like processes that fork.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", CHILD], env=env, check=True, timeout=30)


def test_no_cluster_no_member(monkeypatch):
    monkeypatch.delenv("SHARDKIT_AGENT", raising=False)
    assert join(preload=lambda: 1 / 0) is None


def test_a_cluster_that_is_gone_cannot_be_joined():
    program = "from shardkit.cluster import join; join()"
    env = os.environ | {"SHARDKIT_AGENT": "127.0.0.1:1", "SHARDKIT_TOKEN": "x"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=env | {"SHARDKIT_WORKER": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "ClusterError: SHARDKIT_AGENT=127.0.0.1:1: cannot join" in done.stderr


def test_a_process_that_takes_the_place_of_another_is_told_so(monkeypatch):
    async def pretend(reader, writer):
        link = await accept(reader, writer, "x", 5)
        while (await link.receive()).header["type"] != "worker":
            pass
        link.post({"type": "stale"})
        with pytest.raises(WireError, match="is gone"):
            await link.receive()
        link.abort()

    async def main():
        server = await asyncio.start_server(pretend, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        monkeypatch.setenv("SHARDKIT_AGENT", f"{host}:{port}")
        monkeypatch.setenv("SHARDKIT_TOKEN", "x")
        monkeypatch.setenv("SHARDKIT_WORKER", "3")
        monkeypatch.setattr("shardkit.cluster.joining.die_with_parent", lambda: None)
        with pytest.raises(ClusterError, match="waits for no worker 3: another"):
            await asyncio.to_thread(join)
        server.close()
        await asyncio.sleep(0.05)

    asyncio.run(main())


@pytest.mark.parametrize("count", [1, 4, 16])
def test_what_workers_said_last_always_fits_into_a_report(count):
    workers = {}
    for id in range(count):
        worker = workers[id] = Worker(id)
        worker.child = SimpleNamespace(pid=1, returncode=1)
        worker.assignment, worker.state = ASSIGNMENT, "exited"
        worker.ended_s = worker.failed_s = worker.started_s
        # What is no text is spelled with six bytes each.
        worker.tail.extend(["\ufffd" * 2000] * 40)
        worker.told["failed"] = {
            "kind": "XlaRuntimeError",
            "message": "\ufffd" * 20000,
            "traceback": "\ufffd" * 19995 + "the end",
        }
    found = Workers.report(SimpleNamespace(all=workers))
    assert len(encode({"type": "report", "workers": found})) < 1 << 20
    for entry in found:
        assert entry["failed"]["traceback"].endswith("the end")
        assert entry["tail"]


def test_a_process_that_ended_by_itself_was_not_ended_by_us(tmp_path):
    """Also if it is to be ended while what it said last is still being read."""
    worker, called = Worker(0), []
    worker.child = SimpleNamespace(pid=1, returncode=-9, kill=lambda: called.append(1))
    worker.assignment, worker.state = ASSIGNMENT, "running"

    async def end():
        workers = Workers("host-0", ["true"], {}, tmp_path, lambda: None)
        workers.all[0] = worker
        worker.link = SimpleNamespace(abort=lambda: workers.heard_out(worker))
        workers._ended(worker, SimpleNamespace(finish=lambda: None))
        assert not workers.end(ASSIGNMENT.generation)
        workers.end_all()
        assert worker.report()["state"] == "running"
        # Somebody holds its connection, which is not waited for any longer than this.
        await asyncio.sleep(0.3)
        assert workers.end(ASSIGNMENT.generation)

    asyncio.run(end())
    found = worker.report()
    assert (found["state"], found["ended_by_us"], called) == ("exited", False, [])
    assert 0.2 <= found["exit_age_s"] < 5


def test_why_a_process_failed_is_known_also_if_it_is_being_ended():
    agent = SimpleNamespace(_generation=3, _soon=lambda: None)
    worker = Worker(0)
    worker.assignment, worker.state, worker.is_ending = ASSIGNMENT, "running", True
    failed_s = time.monotonic() - 5
    words = {"type": "failed", "kind": "ValueError", "message": "no", "at_s": failed_s}
    Agent._worker_said(agent, worker, words)
    assert (worker.told["failed"], worker.failed_s) == (words, failed_s)
    # The first time counts, and no clock of a process is ahead of its host's.
    Agent._worker_said(agent, worker, {**words, "at_s": failed_s + 1})
    assert worker.failed_s == failed_s
    worker.failed_s = None
    Agent._worker_said(agent, worker, {**words, "at_s": failed_s + 1000})
    assert worker.failed_s <= time.monotonic()


def test_a_host_is_dated_by_the_fastest_of_its_beats():
    host = Host(plan_hosts(1, 1, 1)[0])

    def hear(said_s, delay_s, beat=True):
        report = {"said_s": said_s, "beat": beat, "workers": []}
        host.heard(report, said_s + 500 + delay_s)
        return host.said_s - 500 - said_s

    assert hear(1.0, 0.25) == 0.25
    assert hear(2.0, 0.5) == 0.25
    assert hear(3.0, 0.0, beat=False) == 0
    assert hear(4.0, 0.125) == 0.125
    # Progress is told so often that a few bad seconds would be all that is known.
    for _ in range(200):
        assert hear(5.0, 0.5, beat=False) == 0.125
    with pytest.raises(KeyError):
        host.heard({"workers": []}, 0.0)
    assert hear(6.0, 1.0) == 0.125
    host.lose("gone", 1000.0, Limits())
    assert hear(7.0, 1.0) == 1


def test_a_supervisor_that_cannot_save_goes_on_and_says_so_once(tmp_path):
    told = []
    history = SimpleNamespace(to_json=dict)
    there = SimpleNamespace(
        _file=tmp_path / "none" / "state.json",
        _unsaved="",
        _settings=SimpleNamespace(run="r"),
        _machine=history,
        _history=history,
        _launcher=SimpleNamespace(post=told.append),
    )
    for _ in range(3):
        Supervisor._save(there)
    assert [x["type"] for x in told] == ["tell"]
    assert "No such file or directory" in told[0]["text"]
    (tmp_path / "none").mkdir()
    Supervisor._save(there)
    assert (there._unsaved, there._file.exists()) == ("", True)


def test_a_status_that_does_not_fit_into_a_header_is_told_all_the_same(tmp_path):
    cause = "x" * 2000
    status = {"run": "r", "recoveries": [{"cause": cause}] * 600}
    there = SimpleNamespace(_status=lambda: status)

    async def met(reader, writer):
        link = await accept(reader, writer, "x", 5)
        header = (await link.receive()).header
        with pytest.raises(WireError, match="is gone"):
            await Supervisor._serve_person(there, link, header)
        link.abort()

    async def main():
        server = await asyncio.start_server(met, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        address = Address(path=tmp_path, address=f"{host}:{port}", token="x")

        def ask():
            with Asker(address) as asker:
                return asker.ask(5)

        found = await asyncio.to_thread(ask)
        server.close()
        await asyncio.sleep(0.05)
        return found

    found = asyncio.run(main())
    assert len(found.recoveries) == 600
    assert found.recoveries[0].cause == cause
