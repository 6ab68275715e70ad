"""`shardkit suggest`: rules for a config, to be pasted into it."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shardkit as sk
from shardkit.build import build_trainer, device_pool
from shardkit.config import load
from shardkit.events import EventLog

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tensor-rules.md"
SMALL = """
[model]
factory = "models.vit:build"
options = {num_layers = 2, width = 8, num_heads = 2}
[data]
factory = "models.vit:digits"
global_batch_size = 8
num_microbatches = 4
[optimizer]
learning_rate = 0.1
[train]
steps = 1
"""


@pytest.fixture
def suggest(verb):
    return verb("suggest")


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "small.toml"
        path.write_text(text)
        return path

    return write


def test_it_needs_no_device():
    program = (
        "import os, sys; os.environ['JAX_PLATFORMS'] = 'none_such';"
        "from shardkit.command.main import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "suggest", "configs/llama_1b.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert 'heads = "tensor"' in done.stdout
    # Two sums of every one of 16 layers, 2 rows of 2048 positions in bfloat16.
    assert re.search(r"all-reduce +32 +512 MiB", done.stdout)


def test_the_page_shows_what_is_printed(suggest, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = PAGE.read_text().partition("--tensor 4\n")[2].partition("```")[0]
    assert suggest("configs/vit.toml", "--tensor", "4") == shown
    found = doctest.testfile(str(PAGE), module_relative=False)
    assert found.attempted > 8
    assert not found.failed


def test_what_it_prints_can_be_pasted(suggest, write):
    found = suggest(write(SMALL), "--tensor", "2")
    assert "Block_*/Dense_*/kernel" in found
    assert "×2" in found
    rules = found.partition("before the others:\n")[2].partition("\nFor a program")[0]
    pasted = write(SMALL + rules)
    document = suggest(pasted, "--tensor", "2", "--json")
    cut = {x["path"] for x in document["leaves"] if x["dim"] >= 0}
    assert "Block_0/MultiHeadDotProductAttention_0/query/kernel" in cut
    # They say the same of what they are found for again.
    assert suggest(pasted, "--tensor", "2") == found


def test_rules_over_paths_of_a_config_reach_the_trainer(write, tmp_path, monkeypatch):
    path = write(
        SMALL + '[path_rules]\n"Block_*/Dense_0/bias" = ["fsdp"]\n"p*" = [""]\n'
    )
    asked = {}

    def asked_for(**options):
        asked.update(options)

    monkeypatch.setattr(sk, "Trainer", asked_for, raising=False)
    build_trainer(
        load(path), devices=device_pool(2), checkpoints=tmp_path, events=EventLog()
    )
    rules = {"Block_*/Dense_0/bias": ("fsdp",), "p*": (None,)}
    assert asked["path_rules"] == rules
    assert asked["axis_rules"] == {"embed": "fsdp"}


def test_a_model_without_any_is_told_so(suggest, write):
    small = SMALL.replace("models.vit:build", "models.resnet:build")
    small = small.replace("num_layers = 2, width = 8, num_heads = 2", "")
    assert "None found: every cut" in suggest(write(small), code=1)
    # No prime like that divides heads, vocabulary or hidden units.
    found = suggest(write(SMALL), "--tensor", "1009", code=1)
    assert "None found: 1009 divides none" in found


def test_bad_input_is_one_message(suggest, write, tmp_path):
    assert "there is no such file" in suggest(tmp_path / "none.toml", code=2)
    assert "2 or more" in suggest(write(SMALL), "--tensor", "1", code=2)
    wrong = write(SMALL + '[path_rules]\n"place" = ["tensor"]\n')
    assert "place" in suggest(wrong, code=2)
