import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from models import gpt
from shardkit.checkpoint.families import (
    Layout,
    infer_decoder,
    infer_layout,
    model_options,
)
from shardkit.checkpoint.huggingface import (
    export_huggingface,
    from_huggingface,
    import_huggingface,
    read_config,
    to_huggingface,
)
from shardkit.checkpoint.remap import Remap
from shardkit.checkpoint.safetensors_files import open_safetensors, write_safetensors
from shardkit.checkpoint.views import ArrayView, whole_box
from shardkit.errors import ConfigError, RestoreError
from shardkit.tree import named_leaves, path_string

FIXTURES = Path(__file__).parent / "fixtures" / "huggingface"
NAMES = ["gpt2", "llama", "llama_tied", "llama_bfloat16"]
LAYOUTS = pytest.mark.parametrize("scan_layers", [False, True], ids=["list", "scan"])
EVERY = pytest.mark.parametrize("name", NAMES)


def whole(view):
    return view.read(whole_box(view.shape))


def read(tree):
    return {path: whole(view) for path, view in tree.items()}


def bits(arrays):
    return {k: (a.shape, a.dtype, a.tobytes()) for k, a in arrays.items()}


def logits_of(decoder, tree, tokens, scan_layers):
    """What our model makes of a tree that must be the whole of its params."""
    config = gpt.GPTConfig(**model_options(decoder, scan_layers=scan_layers))
    model = nnx.eval_shape(lambda: gpt.GPT(config, nnx.Rngs(params=0)))
    graphdef, state = nnx.split(model)
    names = {f"params/{path}" for path, _ in named_leaves(state)}
    assert names == set(tree)
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(
            whole(tree[f"params/{path_string(path)}"]).astype(np.float32)
        ),
        state,
    )
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, state)
    with jax.default_matmul_precision("highest"):
        return np.asarray(nnx.merge(graphdef, params)(jnp.asarray(tokens)))


def export(directory, tree, decoder, **options):
    rope = {}
    if decoder.family == "llama":
        rope["rope_theta"] = decoder.rope_theta
        rope["max_sequence_length"] = decoder.max_sequence_length
    return export_huggingface(directory, tree, **rope, **options)


@EVERY
@LAYOUTS
def test_our_model_computes_the_logits_of_transformers(name, scan_layers):
    decoder, tree = import_huggingface(FIXTURES / name, Layout(scan_layers=scan_layers))
    tokens, wanted = (
        np.load(FIXTURES / name / f"{x}.npy") for x in ("tokens", "logits")
    )
    found = logits_of(decoder, tree, tokens, scan_layers)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


@EVERY
@LAYOUTS
def test_import_and_export_keep_every_bit(name, scan_layers, tmp_path):
    decoder, tree = import_huggingface(FIXTURES / name, Layout(scan_layers=scan_layers))
    # Other parts of a state are not exported.
    state = {
        **tree,
        "step": ArrayView(np.int32(3)),
        "opt_state/0/count": tree[min(tree)],
    }
    written = export(tmp_path / "out", state, decoder, max_shard_bytes=30_000)
    assert written == decoder == read_config(tmp_path / "out")
    # The very tensors that transformers wrote, as the real library reads them.
    wanted, found = {}, {}
    for arrays, directory in ((wanted, FIXTURES / name), (found, tmp_path / "out")):
        for file in directory.glob("*.safetensors"):
            arrays.update(safetensors.numpy.load_file(file))
            with safetensors.safe_open(file, "np") as opened:
                assert opened.metadata() == {"format": "pt"}
    assert bits(found) == bits(wanted)
    again, tree_again = import_huggingface(
        tmp_path / "out", Layout(scan_layers=scan_layers)
    )
    assert again == decoder
    assert bits(read(tree_again)) == bits(read(tree))


