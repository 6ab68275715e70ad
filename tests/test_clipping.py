import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import consume, linear, linear_data

import shardkit as sk
from shardkit.config import OptimizerSection
from shardkit.optim import build_optimizer

NORMS = [1.0, 1.2, 0.9, 1.1, 30.0, 1.0, 1.05, 9.0]


def expected(norms, z_score, decay, warmup_steps):
    """The paper's algorithm, on a list of norms."""
    clipped, mean, variance = [], 0.0, 0.0
    for step, norm in enumerate(norms):
        if step < warmup_steps:
            seen = norms[: step + 1]
            mean, variance = np.mean(seen), np.var(seen)
            clipped.append(norm)
            continue
        deviation = np.sqrt(variance) + 1e-6
        z = (norm - mean) / deviation
        if z > z_score:
            norm = mean + z_score**2 / z * deviation
        mean = decay * mean + (1 - decay) * norm
        variance = decay * variance + (1 - decay) * (norm - mean) ** 2
        clipped.append(norm)
    return clipped


def test_norms_are_clipped_as_published():
    tx = sk.clip_spikes(2.0, decay=0.8, warmup_steps=3)
    gradient = {"w": np.float32([0.6, 0.0]), "b": np.float32([[0.8]])}
    state, found = tx.init(gradient), []
    update = jax.jit(tx.update)
    for norm in NORMS:
        scaled = {name: x * np.float32(norm) for name, x in gradient.items()}
        updates, state = update(scaled, state)
        found.append(float(optax.tree.norm(updates)))
        assert float(updates["b"][0, 0] / updates["w"][0]) == pytest.approx(4 / 3)
    np.testing.assert_allclose(found, expected(NORMS, 2.0, 0.8, 3), rtol=1e-4)
    assert found[4] < 2 < NORMS[4]
    assert int(state.count) == len(NORMS)


def test_what_is_not_finite_is_not_remembered():
    tx = sk.clip_spikes()
    _, state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    _, after = tx.update(jnp.array([1.0, jnp.nan, 1.0]), state)
    assert after == state


@pytest.mark.parametrize(
    "options", [{"z_score": 0}, {"decay": 1.0}, {"warmup_steps": 1}]
)
def test_unusable_values_are_refused(options):
    with pytest.raises(sk.ConfigError, match="clip_spikes: expected"):
        sk.clip_spikes(**options)


def spiking_data(step):
    """Errors that are large at step 4."""
    batch = linear_data(step)
    return batch | {"y": batch["y"] * (20 if step == 4 else 1)}


@pytest.mark.slow
def test_clipped_lars_keeps_its_bits(compile_cache):
    section = OptimizerSection(
        name="lars",
        learning_rate=0.1,
        weight_decay=0.1,
        clip_z=2.5,
        clip_z_warmup_steps=3,
        clip_norm=99.0,
    )

    def run(script):
        problem = linear(data=spiking_data, certify="off")
        problem["tx"] = build_optimizer(section)
        with sk.Trainer(**problem) as trainer:
            norms = [m.metrics["grad_norm"] for m in consume(trainer, 6, script)]
            return norms, trainer.state_digest(), trainer.state.opt_state[0]

    norms, digest, state = run({0: 5, 2: 2})
    other_norms, other_digest, _ = run({0: 2})
    assert (norms, digest) == (other_norms, other_digest)
    seen = expected(norms, 2.5, 0.97, 3)
    assert seen[4] < norms[4] / 2
    assert int(state.count) == 6
    mean = expected_mean(seen, 3)
    assert float(state.mean) == pytest.approx(mean, rel=1e-4)


def expected_mean(clipped, warmup_steps):
    mean = np.mean(clipped[:warmup_steps])
    for norm in clipped[warmup_steps:]:
        mean = 0.97 * mean + 0.03 * norm
    return mean
