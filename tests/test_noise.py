import jax
import numpy as np
import optax
import pytest
from problems import consume, linear, linear_data, weighted_loss

import shardkit as sk
from shardkit.noise import METRICS

GRID = 8


@pytest.fixture(scope="module")
def steps(compile_cache):
    """The metrics and the digest of a run on several devices, and of others."""

    def run(script, **options):
        problem = linear(loss=weighted_loss, tx=optax.sgd(0.1), certify="off")
        with sk.Trainer(**{**problem, **options}) as trainer:
            found = consume(trainer, 3, script)
            return [m.metrics for m in found], trainer.state_digest()

    return {
        "changing": run({0: 5, 1: 2}, noise_scale=True),
        "one": run({0: 2}, noise_scale=True),
        "off": run({0: 2}),
    }


def test_the_noise_has_the_same_bits_on_any_devices(steps):
    assert steps["changing"] == steps["one"]
    assert set(METRICS) <= steps["one"][0][0].keys()


def test_nobody_pays_who_did_not_ask(steps):
    metrics, digest = steps["off"]
    assert not set(METRICS) & metrics[0].keys()
    assert digest == steps["one"][1]
    for without, with_noise in zip(metrics, steps["one"][0], strict=True):
        assert without.items() <= with_noise.items()


def test_the_noise_is_that_of_numpy(steps):
    problem = linear(loss=weighted_loss)
    is_annotated = lambda x: hasattr(x, "names")  # noqa: E731
    made = problem["init"](sk.keys.stream(jax.random.key(0), "init"))
    params = jax.tree.map(lambda x: x.value, made, is_leaf=is_annotated)
    gradients, weights = [], []
    rows = {k: x.reshape(GRID, -1, *x.shape[1:]) for k, x in linear_data(0).items()}
    total = lambda p, b: weighted_loss(p, b, None).loss_sum  # noqa: E731
    for index in range(GRID):
        batch = {name: x[index] for name, x in rows.items()}
        leaves = jax.tree.leaves(jax.grad(total)(params, batch))
        gradients.append(np.concatenate([np.ravel(x) for x in leaves], dtype=float))
        weights.append(float(batch["counts"].sum()))
    counted = [i for i in range(GRID) if weights[i]]
    # A microbatch in which nothing counts has no gradient to compare.
    assert len(counted) < GRID
    whole = sum(gradients) / sum(weights)
    squares = sum(
        weights[i] * ((gradients[i] / weights[i] - whole) ** 2).sum() for i in counted
    )
    trace = squares / (len(counted) - 1)
    square = (whole**2).sum() - trace / sum(weights)
    found = steps["one"][0][0]
    assert found["noise_trace"] == pytest.approx(trace, rel=1e-4)
    assert found["grad_square"] == pytest.approx(square, rel=1e-4)
    assert found["noise_scale"] == pytest.approx(trace / square, rel=1e-3)


def test_one_microbatch_is_too_few():
    with pytest.raises(sk.ConfigError, match="at least 2 microbatches"):
        sk.Trainer(**linear(num_microbatches=1), noise_scale=True)


def test_the_names_are_taken():
    def loss(params, microbatch, key):
        out = weighted_loss(params, microbatch, key)
        return sk.LossOutput(out.loss_sum, out.weight, {"noise_trace": out.weight})

    with pytest.raises(sk.PartitionError, match="noise_trace"):
        sk.Trainer(**linear(loss=loss))
