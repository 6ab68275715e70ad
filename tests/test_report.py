import dataclasses
import importlib.util
import json
import math
import platform
import re
import runpy
import struct
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from reported import CHANGE, CONFIG, Metrics, emit_change, open_run, train

import shardkit
from shardkit.errors import ConfigError
from shardkit.events import EventLog
from shardkit.report import (
    MetricsFile,
    Report,
    compare_runs,
    read_records,
)
from shardkit.report.jsonl import write_atomically
from shardkit.report.summary import summarize, summary_rows, versions
from shardkit.snapshot.recent import LastStep


def scalars(path):
    """Reads TensorBoard's events: tag → (step, value)."""
    from tensorboardX.proto.event_pb2 import Event

    rest, found = path.read_bytes(), {}
    while rest:
        # A length and its checksum, an event, and its checksum.
        (size,) = struct.unpack("<Q", rest[:8])
        event = Event.FromString(rest[12 : 12 + size])
        rest = rest[12 + size + 4 :]
        for value in event.summary.value:
            found[value.tag] = (event.step, value.simple_value)
    return found


def steps_in(path):
    return [r["step"] for r in read_records(path) if "event" not in r]


def test_the_line_of_a_step_has_its_keys_in_order(tmp_path, terminal):
    directory = open_run(tmp_path / "run")
    train(directory, terminal, 1)
    line = directory.metrics.read_text()
    assert line == (
        '{"step": 0, "loss": 2.5, "loss_bits": "40200000", "num_devices": 8, '
        '"mesh": {"data": 2, "fsdp": 4}, "step_s": 0.5, "tokens_per_s": 12288.0, '
        '"metrics": {"grad_norm": 1.0}}\n'
    )


def test_the_line_of_a_change_has_its_keys_in_order(tmp_path, terminal):
    directory = open_run(tmp_path / "run")
    train(directory, terminal, 6)
    lines = directory.metrics.read_text().splitlines()
    assert lines[5] == json.dumps({"event": "reconfigure", **CHANGE})


def test_the_line_of_a_first_step_counts_from_the_change(tmp_path, terminal):
    directory = open_run(tmp_path / "run")
    log = EventLog()
    with Report(directory, terminal, extras=False) as report:
        log.subscribe(report.event)
        report.begin(0)
        emit_change(log, first_step_s=0.5)
    _, record = read_records(directory.metrics)
    assert record.pop("end_s") == pytest.approx(0.75, abs=0.1)
    assert record == {"event": "first_step", "step": 5, "start_s": 0.25}


def test_the_step_really_begun_from_is_said(tmp_path, terminal, out):
    directory = open_run(tmp_path / "run")
    train(directory, terminal, 4)
    log = EventLog()
    with Report(directory, terminal, extras=False) as report:
        log.subscribe(report.event)
        report.begin(4, is_read=False)
        assert "train: steps 4" not in out.getvalue()
        log.emit("restored", step=2)
        # A run that goes back later has begun already.
        log.emit("restored", step=1)
        report.step(Metrics(2))
    assert out.getvalue().count("train: steps 2 to 20") == 1
    assert steps_in(directory.metrics) == [0, 1, 2]


def last_step(step, *, loss_bits="40200000", **metrics):
    found = LastStep(
        step=step, loss_bits=loss_bits, num_devices=8, mesh={}, metrics=metrics
    )
    return found.to_json()


@pytest.mark.parametrize(
    ("number", "going_on", "added"),
    [(7, 9, [7, 8]), (9, 9, []), (12, 9, []), (0, 1, [0]), (5, 6, [5])],
)
def test_what_the_process_before_did_not_tell_is_told_once(
    tmp_path, terminal, number, going_on, added
):
    directory = open_run(tmp_path / "run")
    train(directory, terminal, number)
    log = EventLog()
    with Report(directory, terminal, extras=False) as report:
        log.subscribe(report.event)
        report.begin(going_on)
        known = range(max(going_on - 4, 0), going_on)
        recent = [last_step(step, loss_bits="40400000") for step in known]
        log.emit("last_steps", step=going_on, recent=recent)
        report.step(Metrics(going_on))
    assert steps_in(directory.metrics) == list(range(going_on + 1))
    records = [r for r in read_records(directory.metrics) if "event" not in r]
    assert [r["step"] for r in records if r["loss"] == 3.0] == added
    trace = json.loads(directory.trace.read_text())["traceEvents"]
    # What took time then took none now.
    assert len([e for e in trace if e.get("cat") == "step"]) == number + 1


