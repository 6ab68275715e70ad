"""The batch as a function of the step: its size, its rows, its learning rate."""

import doctest
import math
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sources import SOURCES, to_bytes

import shardkit as sk
from shardkit.batch import checked_data
from shardkit.config import OptimizerSection, from_dict
from shardkit.optim import build_schedule

PROPERTY = settings(max_examples=20, deadline=None, derandomize=True)
RAMP = sk.BatchRamp({0: 2, 3: 5, 4: 1})


@st.composite
def ramps(draw, most=9):
    starts = draw(st.sets(st.integers(1, 12), max_size=4))
    return sk.BatchRamp({s: draw(st.integers(1, most)) for s in [0, *sorted(starts)]})


@PROPERTY
@given(ramps(), st.integers(0, 40), st.integers(1, 5))
def test_what_comes_before_is_the_sum_of_what_came(ramp, step, each):
    assert ramp.before(step) == sum(map(ramp, range(step)))
    assert ramp.rows(each).before(step) == each * ramp.before(step)
    following = [s for s in range(step + 1, 50) if ramp(s) != ramp(s - 1)]
    assert ramp.next_start(step) == (following[0] if following else None)
    assert ramp.counts == list(dict.fromkeys(map(ramp, range(50))))


@PROPERTY
@given(ramps())
def test_a_ramp_is_what_it_is_written_as(ramp):
    assert sk.BatchRamp(ramp.phases) == ramp
    assert hash(sk.BatchRamp(dict(ramp.phases))) == hash(ramp)
    assert eval(repr(ramp), {"BatchRamp": sk.BatchRamp}) == ramp
    if not ramp.is_constant:
        first, _, rest = str(ramp).partition(",")
        assert sk.BatchRamp.parse(rest, int(first[2:])) == ramp


def test_steps_too_many_for_an_array_have_rows_too():
    ramp = sk.BatchRamp({0: 3, 2**31 - 1: 2**40})
    assert ramp.before(2**40) == 3 * (2**31 - 1) + (2**40 - 2**31 + 1) * 2**40


@pytest.mark.parametrize(
    ("phases", "found"),
    [
        ({}, "begin at 0 and rise, found none"),
        ({1: 8}, "begin at 0 and rise, found 1"),
        ({0: 8, 9: 4, 5: 2}, "found 0, 9, 5"),
        ([(0, 8), (5, 4), (5, 2)], "found 0, 5, 5"),
        ({0: 0, 2.5: 8, 4: True}, r"at least 1, found 0: 0, 2\.5: 8, 4: True"),
        ({0: 8, 2**31: 4}, r"2³¹ - 1 .* found 2147483648: 4"),
        (8, r"sk\.BatchRamp\(\{0: 8, 1000: 16\}\), found 8"),
    ],
)
def test_a_ramp_that_is_none_is_refused(phases, found):
    with pytest.raises(sk.ConfigError, match=found):
        sk.BatchRamp(phases)


def test_before_step_0_there_is_nothing():
    with pytest.raises(sk.DataError, match="found step -1"):
        RAMP(-1)


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory):
    return SOURCES[request.param](tmp_path_factory.mktemp(request.param))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(ramp=ramps(), seed=st.none() | st.integers(0, 3), step=st.integers(0, 14))
def test_no_example_is_skipped_or_repeated_at_a_boundary(source, ramp, seed, step):
    batches = sk.Examples(source, global_batch_size=ramp, seed=seed)
    one = sk.Examples(source, global_batch_size=1, seed=seed)
    # As after a resume: no step before has been asked for.
    found = to_bytes(batches(step)) + to_bytes(batches(step + 1))
    places = range(ramp.before(step), ramp.before(step + 2))
    assert found == [row for place in places for row in to_bytes(one(place))]


@PROPERTY
@given(ramp=ramps(), step=st.integers(0, 14))
def test_arrays_text_and_mixtures_go_on_where_they_were(ramp, step):
    arrays = {"x": np.arange(11)}
    mixture = sk.Mixture([([{"x": i} for i in range(3)], 2), ([{"x": 9}] * 5, 1)])
    for make in (
        lambda size: sk.data.ArrayBatches(arrays, global_batch_size=size, seed=1),
        lambda size: sk.Examples(mixture, global_batch_size=size),
        lambda size: sk.data.TextBatches(
            sk.data.TextCorpus.open(__file__), sequence_length=9, global_batch_size=size
        ),
    ):
        places = range(ramp.before(step), ramp.before(step + 1))
        wanted = [row for place in places for row in to_bytes(make(1)(place))]
        assert to_bytes(make(ramp)(step)) == wanted


def batches_of(ramp):
    return lambda step: {"x": np.zeros((ramp(step), 2), np.float32)}


def test_every_batch_has_the_rows_of_its_step():
    like, rows, data = checked_data(batches_of(RAMP.rows(3)), RAMP)
    assert like["x"].shape == (6, 2)
    assert rows == RAMP.rows(3)
    assert [len(data(step)["x"]) for step in range(6)] == [6, 6, 6, 15, 3, 3]


