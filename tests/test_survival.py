"""Real training under a supervisor, hurt at named points: the bits of an unhurt run.

A process is ended, frozen, starved, made to fail, or loses its host, its messages or
its supervisor, while it computes, copies, saves, restores or joins.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardkit.chaos.faults import KINDS, POINTS
from shardkit.snapshot.segments import default_directory

ROOT = Path(__file__).parents[1]
STEPS = 12
PROCESSES = 3
LIMIT_S = 280
RUN = [
    *(sys.executable, "train.py", "configs/digits.toml"),
    *("--devices", str(PROCESSES), "--resize", f"0:{PROCESSES},6:{PROCESSES}"),
    *("--mesh.data", "1", "--mesh.fsdp", "-1", "--train.eval_every", "5"),
    *("--steps", str(STEPS), "--checkpoint.every", "4"),
]
# Two devices of each process, of which one is given up: who computes enters no bit.
SMALLER = ("--devices", str(2 * PROCESSES), "--resize", f"0:{2 * PROCESSES},5:5")
# Short windows, so that what is frozen is missed soon.
DEADLINES = "step_floor_s=6,silence_s=3,end_s=5,snapshot_s=20,slot_s=25"

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def environment():
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def unhurt(tmp_path_factory):
    """What the run in one process comes to."""
    out = tmp_path_factory.mktemp("unhurt") / "run"
    subprocess.run(
        [*RUN, "--out", str(out)],
        cwd=ROOT,
        env=environment(),
        check=True,
        timeout=LIMIT_S,
        capture_output=True,
    )
    return summary(out)


def summary(out):
    """The state's digest, how many steps, and every step's loss to the bit."""
    found = json.loads((out / "summary.json").read_text())
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    losses = [(x["step"], x["loss_bits"]) for x in records if "event" not in x]
    return found["state_digest"], found["steps"], losses


def survive(
    tmp_path, *faults, changes=(), redundancy="mirror", program="train.py", **more
):
    """Runs it, hurt; returns what it came to and what was said.

    Args:
        tmp_path: Where.
        faults: What happens.
        changes: Options that differ from those of the unhurt run.
        redundancy: How snapshots are protected.
        program: What is run.
        **more: Variables of its environment.
    """
    out = tmp_path / "run"
    command = [sys.executable, "-m", "shardkit", "launch"]
    command += ["--processes", str(PROCESSES), "--out-dir", str(tmp_path / "cluster")]
    command += ["--redundancy", redundancy, "--deadlines", DEADLINES]
    for fault in faults:
        command += ["--fault", fault]
    start_s = time.monotonic()
    done = subprocess.run(
        [*command, "--", RUN[0], program, *RUN[2:], *changes, "--out", str(out)],
        cwd=ROOT,
        env=environment() | more,
        timeout=LIMIT_S,
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    check_nothing_is_left(said, out)
    return summary(out), said, time.monotonic() - start_s


def check_nothing_is_left(said, out):
    run = said.split("shardkit: run ", 1)[1].split()[0]
    assert not list(default_directory().glob(f"shardkit-{run}-*"))
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            assert str(out).encode() not in (directory / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue


def test_an_unhurt_cluster_computes_the_same(tmp_path, unhurt):
    found, said, _ = survive(tmp_path)
    assert found == unhurt
    assert "going on" not in said


@pytest.mark.parametrize(
    "fault",
    [
        *("kill@snapshot:step=5,process=1", "freeze@forward:step=7,process=2"),
        # Process 0 has not written the step before, and its host's memory is gone.
        *("kill@forward:step=7,process=0", "host@collective:step=8,process=0"),
    ],
)
def test_one_fault_changes_no_bit(fault, tmp_path, unhurt):
    found, said, _ = survive(tmp_path, fault)
    assert found == unhurt
    assert "going on from step" in said


def test_steps_that_process_0_never_told_are_in_the_record(tmp_path, unhurt):
    found, said, _ = survive(
        tmp_path,
        program=str(ROOT / "tests" / "workers" / "untold.py"),
        UNTOLD_MARK=str(tmp_path / "mark"),
    )
    assert found == unhurt
    assert "killed by SIGKILL; going on from step 8" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "point"), list(itertools.product(KINDS, POINTS)))
def test_every_fault_at_every_point_changes_no_bit(kind, point, tmp_path, unhurt):
    # All is compiled before the first step.
    step = 0 if point == "compile" else 5
    faults = [f"{kind}@{point}:step={step},process=1"]
    if point in ("restore", "join"):
        # These are parts of a recovery, for which something else must fail first.
        faults = [
            "kill@forward:step=4,process=2",
            f"{kind}@{point}:process=1,generation=2",
        ]
    changes = SMALLER if point == "reshard" else ()
    found, said, _ = survive(tmp_path, *faults, changes=changes)
    assert found == unhurt
    logs = (tmp_path / "cluster" / "workers").glob("host-*-*.log")
    # A log goes with the agent that writes it.
    is_told = any(f"fault: {kind}@{point}" in log.read_text() for log in logs)
    assert is_told or (kind == "host" and "host-1 lost its agent" in said)
