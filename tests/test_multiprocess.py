"""The same bits from separate processes, after one another and together.

One process with eight devices cannot show what a thread pool of another size, other
cores or a network between the devices do.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from problems import PROBLEMS, evaluated_digits

import shardkit as sk
from shardkit.testing import run_digest

WORKERS = Path(__file__).parent / "workers"
DEADLINE_S = 240
STEPS = 2

pytestmark = pytest.mark.multiprocess


def start(name, *args):
    """Starts a worker; nothing of this process's settings of JAX goes with it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return subprocess.Popen(
        [sys.executable, str(WORKERS / f"{name}.py"), *map(str, args)],
        env=env | {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(*workers):
    """Waits for all of them; returns what each printed last."""
    try:
        outputs = [worker.communicate(timeout=DEADLINE_S) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors
    return [out.splitlines()[-1] if out else "" for out, _ in outputs]


def check_relay(problem, runs, directory):
    """Every run goes on from the checkpoint of the one before it."""
    trainer = sk.Trainer(**PROBLEMS[problem]())
    for index, (num_devices, num_cores) in enumerate(runs):
        end = (index + 1) * STEPS
        [line] = finish(
            start("segment", problem, directory, num_devices, num_cores, end)
        )
        expected = run_digest(trainer, end)
        assert json.loads(line) == json.loads(json.dumps(expected)), num_devices
    trainer.close()


@pytest.mark.slow
def test_processes_with_other_devices_and_cores_go_on(tmp_path):
    check_relay("digits-wide-13", [(8, 1), (1, 2), (3, 1)], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "problem", ["digits-wide-13", "gpt-clip-adamw-13", "gpt-lion-bfloat16"]
)
def test_processes_with_every_device_count_on_one_and_two_cores(problem, tmp_path):
    runs = [(n, cores) for n in (8, 1, 7, 2, 6, 3, 5, 4) for cores in (1, 2)]
    check_relay(problem, runs, tmp_path)


def test_two_processes_train_together(tmp_path, compile_cache):
    port = free_port()
    first, _ = finish(
        *[start("member", port, i, 2, tmp_path / "together") for i in range(2)]
    )
    found = json.loads(first)

    trainer, evaluated = evaluated_digits(tmp_path / "alone")
    expected = run_digest(trainer, 3)
    expected |= {"after": run_digest(trainer, 6), "evaluated": list(evaluated)}
    trainer.close()
    # What two processes have saved, one can read.
    trainer, _ = evaluated_digits(tmp_path / "together")
    assert trainer.restore() == 3
    expected |= {"restored": trainer.state_digest()}
    # Of what is lost nothing is used: the run goes back to what is saved.
    list(trainer.run(6))
    expected |= {"seen": [3, 4, 3, 4, 5], "after a loss": trainer.state_digest()}
    assert found == json.loads(json.dumps(expected))
    trainer.close()


def test_arrays_of_two_processes_move_to_any_mesh():
    port = free_port()
    workers = [start("resharded", port, i, 2) for i in range(2)]
    assert finish(*workers) == ["moved", "moved"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ({"data": -1, "fsdp": 1, "tensor": 2}, {1: 6, 2: 4, 3: 7}),
        ({"fsdp": -1, "tensor": 2, "context": 2}, {1: 8}),
    ],
)
def test_groups_of_two_processes_keep_the_bits_of_one(mesh, changes):
    def run(num_processes, changes):
        port, said = free_port(), (json.dumps(mesh), json.dumps(changes))
        ids = range(num_processes)
        return finish(*[start("grouped", port, i, num_processes, *said) for i in ids])

    together, _ = run(2, changes)
    assert [together] == run(1, {1: 4, 3: 8})
