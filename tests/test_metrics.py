import types

import pytest

from shardkit import metrics
from shardkit.errors import NonFiniteError
from shardkit.mesh import MeshSpec


class Scalar:
    """A scalar on a device, which takes time to be there."""

    def __init__(self, value, clock, end_s):
        self.value, self.clock, self.end_s = value, clock, end_s

    def __float__(self):
        self.clock.now_s = max(self.clock.now_s, self.end_s)
        return self.value


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now_s=1000.0)
    fake = types.SimpleNamespace(monotonic=lambda: clock.now_s)
    monkeypatch.setattr(metrics, "time", fake)
    return clock


@pytest.fixture
def push(devices, clock):
    """Dispatches a step that takes 2 seconds, and returns what comes out."""
    mesh = MeshSpec().build(devices[:1])
    placement = types.SimpleNamespace(num_devices=1, mesh=mesh)
    ends = [clock.now_s]

    def push(pending, step, *, waits, loss=1.0):
        ends.append(max(ends[-1], clock.now_s) + 2.0)
        if waits:
            clock.now_s = ends[-1]
        scalar = Scalar(loss, clock, ends[-1])
        values = {"loss": scalar, "grad_norm": scalar, "weight": 64.0}
        return list(pending.push(step, placement, values))

    return push


@pytest.mark.parametrize("waits", [False, True])
def test_a_step_lasts_from_end_to_end(push, clock, waits):
    """Whether or not a dispatch returns before the step is over."""
    pending = metrics.Pending(check_gradients=True)
    clock.now_s += 60  # compiling
    seen = [m for step in range(4) for m in push(pending, step, waits=waits)]
    assert [m.step for m in seen] == [0, 1, 2]
    seen += pending.flush()
    assert [m.step for m in seen] == [0, 1, 2, 3]
    assert [m.step_s for m in seen] == [None, 2.0, 2.0, None]
    assert [m.tokens_per_s for m in seen] == [None, 32.0, 32.0, None]


@pytest.mark.parametrize("waits", [False, True])
def test_what_lies_between_two_steps_is_not_a_steps_time(push, clock, waits):
    pending = metrics.Pending(check_gradients=True)
    seen = []
    for first in (0, 3):
        clock.now_s += 60  # a change of devices, an evaluation, a save
        for step in range(first, first + 3):
            seen += push(pending, step, waits=waits)
        seen += pending.flush()
        seen += pending.flush()
    assert [m.step for m in seen] == list(range(6))
    assert [m.step_s for m in seen] == [None, 2.0, None] * 2


def test_a_step_that_is_not_finite_is_not_yielded(push):
    pending = metrics.Pending(check_gradients=True)
    push(pending, 0, waits=True, loss=float("nan"))
    with pytest.raises(NonFiniteError, match="step 0: the loss is nan"):
        list(pending.flush())
