"""Changes with notice: who waits for what, and that no bit comes of it."""

import os
import signal
import threading
import time

import pytest
from problems import consume, fields_of, linear_data, mean_loss

import shardkit as sk
from shardkit.events import EventLog
from shardkit.membership import Change
from shardkit.overlap import Overlap
from shardkit.testing import run_digest

TIMEOUT_S = 60
NOTHING = Change()


class Slow:
    """Prepares when it is let, and notes what."""

    def __init__(self, *ready):
        self.seen, self.ready, self.bad = [], ready, ()
        self.error = RuntimeError
        self.may_end, self.begun = threading.Semaphore(0), threading.Semaphore(0)
        self.events = EventLog()
        self.announced = []
        self.events.subscribe(lambda event: self.announced.append(event.fields))
        self.overlap = Overlap(self.preparing, self.events)

    def preparing(self, num_devices):
        if num_devices in self.ready:
            return None
        return lambda: self.prepare(num_devices)

    def prepare(self, num_devices):
        self.seen.append(num_devices)
        self.begun.release()
        assert self.may_end.acquire(timeout=TIMEOUT_S)
        if num_devices in self.bad:
            raise self.error("no such placement")

    def next(self, change=NOTHING, **options):
        return self.overlap.next(change, step=3, num_devices=8, **options)

    def finish(self):
        self.may_end.release()
        assert self.overlap.wait(TIMEOUT_S)


@pytest.fixture
def slow():
    slow = Slow()
    yield slow
    slow.overlap.close()
    for _ in range(9):
        slow.may_end.release()


def asks(num_devices, grace_s=1e6, **options):
    return Change(num_devices, grace_s=grace_s, **options)


def test_a_change_is_made_when_it_is_ready_and_once(slow):
    assert slow.next(asks(6)) == NOTHING
    assert slow.overlap.num_asked == 6
    assert slow.next() == NOTHING
    slow.finish()
    assert slow.next() == asks(6)
    assert slow.overlap.num_asked is None
    assert slow.next() == NOTHING
    assert slow.announced == [{"step": 3, "from_devices": 8, "to_devices": 6}]


def test_a_change_is_made_when_its_grace_is_over(slow):
    change = asks(6, grace_s=0.2)
    assert slow.next(change) == NOTHING
    time.sleep(0.2)
    assert slow.next() == change
    assert slow.overlap.num_asked is None


@pytest.mark.parametrize(
    "change",
    [asks(6, grace_s=0), asks(6, lost=True), asks(5), asks(8), Change(leave=True)],
)
def test_some_do_not_wait(change):
    slow = Slow(5)
    assert slow.next(change) == change
    assert slow.seen == slow.announced == []


def test_where_no_step_can_be_done_nothing_waits(slow):
    assert slow.next(asks(6), can_wait=False) == asks(6)
    assert slow.next(asks(6)) == NOTHING
    assert slow.next(can_wait=False) == asks(6)


def test_a_newer_request_replaces_what_is_prepared_and_what_was_to_be(slow):
    assert slow.next(asks(6)) == NOTHING
    assert slow.begun.acquire(timeout=TIMEOUT_S)
    assert slow.next(asks(5)) == slow.next(asks(4)) == NOTHING
    slow.may_end.release()
    assert slow.begun.acquire(timeout=TIMEOUT_S)
    # That 6 is ready is of no use to anybody.
    assert slow.next() == NOTHING
    slow.finish()
    assert slow.next() == asks(4)
    assert slow.seen == [6, 4]
    assert [fields["to_devices"] for fields in slow.announced] == [6, 5, 4]


def test_a_newer_request_that_cannot_wait_replaces_one_that_could(slow):
    assert slow.next(asks(6)) == NOTHING
    assert slow.next(asks(4, lost=True)) == asks(4, lost=True)
    slow.finish()
    assert slow.next() == NOTHING


def test_the_same_again_is_the_same_with_its_own_grace(slow):
    assert slow.next(asks(6)) == slow.next(asks(6, grace_s=0.1)) == NOTHING
    time.sleep(0.1)
    assert slow.next().num_devices == 6
    assert slow.seen == [6]
    assert len(slow.announced) == 1


def test_a_request_is_taken_back(slow):
    assert slow.next(asks(6)) == NOTHING
    assert slow.next(asks(8)) == asks(8)
    slow.finish()
    assert slow.next() == NOTHING
    assert [fields["to_devices"] for fields in slow.announced] == [6, 8]


