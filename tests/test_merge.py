import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import Recorded, bits, random_array

from shardkit.checkpoint import merge
from shardkit.checkpoint.views import ArrayView, as_dtype, iter_boxes, whole_box
from shardkit.errors import ConfigError, RestoreError

# Half of the smallest float8_e4m3fn.
SMALLEST = 2.0**-10
properties = settings(max_examples=100, deadline=None, derandomize=True)


def checkpoint(number, dtype="float32"):
    generator = np.random.default_rng(number)
    arrays = {
        "params/w": generator.normal(size=(6, 4)).astype(as_dtype(dtype)),
        "params/ids": np.arange(3, dtype=np.int32) + number,
        "opt_state/0/mu/w": generator.normal(size=(6, 4)).astype(np.float32),
        "step": np.int32(number),
        "key": np.uint32([number, 7]),
    }
    return {path: ArrayView(array) for path, array in arrays.items()}


def read(view):
    return view.read(whole_box(view.shape))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_lawa_averages_parameters_and_takes_the_rest_from_the_newest(dtype):
    trees = [checkpoint(number, dtype) for number in range(4)]
    merged = merge.average(trees)
    assert list(merged) == list(trees[0])
    wide = [read(tree["params/w"]).astype(np.float64) for tree in trees]
    half_a_unit = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float8_e4m3fn": 2.0**-4}
    found = read(merged["params/w"]).astype(np.float64)
    error = np.abs(found - np.mean(wide, 0))
    assert (error <= half_a_unit[dtype] * np.abs(np.mean(wide, 0)) + SMALLEST).all()
    for path in set(trees[0]) - {"params/w"}:
        assert bits(read(merged[path])) == bits(read(trees[-1][path]))


@properties
@given(st.sampled_from(["float32", "bfloat16", "float64", "int32"]), st.integers(1, 5))
def test_the_average_of_equals_is_that(dtype, num):
    tree = {"params/w": ArrayView(random_array((5, 7), dtype))}
    merged = merge.average([tree] * num, list(range(1, num + 1)))
    assert bits(read(merged["params/w"])) == bits(read(tree["params/w"]))


def test_the_rest_may_have_to_be_equal():
    trees = [checkpoint(1), checkpoint(2)]
    merged = merge.average(trees, rest="equal")
    for path in ("step", "key", "params/ids", "opt_state/0/mu/w"):
        with pytest.raises(RestoreError, match="differ from copy 0"):
            read(merged[path])
    merged = merge.average(trees[:1] * 2, rest="equal")
    assert all(
        bits(read(merged[path])) == bits(read(trees[0][path])) for path in merged
    )


def test_averages_stream():
    recorded = [Recorded(np.ones((1000, 8), np.float32)) for _ in range(3)]
    merged = merge.average([{"params/w": view} for view in recorded])["params/w"]
    assert not any(view.boxes for view in recorded)
    boxes = list(iter_boxes(merged.shape, 4, 3200))
    for box in boxes:
        merged.read(box)
    assert all(view.boxes == boxes for view in recorded)


def test_checkpoints_that_differ_are_refused_with_all_leaves():
    old, new = checkpoint(0), checkpoint(1)
    old["params/w"] = ArrayView(np.zeros((6, 5), np.float32))
    del old["step"]
    old["params/extra"] = new["step"]
    with pytest.raises(RestoreError) as caught:
        merge.average([old, new])
    text = str(caught.value)
    assert "3 leaves" in text
    for part in ("float32[6, 5]", "float32[6, 4]", "step", "params/extra", "nothing"):
        assert part in text


@properties
@given(st.floats(0, 0.999), st.integers(1, 8))
def test_ema_weighs_as_the_recursion_does(decay, num):
    values = np.random.default_rng(0).normal(size=num)
    average = values[0]
    for value in values[1:]:
        average = decay * average + (1 - decay) * value
    weights = merge.ema_weights(decay, num)
    assert sum(weights) == pytest.approx(1)
    assert np.dot(weights, values) == pytest.approx(average, abs=1e-12)


