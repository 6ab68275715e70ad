"""Runs on a real Ray cluster whose nodes come and go."""

import asyncio
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import ROOT, Cluster, environment, expected_digest, wait_for

from shardkit.cluster import ray_engine
from shardkit.cluster.orders import EndHost, StartHost, Tell
from shardkit.cluster.ray_nodes import pick_node, take_resources
from shardkit.cluster.roster import Roster
from shardkit.cluster.settings import Settings
from shardkit.cluster.split import plan_hosts
from shardkit.errors import ClusterError, ConfigError

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed"
)
PATIENT = {"restart_s": 50.0, "slot_s": 60.0, "orphan_s": 55.0}
LIMIT_S = 120


class Nodes:
    """A Ray cluster in a process of its own, so that Ray is not loaded here."""

    def __init__(self, log):
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "workers" / "ray_nodes.py")],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def ask(self, *order):
        print(json.dumps(order), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"no answer to {order}"
        return json.loads(answer)

    def actors(self):
        return self.ask("actors")

    def close(self):
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A head and two more nodes."""
    with (tmp_path_factory.mktemp("ray") / "log").open("w") as log:
        nodes = Nodes(log)
        for _ in range(2):
            nodes.ask("add")
        yield nodes
        nodes.close()


class Run(Cluster):
    """A cluster of counters on Ray; the mark is in the environment of all of it."""

    mark = ""

    def everything(self):
        """All processes of it: (pid, command line)."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark in (path / "environ").read_bytes().decode(
                    errors="replace"
                ):
                    line = (path / "cmdline").read_bytes().decode().replace("\0", " ")
                    found.append((int(path.name), line))
            except OSError:
                pass
        return [(pid, line) for pid, line in found if pid != os.getpid()]

    def pid_of(self, text):
        return next(pid for pid, line in self.everything() if text in line)

    def end(self):
        self.process.kill()
        if not self.process.stderr.closed:
            print(*self.process.communicate(timeout=10), sep="\n")
        super().end()
        for pid, _ in self.everything():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Starts one on the Ray cluster at an address; "" for one of its own."""
    made = []

    def launch(address, **options):
        run = Run.__new__(Run)
        run.mark = f"SHARDKIT_TEST={tmp_path}"
        monkeypatch.setenv("SHARDKIT_TEST", str(tmp_path))
        monkeypatch.setenv("RAY_ADDRESS", address)
        options = {"engine": "ray", "processes": 3, "deadlines": PATIENT, **options}
        run.__init__(tmp_path, **options)
        made.append(run)
        return run

    yield launch
    for run in made:
        run.end()


def check_end(run, steps):
    output, errors = run.finish(limit_s=LIMIT_S)
    assert run.digest() == expected_digest(steps)
    assert output == f"digest {expected_digest(steps)}\n"
    wait_for(lambda: not run.everything(), "the end of all processes", 20)
    return errors


def wait_seats(run, generation):
    wait_for(
        lambda: run.notes(what="begin", generation=generation),
        f"generation {generation}",
        LIMIT_S,
    )
    return run.seats(generation)


def variables(pid):
    text = Path(f"/proc/{pid}/environ").read_bytes().decode()
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


# Without Ray.


def node(id, *, alive=True, **resources):
    return {"NodeID": id, "Alive": alive, "Resources": resources}


def test_a_host_gets_a_node_that_is_free_and_large_enough():
    nodes = [
        node("head", CPU=0.0),
        node("gone", alive=False, CPU=8.0, GPU=8.0),
        node("small", CPU=8.0),
        node("first", CPU=8.0, GPU=8.0),
        node("second", CPU=8.0, GPU=8.0),
    ]

    def pick(hosts, shares=False, **resources):
        found = pick_node(nodes, hosts, {"CPU": 0.01, **resources}, shares=shares)
        return found and found["NodeID"]

    assert pick({}) == "small"
    assert pick({"small": 1}) == "first"
    assert pick({}, GPU=8) == "first"
    assert pick({"first": 1}, GPU=8) == "second"
    assert pick({"first": 1, "second": 1}, GPU=8) is None
    assert pick({"first": 2, "second": 1}, shares=True, GPU=8) == "second"
    assert pick({}, GPU=9) is None


def test_a_host_takes_the_accelerators_of_its_node_unless_told_otherwise():
    large = node("a", CPU=64.0, GPU=8.0)
    assert take_resources(large, {"CPU": 0.01}, 1) == {"CPU": 0.01, "GPU": 8.0}
    assert take_resources(large, {"CPU": 0.01}, 3) == {"CPU": 0.01, "GPU": 2.0}
    assert take_resources(large, {"CPU": 2, "GPU": 4}, 1) == {"CPU": 2, "GPU": 4}
    assert take_resources(node("b", CPU=4.0), {"CPU": 0.01}, 1) == {"CPU": 0.01}


def settings_of(num_hosts):
    hosts = plan_hosts(num_hosts, num_hosts, num_hosts)
    return Settings(run="a", token="b", argv=("x",), directory="/none", hosts=hosts)


def test_a_host_without_a_node_is_not_given_up():
    settings, orders = settings_of(1), []
    roster = Roster(settings, orders)
    roster.check(0.0)
    roster.waits("host-0", "for a node", 1.0)
    assert orders == [StartHost("host-0"), Tell("host-0 waits for a node")]
    roster.waits("host-0", "for a node", 2.0)
    roster.check(10_000.0)
    assert len(orders) == 2
    assert roster.starting() == []
    roster.waits("host-0", "", 10_000.0)
    roster.check(10_000.0 + settings.deadlines.restart_s)
    assert isinstance(orders[-1], EndHost)


def test_what_cannot_be_used_is_said_before_anything_starts(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="expected the address of a cluster"):
        ray_engine.check_ray("ray://10.0.0.1:10001")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'shardkit\[ray\]'"):
        ray_engine.check_ray("")


def test_an_address_where_nobody_is(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ClusterError, match=r"the cluster at 127\.0\.0\.1:1: Connect"):
        asyncio.run(ray_engine.run_on_ray(settings_of(1), address="127.0.0.1:1"))


# With it.


@needs_ray
@pytest.mark.multiprocess
def test_a_cluster_of_its_own(launch):
    run = launch("", steps=200)
    wait_seats(run, 1)
    assert run.address()["address"].startswith("127.0.0.1:")
    run.wait_standbys()
    lost = set(run.segments())
    os.kill(run.pid_of("cluster.agent_process host-1"), signal.SIGKILL)
    assert len(wait_seats(run, 2)) == 2
    assert any("host-1" in name for name in lost - set(run.segments()))
    cause = run.status()["recoveries"][0]["cause"]
    assert cause == "host-1 lost its agent, which was killed by SIGKILL"
    assert [x["host"] for x in wait_seats(run, 3)] == ["host-0", "host-1", "host-2"]
    check_end(run, 200)
    assert not list(Path("/tmp").glob("shardkit-ray-*/session_*"))


@needs_ray
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "politely",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids="left killed".split(),
)
def test_a_node_leaves_and_another_joins(launch, nodes, politely):
    address = nodes.ask("address")
    another = nodes.ask("add")
    run = launch(address, steps=1500, processes=4)
    assert len(wait_seats(run, 1)) == 4
    assert run.address()["address"].split(":")[0] == address.split(":")[0]
    assert len(nodes.actors()) == 4
    # The head has none; Ray believes the others that they have two GPUs each.
    gpus = [variables(x["pid"]).get("CUDA_VISIBLE_DEVICES") for x in run.seats(1)]
    assert sorted(gpus, key=str) == ["0,1", "0,1", "0,1", None]
    run.wait_standbys()
    step = run.notes(what="step")[-1]["step"]
    removed_s = time.monotonic()
    nodes.ask("remove", another, politely)
    assert [x["num_devices"] for x in wait_seats(run, 2)] == [6, 6, 6]
    print("from its removal to the next generation", time.monotonic() - removed_s)
    recovery = run.wait_status(lambda s: s["recoveries"][0]["is_over"])["recoveries"][0]
    assert recovery["lost_steps"] <= 1
    print(recovery)
    how = "lost its node: " if politely else "cannot be reached by Ray any more"
    assert how in recovery["cause"]
    waits = run.wait_status(
        lambda s: any("waits for a node" in h["why"] for h in s["hosts"])
    )
    assert waits["state"] == "running"
    another = nodes.ask("add")
    joined_s = time.monotonic()
    assert len(wait_seats(run, 3)) == 4
    print("from a new node to the next generation", time.monotonic() - joined_s)
    assert run.status()["recoveries"][1]["lost_steps"] == 0
    assert run.seats(3)[0]["num_devices"] == 8
    assert run.notes(what="step")[-1]["step"] > step
    errors = check_end(run, 1500)
    assert "waits for a node of the Ray cluster: none of" in errors
    assert nodes.actors() == []
    nodes.ask("remove", another, True)


@needs_ray
@pytest.mark.multiprocess
@pytest.mark.slow
def test_who_speaks_with_ray_is_killed(launch, nodes):
    run = launch(nodes.ask("address"), steps=1000)
    wait_seats(run, 1)
    run.wait_standbys()
    before = run.pid_of("cluster.ray_driver")
    os.kill(before, signal.SIGKILL)

    def is_back():
        pids = [pid for pid, line in run.everything() if "cluster.ray_driver" in line]
        return pids and before not in pids

    wait_for(is_back, "another", LIMIT_S)
    time.sleep(5)
    assert run.status()["generation"] == 1
    assert len(nodes.actors()) == 3
    # It hears of the hosts that were there before it.
    os.kill(run.pid_of("cluster.agent_process host-2"), signal.SIGKILL)
    wait_seats(run, 2)
    assert "host-2 lost its agent" in run.status()["recoveries"][0]["cause"]
    assert "the process that speaks with Ray was killed" in check_end(run, 1000)
    assert nodes.actors() == []


@needs_ray
@pytest.mark.multiprocess
@pytest.mark.parametrize("is_own", [True, False], ids="own given".split())
def test_a_launcher_that_is_killed_leaves_nothing(launch, nodes, is_own):
    run = launch("" if is_own else nodes.ask("address"), steps=100_000)
    wait_seats(run, 1)
    run.wait_standbys()
    run.address()
    run.signal(signal.SIGKILL)
    run.process.wait(10)
    wait_for(lambda: not run.everything(), "the end of all processes", LIMIT_S)
    assert not run.segments()
    assert nodes.actors() == []


def state_digest(output):
    return re.search(r"state digest +([0-9a-f]+)", output)[1]


@needs_ray
@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_training_while_a_node_leaves_and_another_joins(launch, nodes, tmp_path):
    """Without redundancy the lost host's part is lost: it goes on from the disk."""
    another = nodes.ask("add")
    command = [
        *(sys.executable, "train.py", "configs/tiny.toml", "--steps", "120"),
        *("--devices", "4", "--resize=", "--train.eval_every", "0"),
        *("--train.standby", "0", "--out"),
    ]
    alone = subprocess.run(
        [*command, str(tmp_path / "alone")],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    expected = state_digest(alone.stdout)
    patient = {**PATIENT, "form_s": 240.0, "step_floor_s": 50.0}
    run = launch(
        nodes.ask("address"),
        argv=[*command, str(tmp_path / "out")],
        processes=4,
        devices=4,
        deadlines=patient,
    )

    def wait(look):
        end_s = time.monotonic() + 900
        while not look(status := run.status()):
            assert time.monotonic() < end_s, status
            time.sleep(1)
        return status

    def is_training(generation, devices):
        def look(status):
            here = (status["generation"], status["devices"]) == (generation, devices)
            return here and status["step"] > 5 and status["state"] == "running"

        return look

    run.address()
    wait(is_training(1, 4))
    nodes.ask("remove", another, True)
    status = wait(is_training(2, 3))
    assert "lost its node" in status["recoveries"][0]["cause"]
    another = nodes.ask("add")
    status = wait(is_training(3, 4))
    assert status["recoveries"][1]["lost_steps"] == 0
    print(json.dumps(status["recoveries"]))
    output, _ = run.finish(limit_s=900)
    assert state_digest(output) == expected
    wait_for(lambda: not run.everything(), "the end of all processes", 20)
    assert nodes.actors() == []
    nodes.ask("remove", another, True)
