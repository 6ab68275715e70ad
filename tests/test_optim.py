import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardkit as sk
from models import gpt
from shardkit.build import build_trainer
from shardkit.config import OptimizerSection, from_dict
from shardkit.optim import build_optimizer, build_schedule
from shardkit.tree import named_leaves

NAMES = ["adamw", "lion", "sgd", "adafactor", "lamb", "lars"]
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


# Every kind of vector, in layers and outside: biases, norm scales and norm biases.
SMALL_GPT = {
    "vocab_size": 11,
    "num_layers": 2,
    "num_heads": 2,
    "embed_dim": 4,
    "mlp_dim": 6,
    "norm": "layer",
    "use_bias": True,
}


def decays_by_leaf(tx, params):
    """Path → whether weight decay reaches it; a layer's index is left out."""
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
    zeros = jax.tree.map(jnp.zeros_like, ones)
    updates, _ = tx.update(zeros, tx.init(ones), ones)
    decays = {}
    for path, update in named_leaves(updates):
        name = re.sub(r"layers/\d+/", "layers/", path).removesuffix("/value")
        assert decays.setdefault(name, bool(update.any())) == bool(update.any()), path
    return decays


def test_stacking_layers_changes_no_weight_decay():
    section = OptimizerSection(name="sgd", learning_rate=0.1, weight_decay=0.25)
    found = []
    for scan_layers in (False, True):
        model = gpt.build(**SMALL_GPT, scan_layers=scan_layers)
        params = jax.eval_shape(model.init, jax.random.key(0))
        found.append(decays_by_leaf(build_optimizer(section, params), params))
    assert found[0] == found[1]
    decayed = {path for path, decays in found[1].items() if decays}
    assert {
        "embedding",
        "layers/mlp/up/kernel",
        "layers/attention/out/kernel",
    } < decayed
    assert not [path for path in decayed if re.search(r"norm|mlp/\w+/bias", path)]


def test_leaves_without_logical_axes_go_by_their_dims():
    params = {
        "stacked": sk.axes(jnp.ones((3, 4)), "layers", "mlp"),
        "unnamed": sk.axes(jnp.ones((3, 4)), None, None),
        "bare": jnp.ones((3, 4)),
        "vector": jnp.ones(4),
    }
    section = OptimizerSection(name="sgd", learning_rate=0.1, weight_decay=0.25)
    bare = {name: jnp.ones((3, 4)) for name in params} | {"vector": jnp.ones(4)}
    expected = {"stacked": False, "unnamed": True, "bare": True, "vector": False}
    assert decays_by_leaf(build_optimizer(section, params), bare) == expected
    expected["stacked"] = True
    assert decays_by_leaf(build_optimizer(section), bare) == expected


def test_a_config_masks_by_the_axes_of_its_model(monkeypatch):
    monkeypatch.setattr("shardkit.trainer.Trainer", lambda **options: options)
    options = {**SMALL_GPT, "scan_layers": True}
    config = from_dict(
        {
            "model": {"factory": "models.gpt:build", "options": options},
            "data": {
                "factory": "models.mlp:digits",
                "global_batch_size": 8,
                "num_microbatches": 4,
            },
            "optimizer": {"name": "sgd", "learning_rate": 1.0, "weight_decay": 0.1},
            "train": {"steps": 1},
        }
    )
    made, _ = build_trainer(
        config, devices=jax.devices(), checkpoints=Path("unused"), events=None
    )
    params = jax.eval_shape(made["init"], jax.random.key(0))
    decays = decays_by_leaf(made["tx"], params)
    assert decays["layers/mlp/up/kernel"]
    assert not decays["layers/mlp/up/bias"]


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
