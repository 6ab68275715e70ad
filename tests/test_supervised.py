"""What a process of a supervised run knows, what it says, and in which order."""

import dataclasses
import os

import pytest
from clusters import ASSIGNMENT

from shardkit import supervised
from shardkit.cluster.deadlines import ENVIRONMENT, Deadlines
from shardkit.errors import ConfigError


@pytest.fixture
def part(monkeypatch, tmp_path):
    def make(index=0, **deadlines):
        values = {
            "SHARDKIT_RUN": "ab",
            "SHARDKIT_DIRECTORY": str(tmp_path),
            ENVIRONMENT: Deadlines(**deadlines).spell(),
        }
        for name, value in values.items():
            monkeypatch.setitem(os.environ, name, value)
        return supervised.Part(dataclasses.replace(ASSIGNMENT, process_index=index))

    return make


def test_processes_meet_for_as_long_as_the_run_was_told(part, monkeypatch):
    seen = []
    monkeypatch.setattr(
        supervised, "start_jax", lambda _, *, timeout_s: seen.append(timeout_s)
    )
    for deadlines in ({}, {"meet_s": 11, "form_s": 33}):
        part(**deadlines).start_jax()
    assert seen == [Deadlines().meet_s, 11]


def test_a_directory_that_nobody_names_is_waited_for_as_long(part, tmp_path):
    with pytest.raises(ConfigError, match=r"did not say for 0\.05 s \(meet_s\)"):
        part(1, meet_s=0.05).directory(None, "tiny")
    (tmp_path / "out").write_text("/somewhere")
    assert str(part(1).directory(None, "tiny")) == "/somewhere"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ('{"meet_s": 90}', "meet_s = 90 must be below half of start_s = 180.0"),
        ('{"silense_s": 1}', "silense_s unknown"),
    ],
)
def test_deadlines_that_cannot_be_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        Deadlines.of_environment({ENVIRONMENT: text})


def test_only_what_differs_is_spelled():
    assert Deadlines().spell() == "{}"
    assert Deadlines(form_s=50).spell() == '{"form_s": 50}'
    assert Deadlines.of_environment({}) == Deadlines()


class Ended(Exception):
    """The process would have ended here."""


class Line:
    """A member that notes what it is asked for."""

    deadlines = Deadlines(halt_s=50)

    def __init__(self, redundancy, in_time):
        self.assignment = dataclasses.replace(ASSIGNMENT, redundancy=redundancy)
        self.said, self._in_time = [], in_time

    def wait_protected(self, step, timeout_s):
        self.said.append(("wait", step, timeout_s))
        return self._in_time

    def halted(self, step):
        self.said.append(("halted", step))

    def disturb(self, kind):
        raise AssertionError(kind)


@pytest.mark.parametrize("in_time", [True, False])
@pytest.mark.parametrize("redundancy", ["none", "mirror", "parity:2"])
def test_a_halt_is_told_when_the_last_snapshot_is_protected(
    monkeypatch, redundancy, in_time
):
    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(supervised, "leave", leave)
    monkeypatch.setenv("SHARDKIT_RUN", "run")
    line = Line(redundancy, in_time)
    with pytest.raises(Ended, match="0"):
        supervised.Supervision(line).halt(7)
    waited = [] if redundancy == "none" else [("wait", 7, 25)]
    assert line.said == [*waited, ("halted", 7)]
