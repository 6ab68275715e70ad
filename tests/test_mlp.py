import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardkit as sk
from models import mlp

BATCH = {
    "image": jnp.asarray(np.random.default_rng(0).random((6, 64)), jnp.float32),
    "label": jnp.arange(6, dtype=jnp.int32),
}
KEY = jax.random.key(1)


def is_annotated(x):
    return hasattr(x, "names")


def plain_params(model):
    annotated = jax.jit(model.init)(jax.random.key(0))
    return jax.tree.map(lambda x: x.value, annotated, is_leaf=is_annotated)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_every_dim_has_a_name_of_its_own(num_layers):
    model = mlp.build(hidden_dim=8, num_layers=num_layers)
    params = jax.eval_shape(model.init, jax.random.key(0))
    leaves = jax.tree.leaves(params, is_leaf=is_annotated)
    assert len(leaves) == 2 * (num_layers + 1)
    for leaf in leaves:
        assert len(set(leaf.names)) == leaf.value.ndim
    used = {name for leaf in leaves for name in leaf.names}
    assert set(model.axis_rules) <= used


def test_loss_is_a_sum_over_images():
    model = mlp.build(hidden_dim=8)
    params = plain_params(model)
    loss = jax.jit(lambda batch: model.loss(params, batch, None))
    output = loss(BATCH)
    cut = lambda rows: {name: array[rows] for name, array in BATCH.items()}  # noqa: E731
    parts = [loss(cut(slice(3))), loss(cut(slice(3, 6)))]
    assert output.weight == 6.0
    np.testing.assert_allclose(
        sum(p.loss_sum for p in parts), output.loss_sum, rtol=1e-5
    )
    assert output.metrics["accuracy"] == sum(p.metrics["accuracy"] for p in parts)


def test_masks_depend_on_the_key_and_only_in_training():
    model = mlp.build(hidden_dim=32, dropout=0.5)
    params = plain_params(model)
    sums = {}
    for name in ("loss", "eval_loss"):
        jit_loss = jax.jit(getattr(model, name))
        keys = (KEY, KEY, jax.random.key(2))
        sums[name] = [float(jit_loss(params, BATCH, k).loss_sum) for k in keys]
    first, again, other = sums["loss"]
    assert first == again != other
    assert len({*sums["eval_loss"]}) == 1


def test_the_gradient_contains_no_scatter():
    model = mlp.build(hidden_dim=8)
    gradient = jax.grad(lambda params: model.loss(params, BATCH, KEY).loss_sum)
    program = str(jax.make_jaxpr(gradient)(plain_params(model)))
    assert "dot_general" in program
    assert re.findall(r"\bscatter[\w-]*", program) == []


def test_it_learns_the_digits():
    pytest.importorskip("sklearn")
    model = mlp.build(hidden_dim=32, num_layers=1)
    train = mlp.digits(global_batch_size=64)

    @jax.jit
    def descend(params, batch, key):
        mean = lambda p: model.loss(p, batch, key).loss_sum / 64  # noqa: E731
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(mean)(params))

    params = plain_params(model)
    for step in range(100):
        params = descend(params, train(step), jax.random.fold_in(KEY, step))
    batch = mlp.digits(global_batch_size=359, split="validation")(0)
    output = model.eval_loss(params, batch, None)
    assert output.metrics["accuracy"] / output.weight > 0.9


def test_splits_share_no_image():
    pytest.importorskip("sklearn")
    splits = {"train": 1438, "validation": 359}
    images = {}
    for split, num_images in splits.items():
        batches = mlp.digits(global_batch_size=num_images, seed=5, split=split)
        batch = batches(0)
        assert batch["image"].dtype == np.float32
        assert batch["label"].dtype == np.int32
        assert batch["image"].min() == 0.0
        assert batch["image"].max() == 1.0
        images[split] = {row.tobytes() for row in batch["image"]}
        assert len(images[split]) == num_images
    assert not images["train"] & images["validation"]


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(sk.DataError, match="pip install scikit-learn"):
        mlp.digits(global_batch_size=8)


def test_an_unknown_split_is_refused():
    with pytest.raises(sk.DataError, match="found 'test'"):
        mlp.digits(global_batch_size=8, split="test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 0, "num_layers": "2"}, "hidden_dim: .*; num_layers: .*'2'"),
        ({"dropout": 1}, "dropout: .* found 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(sk.ConfigError, match=message):
        mlp.build(**options)