def test_begun_anew_it_waits_for_what_is_needed_now(slow):
    slow.overlap.begin_anew()
    assert slow.next(asks(6)) == NOTHING
    assert slow.begun.acquire(timeout=TIMEOUT_S)
    slow.overlap.begin_anew()
    slow.may_end.release()
    assert slow.begun.acquire(timeout=TIMEOUT_S)
    # What was begun first is there, and no longer what is needed.
    assert slow.next() == NOTHING
    slow.finish()
    assert slow.next() == asks(6)
    assert slow.seen == [6, 6]
    assert len(slow.announced) == 1


def test_begun_anew_it_waits_for_nothing_that_is_there(slow):
    assert slow.next(asks(6)) == NOTHING
    slow.ready = (6,)
    slow.overlap.begin_anew()
    assert slow.next() == asks(6)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_what_cannot_be_prepared_is_for_the_change_to_tell(slow, error):
    slow.bad, slow.error = (6,), error
    assert slow.next(asks(6)) == NOTHING
    slow.finish()
    assert slow.next() == asks(6)


class SlowCompile:
    """A loss that waits, where it is compiled beside the steps, until it may go on."""

    def __init__(self):
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self, *args):
        if threading.current_thread().name.startswith("shardkit-"):
            self.begun.set()
            assert self.may_end.wait(TIMEOUT_S)
        return mean_loss(*args)


@pytest.fixture
def loss():
    loss = SlowCompile()
    yield loss
    loss.may_end.set()


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def unhurried(step):
    """Data for steps that take long enough for something to happen meanwhile."""
    time.sleep(0.01)
    return linear_data(step)


def follow(trainer, membership, actions, until=lambda: True, most=6000):
    """Trains, doing things after some steps; ends 3 steps after `until` is true."""
    counts, end = {}, None
    for metrics in trainer.run(steps=most, membership=membership):
        counts[metrics.step] = metrics.num_devices
        actions.get(metrics.step, lambda: None)()
        if end is None and metrics.step > max(actions) and until():
            end = metrics.step + 3
        if metrics.step == end:
            break
    return counts


def is_still_exact(make, trainer):
    twin, _ = make(certify="off")
    return trainer.state_digest() == run_digest(twin, trainer.step)["state"]


@pytest.mark.parametrize(
    ("certify", "standby"),
    [
        ("off", 0),
        ("always", 2),
        pytest.param("off", 2, marks=pytest.mark.slow),
        pytest.param("always", 0, marks=pytest.mark.slow),
    ],
)
def test_the_run_goes_on_while_the_program_is_made(make, loss, standby, certify):
    trainer, events = make(loss=loss, data=unhurried, certify=certify, standby=standby)
    compiled_in = []

    def note(event):
        if event.name == "compile" and event.fields["program"] == "step":
            compiled_in.append(threading.current_thread().name.startswith("shardkit-"))

    trainer.events.subscribe(note)
    actions = {1: lambda: send(signal.SIGUSR1), 20: loss.may_end.set}
    counts = follow(
        trainer, sk.signals(), actions, lambda: fields_of(events, "reconfigure")
    )
    assert loss.begun.is_set()
    assert {counts[step] for step in range(20)} == {8}
    assert list(counts.values())[-1] == 7
    [asked] = fields_of(events, "announced")
    assert (asked["from_devices"], asked["to_devices"]) == (8, 7)
    [change] = fields_of(events, "reconfigure")
    assert change["was_ready"] is True
    assert change["certified"] is (True if certify == "always" else None)
    assert compiled_in[:2] == [False, True]
    assert compiled_in.count(False) == 1
    assert is_still_exact(make, trainer)


@pytest.mark.slow
def test_growing_with_notice_goes_on_too(make, loss, tmp_path):
    wish = tmp_path / "devices.json"
    trainer, events = make(loss=loss, data=unhurried, certify="off")
    consume(trainer, 2, {0: 4})
    actions = {
        3: lambda: wish.write_text('{"num_devices": 8, "grace_s": 50}'),
        9: loss.may_end.set,
    }
    counts = follow(
        trainer, sk.watch_file(wish), actions, lambda: fields_of(events, "reconfigure")
    )
    assert {counts[step] for step in range(2, 9)} == {4}
    assert list(counts.values())[-1] == 8
    assert is_still_exact(make, trainer)


