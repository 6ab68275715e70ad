import numpy as np
import optax
import pytest
from problems import consume, linear, linear_data, weighted_loss

import shardkit as sk

ROWS = {name: x[:19] for name, x in linear_data(99).items() if name != "counts"}
SET = sk.FixedSet(ROWS, global_batch_size=8, weight="counts")


def make(**options):
    # At this rate a step changes nothing but the devices.
    fixed = {"loss": weighted_loss, "tx": optax.sgd(0.0), "certify": "off"}
    return sk.Trainer(**linear(**{**fixed, **options}))


def test_a_set_is_evaluated_to_the_same_bits_on_any_devices(compile_cache):
    other = sk.EvalConfig(data=linear_data, num_batches=2)
    found, others = [], []
    with make(eval=sk.EvalConfig(data=SET)) as trainer:
        for step, count in enumerate((8, 5, 2, 1)):
            consume(trainer, step + 1, {step: count})
            found.append(trainer.evaluate())
            if count in (5, 1):
                others.append(trainer.evaluate(other))
        params = trainer.state.params
    assert found[1:] == found[:1] * 3
    assert others[1:] == others[:1]
    out = weighted_loss(params, {**ROWS, "counts": np.ones(19, np.float32)}, None)
    loss = float(out.loss_sum / out.weight)
    np.testing.assert_allclose(found[0]["loss"], loss, rtol=1e-5)
    outs = [weighted_loss(params, linear_data(i), None) for i in range(2)]
    loss = sum(o.loss_sum for o in outs) / sum(o.weight for o in outs)
    np.testing.assert_allclose(others[0]["loss"], loss, rtol=1e-5)


def test_every_row_is_there_once():
    assert SET.num_batches == 3
    batches = [SET(index) for index in range(3)]
    assert {len(b["x"]) for b in batches} == {8}
    rows = np.concatenate([b["x"][b["counts"] > 0] for b in batches])
    np.testing.assert_array_equal(rows, ROWS["x"])
    full = sk.FixedSet({"x": ROWS["x"][:16]}, global_batch_size=8)
    assert full(1).keys() == {"x"}
    with pytest.raises(sk.DataError, match="from 0 to 2, found 3"):
        SET(3)


def test_a_set_that_cannot_be_is_refused():
    with pytest.raises(sk.DataError, match=r"'weight'.*weight=…"):
        sk.FixedSet({"weight": np.ones(3)}, global_batch_size=2)
    with pytest.raises(sk.DataError, match="global_batch_size of at least 1"):
        sk.FixedSet({"x": np.ones(3)}, global_batch_size=0)
    with pytest.raises(sk.DataError, match=r"that no ramp changes, found BatchRamp"):
        sk.FixedSet({"x": np.ones(3)}, global_batch_size=sk.BatchRamp({0: 2, 3: 4}))
    with pytest.raises(sk.ConfigError, match="the set has 3 batches, found 4"):
        sk.EvalConfig(data=SET, num_batches=4)


def test_a_loss_that_counts_what_only_fills_is_refused():
    def deaf(params, microbatch, key):
        return weighted_loss(params, {**microbatch, "counts": np.ones(1)}, key)

    with pytest.raises(sk.ConfigError, match=r"does not read microbatch\['counts'\]"):
        make(eval_loss=deaf, eval=sk.EvalConfig(data=SET))
    with make(eval_loss=deaf) as trainer:
        with pytest.raises(sk.ConfigError, match=r"19 rows .* 3 batches of 8"):
            trainer.evaluate(sk.EvalConfig(data=SET))
