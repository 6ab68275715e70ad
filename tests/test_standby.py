"""Programs that are ready before the change that needs them."""

import logging
import threading

import pytest
from problems import consume, fields_of, linear_data, mean_loss

import shardkit as sk
from shardkit.standby import Standby, likely_counts
from shardkit.testing import run_digest

TIMEOUT_S = 60


class Slow:
    """Prepares when it is let, and notes what and where."""

    def __init__(self, *bad):
        self.seen, self.threads, self.bad = [], set(), bad
        self.may_go = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)

    def preparing(self, num_devices):
        return lambda: self.prepare(num_devices)

    def prepare(self, num_devices):
        self.seen.append(num_devices)
        self.threads.add(threading.current_thread().name)
        self.begun.release()
        assert self.may_go.acquire(timeout=TIMEOUT_S)
        if num_devices in self.bad:
            raise RuntimeError("no such placement")
        return 100


def test_the_likeliest_come_first_and_none_twice():
    assert likely_counts(8, 8) == [7, 6, 4]
    assert likely_counts(6, 8, scripted=[6, 3, 8, 3]) == [3, 8, 5, 4, 7]
    assert likely_counts(1, 8) == [8, 2]
    assert likely_counts(1, 1) == []
    assert likely_counts(2, 2, scripted=[9, 0]) == [1]
    assert likely_counts(8, 8, scripted=[3], configured=[5, 3, 8]) == [3, 5, 7, 6, 4]
    # One host fewer: of one host nothing would be left, of uneven ones either may go.
    assert likely_counts(8, 16, configured=[12]) == [12, 7, 6, 16, 9, 4]


def test_over_several_processes_only_what_is_known_is_prepared():
    work = Slow()
    standby = Standby(work, max_programs=8, configured=(4,))
    standby.look_ahead([0, 0, 1, 1, 2, 2], 6, scripted=[6, 5])
    for _ in range(3):
        assert work.begun.acquire(timeout=TIMEOUT_S)
        work.may_go.release()
    assert standby.wait(TIMEOUT_S)
    # The present one, too, since a change needs more of it than a step does.
    assert work.seen == [5, 6, 4]
    standby.close()
    idle = Standby(work, max_programs=8)
    idle.look_ahead([0, 0, 1, 1], 4, scripted=[4])
    assert idle.wait(TIMEOUT_S)
    assert len(work.seen) == 3
    idle.close()


def test_what_is_expected_is_prepared_once_and_elsewhere():
    placements = Slow()
    standby = Standby(placements)
    standby.expect([5, 3])
    assert placements.begun.acquire(timeout=TIMEOUT_S)
    standby.expect([5, 7])
    for _ in range(3):
        placements.may_go.release()
    assert standby.wait(TIMEOUT_S)
    assert placements.seen == [5, 7]
    assert placements.threads == {"shardkit-standby"}
    standby.expect([7, 3])
    assert standby.wait(TIMEOUT_S)
    assert placements.seen == [5, 7, 3]
    standby.close()


def test_what_fails_does_not_stop_the_rest():
    placements = Slow(5)
    standby = Standby(placements)
    standby.expect([5, 3])
    for _ in range(2):
        placements.may_go.release()
    assert standby.wait(TIMEOUT_S)
    assert placements.seen == [5, 3]


@pytest.mark.parametrize("limits", [{"max_programs": 2}, {"max_bytes": 150}])
def test_its_memory_is_bounded(limits):
    placements = Slow()
    standby = Standby(placements, **limits)
    standby.expect([5, 3, 4])
    for _ in range(3):
        placements.may_go.release()
    assert standby.wait(TIMEOUT_S)
    assert placements.seen == [5, 3]


def test_where_the_run_is_comes_second_and_is_not_counted():
    placements = Slow()
    standby = Standby(placements, max_programs=1)
    standby.expect([5, 3], present=8)
    for _ in range(2):
        placements.may_go.release()
    assert standby.wait(TIMEOUT_S)
    assert placements.seen == [5, 8]
    standby.expect([3], present=6)
    placements.may_go.release()
    assert standby.wait(TIMEOUT_S)
    assert placements.seen == [5, 8, 6]


def test_the_way_back_is_prepared_too_and_counts_as_no_program():
    placements = Slow()
    standby = Standby(placements, max_programs=1)
    for _ in range(9):
        placements.may_go.release()
    standby.expect([5, 3], present=8)
    assert standby.wait(TIMEOUT_S)
    standby.expect([8, 3], present=5)
    assert standby.wait(TIMEOUT_S)
    assert placements.seen == [5, 8, 8, 5]
    standby.expect([8], present=5)
    assert standby.wait(TIMEOUT_S)
    assert placements.seen == [5, 8, 8, 5]


