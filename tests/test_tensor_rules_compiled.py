"""Rules that were found, beside what XLA makes of them on emulated devices."""

import importlib
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tensor_models import BATCH, CASES, case
from tensor_placed import Placed, assert_alike, collectives, predicted

import shardkit as sk
from models import gpt, mlp, moe, vit
from shardkit.planner.tensor_rules import find_tensor_rules

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(
    path.stem for path in EXAMPLES.glob("*.py") if "def main(" in path.read_text()
)
RNG = np.random.default_rng(0)
TOKENS = {"tokens": RNG.integers(64, size=(2, 17)).astype(np.int32)}
IMAGES = {
    "image": RNG.normal(size=(4, 64)).astype(np.float32),
    "label": np.arange(4, dtype=np.int32),
}
SMALL = {"embed_dim": 32, "num_heads": 4, "mlp_dim": 64, "vocab_size": 64}
LLAMA = {**SMALL, "num_layers": 2, "num_kv_heads": 2, "dropout": 0.1}
GPT2 = {**SMALL, "norm": "layer", "positions": "learned", "mlp": "gelu"}
LOOP = {"scan_layers": True, "remat": True, "tie_embeddings": False}
OURS = {
    "llama": (lambda: gpt.build(**LLAMA), TOKENS, 2),
    "llama-scanned": (lambda: gpt.build(**LLAMA, **LOOP), TOKENS, 2),
    "gpt2": (lambda: gpt.build(num_layers=1, use_bias=True, **GPT2), TOKENS, 4),
    "moe": (lambda: moe.build(num_layers=1, **SMALL, dropout=0.1), TOKENS, 2),
    "mlp": (lambda: mlp.build(hidden_dim=16, num_layers=3), IMAGES, 4),
    "vit": (lambda: vit.build(num_layers=1), IMAGES, 4),
}


def check(model, microbatch, size, *, gradient=False, **rules):
    """Compares collectives and results; returns what was found."""
    found = find_tensor_rules(model, microbatch, size=size, **rules)
    placed = Placed(model, microbatch, found, size)
    text, results, expected = placed.forward()
    assert collectives(text) == predicted(found, size)
    assert_alike(results, expected)
    if gradient:
        assert_alike(*placed.gradient())
    return found


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("swiglu", 4), ("fused", 2), ("grouped", 2), ("parallel", 2)),
        *(("hidden_norm", 4), ("experts", 2), ("labelled", 4)),
    ],
)
def test_collectives_are_those_predicted(name, size):
    # The other cases, and most gradients, are for long tests.
    check(case(name), BATCH, size)


@pytest.mark.parametrize(
    "name", ["attention", "scanned", pytest.param("tied", marks=pytest.mark.slow)]
)
def test_gradients_are_those_of_one_device(name):
    check(case(name), BATCH, 2, gradient=True)


@pytest.mark.parametrize("name", ["llama-scanned", "mlp"])
def test_models_of_this_repository(name):
    make, microbatch, size = OURS[name]
    assert check(make(), microbatch, size).pairs


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][2]])
def test_gradients_of_all_cases(name, size):
    check(case(name), BATCH, size, gradient=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", OURS)
def test_their_gradients(name, size):
    make, microbatch, _ = OURS[name]
    check(make(), microbatch, size, gradient=True)


class Asked(Exception):
    """Carries what a `Trainer` was to be made of."""


def example(name, monkeypatch):
    """The model of an example, a microbatch, and its rules over paths."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module(name)

    def trainer(**options):
        raise Asked(options)

    monkeypatch.setattr(sk, "Trainer", trainer, raising=False)
    with pytest.raises(Asked) as asked:
        module.main(steps=0)
    options = asked.value.args[0]
    rows = jax.tree.map(lambda x: x[:4], options["data"](0))
    model = sk.Model(
        init=options["init"],
        loss=options["loss"],
        axis_rules=options.get("axis_rules", {}),
    )
    return model, rows, options.get("path_rules")


def check_example(name, monkeypatch, **options):
    model, microbatch, path_rules = example(name, monkeypatch)
    found = check(model, microbatch, 2, path_rules=path_rules, **options)
    assert found.pairs
    # One all-reduce for each pair, and nothing else.
    [rows] = found.exchanges
    assert (rows.kind, rows.of, rows.count) == ("all-reduce", "row", len(found.pairs))


@pytest.mark.parametrize("name", ["equinox_attention", "linen_transformer"])
def test_models_that_nobody_here_wrote(name, monkeypatch):
    check_example(name, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n != "haiku_resnet"])
def test_gradients_of_all_examples(name, monkeypatch):
    check_example(name, monkeypatch, gradient=True)


def test_a_convolutional_one_has_no_rules(monkeypatch):
    model, microbatch, path_rules = example("haiku_resnet", monkeypatch)
    found = find_tensor_rules(model, microbatch, size=2, path_rules=path_rules)
    assert not found.pairs


def test_no_other_way_to_cut_both_products_exchanges_less():
    found = find_tensor_rules(case("residual"), BATCH, size=2)
    model = case("residual")
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    cost = {}
    for dims in itertools.product((0, 1), (0, 1)):
        specs = {
            name: PartitionSpec(*("tensor" if i == dim else None for i in range(2)))
            for name, dim in zip(("down", "up"), dims, strict=True)
        }
        params = {
            name: jax.device_put(x, NamedSharding(mesh, specs[name]))
            for name, x in model.init(None).items()
        }
        batch = jax.device_put(BATCH, NamedSharding(mesh, PartitionSpec()))
        loss = jax.jit(model.loss).lower(params, batch, jnp.uint32(0)).compile()
        cost[dims] = sum(size for _, size in collectives(loss.as_text()).values())
    ours = tuple(leaf.dim for leaf in found.leaves)
    assert cost.pop(ours) < min(cost.values())
