"""`trace.json`: whole at every moment, nested, and gone on with by the next process."""

import json
import threading
import time

import pytest
from problems import linear_data
from reported import Metrics, emit_change, open_run

import shardkit as sk
from shardkit.report import Report, trace
from shardkit.report.trace import TraceFile

NESTING_US = 2.0
"""What rounding to microseconds may do to two edges."""


def events_in(path, *kinds):
    """The events of a trace file, of some kinds or all, without the names of rows."""
    found = json.loads(path.read_text())["traceEvents"]
    events = [event for event in found if event["ph"] != "M"]
    return [event for event in events if not kinds or event["cat"] in kinds]


def rows_of(path):
    found = json.loads(path.read_text())["traceEvents"]
    return {e["args"]["name"]: e["tid"] for e in found if e["name"] == "thread_name"}


def assert_nested(events):
    """Asserts that spans of a row lie in one another or apart, as viewers want it."""
    for row in {e["tid"] for e in events}:
        spans = [e for e in events if e["tid"] == row and e["ph"] == "X"]
        open_us = []
        for span in sorted(spans, key=lambda e: (e["ts"], -e["dur"])):
            start, end = span["ts"], span["ts"] + span["dur"]
            assert 0 <= start <= end
            while open_us and open_us[-1] <= start + NESTING_US:
                open_us.pop()
            assert not open_us or end <= open_us[-1] + NESTING_US, span
            open_us.append(end)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.json"


@pytest.fixture
def open_trace(path):
    """Opens the trace as another process of the run would; closes all in the end."""
    opened = []

    def open_trace(**options):
        opened.append(TraceFile(path, label="run", **options))
        return opened[-1]

    yield open_trace
    for file in opened:
        file.close()


def subscribed(file):
    log = sk.EventLog()
    log.subscribe(file.event)
    return log


def test_a_change_has_its_phases_in_it(open_trace, path):
    file = open_trace()
    emit_change(subscribed(file), first_step_s=0.125)
    change, plan, move, first = events_in(path)
    assert (change["name"], change["cat"]) == ("8 -> 3 devices", "reconfigure")
    assert change["args"]["bytes_moved"] == 3 * 2**20
    assert (plan["name"], move["name"], first["name"]) == ("plan", "move", "first step")
    assert move["args"] == {"step": 5, "devices": 3, "bytes": 3 * 2**20}
    assert plan["ts"] == change["ts"]
    assert move["dur"] == pytest.approx(240_000)
    assert change["dur"] >= plan["dur"] + move["dur"] - NESTING_US


def test_it_is_whole_after_every_event(open_trace, path):
    file = open_trace()
    log = subscribed(file)
    for step in range(5):
        assert len(events_in(path)) == 4 * step
        file.step(Metrics(step, loss=float("nan")))
        file.mark("begin", step=step)
        log.emit("eval", since_s=time.monotonic() - 0.01, step=step, loss=2.0)
        log.emit("rewind", step=step, repeats=1)
        log.emit("notice", message="not traced")
    kinds = [event["cat"] for event in events_in(path)]
    assert kinds == ["step", "begin", "eval", "rewind"] * 5
    assert "loss" not in events_in(path, "step")[0]["args"]


def test_steps_do_not_overlap_and_unknown_times_are_moments(open_trace, path):
    file = open_trace()
    for step in range(4):
        file.step(Metrics(step, step_s=None if step == 0 else 10.0))
    first, *rest = events_in(path)
    assert (first["ph"], first["name"]) == ("i", "step 0")
    assert [e["ph"] for e in rest] == ["X"] * 3
    assert_nested(rest)


def test_background_threads_have_rows_of_their_own(open_trace, path):
    log = subscribed(open_trace())

    def compile(name):
        def work():
            with log.phase("compile", program="step", devices=3):
                time.sleep(0.01)

        thread = threading.Thread(target=work, name=name)
        thread.start()
        return thread

    threads = [compile(name) for name in ["shardkit-standby"] * 20 + [None] * 20]
    for thread in threads:
        thread.join()
    rows = rows_of(path)
    assert rows == {"run": 1, "standby": 2}
    found = [event["tid"] for event in events_in(path, "compile")]
    assert (found.count(1), found.count(2)) == (20, 20)


