"""`shardkit launch`: what is asked for, what is refused, and the run's exit code."""

import json
import subprocess
import sys

import pytest
from clusters import ROOT, environment, expected_digest

from shardkit.command.main import main


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --processes"),
        (["--processes", "0"], "expected a whole number, 1 or more, found '0'"),
        (["--processes", "2"], "expected a command after --"),
        (["--processes", "2", "--", "nosuch"], "'nosuch' is no command"),
        (
            ["--processes", "2", "--hosts", "3", "--devices", "1", "--", "true"],
            "--hosts: expected 1 to 2, one process each at least, found 3; --devices: "
            "expected at least 2, one a process, found 1",
        ),
        (["--processes", "2", "--min-devices", "9", "--", "true"], "at most 2, all"),
        (
            # The last one counts, as it does for the program itself.
            "--processes 2 -- true --devices 9 --devices 1".split(),
            "--devices: expected at least 2, one a process, found 1",
        ),
        (["--processes", "2", "--redundancy", "raid", "--", "true"], "found 'raid'"),
        (["--processes", "2", "--redundancy", "parity:0", "--", "x"], "'parity:0'"),
        (
            [
                "--processes",
                "2",
                "--hosts",
                "1",
                "--redundancy",
                "mirror",
                "--",
                "true",
            ],
            "expected at least 2 hosts, since a host cannot protect itself; found 1",
        ),
        (["--processes", "2", "--stragglers", "eject", "--", "x"], "choice: 'eject'"),
        (["--processes", "2", "--deadlines", "end_s=x", "--", "true"], "end_s=x"),
        (["--processes", "2", "--deadlines", "end_s=1", "--", "true"], "must be below"),
        (["--processes", "2", "--out-dir", "/dev/null/x", "--", "true"], "cannot be"),
    ],
)
def test_bad_input_is_one_clear_error(argv, message, capsys):
    assert main(["launch", *argv]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.multiprocess
def test_a_command_runs_in_several_processes(tmp_path):
    options = json.dumps({"out": str(tmp_path), "steps": 10})
    counter = [sys.executable, str(ROOT / "tests" / "workers" / "counter.py"), options]
    launcher = [sys.executable, "-m", "shardkit", "launch", "--processes", "2"]
    done = subprocess.run(
        [*launcher, "--devices", "3", "--out-dir", str(tmp_path / "c"), "--", *counter],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"digest {expected_digest(10)}\n"
    assert done.stderr.startswith("shardkit: run ")
