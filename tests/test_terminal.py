import io
import re
from pathlib import Path

import pytest
from reported import BEFORE, CHANGE, Metrics, open_run, train
from rich.console import Console

from shardkit.events import EventLog
from shardkit.report import Report, Terminal, summarize


def test_plain_lines_tell_of_every_tenth_and_every_change(tmp_path, terminal, out):
    train(open_run(tmp_path / "run"), terminal, 20)
    lines = out.getvalue().splitlines()
    progress = [line for line in lines if "tokens/s" in line]
    assert len(progress) == 10
    assert progress[-1] == "20/20  loss 2.5000  12,288 tokens/s  data=2 fsdp=4"
    assert (
        "step 5: 8 -> 3 devices (data=2 fsdp=4 -> fsdp=3), 3 MiB moved, 250 ms "
        "(move 240 ms), certified" in lines
    )


def test_a_terminal_shows_a_bar_a_line_and_a_table(tmp_path, out):
    console = Console(file=out, force_terminal=True, width=120, _environ={})
    train(open_run(tmp_path / "run"), Terminal(console), 20)
    shown = out.getvalue()
    for word in ("20/20", "loss 2.5000", "8 -> 3 devices", "state digest"):
        assert word in shown


@pytest.fixture
def bar(tmp_path, out):
    """A report with a bar, and what the bar shows now."""
    terminal = Terminal(Console(file=out, force_terminal=True, width=80, _environ={}))
    with Report(open_run(tmp_path / "run"), terminal, extras=False) as report:
        report.begin(0)
        log = EventLog()
        log.subscribe(report.event)

        def now():
            console = Console(file=io.StringIO(), width=80)
            console.print(terminal._progress)
            return console.file.getvalue()

        yield report, log, now


def test_a_bar_says_that_devices_change(bar):
    report, log, now = bar
    for step in range(5):
        report.step(Metrics(step))
    assert "12,288 tokens/s" in now()
    log.emit("reconfiguring", **BEFORE)
    assert " 5/20 8 -> 3 devices: compiling " in now()
    assert "fsdp" not in now()
    log.emit("reconfigure", **CHANGE)
    assert "compiling" not in now()
    assert "loss 2.5000  fsdp=3" in now()
    assert "tokens/s" not in now()


def test_a_change_that_waits_is_a_line_and_the_bar_goes_on(bar, out):
    report, log, now = bar
    report.step(Metrics(0))
    log.emit("announced", step=1, from_devices=8, to_devices=3)
    report.step(Metrics(1))
    assert "step 1: 8 -> 3 devices asked for" in out.getvalue()
    assert "2/20 loss 2.5000" in now()
    log.emit("announced", step=2, from_devices=8, to_devices=8)
    assert "step 2: 8 devices are to stay" in out.getvalue()


def test_a_change_of_devices_is_in_no_speed_and_in_no_time_remaining(bar):
    report, log, now = bar
    [task] = report.terminal._progress.tasks
    clock = [0.0]
    report.terminal._progress.get_time = task._get_time = lambda: clock[0]
    for step in range(20):
        if step == CHANGE["step"]:
            log.emit("reconfiguring", **BEFORE)
            clock[0] += 10
            log.emit("reconfigure", **CHANGE)
        first = step in (0, CHANGE["step"])
        times = {"step_s": None, "tokens_per_s": None} if first else {}
        clock[0] += 0.5
        report.step(Metrics(step, **times))
        assert task.speed in (None, pytest.approx(2.0))
    assert task.completed == 20
    assert task.speed is not None
    assert "12,288 tokens/s" in now()


def test_the_speed_is_that_of_some_steps_not_of_one(terminal, out):
    terminal.begin(0, 3, label="run", every=1)
    terminal.step(Metrics(0, step_s=None, tokens_per_s=None))
    terminal.step(Metrics(1, step_s=3.0, tokens_per_s=100.0))
    terminal.step(Metrics(2, step_s=0.0625, tokens_per_s=4800.0))
    lines = out.getvalue().splitlines()[1:]
    assert lines[0] == "1/3  loss 2.5000  data=2 fsdp=4"
    assert "  100 tokens/s" in lines[1]
    assert "  196 tokens/s" in lines[2]


def test_the_closing_table_fits_and_names_the_picture(tmp_path, out, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    directory = open_run(Path("run"))
    with Report(directory, Terminal(console)) as report:
        report.begin(0)
        summary = summarize(
            [], steps=0, eval_loss=None, state_digest="5" * 32, corpus_digest="c" * 64
        )
        report.finish(summary)
    assert directory.summary()["corpus_digest"] == "c" * 64
    rows = dict(re.findall(r"│ (\S.*?) +│ (\S+) +│", out.getvalue()))
    assert rows["state digest"] == "5" * 32
    assert rows["corpus digest"] == "c" * 16 + "…"
    assert rows["picture"] == "run/loss.png"
    assert Path(rows["picture"]).is_file()