def test_the_next_process_goes_on_after_the_one_before(open_trace, path, monkeypatch):
    first = open_trace()
    emit_change(subscribed(first))
    threading.Thread(
        target=subscribed(first).emit, args=["x"], name="shardkit-a"
    ).start()
    first.close()
    before = events_in(path)
    # Another machine, whose clocks are behind and began at another time.
    now_s, unix_s = time.monotonic(), time.time()
    monkeypatch.setattr(trace.time, "monotonic", lambda: now_s - 5000.0)
    monkeypatch.setattr(trace.time, "time", lambda: unix_s - 1000.0)
    second = open_trace()
    assert events_in(path) == before
    second.mark("begin", step=3)
    *same, last = events_in(path)
    assert same == before
    assert last["ts"] >= max(e["ts"] + e.get("dur", 0) for e in before)
    assert rows_of(path) == {"run": 1, "a": 2}


@pytest.mark.parametrize("lost", [1, 4, 30, 300])
def test_what_was_torn_is_dropped(open_trace, path, lost):
    file = open_trace()
    for step in range(8):
        file.mark("begin", step=step)
    file.close()
    path.write_bytes(path.read_bytes()[:-lost] + b"\0\0")
    open_trace().mark("begin", step=8)
    steps = [event["args"]["step"] for event in events_in(path)]
    assert steps == [*range(len(steps) - 1), 8]
    assert len(steps) > 5


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}\n', "\0"])
def test_what_is_no_trace_is_written_anew(open_trace, path, text):
    path.write_text(text)
    open_trace().mark("begin", step=0)
    assert len(events_in(path)) == 1


def test_the_older_half_goes_when_there_are_too_many(open_trace, path):
    file = open_trace(max_events=10)
    for step in range(26):
        file.mark("begin", step=step)
        assert 5 <= len(events_in(path)) <= 10 or step < 5
    steps = [event["args"]["step"] for event in events_in(path)]
    assert steps == list(range(26 - len(steps), 26))
    assert rows_of(path) == {"run": 1}


def test_what_comes_after_the_end_is_not_written(open_trace, path):
    file = open_trace()
    file.close()
    before = path.read_bytes()
    file.mark("begin", step=0)
    assert path.read_bytes() == before


def test_the_trace_of_a_run_covers_it(make, tmp_path, terminal):
    checkpoint = sk.CheckpointConfig(directory=tmp_path / "saved", every=4)
    evaluation = sk.EvalConfig(data=linear_data, every=3)
    trainer, _ = make(checkpoint=checkpoint, eval=evaluation, standby=1)
    directory = open_run(tmp_path / "run")
    with Report(directory, terminal, extras=False) as report:
        trainer.events.subscribe(report.event)
        report.begin(0)
        script = sk.scripted({2: 4, 5: 8, 6: 4})
        for metrics in trainer.run(steps=7, membership=script):
            report.step(metrics)
        assert trainer.wait_for_standby(60)
    events = events_in(directory.trace)
    assert_nested(events)
    assert [e["args"]["step"] for e in events if e["cat"] == "step"] == list(range(7))
    assert [e["args"]["step"] for e in events if e["cat"] == "eval"] == [3, 6]
    assert [e["args"]["step"] for e in events if e["cat"] == "checkpoint"] == [4]
    changes = [e for e in events if e["cat"] == "reconfigure"]
    assert [e["name"] for e in changes] == [
        *("8 -> 4 devices", "4 -> 8 devices", "8 -> 4 devices")
    ]
    for change in changes:
        end = change["ts"] + change["dur"]
        phases = [
            e
            for e in events
            if e["cat"] == "phase" and change["ts"] <= e["ts"] + NESTING_US < end
        ]
        covered = sum(phase["dur"] for phase in phases)
        assert change["dur"] - 200_000 < covered <= change["dur"] + NESTING_US
    compiled = {e["name"] for e in events if e["cat"] == "compile"}
    assert compiled == {"compile init", "compile step", "compile evaluate"}
    # Two of three changes made no step themselves: their placements were known.
    firsts = [e["args"]["step"] for e in events if e["cat"] == "first_step"]
    assert firsts == [5, 6]
