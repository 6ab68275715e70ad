"""Bad input to `train.py` ends in one message that says where, what and what to do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from problems import CONFIG

import train
from shardkit import cli

ROOT = Path(__file__).parents[1]

TEXT = CONFIG.replace('factory = "faulty:digits"', "sequence_length = 8")

CASES = {
    "unknown key": (["--train.stepz", "3"], "stepz.*did you mean 'steps'"),
    "unknown table": (["--trian.steps", "3"], "trian.*did you mean 'train'"),
    "wrong type": (["--train.seed", "many"], 'whole number, found "many"'),
    "wrong choice": (["--consistency", "loose"], "consistency.*exact.*loose"),
    "pool too small": (["--devices", "9"], "--devices: expected at most 8.*found 9"),
    "mesh cannot fit": (["--mesh.tensor", "16"], "at least 16 devices.*found 8"),
    "two free axes": (["--mesh.data", "-1"], "only one axis can be -1"),
    "unknown mesh axis": (["--axis_rules.pixels", "fsdq"], "fsdq.*fsdp"),
    "unused rule": (
        ["--axis_rules.pixel", "fsdp", "--train.strict", "true"],
        "pixel",
    ),
    "no annotation": (["--train.strict", "true"], "hidden_0/kernel"),
    "resize syntax": (["--resize", "0=4"], "expected STEP:N.*found '0=4'"),
    "resize order": (["--resize", "4:4,2:8"], "rising steps, found 2 after 4"),
    "resize too many": (["--resize", "0:9"], "1 to 8 devices.*found 9"),
    "resize too few": (["--resize", "0:4,3:0"], "1 to 8 devices.*found 0"),
    "microbatches": (
        ["--data.num_microbatches", "4"],
        "global_batch_size = 26 is not divisible by num_microbatches = 4",
    ),
    "factory": (["--model.factory", "models.mlp:bild"], "did you mean 'build'"),
    "model option": (["--model.options.hiden_dim", "3"], "did you mean 'hidden_dim'"),
    "rules of nothing": (["--remap", "r.toml"], "name it with --from"),
    "from nothing": (["--from", "none"], "none: there is no such path"),
    "from and resume": (["--from", "none", "--resume"], "leave one out"),
    "model value": (["--model.options.dropout", "1.5"], "dropout.*found 1.5"),
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `train.py` in this process, which has its devices already."""
    monkeypatch.setattr(cli, "prepare_environment", lambda *args: None)
    monkeypatch.syspath_prepend(ROOT / "tests" / "workers")
    monkeypatch.chdir(tmp_path)

    def run(config, *args):
        Path("config.toml").write_text(config)
        code = train.main(["config.toml", "--out", "out", *args])
        return code, capsys.readouterr().err

    return run


def check(found, message, tmp_path):
    code, said = found
    assert code == 2, said
    assert said.count("Error: ") == 1
    assert "Traceback" not in said
    assert re.search(message, said, re.DOTALL), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_message(case, run, tmp_path):
    args, message = CASES[case]
    config = CONFIG
    if case == "no annotation":
        config = config.replace("models.mlp:build", "faulty:bare")
        config = config.replace(", num_layers = 1, dropout = 0.2", "")
    check(run(config, *args), message, tmp_path)


def test_a_config_that_is_not_toml(run, tmp_path):
    check(run("[train\nsteps = 3"), "config.toml.*line 1", tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.txt", "missing.txt does not exist"),
        ("empty.txt", "empty.*0 bytes"),
        ("nothing", "holds no text"),
        ("short.txt", "sequence_length|at least|too short"),
    ],
)
def test_a_corpus_that_cannot_be_used(path, message, run, tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("abc")
    check(run(TEXT, "--data.path", path), message, tmp_path)


def test_a_process_says_it_too(tmp_path):
    command = [sys.executable, str(ROOT / "train.py")]
    for args in (["missing.toml"], [str(ROOT / "configs" / "tiny.toml"), "--bogus"]):
        found = subprocess.run(
            [*command, *args], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert found.returncode == 2
        assert found.stderr.startswith("ConfigError: ")
        assert "Traceback" not in found.stderr
        assert found.stdout == ""
    assert list(tmp_path.iterdir()) == []
