"""`shardkit report`: what is said of one run, and of several side by side."""

import json
import struct

import pytest
from reported import CONFIG
from stored_runs import FACTS, VERSIONS, changed, step_line, store_run

from shardkit.command.main import main
from shardkit.report.comparison import compare_stored
from shardkit.report.stored_run import StoredRun


@pytest.fixture
def report(verb):
    return verb("report")


@pytest.fixture
def first(tmp_path):
    return store_run(tmp_path / "first")


def compare(first, other):
    return compare_stored(StoredRun.read(first), StoredRun.read(other))


def flipped(step):
    """A line of which the loss differs in its last bit."""
    line = step_line(step)
    number = int(line["loss_bits"], 16) ^ 1
    (loss,) = struct.unpack(">f", struct.pack(">I", number))
    return {**line, "loss": loss, "loss_bits": f"{number:08x}"}


def test_one_run_gets_its_page(report, first):
    said = report(first)
    assert (first / "report.html").read_text().startswith("<!doctype html>")
    assert "report.html" in said
    assert "20  of 20" in said
    found = report(first, "--out", first / "other.html", "--json")
    assert found["page"] == str(first / "other.html")
    assert found["steps"] == 20
    assert found["state_digest"] == "aa" * 16
    assert (first / "other.html").exists()


def test_runs_that_are_the_same(report, first, tmp_path):
    other = store_run(tmp_path / "other")
    assert "identical, as they should be" in report(first, other)
    [pair] = report(first, other, "--json")["pairs"]
    assert pair["identical"]
    assert pair["should_agree"]
    assert (pair["num_common"], pair["num_differing"]) == (20, 0)
    assert (pair["same_digest"], pair["same_evals"]) == (True, True)


def test_one_bit_of_one_loss_is_found(report, first, tmp_path):
    lines = [flipped(s) if s == 7 else step_line(s) for s in range(20)]
    other = store_run(tmp_path / "other", lines=lines)
    said = report(first, other, code=1)
    assert "differ from step 7, though they should agree" in said
    assert "1 of 20 steps differ" in said
    found = report(first, other, "--json", code=1)
    assert not found["ok"]
    [pair] = found["pairs"]
    assert pair["first_differing"] == pair["largest_step"] == 7
    assert 0 < pair["largest_difference"] < 1e-6


def test_states_that_differ_are_found(first, tmp_path):
    found = compare(first, store_run(tmp_path / "other", digest="bb" * 16))
    assert found.is_wrong
    assert "final states" in found.verdict


OTHER = [flipped(step) for step in range(20)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"config": changed(optimizer={"learning_rate": 0.2})},
            "optimizer.learning_rate 1 / 0.2",
        ),
        ({"config": changed(train={"seed": 3})}, "train.seed 0 / 3"),
        ({"config": changed(train={"ema": 0.9})}, "train.ema none / 0.9"),
        ({"corpus_digest": "ab"}, None),
        ({"facts": {**FACTS, "platform": "gpu"}}, "platform cpu / gpu"),
        ({"facts": {**FACTS, "threads": "16"}}, "threads 8 / 16"),
        (
            {"facts": {**FACTS, "versions": {**VERSIONS, "jax": "0.12.0"}}},
            "jax 0.10.2 / 0.12.0",
        ),
        ({"source": "runs/a"}, "begun from its seed / runs/a"),
    ],
)
def test_what_lets_runs_differ_is_named(report, first, tmp_path, options, named):
    other = store_run(tmp_path / "other", lines=OTHER, **options)
    if named is None:
        # What is not known of one run is taken to be as in the other.
        report(first, other, code=1)
        return
    said = report(first, other)
    assert f"differ from step 0, as expected: {named}" in said


def test_another_corpus_is_named(first, tmp_path):
    runs = [
        store_run(tmp_path / name, lines=lines, corpus_digest=name * 8)
        for name, lines in (("ab", None), ("cd", OTHER))
    ]
    assert "corpus digest abab" in compare(*runs).verdict


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"certify": "off", "standby": 0, "eval_every": 3, "steps": 30}},
        {"checkpoint": {"every": 7}},
        {"mesh": {"fsdp": 2}},
        {"snapshot": {"every": 1}},
    ],
)
def test_what_enters_no_bits_excuses_nothing(first, tmp_path, sections):
    config = changed(**sections)
    other = store_run(tmp_path / "other", lines=OTHER, config=config)
    assert compare(first, other).is_wrong


def test_fast_sums_excuse_a_difference(tmp_path):
    config = changed(train={"consistency": "fast"})
    a = store_run(tmp_path / "a", config=config)
    b = store_run(tmp_path / "b", config=config, lines=OTHER)
    found = compare(a, b)
    assert not found.is_wrong
    assert "sums in any order" in found.verdict
    assert compare(a, a).verdict.startswith("identical, though nothing promises it")


def test_a_run_that_moved_to_another_machine_promises_nothing(first, tmp_path):
    other = store_run(tmp_path / "other", lines=OTHER)
    line = {"event": "environment", "step": 9, "facts": {**FACTS, "machine": "arm64"}}
    line["facts"] |= {"threads": "4"}
    with (other / "events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert "threads 8 / 8 then 4" in compare(first, other).verdict


def test_runs_of_other_lengths_are_compared_as_far_as_both_are(first, tmp_path):
    shorter = store_run(tmp_path / "shorter", steps=12, is_finished=False)
    found = compare(first, shorter)
    assert (found.num_common, found.same_digest) == (12, None)
    assert found.verdict == "identical, as they should be"
    lines = [step_line(step) for step in range(30, 40)]
    config = changed(train={"steps": 40})
    later = store_run(tmp_path / "later", lines=lines, steps=40, config=config)
    found = compare(first, later)
    assert found.num_common == 0
    assert "nothing to compare" in found.verdict
    assert not found.is_wrong


def test_a_page_shows_several_runs(report, first, tmp_path):
    second = store_run(tmp_path / "second <b>")
    third = store_run(tmp_path / "third", lines=OTHER)
    out = tmp_path / "all.html"
    said = report(first, second, third, "--out", out, code=1)
    assert said.count("verdict") == 2
    assert str(out.name) in said
    page = out.read_text()
    assert page.count('class="line run-') == 3
    assert "second &lt;b&gt;" in page
    assert "<b>" not in page
    assert "differ from step 0, though they should agree" in page


def test_bad_input_is_one_message(report, first, tmp_path):
    errors = report(first, tmp_path / "none", tmp_path / "nowhere", code=2)
    assert "none: expected the directory of a run" in errors
    assert "nowhere: expected the directory of a run" in errors
    (first / "summary.json").write_text("{")
    assert "summary.json: damaged" in report(first, code=2)
    assert "--out" in report(first, "--out", tmp_path, code=2)
    assert not (first / "report.html").exists()


def test_the_help_tells_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["report", "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for code in "012":
        assert f"\n  {code}    " in said


def test_the_config_of_these_tests_is_exact():
    assert CONFIG.train.consistency == "exact"
