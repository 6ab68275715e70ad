import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import gpt
from shardkit.checkpoint.families import Decoder, Layout, model_options
from shardkit.checkpoint.maxtext import (
    MaxTextLayout,
    Scale,
    from_maxtext,
    infer_maxtext,
    to_maxtext,
)
from shardkit.checkpoint.views import ArrayView, as_dtype, whole_box
from shardkit.errors import ConfigError, RestoreError
from shardkit.tree import path_string

FIXTURES = Path(__file__).parent / "fixtures" / "maxtext"
CONFIG = {"max_sequence_length": 20, "rope_theta": 50_000.0}
OPTIONS = {
    "scanned": {},
    "scanned_axis0": {"scan_axis": 0},
    "scanned_tied": {"normalizes_logits": False},
    "unscanned": {},
    "unscanned_rope31": {"rotates_pairs": True},
}
NAMES = pytest.mark.parametrize("name", OPTIONS)
LAYOUTS = pytest.mark.parametrize("scan_layers", [False, True], ids=["list", "scan"])


def load(name):
    """What MaxText made: the variables by their paths, the input and the logits."""
    with np.load(FIXTURES / f"{name}.npz") as file:
        arrays = dict(file)
    return arrays, arrays.pop("tokens"), arrays.pop("logits")


def views(arrays):
    return {path: ArrayView(array) for path, array in arrays.items()}


def read(tree):
    return {path: view.read(whole_box(view.shape)) for path, view in tree.items()}


def bits(arrays):
    return {k: (a.shape, a.dtype, a.tobytes()) for k, a in arrays.items()}


@NAMES
@LAYOUTS
def test_our_model_computes_the_logits_of_maxtext(name, scan_layers):
    arrays, tokens, wanted = load(name)
    decoder, theirs = infer_maxtext(views(arrays), **CONFIG, **OPTIONS[name])
    ours = Layout(scan_layers=scan_layers)
    tree = read(from_maxtext(decoder, theirs, ours).apply(views(arrays)))
    config = gpt.GPTConfig(**model_options(decoder, scan_layers=scan_layers))
    model = nnx.eval_shape(lambda: gpt.GPT(config, nnx.Rngs(params=0)))
    graphdef, state = nnx.split(model)
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(tree.pop(f"params/{path_string(path)}")), state
    )
    assert not tree
    with jax.default_matmul_precision("highest"):
        found = np.asarray(nnx.merge(graphdef, params)(jnp.asarray(tokens)))
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


@NAMES
@LAYOUTS
def test_the_way_back_gives_what_maxtext_had(name, scan_layers):
    arrays, _, _ = load(name)
    decoder, theirs = infer_maxtext(views(arrays), **OPTIONS[name])
    ours = Layout(scan_layers=scan_layers)
    tree = from_maxtext(decoder, theirs, ours).apply(views(arrays))
    back = read(to_maxtext(decoder, ours, theirs).apply(tree))
    queries = {path for path in arrays if "query" in path}
    assert len(queries) > 0
    assert set(back) == set(arrays)
    for path in queries:
        # √8 is no float: the queries come back to the last bit, the rest whole.
        np.testing.assert_allclose(back.pop(path), arrays.pop(path), rtol=2e-7)
    assert bits(back) == bits(arrays)


