"""`shardkit explain`: its tables, its files, its exit codes."""

import dataclasses
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from shardkit.command import explain_job
from shardkit.command.explain_page import render_page
from shardkit.command.explain_pictures import choose
from shardkit.config import load
from shardkit.errors import ConfigError
from shardkit.explain.advice import Resharding
from shardkit.explain.forbid import find_broken, parse_rule
from shardkit.hlo import find_collectives

ROOT = Path(__file__).parents[1]
# 6 devices divide neither the microbatches nor the dims.
SMALL = """
devices = 6
[model]
factory = "models.mlp:build"
[model.options]
hidden_dim = 8
num_layers = 1
[data]
factory = "models.mlp:digits"
global_batch_size = 28
num_microbatches = 14
[optimizer]
name = "sgd"
learning_rate = 0.1
[mesh]
data = 2
fsdp = 3
[train]
steps = 10
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("explained") / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def job(path):
    """The one compilation of these tests."""
    return explain_job.explain(load(path), 6)


@pytest.fixture
def explain(verb, job, monkeypatch):
    """The verb, given what was compiled already."""

    def known(config, num_devices):
        assert num_devices == 6
        return job

    monkeypatch.setattr(explain_job, "explain", known)
    return verb("explain")


def test_tables(explain, path):
    said = explain(path)
    assert said.startswith(f"{path} on 6 devices\n")
    assert "data=2 fsdp=3 on cpu" in said
    assert re.search(r"all-gather +fsdp +1 +.* parameters made whole", said)
    assert re.search(r"reduce-scatter +fsdp +1 +.* sum of gradients", said)
    assert re.search(r"all-reduce +data fsdp .* loss and metrics", said)
    assert "shardkit/collectives.py:" in said
    assert "none that nobody asked for" in said
    assert "cut by fsdp only, and whole along data" in said
    # 14 microbatches in 3 rounds of 6 devices.
    assert "14, 2 to 3 on a device: 22.2% of the time is waiting" in said
    assert "XLA tells: arguments" in said
    assert "padded" in said


@pytest.fixture
def advised(job):
    """The job, as if three collectives resharded, two of which for the same reason."""
    [gather] = [x for x in job.program.exchanged if x.kind == "all-gather"]
    same = Resharding(gather, "x is needed whole by y", "leave it whole")
    found = (same, Resharding(gather, "z is needed", "cut it"), same)
    program = dataclasses.replace(job.program, reshardings=found)
    return dataclasses.replace(job, program=program)


def test_the_same_advice_is_given_once(verb, path, advised, monkeypatch, tmp_path):
    monkeypatch.setattr(explain_job, "explain", lambda config, num_devices: advised)
    said = verb("explain")(path, "--html", tmp_path / "a.html")
    assert "3 that nobody asked for" in said
    heads = [x for x in said.splitlines() if x.startswith("Resharding, ")]
    assert re.match(
        r"Resharding, 2 × all-gather of .*B: x is needed whole by", heads[0]
    )
    assert re.match(r"Resharding, all-gather of .*B: z is needed", heads[1])
    assert len(heads) == 2
    assert said.count("Leave it whole.") == 1
    page = (tmp_path / "a.html").read_text()
    assert page.count("x is needed whole by y") == page.count("2 × all-gather") == 1
    assert "resharding 2 ×: x is needed whole" in str(advised.program)
    # For machines there is one entry for every collective.
    assert len(verb("explain")(path, "--json")["resharding"]) == 3


def test_one_document_has_everything(explain, path, job):
    found = explain(path, "--json")
    assert found["mesh"] == {"data": 2, "fsdp": 3, "tensor": 1} | {
        "expert": 1,
        "context": 1,
    }
    totals = {}
    for each in found["collectives"]:
        key = each["kind"], each["note"]
        totals[key] = totals.get(key, 0) + each["bytes"]
        assert each["parts"]
        assert all(part["cause"] and part["source"] for part in each["parts"])
        assert all(part["frames"][0]["line"] for part in each["parts"])
    kinds = find_collectives(job.report.compiled.as_text())
    assert totals == {(c.kind, c.note): c.num_bytes for c in kinds}
    assert [x["num_bytes"] for x in found["by_kind"]] == [c.num_bytes for c in kinds]
    assert found["resharding"] == found["forbidden"] == []
    leaves = {leaf["path"]: leaf for leaf in found["leaves"]}
    padded = [leaf for leaf in leaves.values() if leaf["padding_bytes"]]
    assert padded
    assert found["padding_bytes"] == sum(leaf["padding_bytes"] for leaf in padded)
    for leaf in padded:
        assert leaf["pieces"] * leaf["copies"] == 6
        assert len(leaf["boxes"]) == 6
    assert found["microbatches"]["counts"] == [3, 3, 2, 2, 2, 2]
    memory = found["memory"]
    assert sum(x["bytes"] for x in memory["arguments"]) == memory["argument_bytes"]
    names = {x["name"] for x in memory["arguments"]}
    assert {"step", "random key", "batch/image"} <= names or "batch" in str(names)
    assert names >= {path for path in leaves if path.startswith("params/")}


def test_what_is_forbidden_is_named_and_has_a_code_of_its_own(explain, path):
    rules = ["--forbid", "all-gather@fsdp>1B", "--forbid", "resharding"]
    said = explain(path, *rules, code=4)
    [line] = [x for x in said.splitlines() if x.startswith("--forbid")]
    assert line == "--forbid 'all-gather@fsdp>1B' is broken:"
    offending = said.split(line)[1]
    assert "all-gather over fsdp" in offending
    assert re.search(
        r"at shardkit/\w+\.py:\d+\n  parameters made whole, of params", offending
    )
    assert "resharding" not in offending
    assert "none of 1 rules" in explain(path, "--forbid", "all-gather@tensor")
    found = explain(path, "--forbid", "reduce-scatter", "--json", code=4)
    [broken] = found["forbidden"]
    assert broken["rule"] == "reduce-scatter"
    assert [x["kind"] for x in broken["collectives"]] == ["reduce-scatter"]


RULES = {
    "all-gather": True,
    "all-gather>1GiB": False,
    "total *>1GB": False,
    "total all-reduce@data>0": True,
    "all-to-all": False,
    "gather@fsdp": True,
    "gather@data": False,
    "metrics>0B": True,
    "total sum>10 B": True,
    "resharding>0": False,
}


@pytest.mark.parametrize("text", RULES)
def test_rules(text, job):
    assert bool(find_broken([parse_rule(text)], job.program.exchanged)) == RULES[text]


def test_the_limit_of_a_rule_is_more_than_and_exact(job):
    [gather] = [x for x in job.program.exchanged if x.kind == "all-gather"]
    size = gather.exchange.num_bytes
    assert find_broken([parse_rule(f"all-gather>{size - 1}")], [gather])
    assert not find_broken([parse_rule(f"all-gather>{size}")], [gather])
    kib = size / 1024
    assert parse_rule(f"all-gather>{kib}KiB").limit_bytes == pytest.approx(size)
    [total] = find_broken([parse_rule(f"total gather>{size}")], [gather, gather])
    assert total[1] == [gather, gather]


@pytest.mark.parametrize(
    "text",
    ["", "all-gather>", "allgather", "all-gather@x", "sum>1XiB", "sum<1", "sum>-1"],
)
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(ConfigError, match="WHAT"):
        parse_rule(text)


def test_leaves_are_drawn_in_the_terminal_and_as_files(explain, path, tmp_path, job):
    svg, page = tmp_path / "a.svg", tmp_path / "a.html"
    said = explain(path, "--leaf", "params/*", "--svg", svg, "--html", page)
    assert f"{svg} shows it" in said
    assert "over fsdp, 2 copies over data" in said
    assert "[" in said.split("XLA tells")[1]
    ElementTree.fromstring(svg.read_bytes())
    text = page.read_text()
    assert "parameters made whole" in text
    assert text.count("<svg") == len(choose(job.leaves, ["params/*"]))
    assert "params/*: expected" not in said
    errors = explain(path, "--leaf", "none/such", code=2)
    assert "--leaf none/such: expected paths of leaves, such as step" in errors


def test_the_page_lets_in_nothing_but_itself(job):
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    broken = find_broken([parse_rule("all-gather")], job.program.exchanged)
    page = render_page(hostile, job, choose(job.leaves, []), broken)
    assert "default-src 'none'" in page
    assert page.count("<script") == 2
    assert "<img" not in page
    assert not re.search(r"\sstyle=|\son\w+=\"|url\(", page.split("<body>")[1])
    assert set(re.findall(r"https?://[^\s\"'`<>)]+", page)) == {
        "http://www.w3.org/2000/svg"
    }
    # Every leaf is in one of the pictures.
    assert all(leaf.path in page for leaf in job.leaves)


def test_bad_input_is_one_message(verb, path, tmp_path):
    explain = verb("explain")
    errors = explain(path, "--devices", "9", code=2)
    assert "expected at most 8" in errors
    assert "at most 2048" in explain(path, "--devices", "2049", code=2)
    assert "at most 4294967296" in verb("plan")(path, "--devices", "9" * 20, code=2)
    bare = tmp_path / "bare.toml"
    bare.write_text(SMALL.replace("devices = 6", ""))
    assert "--devices N" in explain(bare, code=2)
    assert "there is no 'none-such'" in explain(path, "--forbid", "none-such", code=2)
    assert "there is no such file" in explain(tmp_path / "none.toml", code=2)
    outputs = "--svg", tmp_path / "none/a.svg", "--html", tmp_path
    errors = explain(path, *outputs, code=2)
    assert f"a.svg, --html {tmp_path}: expected a file in a directory" in errors


@pytest.mark.slow
def test_it_starts_alone_and_emulates_what_is_not_there(tmp_path):
    """More devices than other tests have, in a process of its own."""
    fast = tmp_path / "fast.toml"
    fast.write_text(f'{SMALL}consistency = "fast"\n')
    words = ["explain", str(fast), "--devices", "9", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "shardkit", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["devices"] == 9
    assert found["platform"] == "cpu"
    assert found["mesh"]["data"] * found["mesh"]["fsdp"] == 9
    assert found["resharding"] == []
