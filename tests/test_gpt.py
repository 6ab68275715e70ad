import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import shardkit as sk
from models import gpt

TINY = {
    "vocab_size": 17,
    "num_layers": 2,
    "num_heads": 4,
    "embed_dim": 16,
    "mlp_dim": 24,
    "max_sequence_length": 12,
}
GPT2 = {
    "norm": "layer",
    "positions": "learned",
    "mlp": "gelu",
    "use_bias": True,
    "dropout": 0.1,
}
LLAMA = {"num_kv_heads": 2, "tie_embeddings": False, "dropout": 0.1}
MIXED = GPT2 | LLAMA
VARIANTS = pytest.mark.parametrize("options", [GPT2, LLAMA], ids=["gpt2", "llama"])
BASE = {"scan_layers": False, "remat": False, "compute_dtype": "float32"}
KEY = jax.random.key(3)


def microbatch(num_rows=3, num_positions=12, seed=0):
    tokens = np.random.default_rng(seed).integers(
        17, size=(num_rows, num_positions + 1)
    )
    return {"tokens": jnp.asarray(tokens, jnp.int32)}


@functools.cache
def built(**options):
    """A model and params that are quick to make, with no bias at 0 or scale at 1."""
    model = gpt.build(**TINY, **options)
    rng = np.random.default_rng(1)
    fill = lambda leaf: np.float32(rng.normal(0.2, 0.2, leaf.shape))  # noqa: E731
    return model, jax.tree.map(fill, jax.eval_shape(model.init, jax.random.key(0)))


@functools.cache
def loss_and_gradient(key=KEY, **options):
    """Both, of the params of separate layers, whatever the layout of the model."""
    is_stacked = options.get("scan_layers", False)
    model, _ = built(**options)
    _, params = built(**{**options, **BASE})
    if is_stacked:
        params = stacked(params)
    scalar = lambda params: model.loss(params, microbatch(), key).loss_sum  # noqa: E731
    loss, gradient = jax.jit(jax.value_and_grad(scalar))(params)
    return loss, gradient if is_stacked else stacked(gradient)


def named_variables(params):
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in leaves}


def stacked(params):
    """Rewrites the params of separate layers as those of stacked ones."""
    tree = nnx.to_pure_dict(params)
    layers = [tree["layers"][index] for index in sorted(tree["layers"])]
    tree["layers"] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    return tree


@VARIANTS
def test_every_parameter_names_every_dim(options):
    for scan_layers in (False, True):
        model = gpt.build(**TINY, **options, scan_layers=scan_layers)
        params = jax.eval_shape(model.init, jax.random.key(0))
        names = {path: v.out_sharding for path, v in named_variables(params).items()}
        for path, variable in named_variables(params).items():
            assert len(names[path]) == variable.ndim, path
            assert len(set(names[path])) == variable.ndim, path
            in_stack = scan_layers and path.startswith("layers")
            assert ("layers" in names[path]) == in_stack, path
        used = {name for axes in names.values() for name in axes}
        assert set(model.axis_rules) <= used
    assert names["layers/attention/query/kernel"] == (
        "layers",
        "embed",
        "heads",
        "head_dim",
    )


def test_initial_weights_have_the_scale_of_gpt2():
    expected = {
        "layers/0/attention/query/kernel": 0.02,
        "layers/1/attention/out/kernel": 0.01,
        "layers/1/mlp/down/kernel": 0.01,
        "layers/0/mlp/up/bias": 0.0,
    }
    model = gpt.build(**{**TINY, "embed_dim": 64}, **GPT2)
    init = lambda key: named_variables(model.init(key))  # noqa: E731
    deviations = jax.jit(lambda key: {p: jnp.std(init(key)[p][...]) for p in expected})
    assert deviations(KEY) == pytest.approx(expected, rel=0.1)


def test_initial_weights_are_the_same_stacked():
    def up(layer):
        return layer["mlp"]["up"]["kernel"][...]

    separate, scanned = gpt.build(**TINY), gpt.build(**TINY, scan_layers=True)
    layers = jax.jit(lambda key: [up(separate.init(key)["layers"][i]) for i in (0, 1)])
    found = jax.jit(lambda key: up(scanned.init(key)["layers"]))(KEY)
    np.testing.assert_array_equal(found, np.stack(layers(KEY)))
    assert not np.array_equal(found[0], found[1])


@pytest.mark.parametrize(
    "change",
    [{"remat": True}, {"scan_layers": True}, {"scan_layers": True, "remat": True}],
    ids=["remat", "scan", "both"],
)
def test_scan_and_remat_compute_the_same(change):
    # Dropout tells whether the masks are the same too.
    expected_loss, expected_gradient = loss_and_gradient(**MIXED)
    loss, gradient = loss_and_gradient(**MIXED, **change)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, gradient, expected_gradient)