@EVERY
@LAYOUTS
@pytest.mark.parametrize("suffix", ["/value", ""])
def test_a_decoder_is_inferred_from_its_params(name, scan_layers, suffix):
    layout = Layout(scan_layers=scan_layers, prefix="ema/", suffix=suffix)
    decoder, tree = import_huggingface(FIXTURES / name, layout)
    assert infer_layout(tree, "ema/") == layout
    rope = {}
    if decoder.family == "llama":
        rope = {"max_sequence_length": 24, "rope_theta": 50_000.0}
    assert infer_decoder(tree, layout, **rope) == decoder


def test_a_model_of_ours_goes_out_and_comes_back(tmp_path):
    options = {"num_layers": 3, "num_heads": 2, "embed_dim": 8, "mlp_dim": 12}
    options |= {"vocab_size": 11, "max_sequence_length": 6, "scan_layers": True}
    params = gpt.build(**options).init(jax.random.key(0))
    tree = {f"params/{k}": ArrayView(np.asarray(v)) for k, v in named_leaves(params)}
    out = tmp_path / "out"
    decoder = export_huggingface(
        out,
        tree,
        max_sequence_length=6,
        rope_theta=10_000.0,
        config={"eos_token_id": 3},
    )
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 3
    found, back = import_huggingface(out, Layout(scan_layers=True))
    assert found == decoder
    assert bits(read(back)) == bits(read(tree))


@LAYOUTS
def test_rules_survive_toml(scan_layers):
    decoder, layout = read_config(FIXTURES / "gpt2"), Layout(scan_layers=scan_layers)
    for remap in (from_huggingface(decoder, layout), to_huggingface(decoder, layout)):
        assert Remap.from_toml(remap.to_toml()) == remap


def copy(name, directory, config=(), drop=(), change=None):
    """Copies a fixture, with another config and other tensors."""
    tree = dict(open_safetensors(FIXTURES / name))
    tree = {path: view for path, view in tree.items() if path not in drop}
    tree.update(change(tree) if change else {})
    text = json.loads((FIXTURES / name / "config.json").read_text()) | dict(config)
    files = {"config.json": json.dumps(text).encode()}
    write_safetensors(directory, tree, {"format": "pt"}, files=files)
    return directory


@pytest.mark.parametrize(
    ("name", "body"), [("gpt2", "transformer."), ("llama_tied", "model.")]
)
def test_names_without_the_body_are_read_too(tmp_path, name, body):
    tree = open_safetensors(FIXTURES / name)
    bare = {path.removeprefix(body): view for path, view in tree.items()}
    copy(name, tmp_path / "bare", drop=set(tree), change=lambda _: bare)
    _, found = import_huggingface(tmp_path / "bare")
    _, wanted = import_huggingface(FIXTURES / name)
    assert bits(read(found)) == bits(read(wanted))


def test_buffers_of_old_versions_and_tied_heads_are_left_out(tmp_path):
    def add(tree):
        mask = ArrayView(np.tri(24, dtype=np.uint8)[None, None])
        head = tree["transformer.wte.weight"]
        return {"transformer.h.1.attn.bias": mask, "lm_head.weight": head}

    _, found = import_huggingface(copy("gpt2", tmp_path / "old", change=add))
    _, wanted = import_huggingface(FIXTURES / "gpt2")
    assert bits(read(found)) == bits(read(wanted))


def test_everything_missing_reshaped_or_unknown_is_named(tmp_path):
    gone = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    wrong = {"model.embed_tokens.weight": ArrayView(np.zeros((64, 32), np.float32))}
    bad = copy("llama", tmp_path / "bad", drop=gone, change=lambda _: wrong)
    with pytest.raises(RestoreError) as caught:
        import_huggingface(bad)
    for text in (
        f"{gone[0]}: expected (48, 32), found nothing",
        f"{gone[1]}: expected (32,), found nothing",
        "model.embed_tokens.weight: expected (61, 32), found (64, 32)",
    ):
        assert text in str(caught.value)
    more = {"score.weight": ArrayView(np.zeros(2)), "lora.a": ArrayView(np.zeros(2))}
    extra = copy("llama", tmp_path / "extra", change=lambda _: more)
    with pytest.raises(RestoreError, match=r"(?s)score\.weight.*lora\.a"):
        import_huggingface(extra)


