"""A hundred random faults while four processes train: the bits of an unhurt run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT_S = 3600


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(LIMIT_S + 60)
def test_a_hundred_faults_change_no_bit():
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "goodput.py")),
            *("--faults", "100", "--every", "6"),
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