def test_begun_anew_it_may_make_as_many_whatever_is_under_way():
    placements = Slow()
    standby = Standby(placements, max_programs=1)
    standby.expect([5, 3])
    assert placements.begun.acquire(timeout=TIMEOUT_S)
    standby.begin_anew()
    for _ in range(3):
        placements.may_go.release()
    assert standby.wait(TIMEOUT_S)
    standby.expect([5, 3])
    assert standby.wait(TIMEOUT_S)
    assert placements.seen == [5, 5]
    standby.close()


def test_configured_counts_are_prepared_before_guesses(make):
    trainer, _ = make(standby=2, standby_counts=[3], certify="off")
    for metrics in trainer.run(6, sk.scripted({9: 5})):
        if metrics.step == 4:
            assert trainer.wait_for_standby(TIMEOUT_S)
    known = trainer._controller.placements._known.values()
    ready = [placement.num_devices for placement in known if placement.is_compiled]
    assert ready == [8, 5, 3]


@pytest.mark.parametrize("counts", [[9], [4, 0], [2.0], [True]])
def test_counts_that_the_pool_has_not_are_refused(make, counts):
    with pytest.raises(sk.ConfigError, match=r"standby_counts: expected .* 1 to 8"):
        make(standby=1, standby_counts=counts)


def test_after_closing_nothing_is_begun():
    placements = Slow()
    standby = Standby(placements)
    standby.expect([5, 3])
    assert placements.begun.acquire(timeout=TIMEOUT_S)
    standby.close()
    standby.expect([2])
    placements.may_go.release()
    assert standby.wait(TIMEOUT_S)
    assert placements.seen == [5]


class Compiled(logging.Handler):
    """Notes what JAX compiles or loads outside of the standby thread."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.seen = []

    def emit(self, record):
        if (
            record.threadName != "shardkit-standby"
            and "XLA compilation of" in record.getMessage()
        ):
            self.seen.append(record.getMessage())


@pytest.fixture
def compiled():
    """All that is compiled, also what is no `Program`, from `clear` on."""
    handler, logger = Compiled(), logging.getLogger("jax._src.dispatch")
    before = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield handler.seen
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.mark.parametrize(
    "certify", ["always", pytest.param("off", marks=pytest.mark.slow)]
)
def test_a_change_to_a_waiting_program_compiles_nothing(make, certify, compiled):
    # Moves, first steps, digests and evaluations, of the average of the parameters.
    trainer, events = make(
        standby=8,
        certify=certify,
        ema=0.9,
        eval=sk.EvalConfig(data=linear_data, every=2),
    )
    script = {6: 5, 10: 8, 11: 3}
    seen = []

    for metrics in trainer.run(steps=14, membership=sk.scripted(script)):
        seen.append(metrics.step)
        if metrics.step == 4:
            assert trainer.wait_for_standby(TIMEOUT_S)
            # 8; scripted 5 and 3; 7, 6 and 4
            assert trainer.compiles["step"] == trainer.compiles["evaluate"] == 6
            assert compiled
            compiled.clear()
    assert seen == list(range(14))
    changes = fields_of(events, "reconfigure")
    assert [change["was_ready"] for change in changes] == [True, True, True]
    assert len(fields_of(events, "eval")) == 7
    assert not compiled
    twin, _ = make(ema=0.9)
    assert trainer.state_digest() == run_digest(twin, 14)["state"]


def test_without_it_nothing_is_compiled_ahead(make):
    trainer, events = make(certify="off")
    consume(trainer, 8, {4: 3})
    assert trainer.compiles["step"] == 2
    [change] = fields_of(events, "reconfigure")
    assert change["was_ready"] is False


def test_a_change_to_a_program_under_way_waits_for_that_one(make):
    entered, may_go = threading.Event(), threading.Event()

    def slow(*args):
        if threading.current_thread().name == "shardkit-standby":
            entered.set()
            assert may_go.wait(TIMEOUT_S)
        return mean_loss(*args)

    trainer, _ = make(loss=slow, standby=1, certify="off")
    for metrics in trainer.run(steps=8, membership=sk.scripted({5: 3})):
        if metrics.step == 2:
            assert entered.wait(TIMEOUT_S)
        if metrics.step == 3:
            threading.Timer(0.3, may_go.set).start()
    assert trainer.compiles["step"] == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"standby_counts": [3]}, "standby=0"),
        ({"standby": 1, "standby_counts": 6}, "such as"),
    ],
)
def test_counts_that_nobody_would_prepare_are_refused(make, options, said):
    with pytest.raises(sk.ConfigError, match=said):
        make(**options)
