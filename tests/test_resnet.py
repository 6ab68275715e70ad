import re

import jax
import numpy as np
import optax
import pytest

import shardkit as sk
from models import resnet

ROWS, GRID = 26, 13
KEY = jax.random.key(1)


def data(step):
    rng = np.random.default_rng(step)
    image = rng.random((ROWS, 64)).astype(np.float32)
    return {"image": image, "label": rng.integers(10, size=ROWS).astype(np.int32)}


def make():
    model = resnet.build(width=3, num_stages=2, momentum=0.5)
    return sk.Trainer(
        init=model.init,
        loss=model.loss,
        axis_rules=model.axis_rules,
        tx=optax.adamw(0.01),
        data=data,
        num_microbatches=GRID,
        certify="off",
    )


def plain(model):
    is_annotated = lambda x: hasattr(x, "names")  # noqa: E731
    made = jax.jit(model.init)(jax.random.key(0))
    made = jax.tree.map(lambda x: x.value, made, is_leaf=is_annotated)
    return made.params, made.state


FULL = {0: 8, 1: 5, 3: 2, 4: 8}


@pytest.mark.slow
def test_any_devices_leave_the_same_bits(compile_cache):
    def run(counts):
        with make() as trainer:
            losses = [m.loss for m in trainer.run(5, membership=sk.scripted(counts))]
            return losses, trainer.state_digest()

    assert run(FULL) == run({0: 1})


def convolved(x, kernel, stride):
    """A 3 × 3 convolution with zeros outside, pixel by pixel."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    size = x.shape[1] // stride
    y = np.zeros((len(x), size, size, kernel.shape[1]))
    for i in range(size):
        for j in range(size):
            top, left = i * stride, j * stride
            patch = padded[:, top : top + 3, left : left + 3]
            y[:, i, j] = patch.reshape(len(x), -1) @ kernel
    return y


def normalised(x, params, state, statistics=None):
    """Batch normalisation; `state` is told what it has seen, unless that is given."""
    if statistics is None:
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
        state["mean"] = 0.5 * np.asarray(state["mean"]) + 0.5 * mean
        state["variance"] = 0.5 * np.asarray(state["variance"]) + 0.5 * variance
    else:
        mean, variance = statistics["mean"], statistics["variance"]
    x = (x - mean) / np.sqrt(np.asarray(variance) + 1e-5)
    return x * np.asarray(params["scale"]) + np.asarray(params["bias"])


def logits(params, state, image, is_training):
    """The network in numpy, and the statistics after it."""
    state = jax.tree.map(lambda x: x, state)

    def unit(x, *path, stride=1, kernel_size=3):
        place, after = params, state
        for name in path:
            place, after = place[name], after[name]
        kernel = np.asarray(place["kernel"], np.float64)
        if kernel_size == 3:
            x = convolved(x, kernel, stride)
        else:
            x = x[:, ::stride, ::stride] @ kernel
        return normalised(x, place, after, None if is_training else after)

    def relu(x):
        return np.maximum(x, 0)

    x = relu(unit(np.asarray(image, np.float64).reshape(-1, 8, 8, 1), "stem"))
    for stage, stride in ((0, 1), (1, 2)):
        name = f"stage_{stage}_block_0"
        y = relu(unit(x, name, "first", stride=stride))
        y = unit(y, name, "second")
        if stage:
            x = unit(x, name, "shortcut", stride=stride, kernel_size=1)
        x = relu(x + y)
    x = x.mean((1, 2)) @ np.asarray(params["logits"]["kernel"])
    return x + np.asarray(params["logits"]["bias"]), state


@pytest.mark.parametrize(
    "is_training", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_outputs_and_statistics_are_those_of_numpy(is_training):
    model = resnet.build(width=3, num_stages=2, momentum=0.5)
    params, state = plain(model)
    rng = np.random.default_rng(0)
    noise = lambda x: x + rng.uniform(0, 0.3, x.shape).astype(np.float32)  # noqa: E731
    params, state = jax.tree.map(noise, (params, state))
    batch = jax.tree.map(lambda x: x[:4], data(0))
    expected, left = logits(params, state, batch["image"], is_training)
    losses = np.logaddexp.reduce(expected, 1) - expected[np.arange(4), batch["label"]]
    loss = jax.jit(model.loss if is_training else model.eval_loss)
    out = loss(params, state, batch, None)
    np.testing.assert_allclose(out.loss_sum, losses.sum(), rtol=1e-4)
    assert out.weight == 4
    for found, wanted in zip(
        jax.tree.leaves(out.state), jax.tree.leaves(left), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_row_of_weight_0_does_not_count():
    model = resnet.build(width=2, num_stages=1)
    params, state = plain(model)
    batch = jax.tree.map(lambda x: x[:4], data(0))
    eval_loss = jax.jit(model.eval_loss)
    expected = eval_loss(params, state, batch, None)
    filled = {name: np.concatenate([x, x[:2]]) for name, x in batch.items()}
    filled["weight"] = np.float32([1, 1, 1, 1, 0, 0])
    found = eval_loss(params, state, filled, None)
    np.testing.assert_allclose(found.loss_sum, expected.loss_sum, rtol=1e-6)
    assert (found.weight, found.metrics) == (expected.weight, expected.metrics)


@pytest.mark.slow
def test_the_gradient_contains_neither_scatter_nor_convolution():
    model = resnet.build(width=2, num_stages=2)
    params, state = plain(model)

    def mean_loss(params):
        return model.loss(params, state, data(0), KEY).loss_sum

    program = str(jax.make_jaxpr(jax.grad(mean_loss))(params))
    assert "dot_general" in program
    assert re.findall(r"\b(?:scatter|conv_general)[\w-]*", program) == []


def test_validation_has_every_image_once():
    pytest.importorskip("sklearn")
    rows = resnet.digits(global_batch_size=192, split="validation")
    batches = [rows(index) for index in range(rows.num_batches)]
    assert [int(batch["weight"].sum()) for batch in batches] == [192, 167]
    images = np.concatenate([b["image"][b["weight"] > 0] for b in batches])
    assert len({image.tobytes() for image in images}) == 359


def test_bad_options_are_named():
    with pytest.raises(sk.ConfigError, match=r"num_stages: .* 5; momentum: .* 1"):
        resnet.build(num_stages=5, momentum=1)