def test_when_the_grace_is_over_the_run_waits(make, loss):
    trainer, events = make(loss=loss, data=unhurried, certify="off")
    for metrics in trainer.run(steps=400, membership=sk.signals(grace_s=0.2)):
        if metrics.step == 1:
            send(signal.SIGUSR1)
        if metrics.step == 2:
            # Only the wait of the change itself can be that long.
            assert loss.begun.wait(TIMEOUT_S)
            time.sleep(0.2)
            threading.Timer(0.5, loss.may_end.set).start()
        if fields_of(events, "reconfigure"):
            break
    [change] = fields_of(events, "reconfigure")
    assert change["was_ready"] is False
    assert trainer.compiles["step"] == 2
    assert is_still_exact(make, trainer)


def test_signals_add_up_while_a_program_is_made(make, loss):
    trainer, events = make(loss=loss, data=unhurried, certify="off")
    actions = {
        1: lambda: send(signal.SIGUSR1),
        4: lambda: send(signal.SIGUSR1, signal.SIGUSR1),
        7: lambda: send(signal.SIGUSR2),
        10: loss.may_end.set,
    }
    counts = follow(
        trainer, sk.signals(), actions, lambda: fields_of(events, "reconfigure")
    )
    asked = [fields["to_devices"] for fields in fields_of(events, "announced")]
    assert asked[0] == 7
    assert asked[-1] == 6
    assert list(counts.values())[-1] == 6
    assert len(fields_of(events, "reconfigure")) == 1
    assert is_still_exact(make, trainer)


def test_a_request_that_is_taken_back_moves_nothing(make, loss):
    trainer, events = make(loss=loss, certify="off", standby=1)
    actions = {
        1: lambda: send(signal.SIGUSR1),
        4: lambda: send(signal.SIGUSR2),
        7: loss.may_end.set,
    }
    counts = follow(trainer, sk.signals(), actions)
    assert set(counts.values()) == {8}
    assert fields_of(events, "reconfigure") == []
    assert fields_of(events, "announced")[-1]["to_devices"] == 8


def test_sigterm_leaves_at_once_while_a_program_is_made(make, loss, tmp_path):
    checkpoint = sk.CheckpointConfig(directory=tmp_path)
    trainer, events = make(loss=loss, certify="off", checkpoint=checkpoint)
    actions = {1: lambda: send(signal.SIGUSR1), 4: lambda: send(signal.SIGTERM)}
    with pytest.raises(sk.Preempted, match=r"step \d is saved"):
        follow(trainer, sk.signals(), actions)
    assert loss.begun.is_set()
    assert not loss.may_end.is_set()
    assert fields_of(events, "reconfigure") == []
    assert is_still_exact(make, trainer)


def test_lost_devices_do_not_wait_for_what_was_announced(make, loss, tmp_path):
    wish = tmp_path / "devices.json"
    trainer, events = make(loss=loss, data=unhurried, certify="off")
    actions = {
        1: lambda: wish.write_text('{"num_devices": 7}'),
        4: lambda: wish.write_text('{"num_devices": 4, "lost": true}'),
    }
    counts = follow(
        trainer, sk.watch_file(wish), actions, lambda: fields_of(events, "reconfigure")
    )
    assert not loss.may_end.is_set()
    assert set(counts.values()) == {8, 4}
    [change] = fields_of(events, "reconfigure")
    assert (change["step"], change["to_devices"]) == (6, 4)
    assert is_still_exact(make, trainer)


def test_a_request_outlives_the_run_in_which_it_came(make, loss):
    trainer, _ = make(loss=loss, data=unhurried, certify="off")
    membership = sk.signals()
    for metrics in trainer.run(steps=6, membership=membership):
        if metrics.step == 1:
            send(signal.SIGUSR1)
    assert trainer._controller.num_asked == 7
    loss.may_end.set()
    assert trainer._controller.foresight._overlap.wait(TIMEOUT_S)
    [metrics] = trainer.run(steps=7, membership=membership)
    assert metrics.num_devices == 7


def test_before_the_first_step_a_request_is_met_at_once(make):
    trainer, events = make()
    membership = sk.signals()
    stop = membership.start()
    send(signal.SIGUSR1, signal.SIGUSR1)
    stop()
    run = trainer.run(steps=1, membership=membership)
    assert [metrics.num_devices for metrics in run] == [6]
    assert fields_of(events, "announced") == []
    assert trainer.compiles["step"] == 1
