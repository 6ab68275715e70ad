"""What a process of a supervised run says, and in which order."""

import dataclasses

import pytest
from clusters import ASSIGNMENT

from shardkit import supervised
from shardkit.cluster.deadlines import Deadlines


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
