import itertools
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.errors import DataError
from shardkit.prefetch import Prefetcher


def test_computes_each_coming_step_once_and_no_further_than_depth():
    calls, ran_ahead = [], threading.Event()

    def fn(step):
        calls.append(step)
        if step == 3:
            ran_ahead.set()
        return step * 10

    with Prefetcher(fn, depth=3) as prefetcher:
        assert not calls
        assert prefetcher.get(0) == 0
        assert ran_ahead.wait(10)
        time.sleep(0.05)
        assert calls == [0, 1, 2, 3]
        assert [prefetcher.get(step) for step in range(1, 20)] == [
            step * 10 for step in range(1, 20)
        ]
    assert calls == list(range(len(calls)))


def test_runs_in_one_background_thread():
    with Prefetcher(lambda step: threading.current_thread()) as prefetcher:
        threads = {prefetcher.get(step) for step in (0, 1, 2, 9)}
    (thread,) = threads
    assert thread is not threading.current_thread()
    assert thread.daemon
    assert not thread.is_alive()


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.integers(0, 6), max_size=15),
    depth=st.integers(1, 4),
    delay_ms=st.integers(0, 1),
)
def test_seeks(steps, depth, delay_ms):
    def fn(step):
        time.sleep(delay_ms / 1000)
        return step

    with Prefetcher(fn, depth=depth) as prefetcher:
        assert [prefetcher.get(step) for step in steps] == steps


def test_seek_discards_what_was_computed_ahead():
    step_one_is_stored = threading.Event()

    def fn(step):
        if step == 2:
            step_one_is_stored.set()
        return step

    with Prefetcher(fn, depth=2) as prefetcher:
        assert prefetcher.get(0) == 0
        assert step_one_is_stored.wait(10)
        assert [prefetcher.get(step) for step in (7, 8, 1)] == [7, 8, 1]


def test_seek_discards_the_step_under_way():
    release, started = threading.Event(), threading.Event()

    def fn(step):
        if step == 1:
            started.set()
            assert release.wait(10)
        return step

    with Prefetcher(fn) as prefetcher:
        assert prefetcher.get(0) == 0
        assert started.wait(10)
        threading.Timer(0.05, release.set).start()
        assert prefetcher.get(7) == 7
        assert prefetcher.get(8) == 8


def test_raises_at_the_step_that_failed_and_goes_on():
    attempts = itertools.count()

    def fn(step):
        if step == 2 and next(attempts) == 0:
            raise KeyError("step two")
        return step

    with Prefetcher(fn, depth=4) as prefetcher:
        assert [prefetcher.get(0), prefetcher.get(1)] == [0, 1]
        with pytest.raises(KeyError, match="step two"):
            prefetcher.get(2)
        assert prefetcher.get(3) == 3
        assert prefetcher.get(2) == 2


def test_hands_over_even_system_exit():
    def fn(step):
        raise SystemExit(4)

    with Prefetcher(fn) as prefetcher, pytest.raises(SystemExit):
        prefetcher.get(0, timeout_s=10)


def test_deadline_names_the_step_and_can_be_retried():
    release = threading.Event()

    def fn(step):
        assert release.wait(10)
        return step

    with Prefetcher(fn) as prefetcher:
        with pytest.raises(DataError, match=r"step 5 is missing: .* within 0\.05 s"):
            prefetcher.get(5, timeout_s=0.05)
        release.set()
        assert prefetcher.get(5) == 5


def test_close_is_idempotent_and_final():
    prefetcher = Prefetcher(lambda step: step)
    prefetcher.close()
    prefetcher = Prefetcher(lambda step: step)
    assert prefetcher.get(3) == 3
    prefetcher.close()
    prefetcher.close()
    with pytest.raises(DataError, match=r"step 4 .* closed"):
        prefetcher.get(4)


def test_close_frees_a_waiting_get():
    release = threading.Event()
    prefetcher = Prefetcher(lambda step: release.wait(10))
    timer = threading.Timer(0.05, prefetcher.close, kwargs={"timeout_s": 0})
    timer.start()
    with pytest.raises(DataError, match="closed"):
        prefetcher.get(0)
    release.set()
    timer.join()


def test_refuses_a_depth_of_zero():
    with pytest.raises(DataError, match="depth = 0"):
        Prefetcher(lambda step: step, depth=0)


def test_interpreter_ends_with_a_stuck_prefetch_and_without_jax():
    program = (
        "import sys, time\n"
        "from shardkit.prefetch import Prefetcher\n"
        "assert 'jax' not in sys.modules\n"
        "p = Prefetcher(lambda step: time.sleep(600 * step))\n"
        "p.get(0)\n"
        "print('end')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, "end\n"), result.stderr
