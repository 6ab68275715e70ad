"""Who is slow, from noisy measurements, and what is worth a change."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.cluster.settings import Limits
from shardkit.cluster.stragglers import Speeds, decide, share, step_time

LIMITS = Limits()
SAMPLE_S = 0.02


def measure(*draws, num=LIMITS.straggler_steps, work=8):
    """What was measured of some processes; each draw is seconds per microbatch."""
    speeds = Speeds(LIMITS, len(draws))
    for process, draw in enumerate(draws):
        for step in range(num):
            speeds.add(process, step, draw(step) * work, work)
    return speeds


def judge(speeds, **facts):
    return decide(
        speeds.speeds(), speeds.work(), LIMITS, halves=speeds.halves(), **facts
    )


def steady(_):
    return SAMPLE_S


def sliced(seed, sample_s=SAMPLE_S, on_s=0.02, off_s=0.02):
    """A process that is stopped for `off_s` after every `on_s`."""
    rng = random.Random(seed)

    def draw(_):
        at_s, left_s, spent_s = rng.uniform(0, on_s), sample_s, 0.0
        while at_s + left_s > on_s:
            left_s -= on_s - at_s
            spent_s += on_s - at_s + off_s
            at_s = 0.0
        return spent_s + left_s

    return draw


def noisy(seed, spread):
    rng = random.Random(seed)
    return lambda _: SAMPLE_S * rng.lognormvariate(0, spread)


def test_nobody_is_judged_by_few_measurements():
    few = measure(steady, steady, num=LIMITS.straggler_steps - 1)
    assert few.speeds() == {}
    assert few.halves() == [{}, {}]
    assert judge(few) is None


def test_one_measurement_told_many_times_counts_once():
    speeds = Speeds(LIMITS, 2)
    for process in (0, 1) * 100:
        speeds.add(process, 7, 1.0, 8)
    assert speeds.speeds() == {}


def test_only_what_all_have_measured_before_the_same_steps_is_compared():
    speeds = Speeds(LIMITS, 2)
    for step in range(100 * LIMITS.straggler_steps):
        speeds.add(0, step, 1.0, 8)
        # The machine has other things to do where one of them does not measure.
        speeds.add(1, step, 1.0 if step % 2 == 0 else 9.0, 8 if step % 2 == 0 else 0)
    assert speeds.speeds() == {0: 8.0, 1: 8.0}


@pytest.mark.parametrize("seed", range(30))
def test_who_is_stopped_every_other_instant_is_found(seed):
    speeds = measure(steady, sliced(seed), steady)
    found = speeds.speeds()
    # Half the speed, of which the slowest of each half, left out, hide a part.
    assert 0.35 < found[1] / found[0] < 0.85


def test_most_who_are_stopped_every_other_instant_get_less_at_once():
    found = [judge(measure(steady, sliced(seed), steady)) for seed in range(100)]
    gets_less = [x is not None and x.quotas[1] < 8 for x in found]
    assert sum(gets_less) > 75


@pytest.mark.parametrize("late_s", [0.05, 5.0])
@pytest.mark.parametrize("where", [0, 3, LIMITS.straggler_steps - 1])
def test_one_outlier_tells_nothing(where, late_s):
    speeds = measure(steady, lambda step: late_s if step == where else SAMPLE_S, steady)
    found = speeds.speeds()
    assert found[1] == pytest.approx(found[0])
    assert judge(speeds) is None


def test_what_does_not_last_changes_nothing():
    half = LIMITS.straggler_steps // 2
    for is_slow in (lambda step: step < half, lambda step: step >= half):
        speeds = measure(
            steady,
            lambda step, is_slow=is_slow: 4 * SAMPLE_S if is_slow(step) else SAMPLE_S,
        )
        assert decide(speeds.speeds(), speeds.work(), LIMITS) is not None
        assert judge(speeds) is None


def test_noise_alone_is_hardly_ever_a_reason():
    found = [
        judge(measure(*(noisy(f"{seed} {process}", 0.3) for process in range(3))))
        for seed in range(300)
    ]
    assert sum(x is not None for x in found) == 0


def test_who_is_quick_again_gets_back_what_it_had():
    speeds = Speeds(LIMITS, 3)
    for process, work in enumerate((10, 4, 10)):
        for step in range(LIMITS.straggler_steps):
            speeds.add(process, step, SAMPLE_S * work, work)
    found = judge(speeds)
    assert found.quotas == (8, 8, 8)
    assert (
        found.why
        == "no process is slow any more: microbatches 10, 4, 10 become " + ("8, 8, 8")
    )


def test_devices_do_whole_microbatches():
    # A tenth less for a process of three devices would change no step's length.
    speeds, work = {0: 3.0, 1: 3.0, 2: 2.7}, {0: 9, 1: 9, 2: 9}
    devices = dict.fromkeys(work, 3)
    assert step_time({2: 9}, speeds, devices) == step_time({2: 7}, speeds, devices)
    assert decide(speeds, work, Limits(straggler_gain=0.05), devices=devices) is None


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 4)), min_size=1, max_size=3),
    st.data(),
)
def test_no_other_sharing_is_done_earlier(total, found, data):
    total = max(total, len(found))
    speeds, devices = zip(*found, strict=True)
    quotas = share(total, speeds, devices)
    assert sum(quotas) == total
    others = [1] * len(found)
    for _ in range(total - len(found)):
        others[data.draw(st.integers(0, len(found) - 1))] += 1

    def end_s(quotas):
        given = (dict(enumerate(x)) for x in (quotas, speeds, devices))
        return step_time(*given)

    assert end_s(quotas) <= end_s(others) * (1 + 1e-9)
