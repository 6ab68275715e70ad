"""Hosts that are lost with all their memory, and the run that loses nothing by it."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
from clusters import Cluster, expected_digest, wait_for

from shardkit.errors import TornError
from shardkit.snapshot.head import IMAGE, read_head
from shardkit.snapshot.image import read_image

pytestmark = pytest.mark.multiprocess

DEADLINES = {
    "heartbeat_s": 0.1,
    "silence_s": 1.0,
    "end_s": 2.0,
    "step_floor_s": 2.0,
    "restart_s": 10.0,
    "mute_s": 8.0,
}
STEPS = 60


@pytest.fixture
def launch(tmp_path):
    made = []

    def launch(redundancy, *, steps=STEPS, ballast=0, step=5, **options):
        counter = {"shards": True, "ballast": ballast}
        options = {"redundancy": redundancy, "deadlines": DEADLINES, **options}
        made.append(Cluster(tmp_path, steps=steps, counter=counter, **options))
        made[-1].wait_step(step)
        made[-1].wait_standbys()
        return made[-1]

    yield launch
    for cluster in made:
        cluster.end()


def protected_step(cluster):
    status = cluster.wait_status(lambda s: s["snapshot"], "a snapshot")
    return status["snapshot"]["step"]


def lose(cluster, *hosts):
    """Ends hosts at once: agents, processes, memory."""
    pids = [cluster.pid_of(f"cluster.agent_process {host}") for host in hosts]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def recovery(cluster, count=1):
    def look(status):
        recoveries = status["recoveries"]
        return len(recoveries) >= count and recoveries[count - 1]["is_over"]

    return cluster.wait_status(look, f"recovery {count}")["recoveries"][count - 1]


def check_end(cluster, steps=STEPS):
    """The same bits as without any failure; `finish` sees that no memory is left."""
    output, errors = cluster.finish()
    assert cluster.digest() == expected_digest(steps)
    assert output == f"digest {expected_digest(steps)}\n", errors
    return errors


def check_nothing_lost(found, step):
    """Checks a recovery from the loss of hosts, after which `step` was protected."""
    assert found["step"] >= step
    # The one in flight, and the one that was not protected yet.
    assert found["lost_steps"] <= 2
    assert found["rebuilt_bytes"] > 0


@pytest.mark.parametrize(
    "redundancy",
    ["mirror", pytest.param("parity", marks=pytest.mark.slow), "parity:2"],
)
def test_a_lost_host_loses_nothing(launch, redundancy):
    cluster = launch(redundancy)
    snapshot = cluster.wait_status(lambda s: s["snapshot"])["snapshot"]
    held = snapshot["bytes"] + snapshot["protection_bytes"]
    assert 0 < snapshot["protection_bytes"] < held <= snapshot["predicted_bytes"]
    for host in cluster.status()["hosts"]:
        held = host["image_bytes"] + host["protection_bytes"]
        assert 0 < host["image_bytes"] < held <= host["predicted_bytes"]
    step = protected_step(cluster)
    lose(cluster, "host-2")
    check_nothing_lost(recovery(cluster), step)
    # Counters want all of every image.
    cluster.wait_status(lambda s: s["recoveries"][-1]["fetched_bytes"] > 0)
    errors = check_end(cluster)
    assert "of process 2, lost with host-2, are rebuilt on host-" in errors
    assert "MB of a host's memory, what protects them" in errors


@pytest.mark.slow
def test_two_hosts_at_once(launch):
    cluster = launch("parity:2")
    step = protected_step(cluster)
    lose(cluster, "host-0", "host-3")
    check_nothing_lost(recovery(cluster), step)
    check_end(cluster)


@pytest.mark.slow
def test_several_processes_on_each_host(launch):
    cluster = launch("parity", processes=5, hosts=3, devices=10)
    step = protected_step(cluster)
    lose(cluster, "host-0")
    check_nothing_lost(recovery(cluster), step)
    check_end(cluster)


def test_without_redundancy_a_lost_host_takes_the_run_back_to_disk(launch):
    cluster = launch("none")
    lose(cluster, "host-2")
    found = recovery(cluster)
    assert (found["step"], found["rebuilt_bytes"]) == (0, 0)
    errors = check_end(cluster)
    assert "the image of process 2 is lost" in errors
    assert "the newest checkpoint on disk is next" in errors


@pytest.mark.slow
def test_a_host_lost_while_its_images_are_protected(launch):
    cluster = launch("parity", ballast=16 << 20, steps=40)
    for count in (1, 2):
        if count == 2:
            # It comes back, and the next one is lost.
            cluster.wait_status(lambda s: s["devices"] == 8)
            cluster.wait_standbys()
        step = cluster.notes(what="step")[-1]["step"]
        # Just committed, and not protected yet.
        cluster.wait_step(step + 1)
        protected = protected_step(cluster)
        lose(cluster, f"host-{count}")
        found = cluster.wait_status(
            lambda s, c=count: len(lost := losses(s)) >= c and lost[-1]["is_over"]
        )
        check_nothing_lost(losses(found)[-1], protected)
    check_end(cluster, 40)


def losses(status):
    return [x for x in status["recoveries"] if "lost its agent" in x["cause"]]


@pytest.mark.slow
@pytest.mark.parametrize("redundancy", ["parity", "parity:2"])
def test_a_host_lost_while_images_are_rebuilt(launch, redundancy):
    cluster = launch(redundancy, ballast=48 << 20, steps=20, step=3)
    step = protected_step(cluster)
    lose(cluster, "host-1")
    cluster.wait_status(lambda s: any("to be rebuilt" in x for x in s["waits"]))
    lose(cluster, "host-3")
    found = recovery(cluster)
    if redundancy == "parity:2":
        check_nothing_lost(found, step)
    else:
        assert found["step"] == 0
    check_end(cluster, 20)


def images(cluster, host):
    """The images on a host: step → file and the place of a piece in it."""
    found = {}
    for name in cluster.segments():
        path = Path("/dev/shm") / name
        with contextlib.suppress(TornError, FileNotFoundError, StopIteration):
            data = path.read_bytes()
            if f"-{host}-" in name and read_head(data).magic == IMAGE:
                image = read_image(data)
                image.verify()
                piece = next(x for x in image.pieces if x.num_bytes)
                found[image.head.step] = (path, piece.offset)
    return found


def still_with_two_steps(cluster):
    """Stops all workers at a moment when two steps are whole, and returns them."""
    pids = [seat["pid"] for seat in cluster.seats(1)]

    def stop():
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        found = [images(cluster, f"host-{i}") for i in range(len(pids))]
        common = set.intersection(*map(set, found))
        protected = protected_step(cluster)
        if len(common) == 2 and protected == max(common):
            return sorted(common)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        return None

    return wait_for(stop, "two whole steps")


def flip(place):
    path, offset = place
    with path.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 1]))


@pytest.mark.slow
@pytest.mark.parametrize("redundancy", ["none", "mirror", "parity"])
def test_a_flipped_bit_is_found_and_mended(launch, redundancy):
    cluster = launch(redundancy, steps=120)
    older, newer = still_with_two_steps(cluster)
    flip(images(cluster, "host-2")[newer])
    os.kill(cluster.seats(1)[0]["pid"], signal.SIGKILL)
    found = recovery(cluster, 2)
    assert "DamagedError" in found["cause"]
    assert f"the image of process 2, step {newer}, on host-2" in found["said"]
    if redundancy == "none":
        assert found["step"] == older
    else:
        assert found["step"] == newer
        assert found["rebuilt_bytes"] > 0
    check_end(cluster, 120)


@pytest.mark.slow
def test_a_flipped_bit_in_what_protects_a_lost_host(launch):
    cluster = launch("mirror", steps=120)
    newer = still_with_two_steps(cluster)[-1]
    for host in range(4):
        if host != 1:
            for name in cluster.segments():
                if f"-host-{host}-guard" in name:
                    path = Path("/dev/shm") / name
                    flip((path, path.stat().st_size - 64))
    lose(cluster, "host-1")
    found = recovery(cluster)
    assert f"a rebuild of step {newer} failed" in found["said"]
    assert found["step"] == 0
    check_end(cluster, 120)


@pytest.mark.slow
def test_the_supervisor_is_killed_with_a_host(launch):
    cluster = launch("parity")
    step = protected_step(cluster)
    os.kill(cluster.pid_of("cluster.supervisor"), signal.SIGKILL)
    lose(cluster, "host-2")
    found = cluster.wait_status(
        lambda s: s["recoveries"] and s["recoveries"][-1]["is_over"]
    )["recoveries"]
    assert found[0]["step"] >= step
    assert found[0]["rebuilt_bytes"] > 0
    check_end(cluster)


@pytest.mark.slow
def test_the_supervisor_is_killed_while_images_are_rebuilt(launch):
    cluster = launch("parity", ballast=48 << 20, steps=20, step=3)
    step = protected_step(cluster)
    lose(cluster, "host-1")
    cluster.wait_status(lambda s: any("to be rebuilt" in x for x in s["waits"]))
    os.kill(cluster.pid_of("cluster.supervisor"), signal.SIGKILL)
    cluster.wait_step(step + 1, generation=2)
    assert min(x["step"] for x in cluster.notes(what="step", generation=2)) > step
    check_end(cluster, 20)