def test_other_rows_are_an_error_that_names_the_step():
    _, _, data = checked_data(batches_of(sk.BatchRamp({0: 6})), RAMP)
    data(2)
    with pytest.raises(sk.DataError, match=r"data\(3\): expected 15 rows, 5 micro.* 6"):
        data(3)
    _, _, data = checked_data(
        lambda step: {"x": np.zeros(RAMP(step)), "y": np.zeros(2)}, RAMP
    )
    # Where leaves differ from one another, the wrong one is named.
    with pytest.raises(sk.DataError, match=r"y: expected float64\[5\], found .*\[2\]"):
        data(3)


@pytest.mark.parametrize(("rows", "ramp"), [(6, RAMP), (RAMP.rows(3), 2)])
def test_a_source_that_knows_its_rows_is_refused_before_the_run(rows, ramp):
    data = sk.data.ArrayBatches({"x": np.arange(9)}, global_batch_size=rows)
    with pytest.raises(sk.DataError, match=r"num_microbatches=ramp, .*ramp\.rows\(3\)"):
        checked_data(data, ramp if ramp is RAMP else sk.BatchRamp({0: 2}))


def test_the_rate_follows_the_batch():
    ramp = sk.BatchRamp({0: 3, 4: 6, 8: 5})
    schedule = jax.jit(optax.linear_schedule(0.3, 0.1, 10))
    for rule, power in (("linear", lambda k: k), ("sqrt", math.sqrt)):
        number = jax.jit(sk.scale_to_batch(0.3, ramp, rule))
        course = jax.jit(sk.scale_to_batch(schedule, ramp, rule))
        for step in range(12):
            factor = power(ramp(step) / 3)
            assert number(step).dtype == np.float32
            # One rounding in Python, and none of it on the device.
            assert number(step) == np.float32(0.3 * factor)
            wanted = np.float32(schedule(step)) * np.float32(factor)
            assert course(step) == wanted


def test_a_rule_that_does_not_exist_is_refused():
    with pytest.raises(sk.ConfigError, match="'linear', 'sqrt', found 'cubic'"):
        sk.scale_to_batch(0.1, RAMP, "cubic")
    with pytest.raises(sk.ConfigError, match=r"expected an sk\.BatchRamp, found 8"):
        sk.scale_to_batch(0.1, 8)


def config(**data):
    sizes = {"global_batch_size": 6, "num_microbatches": 2}
    return {
        "model": {"factory": "models.mlp:build"},
        "data": {"factory": "models.mlp:digits", **sizes, **data},
        "optimizer": {"learning_rate": 0.5, "scale_to_batch": "linear"},
        "train": {"steps": 3},
    }


def test_a_config_has_a_ramp_as_text():
    run = from_dict(config(batch_ramp="3:5, 4:1"))
    assert (run.data.ramp, run.data.rows) == (RAMP, RAMP.rows(3))
    rate = build_schedule(run.optimizer, run.data.ramp)
    assert [float(rate(step)) for step in (2, 3, 4)] == [0.5, 1.25, 0.25]
    warm = OptimizerSection(learning_rate=1.0, warmup_steps=3, scale_to_batch="linear")
    rate = build_schedule(warm, RAMP)
    assert [float(rate(step)) for step in (0, 3)] == [0.25, 2.5]


@pytest.mark.parametrize(
    ("ramp", "found"),
    [
        ("0:4", "steps above 0, such as 100:16,300:32, found '0:4'"),
        ("3:5,x", "found 'x' in '3:5,x'"),
        ("4:1,3:5", "rise, found 0, 4, 3"),
        ("3:0", "found 3: 0"),
        (None, "scale_to_batch is of no use without batch_ramp"),
    ],
)
def test_what_is_wrong_in_a_config_is_said(ramp, found):
    table = config() if ramp is None else config(batch_ramp=ramp)
    with pytest.raises(sk.ConfigError, match=found):
        from_dict(table)


def test_each_way_to_give_data_by_config_takes_a_ramp(tmp_path):
    from shardkit.build import build_batches

    (tmp_path / "a.txt").write_text("several words " * 90)
    for factory in ("text", "documents"):
        data = {"path": str(tmp_path / "a.txt"), "sequence_length": 8}
        data |= {"factory": factory, "batch_ramp": "3:5,4:1"}
        if factory == "documents":
            (tmp_path / "b.txt").write_text("and more of them " * 30)
            data["path"] = str(tmp_path / "*.txt")
        train, valid, _ = build_batches(from_dict(config(**data)))
        sizes = [len(train(step)["tokens"]) for step in range(5)]
        assert sizes == [6, 6, 6, 15, 3]
        # What is evaluated on stays as it is.
        assert len(valid(3)["tokens"]) == 6


def test_the_page_says_what_happens():
    page = Path(__file__).parents[1] / "docs" / "models.md"
    found = doctest.testfile(str(page), module_relative=False)
    assert found.attempted >= 5
    assert not found.failed