def test_ema_merges_trees():
    trees = [{"params/w": ArrayView(np.float32([x]))} for x in (0, 4, 8)]
    assert read(merge.ema(trees, 0.5)["params/w"]).tolist() == [5.0]


@properties
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8).map(
        lambda rates: [1.0, *sorted(rates, reverse=True)]
    )
)
def test_schedule_weights_give_each_update_its_rate(rates):
    """Training at a constant rate, then merged, is training at those rates."""
    updates = np.random.default_rng(0).normal(size=len(rates))
    constant = np.cumsum(updates)
    decayed = np.cumsum(updates * rates)
    weights = merge.schedule_weights(rates)
    assert sum(weights) == pytest.approx(1)
    assert np.dot(weights, constant) == pytest.approx(decayed[-1], abs=1e-12)


@pytest.mark.parametrize("decay", ["linear", "cosine", "inverse_sqrt"])
def test_decays_have_their_shapes(decay):
    weights = merge.decay_weights(decay, 10)
    assert sum(weights) == pytest.approx(1)
    assert min(weights) > 0
    rates = np.cumsum(weights[::-1])[::-1]
    shape = {
        "linear": lambda t: 1 - t,
        "cosine": lambda t: (1 + np.cos(np.pi * t)) / 2,
        "inverse_sqrt": lambda t: 1 - np.sqrt(t),
    }[decay]
    np.testing.assert_allclose(rates, shape(np.arange(10) / 10))
    assert merge.decay_weights(decay, 1) == [1.0]


def test_better_metrics_weigh_more():
    losses = [3.0, 2.0, 2.5]
    for options in ({"temperature": 0.1}, {"power": 4}):
        low = merge.metric_weights(losses, **options)
        high = merge.metric_weights(losses, better="higher", **options)
        assert np.argsort(low).tolist() == [0, 2, 1]
        assert np.argsort(high).tolist() == [1, 2, 0]
        assert sum(low) == pytest.approx(1)
    expected = np.exp(-np.array(losses) / 0.1)
    np.testing.assert_allclose(
        merge.metric_weights(losses, temperature=0.1), expected / expected.sum()
    )
    # Far apart, without an overflow.
    assert merge.metric_weights([0.0, 1e6], temperature=1e-3) == [1.0, 0.0]
    trees = [{"params/w": ArrayView(np.float32([x]))} for x in (0, 3)]
    merged = merge.average_by_metric(trees, [1.0, 2.0], power=1)
    assert read(merged["params/w"]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: merge.average([]), "found none"),
        (lambda: merge.average([{}], [1, 2]), "a weight for each of 1 checkpoints"),
        (lambda: merge.average([{}], [0]), "not all 0"),
        (lambda: merge.average([{}], [float("nan")]), "not all 0"),
        (lambda: merge.average([{}, {}], [2, -1]), "not all 0"),
        (lambda: merge.average([{}], rest="oldest"), "'oldest'"),
        (
            lambda: merge.average([{"w/a": ArrayView(np.ones(2))}], params=["v"]),
            "nothing is under 'v'; expected some of w",
        ),
        (lambda: merge.ema_weights(1.0, 2), "a decay from 0"),
        (lambda: merge.decay_weights("square", 2), "linear, cosine, inverse_sqrt"),
        (lambda: merge.schedule_weights([1.0, 2.0]), "do not rise"),
        (lambda: merge.schedule_weights([1.0, float("nan")]), "do not rise"),
        (lambda: merge.schedule_weights([0.0]), "do not rise"),
        (lambda: merge.schedule_weights([1.0, -1.0]), "do not rise"),
        (lambda: merge.metric_weights([1.0]), "a temperature or a power"),
        (lambda: merge.metric_weights([1.0], power=-1), "a temperature or a power"),
        (lambda: merge.metric_weights([float("nan")], power=1), "finite metrics"),
        (lambda: merge.metric_weights([-1.0], power=1), "above 0"),
    ],
)
def test_what_is_no_merge_is_refused(call, says):
    with pytest.raises(ConfigError, match=says):
        call()
