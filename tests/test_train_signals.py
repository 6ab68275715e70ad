"""A signal before, after and between the runs of `train.py`, and what is said of it."""

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
from problems import CONFIG

import shardkit as sk
import train
from shardkit import build, cli, report

ROOT = Path(__file__).parents[1]
NUMBERS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
EVERYONE = "all 3 identical, to the bit"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, compile_cache):
    """Runs `train.py` here; returns its exit code and what it said."""
    monkeypatch.setattr(cli, "prepare_environment", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.syspath_prepend(ROOT / "tests" / "workers")
    monkeypatch.chdir(tmp_path)
    Path("config.toml").write_text(CONFIG)

    def run(*args, config="config.toml"):
        before = [signal.getsignal(number) for number in NUMBERS]
        code = train.main([config, *args])
        assert [signal.getsignal(number) for number in NUMBERS] == before
        found = capsys.readouterr()
        return code, found.out + found.err

    return run


@pytest.fixture
def send(monkeypatch):
    """Sends signals whenever a function is called, the first time that it is."""

    def send(owner, name, *numbers):
        function = getattr(owner, name)

        def sending(*args, **kwargs):
            monkeypatch.setattr(owner, name, function)
            for number in numbers:
                os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, sending)

    return send


def steps(out="out"):
    records = report.read_records(Path(out) / "metrics.jsonl")
    return [(r["step"], r["num_devices"]) for r in records if "event" not in r]


def directory(config="config.toml", out="out"):
    return report.RunDirectory(Path(out), sk_config(config), resumes=True)


def sk_config(path):
    return cli.parse_arguments([path]).config


def go_on(said):
    """Returns the arguments of the command that the last line names."""
    last = said.splitlines()[-1]
    assert last.startswith("go on with: ")
    words = shlex.split(last.removeprefix("go on with: "))
    assert words[:2] == [sys.orig_argv[0], "train.py"]
    return words[3:], words[2]


def test_leaving_before_the_first_step(run, send):
    send(build, "device_pool", signal.SIGTERM)
    code, said = run("--out", "my run", "--steps", "2")
    assert code == 75
    assert steps("my run") == []
    args, config = go_on(said)
    assert run(*args, config=config)[0] == 0
    assert steps("my run") == [(0, 8), (1, 8)]


@pytest.mark.slow
def test_one_device_fewer_before_the_first_step(run, send):
    send(build, "device_pool", signal.SIGUSR1, signal.SIGUSR1)
    assert run("--out", "out", "--steps", "2")[0] == 0
    assert steps() == [(0, 6), (1, 6)]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        pytest.param(report, "summarize", marks=pytest.mark.slow),
        pytest.param(sk.Trainer, "state_digest", marks=pytest.mark.slow),
        (sk.Trainer, "evaluate"),
    ],
)
def test_after_the_last_step_a_run_is_finished(run, send, owner, name):
    """Also where it is the run itself that evaluates, at its last step."""
    send(owner, name, *NUMBERS)
    code, said = run("--out", "out", "--steps", "2", "--train.eval_every", "2")
    assert code == 0, said
    summary = directory().summary()
    assert summary["steps"] == 2
    assert summary["final_loss"] is not None
    assert summary["eval_loss"] is not None
    assert "go on with" not in said


@pytest.mark.slow
def test_leaving_between_a_run_and_its_twin(run, send):
    send(report.Report, "finish", signal.SIGTERM)
    code, said = run("--out", "out", "--steps", "3", "--twin")
    assert code == 75
    assert directory().summary()["steps"] == 3
    args, config = go_on(said)
    assert "--twin" in args
    code, said = run(*args, config=config)
    assert code == 0
    assert "finished already, at step 3" in said
    assert EVERYONE in said


@pytest.mark.slow
def test_what_is_said_of_a_twin_stays_true_when_the_run_goes_on(run):
    args = ["--out", "out", "--resize", "0:8,1:3,3:8"]
    code, said = run(*args, "--steps", "3", "--twin")
    assert code == 0
    assert EVERYONE in said
    assert "3:8 is ignored" in said
    assert directory().summary()["twin"]["same_digest"] is True

    code, said = run(*args, "--steps", "4", "--resume")
    assert code == 0
    assert EVERYONE in said
    summary = directory().summary()
    assert summary["steps"] == 4
    assert summary["twin"]["num_steps"] == 3
    assert summary["twin"]["same_digest"] is None

    code, said = run(*args, "--steps", "4", "--resume", "--twin")
    assert code == 0
    twin = directory().summary()["twin"]
    assert (twin["num_steps"], twin["same_digest"]) == (4, True)

    # What lies behind the end of a finished run is of no interest.
    code, said = run(*args, "--steps", "2", "--resume")
    assert code == 0
    asked = "beyond step 2 that is asked for"
    assert said == f"out: finished already, at step 4, {asked}\n"
    assert directory().summary()["twin"] == twin


@pytest.mark.parametrize("exists", [True, False])
def test_resuming_nothing_says_so(run, tmp_path, exists):
    if exists:
        (tmp_path / "out").mkdir()
    code, said = run("--out", "out", "--steps", "1", "--resume")
    assert code == 0
    assert said.startswith("--resume: there is no run in out; one begins\n")


def test_interrupted_before_anything_is_written_it_names_no_command(run, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "device_pool", interrupt)
    assert run("--out", "out") == (130, "interrupted\n")
