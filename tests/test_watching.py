"""What a supervisor is told of a run: phases, steps and numbers that JSON has."""

import dataclasses

import pytest

from shardkit.cluster.watching import Watch
from shardkit.events import EventLog


@dataclasses.dataclass
class Metrics:
    step: int
    loss: float = 1.0


class Told:
    """Stands for a member, and keeps what it is told."""

    def __init__(self):
        self.said = []

    def progress(self, step, phase, **facts):
        self.said.append((step, phase, facts))

    def restored(self):
        self.said.append("restored")


def watched(steps):
    told, events = Told(), EventLog()
    watch = Watch(told)
    watch.steps = steps
    events.subscribe(watch.event, begins=watch.begin)
    return told, events, watch


def test_every_phase_has_its_window_and_steps_follow():
    told, events, watch = watched(9)
    with events.phase("restore", step=3):
        pass
    watch.step(Metrics(3), busy_s=0.1, work=2)
    with events.phase("eval", step=4):
        pass
    assert told.said == [
        (3, "restore", {}),
        "restored",
        (0, "step", {}),
        (4, "step", {"loss": 1.0, "busy_s": 0.1, "work": 2}),
        (4, "eval", {}),
        (4, "step", {}),
    ]


def test_what_is_done_after_the_last_step_is_no_step():
    told, events, watch = watched(2)
    watch.step(Metrics(0))
    watch.step(Metrics(1))
    with events.phase("eval", step=2):
        pass
    assert [phase for _, phase, _ in told.said] == ["step", "save", "eval", "save"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_is_not_told(loss):
    told, _, watch = watched(2)
    watch.step(Metrics(0, loss))
    assert told.said == [(1, "step", {})]
