"""Real processes that are killed, frozen and lost, and the run that goes on."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest
from clusters import Cluster, expected_digest, wait_for

from shardkit.cluster.channel import Channel

pytestmark = pytest.mark.multiprocess

QUICK = {
    "heartbeat_s": 0.1,
    "silence_s": 1.0,
    "end_s": 2.0,
    "step_floor_s": 2.0,
    "restart_s": 10.0,
    "mute_s": 8.0,
}


@pytest.fixture
def launch(tmp_path):
    made = []

    def launch(**options):
        made.append(Cluster(tmp_path, **{"deadlines": QUICK, **options}))
        return made[-1]

    yield launch
    for cluster in made:
        cluster.end()


def check_end(cluster, steps=40):
    output, errors = cluster.finish()
    assert cluster.digest() == expected_digest(steps)
    assert output == f"digest {expected_digest(steps)}\n"
    return errors


def last_recovery(cluster, count=1):
    def look(status):
        recoveries = status["recoveries"]
        return len(recoveries) >= count and recoveries[-1]["is_over"]

    return cluster.wait_status(look, f"recovery {count}")["recoveries"][-1]


def test_uninterrupted(launch):
    cluster = launch()
    cluster.wait_step(5)
    status = cluster.wait_status(lambda s: s["snapshot"] and s["step_s"])
    assert status["state"] == "running"
    assert (status["generation"], status["devices"]) == (1, 8)
    assert [h["state"] for h in status["hosts"]] == ["alive"] * 4
    assert [w["process"] for h in status["hosts"] for w in h["workers"]] == [0, 1, 2, 3]
    assert 0 <= status["step"] - status["snapshot"]["step"] <= 2
    assert [x["local"] for x in cluster.seats(1)] == [2, 2, 2, 2]
    assert [x["offset"] for x in cluster.seats(1)] == [0, 2, 4, 6]
    assert [x["silence_s"] for x in cluster.seats(1)] == [QUICK["silence_s"]] * 4
    check_end(cluster)


def test_a_killed_worker(launch):
    cluster = launch(steps=60)
    cluster.wait_step(5)
    cluster.wait_standbys()
    killed_s = time.monotonic()
    os.kill(cluster.seats(1)[2]["pid"], signal.SIGKILL)
    recovery = last_recovery(cluster)
    begun_s = max(seat["time"] for seat in cluster.seats(2))
    assert begun_s - killed_s < 1
    assert recovery["cause"] == "process 2 on host-2 was killed by SIGKILL"
    assert recovery["lost_steps"] <= 1
    assert [x["name"] for x in recovery["phases"]] == (
        ["detect", "end", "choose", "form", "restore", "first_step"]
    )
    assert cluster.status()["devices"] == 8
    check_end(cluster, 60)


def test_two_workers_killed_at_once(launch):
    cluster = launch(steps=60)
    cluster.wait_step(5)
    cluster.wait_standbys()
    # Found beforehand: all are ended within milliseconds of the first, which on a busy
    # machine can come before the second.
    first, second = [cluster.seats(1)[process]["pid"] for process in (0, 3)]
    os.kill(first, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(second, signal.SIGKILL)
    assert "was killed by SIGKILL" in last_recovery(cluster)["cause"]
    assert len(cluster.seats(2)) == 4
    assert len(cluster.status()["recoveries"]) == 1
    check_end(cluster, 60)


@pytest.mark.slow
def test_a_second_failure_during_recovery(launch):
    cluster = launch(steps=60)
    cluster.wait_step(5)
    cluster.wait_standbys()
    os.kill(cluster.seats(1)[1]["pid"], signal.SIGKILL)
    os.kill(cluster.seats(2)[2]["pid"], signal.SIGKILL)
    cluster.wait_step(20, generation=3)
    assert len(cluster.seats(3)) == 4
    check_end(cluster, 60)


def test_a_frozen_worker(launch):
    cluster = launch(steps=60)
    cluster.wait_step(5)
    cluster.wait_standbys()
    frozen_s = time.monotonic()
    os.kill(cluster.seats(1)[1]["pid"], signal.SIGSTOP)
    recovery = last_recovery(cluster)
    assert "process 1 said nothing at all" in recovery["cause"]
    assert "frozen: 1 on host-1" in recovery["cause"]
    assert cluster.seats(2)[0]["time"] - frozen_s < 2 * QUICK["step_floor_s"]
    check_end(cluster, 60)


def test_a_lost_host_comes_back(launch):
    cluster = launch(steps=300)
    cluster.wait_step(5)
    cluster.wait_standbys()
    lost = set(cluster.segments())
    os.kill(cluster.pid_of("cluster.agent_process host-2"), signal.SIGKILL)
    recovery = last_recovery(cluster)
    lost -= set(cluster.segments())
    assert any("host-2" in name for name in lost)
    assert recovery["cause"] == ("host-2 lost its agent, which was killed by SIGKILL")
    assert recovery["lost_steps"] <= 1
    assert [x["num_devices"] for x in cluster.seats(2)] == [6, 6, 6]
    # It is taken in again at a boundary, where nothing is lost.
    back = cluster.seats(3)
    assert [x["host"] for x in back] == [f"host-{i}" for i in range(4)]
    assert last_recovery(cluster, 2)["lost_steps"] == 0
    assert cluster.wait_status(lambda s: s["devices"] == 8)["state"] == "running"
    check_end(cluster, 300)


def test_the_supervisor_is_killed(launch):
    cluster = launch(steps=100)
    cluster.wait_step(5)
    before = cluster.seats(1)
    cluster.status()
    for count in (1, 2):
        os.kill(cluster.pid_of("cluster.supervisor"), signal.SIGKILL)
        step = cluster.notes(what="step")[-1]["step"]
        cluster.wait_step(step + 10)
        assert cluster.wait_status(lambda s: s["snapshot"])["generation"] == 1, count
    assert cluster.status()["recoveries"] == []
    errors = check_end(cluster, 100)
    assert errors.count("the supervisor was killed by SIGKILL") == 2
    assert cluster.notes(what="begin") == cluster.notes(what="begin", generation=1)
    assert len(before) == 4


@pytest.mark.slow
def test_the_supervisor_is_killed_with_a_worker(launch):
    cluster = launch(steps=60)
    cluster.wait_step(5)
    cluster.wait_standbys()
    os.kill(cluster.pid_of("cluster.supervisor"), signal.SIGKILL)
    os.kill(cluster.seats(1)[3]["pid"], signal.SIGKILL)
    recovery = last_recovery(cluster)
    assert recovery["cause"] == "process 3 on host-3 was killed by SIGKILL"
    check_end(cluster, 60)


def test_a_crash_that_repeats_ends_the_run(launch):
    crash = {"at": 12, "process": 1, "error": "no such layer at 0x7f12"}
    cluster = launch(counter=crash)
    cluster.address()
    _, errors = cluster.finish(code=1)
    assert "process 1 on host-1 exited with code 1 (ValueError: no such" in errors
    assert "at step 12 as before: that is the program's own error" in errors
    assert "Traceback (most recent call last)" in errors
    assert "in misbehave" in errors
    assert "the state is saved" in errors
    assert '"step": 12' in (cluster.out / "checkpoint.json").read_text()
    assert max(x["generation"] for x in cluster.notes(what="begin")) == 3, errors


def test_a_crash_that_passes_does_not(launch):
    crash = {"at": 12, "process": 1, "error": "a bit fell over", "until": 1}
    cluster = launch(counter=crash)
    assert "a bit fell over" in check_end(cluster)


def test_the_first_to_fail_is_the_cause_however_late_its_host_says_so(launch):
    crash = {"at": 12, "process": 1, "error": "a bit fell over", "until": 1}
    cluster = launch(counter={**crash, "stops_agent": True})
    agent = cluster.seats(1)[1]["parent"]
    stat = Path(f"/proc/{agent}/stat")
    wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "a stop")
    # Time for its peers to fail too, and for the others to be told to end.
    time.sleep(0.7)
    os.kill(agent, signal.SIGCONT)
    # It had failed by itself, or was ended while it did.
    told = r"process 1 on host-1 .* \(ValueError: a bit fell over\); going on"
    assert re.search(told, check_end(cluster))


def test_the_programs_own_verdict_ends_the_run_at_once(launch):
    cluster = launch(counter={"at": 3, "process": 2, "exit": 3})
    cluster.address()
    _, errors = cluster.finish(code=3)
    assert "process 2 on host-2 exited with code 3" in errors
    assert "this is the end" in errors
    assert max(x["generation"] for x in cluster.notes(what="begin")) == 1


def test_a_command_that_cannot_start_is_told_once(launch):
    cluster = launch(counter={"start_exit": 2})
    cluster.address()
    _, errors = cluster.finish(code=2)
    assert errors.count("a config that is none") == 1
    assert "the command exited with code 2 before it joined" in errors


def test_leaving_saves_first_and_can_be_gone_on_from(launch):
    cluster = launch(steps=60)
    cluster.wait_step(10)
    cluster.status()
    cluster.signal(signal.SIGTERM)
    _, errors = cluster.finish(code=75)
    assert "asked to leave by SIGTERM" in errors
    assert "the state is saved" in errors
    assert (cluster.out / "checkpoint.json").exists()
    again = launch(steps=60)
    check_end(again, 60)


@pytest.mark.slow
def test_leaving_during_recovery_saves_too(launch):
    cluster = launch(steps=60, counter={"preload_s": 0.5})
    cluster.wait_step(10)
    cluster.wait_standbys()
    os.kill(cluster.seats(1)[1]["pid"], signal.SIGKILL)
    cluster.signal(signal.SIGTERM)
    _, errors = cluster.finish(code=75)
    assert "the state is saved" in errors


def test_an_interrupt_ends_everything_at_once(launch):
    cluster = launch(steps=10000)
    cluster.wait_step(3)
    cluster.status()
    cluster.signal(signal.SIGINT)
    _, errors = cluster.finish(code=130, limit_s=10)
    assert "interrupted" in errors


def test_a_launcher_that_is_killed_leaves_nothing(launch):
    cluster = launch(steps=10000)
    cluster.wait_step(3)
    cluster.wait_standbys()
    cluster.signal(signal.SIGKILL)
    cluster.process.wait(10)
    wait_for(lambda: not cluster.processes(), "the end of all processes", 10)
    wait_for(lambda: not cluster.segments(), "the end of all segments", 10)


@pytest.mark.slow
def test_too_few_devices_are_waited_for_and_then_the_state_is_saved(launch):
    cluster = launch(
        steps=10000,
        processes=2,
        min_devices=4,
        deadlines={**QUICK, "form_s": 3.0, "wait_s": 4.0},
        limits={"flaps": 0, "first_quarantine_s": 100.0},
    )
    cluster.wait_step(5)
    cluster.wait_standbys()
    os.kill(cluster.pid_of("cluster.agent_process host-1"), signal.SIGKILL)
    status = cluster.wait_status(lambda s: s["state"] == "waiting")
    assert "for 2 more devices: 2 of at least 4" in status["waits"][0]
    assert status["hosts"][1]["state"] == "quarantined"
    _, errors = cluster.finish(code=75)
    assert "waited 4 s (wait_s) for enough devices: 2 of at least 4" in errors
    assert "the state is saved" in errors


@pytest.mark.slow
def test_a_frozen_agent_is_a_lost_host(launch):
    cluster = launch(steps=300)
    cluster.wait_step(5)
    cluster.wait_standbys()
    os.kill(cluster.pid_of("cluster.agent_process host-0"), signal.SIGSTOP)
    recovery = last_recovery(cluster)
    assert recovery["cause"] == "host-0 was not heard for 1 s (silence_s)"
    assert len(cluster.seats(2)) == 3
    check_end(cluster, 300)


@pytest.mark.slow
def test_a_frozen_supervisor_is_replaced(launch):
    cluster = launch(steps=200)
    cluster.wait_step(5)
    cluster.status()
    os.kill(cluster.pid_of("cluster.supervisor"), signal.SIGSTOP)
    step = cluster.notes(what="step")[-1]["step"]
    cluster.wait_step(step + 10)
    check_end(cluster, 200)
    assert cluster.notes(what="begin") == cluster.notes(what="begin", generation=1)


@pytest.mark.slow
def test_several_processes_on_a_host(launch):
    cluster = launch(steps=60, processes=5, hosts=2, devices=7)
    cluster.wait_step(5)
    assert [x["local"] for x in cluster.seats(1)] == [2, 2, 1, 1, 1]
    cluster.wait_standbys()
    os.kill(cluster.seats(1)[1]["pid"], signal.SIGKILL)
    assert last_recovery(cluster)["lost_steps"] <= 1
    assert [x["host"] for x in cluster.seats(2)] == ["host-0"] * 3 + ["host-1"] * 2
    check_end(cluster, 60)


def test_who_is_of_an_older_generation_can_do_no_harm(launch):
    cluster = launch(steps=100)
    cluster.wait_step(5)
    text = Path(f"/proc/{cluster.seats(1)[1]['pid']}/environ").read_bytes().decode()
    env = dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
    cluster.address()
    token = env["SHARDKIT_TOKEN"]
    # A worker that its agent knows already, or not at all, is told to end.
    for worker in (0, 77):
        stale = Channel(env["SHARDKIT_AGENT"], token, "the agent", 5)
        stale.send({"type": "worker", "worker": worker, "pid": 1})
        assert stale.receive(timeout_s=5).header == {"type": "stale"}
        stale.close()
    # So is an agent whose host was given up.
    supervisor = Channel(cluster.address()["address"], token, "the supervisor", 5)
    supervisor.send({"type": "hello", "host": "host-9"})
    report = {"type": "report", "host": "host-9", "incarnation": "old"}
    supervisor.send(report)
    assert supervisor.receive(timeout_s=5).header == {"type": "stop"}
    supervisor.close()
    check_end(cluster, 100)
    assert cluster.notes(what="begin") == cluster.notes(what="begin", generation=1)


def test_a_directory_is_for_one_cluster(launch):
    cluster = launch(steps=100)
    cluster.wait_step(1)
    other = launch()
    _, errors = other.process.communicate(timeout=20)
    assert other.process.returncode != 0
    assert "another cluster is using it" in errors
    check_end(cluster, 100)
