"""The real program with hosts that are lost: the same bits as without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardkit.snapshot.segments import list_runs

ROOT = Path(__file__).parents[1]
LIMIT_S = 1500
RUN = [
    *(sys.executable, str(ROOT / "train.py"), str(ROOT / "configs" / "tiny.toml")),
    *("--devices", "8", "--resize", "0:8", "--steps", "12"),
    *("--train.eval_every", "0", "--train.eval_batches", "0"),
]


def run(directory, command):
    """Runs a command to its end; returns what it said to people."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PJRT_NPROC": "8"}
    found = subprocess.run(
        command, cwd=directory, env=env, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stderr


def digest(directory):
    return json.loads((directory / "summary.json").read_text())["state_digest"]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(2 * LIMIT_S)
def test_a_lost_host_leaves_no_trace(tmp_path):
    before = list_runs()
    run(tmp_path, [*RUN, "--out", "alone"])
    launch = [
        *(sys.executable, "-m", "shardkit", "launch", "--processes", "4"),
        *("--redundancy", "parity", "--fault", "host@forward:step=5,process=2"),
    ]
    said = run(tmp_path, [*launch, "--", *RUN, "--out", "together"])
    assert "of process 2, lost with host-2, are rebuilt on host-" in said
    assert "steps lost" not in said
    assert digest(tmp_path / "together") == digest(tmp_path / "alone")
    assert list_runs().keys() <= before.keys()