def test_a_last_step_reaches_tensorboard_and_may_not_be_finite(tmp_path, terminal):
    pytest.importorskip("tensorboardX")
    directory, log = open_run(tmp_path / "run"), EventLog()
    with Report(directory, terminal) as report:
        log.subscribe(report.event)
        report.begin(3)
        recent = [last_step(2, loss_bits="7fc00000", grad_norm=math.inf)]
        log.emit("last_steps", step=3, recent=recent)
    (record,) = read_records(directory.metrics)
    assert (record["loss"], record["loss_bits"]) == (None, "7fc00000")
    (path,) = directory.tensorboard.iterdir()
    assert scalars(path)["train/grad_norm"] == (2, math.inf)


def test_a_loss_that_is_not_finite_stays_json(tmp_path, terminal):
    with Report(open_run(tmp_path / "run"), terminal, extras=False) as report:
        report.begin(0)
        report.step(Metrics(0, loss=float("nan"), loss_bits="7fc00000"))
    (record,) = read_records(tmp_path / "run" / "metrics.jsonl")
    assert record["loss"] is None
    assert record["loss_bits"] == "7fc00000"


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3', "\x00\x00\n", '{"'])
def test_a_torn_line_is_cut(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n' + tail)
    assert steps_in(path) == [0, 1]
    file = MetricsFile(path)
    file.append({"step": 2})
    file.close()
    assert steps_in(path) == [0, 1, 2]


def test_truncate_cuts_steps_and_events_from_a_step_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(6):
        file.append({"step": step})
    file.append({"event": "eval", "step": 2, "loss": 1.0})
    file.append({"event": "eval", "step": 5, "loss": 1.0})
    file.truncate(3)
    file.append({"step": 3})
    file.close()
    assert [r["step"] for r in read_records(path)] == [0, 1, 2, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_repeated_steps_stand_once_after_the_change_that_repeats_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(6):
        file.append({"step": step, "try": 1})
    file.append({"event": "reconfigure", "step": 4})  # a device was lost
    for step in range(4, 7):
        file.append({"step": step, "try": 2})
    file.close()
    records = read_records(path)
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4, 4, 5, 6]
    assert [r["try"] for r in records if "event" not in r] == [1] * 4 + [2] * 3
    assert "event" in records[4]


def test_an_event_may_come_before_the_steps_that_led_to_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append({"step": 3})
    file.append({"event": "reconfigure", "step": 5})
    file.append({"step": 4})
    file.append({"step": 5})
    file.close()
    assert steps_in(path) == [3, 4, 5]
    assert len(read_records(path)) == 4


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"


def test_a_default_directory_is_fresh_and_goes_if_nothing_was_written(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with open_run(None) as first, open_run(None) as second:
        assert (first.path.name, second.path.name) == ("tiny-001", "tiny-002")
        second.prepare()
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["tiny-002"]


def test_a_directory_with_something_in_it_needs_resume(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty; add --resume"):
        open_run(tmp_path)
    with pytest.raises(ConfigError, match=r"neither empty nor .*config\.toml"):
        open_run(tmp_path, resume=True)
    with pytest.raises(ConfigError, match="found a file"):
        open_run(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("exists", [True, False])
def test_resume_on_an_empty_directory_starts(tmp_path, exists):
    path = tmp_path / "run"
    if exists:
        path.mkdir()
    directory = open_run(path, resume=True)
    assert not directory.resumes
    assert not directory.is_finished
    assert not directory.has_checkpoint


def test_resume_goes_on_and_a_finished_run_is_finished(tmp_path, terminal):
    path = tmp_path / "run"
    train(open_run(path), terminal, 20)
    assert open_run(path, resume=True).is_finished
    longer = dataclasses.replace(
        CONFIG, train=dataclasses.replace(CONFIG.train, steps=30), devices=4
    )
    directory = open_run(path, longer, resume=True)
    assert directory.resumes
    assert not directory.is_finished
    train(directory, terminal, 30, first=15)
    assert steps_in(directory.metrics) == list(range(30))
    assert directory.summary()["num_reconfigurations"] == 1


def test_resume_of_another_config_lists_every_difference(tmp_path):
    open_run(tmp_path / "run").prepare()
    other = dataclasses.replace(
        CONFIG,
        train=dataclasses.replace(CONFIG.train, seed=7, consistency="fast"),
    )
    with pytest.raises(ConfigError) as caught:
        open_run(tmp_path / "run", other, resume=True)
    assert "train.seed: 0 there, 7 asked for" in str(caught.value)
    assert "train.consistency: 'exact' there, 'fast' asked for" in str(caught.value)


def test_the_summary_says_what_was_promised(tmp_path, terminal):
    directory = open_run(tmp_path / "run")
    train(directory, terminal, 20)
    summary = directory.summary()
    assert summary["final_loss"] == 2.5
    assert summary["eval_loss"] == 2.25
    assert summary["state_digest"] == "aa"
    assert summary["num_reconfigurations"] == 1
    assert summary["standby_hit_rate"] == 0
    assert summary["corpus_digest"] is None
    assert summary["versions"].keys() >= {"python", "jax", "jaxlib", "flax", "optax"}
    assert open_run(tmp_path / "run", resume=True).config == CONFIG


@pytest.mark.parametrize(
    ("ready", "rate", "shown"),
    [([], None, None), ([True, False, True, True], 0.75, "75%")],
)
def test_the_summary_says_how_often_standby_was_right(ready, rate, shown):
    records = [{"event": "reconfigure", **CHANGE, "was_ready": r} for r in ready]
    summary = summarize(
        records, steps=0, eval_loss=None, state_digest="aa", corpus_digest=None
    )
    assert summary["standby_hit_rate"] == rate
    assert summary_rows(summary).get("of these prepared") == shown


def test_versions_are_known_without_an_installation(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    found = versions()
    assert re.fullmatch(r"\d+\.\d+\.\d+", found["shardkit"])
    assert found["shardkit"] == shardkit.__version__
    assert found["python"] == platform.python_version()
    assert found["jax"] is None


def test_packaging_reads_the_version_from_the_code():
    root = Path(__file__).parents[1]
    pyproject = tomllib.loads((root / "pyproject.toml").read_text())
    assert "version" not in pyproject["project"]
    assert pyproject["project"]["dynamic"] == ["version"]
    path = root / pyproject["tool"]["hatch"]["version"]["path"]
    assert runpy.run_path(str(path))["__version__"] == shardkit.__version__


@pytest.mark.parametrize(
    ("change", "identical", "words"),
    [
        ({}, True, "all 20 identical"),
        ({"bits": "40200001"}, False, "20 of 20 DIFFER, the first at step 0"),
        ({"state_digest": "bb"}, False, "DIFFERS"),
        ({"eval_loss": 2.250001}, False, "DIFFERS"),
    ],
)
def test_twins_are_compared(tmp_path, terminal, change, identical, words):
    run, twin = open_run(tmp_path / "run"), open_run(tmp_path / "twin")
    train(run, terminal, 20)
    train(twin, terminal, 20, **change)
    found = compare_runs(run, twin)
    assert found.identical is identical
    assert any(words in row for row in found.rows().values())


def test_a_missing_step_is_a_difference(tmp_path, terminal):
    run, twin = open_run(tmp_path / "run"), open_run(tmp_path / "twin")
    train(run, terminal, 20)
    train(twin, terminal, 20, first=1)
    assert compare_runs(run, twin).differing_steps == [0]


def test_extras_come_with_a_run(tmp_path, terminal, out):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboardX")
    directory = open_run(tmp_path / "run")
    log = EventLog()
    with Report(directory, terminal) as report:
        log.subscribe(report.event)
        report.begin(0)
        report.step(Metrics(0))
        log.emit("eval", step=1, loss=2.0)
        emit_change(log, first_step_s=0.5)
        report.draw()
        assert report.picture_row() == {
            "report": str(directory.report),
            "picture": str(directory.picture),
            "changes": str(directory.timeline),
        }
    assert directory.picture.exists()
    assert directory.timeline.exists()
    assert "need" not in out.getvalue()
    found = scalars(next(directory.tensorboard.iterdir()))
    assert found["train/grad_norm"] == (0, 1.0)
    assert found["eval/loss"] == (1, 2.0)
    changes = {k: v for k, v in found.items() if k.startswith("reconfigure/")}
    assert changes == {
        "reconfigure/plan_ms": (5, pytest.approx(10)),
        "reconfigure/move_ms": (5, pytest.approx(240)),
        "reconfigure/total_ms": (5, pytest.approx(750, abs=100)),
        "reconfigure/bytes_moved": (5, 3 * 2**20),
        "reconfigure/was_ready": (5, 0.0),
        "reconfigure/first_step_ms": (5, pytest.approx(500, abs=100)),
    }


def test_without_extras_there_is_one_notice(tmp_path, terminal, out, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    directory = open_run(tmp_path / "run")
    with Report(directory, terminal) as report:
        report.begin(0)
        report.step(Metrics(0))
        report.draw()
    assert out.getvalue().count("these need tensorboardX and matplotlib") == 1
    assert not directory.picture.exists()
    assert not directory.tensorboard.exists()


def test_a_picture_that_fails_does_not_fail_the_run(tmp_path, terminal, out):
    pytest.importorskip("matplotlib")
    directory = open_run(tmp_path / "run")
    directory.prepare()
    directory.picture.mkdir()
    Report(directory, terminal).draw()
    assert "no picture:" in out.getvalue()
