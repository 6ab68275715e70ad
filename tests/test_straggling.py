"""Real training with a process that is slow for long: it gets less, no bit changes."""

import contextlib
import re
import signal
import subprocess
import sys
import time

import pytest
from test_survival import ROOT, environment, summary

from shardkit.chaos.deeds import slow_down
from shardkit.cluster.asking import Asker, find_address
from shardkit.errors import ShardkitError

PROCESSES = 3
SLOW = 1
LIMIT_S = 900
MORE_STEPS = 40
RUN = [
    *(sys.executable, "train.py", "configs/digits.toml"),
    *("--devices", str(PROCESSES), "--resize", f"0:{PROCESSES}"),
    *("--mesh.data", "1", "--mesh.fsdp", "-1", "--checkpoint.every", "100000"),
    *("--train.eval_every", "0", "--train.eval_batches", "0"),
]
DECISION = re.compile(
    r"process (\d) \(\S+ of the median\) is slow: "
    r"microbatches (\d+), (\d+), (\d+) become (\d+), (\d+), (\d+)"
)

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def run_alone(steps, out, *options):
    """Runs it in one process; returns the digest."""
    subprocess.run(
        [*RUN, "--steps", str(steps), "--out", str(out), *options],
        cwd=ROOT,
        env=environment(),
        check=True,
        timeout=LIMIT_S,
        capture_output=True,
    )
    return summary(out)


def look(directory):
    """The generation that trains, its step and the pid of the slow process, if any."""
    with contextlib.suppress(ShardkitError, OSError):
        with Asker(find_address(directory)) as asker:
            status = asker.ask(2.0)
        workers = [worker for host in status.hosts for worker in host.workers]
        pids = [w.pid for w in workers if w.process == SLOW and w.phase == "step"]
        return status.generation, status.step, *pids
    return ()


def run_until_shared_anew(tmp_path):
    """Runs it with one process slow until another generation trains, and leaves."""
    log = tmp_path / "said"
    command = [sys.executable, "-m", "shardkit", "launch", "--min-devices", "3"]
    command += ["--processes", str(PROCESSES), "--out-dir", str(tmp_path / "cluster")]
    command += ["--", *RUN, "--steps", "1000000", "--out", str(tmp_path / "run")]
    brakes, seen, end_s = {}, [], time.monotonic() + LIMIT_S
    with log.open("wb") as file:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT
        )
        try:
            while child.poll() is None:
                assert time.monotonic() < end_s, log.read_text()[-4000:]
                generation, step, *pids = look(tmp_path / "cluster") or (0, 0)
                for pid in set(pids) - brakes.keys():
                    brakes[pid] = slow_down(pid, for_s=LIMIT_S, part=2 / 3)
                if generation == 2 and pids:
                    seen.append(step)
                    if step > seen[0] + MORE_STEPS:
                        child.send_signal(signal.SIGTERM)
                        child.wait(LIMIT_S)
                time.sleep(0.3)
        finally:
            for process in (child, *brakes.values()):
                if process.poll() is None:
                    process.terminate()
                process.wait(LIMIT_S)
    said = log.read_text()
    assert child.returncode == 75, said[-4000:]
    return said


@pytest.mark.timeout(4 * LIMIT_S)
def test_a_slow_process_gets_fewer_microbatches_and_no_bit_changes(tmp_path):
    said = run_until_shared_anew(tmp_path)
    slow, *counts = map(int, DECISION.findall(said)[0])
    assert slow == SLOW
    assert counts[:3] == [8, 8, 8]
    assert sum(counts[3:]) == 24
    assert counts[3 + SLOW] < min(counts[3], counts[5])
    saved = (tmp_path / "run" / "checkpoints").iterdir()
    last = max(int(path.name) for path in saved if path.name.isdecimal())
    assert last > MORE_STEPS
    # What it left is read on one process, and is what one process comes to.
    together = run_alone(last, tmp_path / "run", "--resume")
    assert together == run_alone(last, tmp_path / "alone")