def test_a_vast_number_of_layers_is_refused_at_once(tmp_path):
    bad = copy("llama", tmp_path / "bad", {"num_hidden_layers": 2**31 - 1})
    with pytest.raises(RestoreError, match="2147483647 layers, found 21 tensors"):
        import_huggingface(bad)


LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("name", "changes", "keys"),
    [
        (
            "llama",
            {"rms_norm_eps": 1e-6, "hidden_act": "gelu"},
            "rms_norm_eps hidden_act",
        ),
        ("llama", {"rope_parameters": LLAMA31}, "rope_parameters"),
        ("llama", {"rope_parameters": None, "rope_scaling": LLAMA31}, "rope_scaling"),
        ("llama", {"attention_bias": True}, "mlp_bias"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("gpt2", {"activation_function": "relu"}, "activation_function"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        ("gpt2", {"n_head": 5, "vocab_size": "61"}, "n_embd vocab_size"),
        ("gpt2", {"n_layer": 10**30, "n_positions": -1}, "n_layer n_positions"),
        ("gpt2", {"tie_word_embeddings": [1]}, "tie_word_embeddings"),
        ("gpt2", {"model_type": "mixtral"}, "model_type"),
        ("gpt2", {"model_type": ["gpt2"]}, "model_type"),
    ],
)
def test_a_config_of_another_function_is_refused(tmp_path, name, changes, keys):
    config = json.loads((FIXTURES / name / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RestoreError) as caught:
        read_config(tmp_path)
    assert all(f"{key}" in str(caught.value) for key in keys.split())


def test_a_config_may_be_allowed_by_key(tmp_path):
    config = json.loads((FIXTURES / "llama" / "config.json").read_text())
    config["rope_parameters"] = LLAMA31
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path, allow=["rope_parameters"]).rope_theta == 5e5


def test_the_config_of_older_versions_is_read(tmp_path):
    config = json.loads((FIXTURES / "llama" / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    del config["head_dim"], config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == read_config(FIXTURES / "llama")


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(RestoreError, match=r"config\.json: cannot be read"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "learned"}, "expected a GPT-2 .* or a Llama"),
        ({"norm": "layer", "use_bias": True}, "expected a GPT-2 .* or a Llama"),
        ({}, "expected max_sequence_length and rope_theta"),
    ],
)
def test_what_has_no_foreign_name_is_refused(tmp_path, options, message):
    sizes = {"num_layers": 2, "num_heads": 2, "embed_dim": 8, "mlp_dim": 12}
    params = gpt.build(**sizes, **options).init(jax.random.key(0))
    tree = {f"params/{k}": ArrayView(np.asarray(v)) for k, v in named_leaves(params)}
    with pytest.raises((RestoreError, ConfigError), match=message):
        export_huggingface(tmp_path / "out", tree)
    assert not (tmp_path / "out").exists()


def test_layers_that_differ_are_named(tmp_path):
    _, tree = import_huggingface(FIXTURES / "llama")
    path = "params/layers/1/mlp_norm/scale/value"
    tree = {**tree, path: ArrayView(np.zeros(31, np.float32))}
    with pytest.raises(RestoreError, match=r"layers\.1\.post_.*\(32,\), found \(31,\)"):
        export_huggingface(tmp_path, tree, max_sequence_length=9, rope_theta=1e4)
    with pytest.raises(RestoreError, match="expected the params of a decoder"):
        export_huggingface(tmp_path, {"params/w": tree[path]})


@EVERY
@LAYOUTS
def test_transformers_computes_the_same_from_what_is_exported(
    name, scan_layers, tmp_path
):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    decoder, tree = import_huggingface(FIXTURES / name, Layout(scan_layers=scan_layers))
    export(tmp_path / "out", tree, decoder, max_shard_bytes=30_000)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    tokens, wanted = (
        np.load(FIXTURES / name / f"{x}.npy") for x in ("tokens", "logits")
    )
    with torch.no_grad():
        found = model.eval()(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)