@VARIANTS
@pytest.mark.parametrize("scan_layers", [False, True], ids=["separate", "stacked"])
def test_the_gradient_contains_no_scatter(options, scan_layers):
    model = gpt.build(**TINY, **options, scan_layers=scan_layers, remat=scan_layers)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def gradient(params):
        return jax.grad(lambda p: model.loss(p, microbatch(), KEY).loss_sum)(params)

    program = str(jax.make_jaxpr(gradient)(params))
    assert "dot_general" in program
    assert re.findall(r"\bscatter[\w-]*", program) == []


@VARIANTS
def test_no_token_sees_a_later_one(options):
    module = nnx.merge(
        nnx.graphdef(gpt.GPT(gpt.GPTConfig(**TINY, **options), nnx.Rngs(0))),
        built(**options)[1],
    )
    tokens = microbatch()["tokens"][:, :12]
    changed = tokens.at[:, 7].add(1) % 17
    before, after = jax.jit(module)(tokens), jax.jit(module)(changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7:], after[:, 7:], atol=1e-4)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_the_order_of_earlier_tokens_matters(positions):
    config = gpt.GPTConfig(**{**TINY, "num_layers": 1}, positions=positions)
    module = gpt.GPT(config, nnx.Rngs(0))
    swapped = module(jnp.array([[2, 1, 3]]))[0, 2]
    assert not np.allclose(module(jnp.array([[1, 2, 3]]))[0, 2], swapped, atol=1e-6)


def test_loss_is_a_sum_over_tokens():
    model, params = built(**GPT2)
    loss = jax.jit(lambda batch: model.loss(params, batch, None))
    output = loss(microbatch(num_rows=4))
    tokens = microbatch(num_rows=4)["tokens"]
    parts = [loss({"tokens": rows}) for rows in (tokens[:2], tokens[2:])]
    assert output.weight == 4 * 12
    np.testing.assert_allclose(
        sum(p.loss_sum for p in parts), output.loss_sum, rtol=1e-5
    )
    assert output.metrics["accuracy"] == sum(p.metrics["accuracy"] for p in parts)


def test_masks_depend_on_the_key_and_only_in_training():
    model, params = built(**GPT2)
    sums = {}
    for name in ("loss", "eval_loss"):
        jit_loss = jax.jit(getattr(model, name))
        keys = (KEY, KEY, jax.random.key(4))
        sums[name] = [float(jit_loss(params, microbatch(), k).loss_sum) for k in keys]
    first, again, other = sums["loss"]
    assert first == again != other
    assert len({*sums["eval_loss"]}) == 1


def test_layers_and_sites_draw_masks_of_their_own(monkeypatch):
    seen = []

    def record(x, key, rate):
        seen.append(tuple(jax.random.key_data(key).tolist()))
        return x

    monkeypatch.setattr(sk.nn, "dropout", record)
    model, params = built(**GPT2)
    model.loss(params, microbatch(), KEY)
    assert len(seen) == len(set(seen)) == 5


def test_bfloat16_keeps_float32_gradients_and_losses():
    loss, gradient = loss_and_gradient(**MIXED, compute_dtype="bfloat16")
    expected, _ = loss_and_gradient(**MIXED)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype("float32")}
    assert loss.dtype == jnp.float32
    assert loss != expected
    np.testing.assert_allclose(loss, expected, rtol=0.02)


@pytest.mark.parametrize(
    ("preset", "num_parameters"),
    [("gpt2_124m", 124_439_808), ("llama_1b", 1_235_814_400)],
)
def test_presets_have_the_published_size(preset, num_parameters):
    params = jax.eval_shape(gpt.build(preset).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == num_parameters


def test_presets_take_overrides():
    config = gpt.GPTConfig.llama(num_layers=1, remat=True)
    assert (config.num_layers, config.remat, config.head_dim) == (1, True, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layer": 2}, "'num_layer'; did you mean 'num_layers'"),
        ({"preset": "gpt5"}, "gpt2_124m, llama_1b.*found 'gpt5'"),
        ({"norm": "batch"}, "norm: expected one of rms, layer, found 'batch'"),
        ({"num_layers": 0}, "num_layers: expected at least 1, found 0"),
        ({"num_layers": True}, "num_layers: expected int, found True"),
        ({"num_layers": "2"}, "num_layers: expected int, found '2'"),
        ({"remat": 1}, "remat: expected bool, found 1"),
        ({"dropout": 1.0}, "dropout: expected at least 0 and less than 1"),
        ({"embed_dim": 20, "num_heads": 4}, "embed_dim: expected a multiple of 8"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads = 4"),
        ({"mlp_dim": -1, "mlp": "relu"}, "mlp_dim: .*; mlp: expected one of"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(sk.ConfigError, match=message):
        gpt.build(**options)


def test_an_int_will_do_for_a_float():
    assert gpt.GPTConfig(dropout=0).dropout == 0


def test_too_many_positions_are_refused():
    model, params = built(**GPT2)
    with pytest.raises(sk.DataError, match=r"max_sequence_length = 12.*found 13"):
        model.loss(params, microbatch(num_positions=13), None)