def test_heads_of_a_power_of_4_come_back_whole():
    rng = np.random.default_rng(0)
    decoder = Decoder(
        **{"family": "llama", "num_layers": 3, "num_heads": 2, "kv_heads": 1},
        **{"head_dim": 16, "embed_dim": 32, "mlp_dim": 12, "vocab_size": 7},
        **{"tied": False, "use_bias": False},
    )
    wide = MaxTextLayout(rotates_pairs=True)
    layouts = [
        wide,
        dataclasses.replace(wide, scan_axis=None),
        MaxTextLayout(scan_axis=0),
    ]
    layer = {"layer/attention/query/kernel": (32, 2, 16)}
    layer |= {"layer/attention/key/kernel": (32, 1, 16)}
    layer |= {"layer/attention/value/kernel": (32, 1, 16)}
    layer |= {"layer/attention/out/kernel": (2, 16, 32)}
    layer |= {f"layer/mlp/{x}/kernel": (32, 12) for x in ("gate", "up")}
    layer |= {"layer/mlp/down/kernel": (12, 32)}
    layer |= {f"layer/{x}_norm/scale": (32,) for x in ("attention", "mlp")}
    ours = Layout(scan_layers=True)
    shapes = {ours.path(name): (3, *shape) for name, shape in layer.items()}
    shapes |= {ours.path("embedding"): (7, 32), ours.path("head"): (32, 7)}
    shapes |= {ours.path("final_norm/scale"): (32,)}
    for theirs, dtype in itertools.product(layouts, ["float32", "bfloat16"]):
        tree = {
            path: ArrayView(rng.normal(size=shape).astype(as_dtype(dtype)))
            for path, shape in shapes.items()
        }
        out = to_maxtext(decoder, ours, theirs).apply(tree)
        axis = {"scan_axis": 0} if theirs.scan_axis == 0 else {}
        found = infer_maxtext(out, rotates_pairs=theirs.rotates_pairs, **axis)
        assert found == (decoder, theirs)
        back = from_maxtext(decoder, theirs, ours).apply(out)
        assert bits(read(back)) == bits(read(tree))


def test_neighbours_become_halves():
    arrays, _, _ = load("unscanned_rope31")
    decoder, theirs = infer_maxtext(views(arrays), rotates_pairs=True)
    tree = read(from_maxtext(decoder, theirs, Layout()).apply(views(arrays)))
    source = arrays["params/params/decoder/layers_1/self_attention/key/kernel"]
    wanted = np.concatenate([source[..., ::2], source[..., 1::2]], axis=-1)
    assert (tree["params/layers/1/attention/key/kernel/value"] == wanted).all()


def test_what_is_not_the_same_function_is_refused():
    arrays, _, _ = load("scanned_tied")
    decoder, theirs = infer_maxtext(views(arrays))
    with pytest.raises(ConfigError, match="normalizes_logits=False"):
        from_maxtext(decoder, theirs, Layout())
    gpt2 = dataclasses.replace(decoder, family="gpt2", use_bias=True)
    with pytest.raises(ConfigError, match=r"(?s)expected a Llama.*expected no biases"):
        to_maxtext(gpt2, Layout(), theirs)


def test_what_is_no_llama_of_maxtext_is_named():
    arrays, _, _ = load("unscanned")
    key = "params/params/decoder/layers_0/self_attention/key/kernel"
    arrays[key] = arrays[key].reshape(16, 8)
    with pytest.raises(RestoreError, match=f"right number of dims at {key}. There"):
        infer_maxtext(views(arrays))
    with pytest.raises(RestoreError, match="token_embedder"):
        infer_maxtext({})


def test_a_layer_that_is_missing_is_named():
    arrays, _, _ = load("unscanned")
    decoder, theirs = infer_maxtext(views(arrays))
    del arrays["params/params/decoder/layers_1/mlp/wo/kernel"]
    remap = from_maxtext(decoder, theirs, Layout(scan_layers=True))
    with pytest.raises(RestoreError, match="layers_1/mlp/wo/kernel"):
        remap.apply(views(arrays))


def test_moments_of_a_scaled_parameter_are_refused():
    arrays, _, _ = load("scanned")
    decoder, theirs = infer_maxtext(views(arrays))
    mu = {p.replace("params/", "opt_state/0/mu/", 1): a for p, a in arrays.items()}
    remap = dataclasses.replace(
        from_maxtext(decoder, theirs, Layout()), follow=("opt_state",)
    )
    with pytest.raises(RestoreError, match="initialise them anew") as caught:
        remap.apply(views(arrays | mu))
    assert "key" not in str(caught.value)


def test_scale_takes_floats_and_rounds_once():
    whole = ArrayView(np.arange(3))
    with pytest.raises(ConfigError, match="expected floats"):
        Scale(2.0).apply([whole])
    values = np.float32([0.1, np.inf, -0.0])
    (view,) = Scale(3.0).apply([ArrayView(values)])
    wanted = (values.astype(np.float64) * 3.0).astype(np.float32)
    assert view.read(((0, 3),)).tobytes() == wanted.tobytes()
