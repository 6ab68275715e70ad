import jax.numpy as jnp
import numpy as np
import pytest

from shardkit.config import OptimizerSection
from shardkit.optim import build_optimizer, build_schedule

NAMES = ["adamw", "lion", "sgd", "adafactor", "lamb"]
# Values of several sizes: lamb rescales, and would hide a decay that is even.
PARAMS = {
    "kernel": jnp.linspace(0.5, 1.5, 12).reshape(4, 3),
    "bias": jnp.linspace(0.5, 1.5, 3),
}


def first_update(gradient, **options):
    tx = build_optimizer(OptimizerSection(learning_rate=0.1, **options))
    grads = {name: jnp.full_like(leaf, gradient) for name, leaf in PARAMS.items()}
    return tx.update(grads, tx.init(PARAMS), PARAMS)[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_goes_downhill(name):
    for leaf in first_update(1.0, name=name, clip_norm=1.0).values():
        assert (np.asarray(leaf) < 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("mask", "bias_decays"), [("matrices", False), ("all", True)])
def test_weight_decay_follows_its_mask(name, mask, bias_decays):
    options = {"name": name, "decay_mask": mask}
    plain = first_update(0.5, **options)
    decayed = first_update(0.5, weight_decay=0.25, **options)
    moved = {key: bool((plain[key] != decayed[key]).any()) for key in PARAMS}
    assert moved == {"kernel": True, "bias": bias_decays}


def test_clipping_limits_the_global_norm():
    updates = first_update(100.0, name="sgd", clip_norm=1.0)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in updates.values()))
    assert norm == pytest.approx(0.1, rel=1e-5)


def test_momentum_carries_over():
    tx = build_optimizer(OptimizerSection(name="sgd", learning_rate=1.0, momentum=0.5))
    state = tx.init(jnp.zeros(1))
    seen = []
    for _ in range(3):
        update, state = tx.update(jnp.ones(1), state, jnp.zeros(1))
        seen.append(float(update[0]))
    assert seen == [-1.0, -1.5, -1.75]


@pytest.mark.parametrize(
    ("schedule", "middle"), [("constant", 1.0), ("linear", 0.6), ("cosine", 0.6)]
)
def test_schedules_rise_to_the_peak_and_end_at_the_horizon(schedule, middle):
    section = OptimizerSection(
        learning_rate=1.0,
        schedule=schedule,
        warmup_steps=4,
        horizon_steps=14,
        end_factor=0.2,
    )
    rate = build_schedule(section)
    found = [float(rate(step)) for step in (0, 2, 4, 9, 14, 99)]
    end = 1.0 if schedule == "constant" else 0.2
    assert found == pytest.approx([0.2, 0.6, 1.0, middle, end, end], rel=1e-5)
