"""`shardkit ckpt remap|merge|export|import`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from problems import consume, linear, linear_data

import shardkit as sk
from shardkit.checkpoint.reader import open_checkpoint
from shardkit.checkpoint.views import as_dtype, whole_box
from shardkit.command.differences import Difference
from shardkit.command.main import main

FIXTURES = Path(__file__).parent / "fixtures"
LAYERS = """
follow = ["opt_state", "ema"]
keep_rest = true

[[rule]]
from = "params/layers/{path...}"
to = "params/layers/{i}/{path...}"
ops = [{ op = "unstack", over = "i" }]

[[rule]]
from = "grad_exponent/{path...}"
ops = [{ op = "drop" }]
"""


def layered(directory, *, is_stacked):
    """A trainer of two layers, in one array or each in its own."""

    def init(key):
        kernels = jax.random.normal(key, (2, 3, 3))
        up = sk.axes(kernels, "layers", "in", "out")
        if not is_stacked:
            up = [sk.axes(kernel, "in", "out") for kernel in kernels]
        layers = {"up": up} if is_stacked else [{"up": each} for each in up]
        return {"embedding": sk.axes(jnp.ones((5, 3)), "in", "out"), "layers": layers}

    def loss(params, microbatch, key):
        x, layers = microbatch["x"] @ params["embedding"], params["layers"]
        for i in range(2):
            x = jnp.tanh(x @ (layers["up"][i] if is_stacked else layers[i]["up"]))
        return jnp.mean((x - microbatch["y"]) ** 2)

    config = sk.CheckpointConfig(directory=directory)
    return sk.Trainer(**linear(init=init, loss=loss, ema=0.9, checkpoint=config))


@pytest.fixture(scope="module")
def scanned(tmp_path_factory, compile_cache):
    """The checkpoint of a run with stacked layers."""
    path = tmp_path_factory.mktemp("scanned")
    with layered(path, is_stacked=True) as trainer:
        consume(trainer, 1)
        trainer.save()
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory, compile_cache):
    """Three steps of linear regression, each evaluated."""
    path = tmp_path_factory.mktemp("linear")
    config = sk.CheckpointConfig(directory=path, every=1, keep=None)
    evaluation = sk.EvalConfig(data=linear_data, every=1)
    with sk.Trainer(**linear(checkpoint=config, eval=evaluation)) as trainer:
        consume(trainer, 3)
    return path


@pytest.fixture
def ckpt(capsys):
    """Runs a verb that is to succeed, as a machine does."""

    def run(*args, code=0):
        found = main(["ckpt", *map(str, args), "--json"])
        out, errors = capsys.readouterr()
        assert found == code, (out, errors)
        return json.loads(out) if out else errors

    return run


def read(path, step=None):
    views = open_checkpoint(path, step).views
    return {p: np.asarray(v.read(whole_box(v.shape))) for p, v in views.items()}


def test_remap_makes_what_another_trainer_restores(scanned, ckpt, tmp_path):
    rules, out = tmp_path / "rules.toml", tmp_path / "out"
    rules.write_text(LAYERS)
    plan = ckpt("remap", scanned, "--rules", rules, "--dry-run")
    assert plan["complete"]
    assert not out.exists()
    row = next(x for x in plan["leaves"] if "0/up" in x["target"])
    assert row["target"] == "params/layers/0/up"
    assert (row["shape"], row["rule"]) == ([3, 3], 1)
    done = ckpt("remap", scanned, out, "--rules", rules, "--limit-mib", 1)
    assert done["leaves"] == plan["leaves"]
    assert ckpt("verify", out, "--blocks")["whole"]
    found, before = read(out), read(scanned)
    assert found.keys() == {leaf["target"] for leaf in plan["leaves"]}
    for place in ("params/", "ema/", "opt_state/0/mu/", "opt_state/0/nu/"):
        for i, layer in enumerate(before[f"{place}layers/up"]):
            assert (found[f"{place}layers/{i}/up"] == layer).all()
    kept = {leaf["path"]: leaf for leaf in ckpt("inspect", out)["leaves"]}
    assert kept["params/embedding"]["axes"] == ["in", "out"]
    remap = sk.checkpoint.Remap([], keep_rest=True, allow=["grad_exponent/{p...}"])
    with layered(out, is_stacked=False) as trainer:
        assert trainer.restore(remap=remap) == 1
        layers = trainer.state.params["layers"]
        assert (np.asarray(layers[1]["up"]) == before["params/layers/up"][1]).all()


def test_a_dry_run_shows_all_that_is_left_over(scanned, tmp_path, capsys):
    rules = tmp_path / "rules.toml"
    text = 'follow = []\n[[rule]]\nfrom = "params/embedding"\nto = "table"'
    rules.write_text(text)
    arguments = ["ckpt", "remap", str(scanned), "--rules", str(rules), "--dry-run"]
    assert main(arguments) == 2
    out, errors = capsys.readouterr()
    assert "table  float32[5, 3]  params/embedding" in out
    num = len(open_checkpoint(scanned).views) - 1
    assert f"taken by no rule ({num}):" in out
    assert "  opt_state/0/count" in out
    assert errors == f"RestoreError: {num} paths are unaccounted for\n"
    like = [*arguments[:3], "--like", str(scanned), *arguments[3:], "--json"]
    assert main(like) == 2
    assert "params/layers/up" in json.loads(capsys.readouterr().out)["missing"]


@pytest.mark.parametrize(
    ("arguments", "weights"),
    [
        (["--how", "average"], [1 / 3, 1 / 3, 1 / 3]),
        (["--how", "average", "--last", "2"], [0.5, 0.5]),
        (["--how", "average", "--steps", "3,1", "--weights", "1,3"], [0.25, 0.75]),
        (["--how", "ema", "--decay", "0.5"], [0.25, 0.25, 0.5]),
        (["--how", "decay", "--shape", "linear"], [1 / 3, 1 / 3, 1 / 3]),
        (["--how", "metric", "--metric", "loss", "--power", "2"], None),
    ],
    ids=["average", "last", "weights", "ema", "decay", "metric"],
)
def test_merge_averages(arguments, weights, saved, ckpt, tmp_path):
    done = ckpt("merge", tmp_path / "out", saved, *arguments)
    steps = [source["step"] for source in done["sources"]]
    if weights is None:
        losses = [ckpt("inspect", saved, "--step", s)["metrics"]["loss"] for s in steps]
        total = sum(loss**-2 for loss in losses)
        weights = [loss**-2 / total for loss in losses]
    np.testing.assert_allclose([x["weight"] for x in done["sources"]], weights)
    found, newest = read(tmp_path / "out", 3), read(saved, steps[-1])
    trees = [read(saved, step) for step in steps]
    for path, x in found.items():
        wanted = newest[path]
        if path.startswith("params/"):
            wanted = sum(
                w * tree[path].astype(float)
                for w, tree in zip(weights, trees, strict=True)
            ).astype(np.float32)
        np.testing.assert_array_max_ulp(x, wanted, 1) if x.dtype.kind == "f" else None
        assert x.dtype == wanted.dtype
    assert ckpt("verify", tmp_path / "out", "--blocks")["whole"]
    assert ckpt("inspect", tmp_path / "out")["metrics"] == {}


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama_tied", "llama_bfloat16"])
@pytest.mark.parametrize("layers", [[], ["--scan-layers"]], ids=["list", "scan"])
def test_hugging_face_in_and_out(name, layers, ckpt, tmp_path):
    source, ours, theirs = (
        FIXTURES / "huggingface" / name,
        tmp_path / "a",
        tmp_path / "b",
    )
    ckpt("import", source, ours, "--from", "huggingface", *layers)
    assert ckpt("verify", ours, "--blocks")["whole"]
    config = json.loads((source / "config.json").read_text())
    rope = config.get("rope_parameters", config).get("rope_theta")
    numbers = []
    if name != "gpt2":
        errors = ckpt("export", ours, theirs, "--to", "huggingface", code=2)
        assert "--max-sequence-length and --rope-theta" in errors
        assert not theirs.exists()
        most = config["max_position_embeddings"]
        numbers = ["--max-sequence-length", most, "--rope-theta", rope]
    extra = tmp_path / "extra.json"
    extra.write_text('{"eos_token_id": 7}')
    ckpt("export", ours, theirs, "--to", "huggingface", "--config", extra, *numbers)
    made = json.loads((theirs / "config.json").read_text())
    assert (made["model_type"], made["eos_token_id"]) == (config["model_type"], 7)
    assert ckpt("diff", source, theirs)["same"]


def test_what_was_imported_begins_a_run(make, ckpt, tmp_path):
    weight = np.arange(15, dtype=np.float32).reshape(3, 5)
    tensors = {"linear.weight": weight, "linear.bias": weight[:, 0].copy()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    ckpt("import", tmp_path, tmp_path / "a", "--from", "safetensors")
    transpose = sk.checkpoint.Transpose(1, 0)
    rules = [
        sk.checkpoint.Rule("linear.weight", "params/kernel", transpose),
        sk.checkpoint.Rule("linear.bias", "params/bias"),
    ]
    anew = ("step", "opt_state/{p...}", "grad_exponent/{p...}")
    trainer, _ = make(checkpoint=sk.CheckpointConfig(directory=tmp_path / "a"))
    trainer.restore(remap=sk.checkpoint.Remap(rules, allow=anew))
    assert (np.asarray(trainer.state.params["kernel"]) == weight.T).all()
    assert trainer.state.step == 0
    consume(trainer, 1)


def test_a_new_run_begins_from_a_checkpoint_of_another(scanned, make, tmp_path):
    rules, new = tmp_path / "rules.toml", tmp_path / "new"
    rules.write_text('allow = ["grad_exponent/{p...}"]' + LAYERS)
    remap = sk.checkpoint.load_rules(rules)
    with layered(new, is_stacked=False) as trainer:
        with pytest.raises(sk.ConfigError, match=r"load_rules\('rules.toml'\)"):
            trainer.restore(remap="rules.toml", source=scanned)
        assert trainer.restore(remap=remap, source=scanned) == 1
        # From now on it is its own, and never that of the other.
        trainer.save()
        assert trainer.saved_steps == [1]
        digest = trainer.state_digest()
        consume(trainer, 2)
    before = read(scanned)["params/layers/up"]
    assert (read(new, 1)["params/layers/1/up"] == before[1]).all()
    with layered(new, is_stacked=False) as again:
        with pytest.raises(sk.RestoreError, match=r"holds steps \[1\] of a run"):
            again.restore(remap=remap, source=scanned)
        assert again.restore() == 1
        assert again.state_digest() == digest
    plain, _ = make(checkpoint=sk.CheckpointConfig(directory=tmp_path / "plain"))
    plain.restore(source=scanned)
    with pytest.raises(sk.RestoreError, match="leaves of the checkpoint are not"):
        plain.state  # noqa: B018


def test_what_was_imported_is_no_run(make, ckpt, tmp_path):
    tree = {"params": {"kernel": np.ones((5, 3), np.float32)}}
    sk.checkpoint.save(tmp_path, tree)
    trainer, _ = make(checkpoint=sk.CheckpointConfig(directory=tmp_path))
    with pytest.raises(sk.RestoreError) as caught:
        trainer.restore()
    assert "no run is recorded with it" in str(caught.value)
    assert str(caught.value).endswith("Give restore(remap=…) if that is meant.")
    config = {f"key{n}": n for n in range(9)}
    saved, _ = make(
        manifest={"config": config},
        checkpoint=sk.CheckpointConfig(directory=tmp_path / "run"),
    )
    consume(saved, 1)
    saved.save()
    other, _ = make(
        manifest={"config": config | {"key3": 4}},
        checkpoint=sk.CheckpointConfig(directory=tmp_path / "run"),
    )
    with pytest.raises(sk.RestoreError, match="config key3  saved 3  now 4") as caught:
        other.restore()
    assert "key2" not in str(caught.value)


@pytest.mark.parametrize("said", ["maxtext", "orbax", "safetensors"])
def test_what_a_path_looks_like_is_said(said, ckpt, tmp_path):
    source = FIXTURES / "huggingface" / "llama"
    arguments = ["import", source, tmp_path / "out", "--from", said]
    if said == "safetensors":
        ckpt(*arguments)
        return
    errors = ckpt(*arguments, code=2)
    assert "looks like a model of Hugging Face" in errors
    assert len(errors.splitlines()) == 1


def test_out_in_a_run_is_refused(scanned, ckpt, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.toml").touch()
    for out in (tmp_path, tmp_path / "checkpoints"):
        arguments = ["import", scanned, out, "--from", "orbax"]
        assert "is of a run" in ckpt(*arguments, code=2)


@pytest.mark.parametrize("axis", ["1", "0", "none"])
def test_maxtext_in_and_out(axis, ckpt, tmp_path):
    source = FIXTURES / "huggingface" / "llama"
    ckpt("import", source, tmp_path / "a", "--from", "huggingface")
    scan = ["--scan-axis", axis]
    ckpt("export", tmp_path / "a", tmp_path / "b", "--to", "maxtext", *scan)
    plain = ocp.PyTreeCheckpointer().restore(tmp_path / "b")
    decoder = plain["params"]["params"]["decoder"]
    assert ("layers_1" in decoder) == (axis == "none")
    ckpt("import", tmp_path / "b", tmp_path / "c", "--from", "maxtext", *scan)
    found, wanted = read(tmp_path / "c"), read(tmp_path / "a")
    assert found.keys() == wanted.keys()
    for path, x in wanted.items():
        # Queries are multiplied by √head_dim, and divided again.
        np.testing.assert_array_max_ulp(found[path], x, 2 if "query" in path else 0)


@pytest.mark.parametrize("tree", [[], ["--tree", "nnx"], ["--tree", "linen"]])
def test_plain_orbax_reads_what_is_exported(tree, scanned, ckpt, tmp_path):
    out = tmp_path / "plain"
    arguments = ["--prefix", "params/"] if "nnx" in tree else []
    ckpt("export", scanned, out, "--to", "orbax", *tree, *arguments)
    found = ocp.PyTreeCheckpointer().restore(out)
    with ocp.StandardCheckpointer() as checkpointer:
        again = checkpointer.restore(out)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, again))
    root = found["model"] if "nnx" in tree else found["params"]
    assert (root["layers"]["up"] == read(scanned)["params/layers/up"]).all()
    assert len(jax.tree.leaves(found)) == (2 if arguments else len(read(scanned)))
    assert {path.name for path in tmp_path.iterdir()} == {"plain"}


def test_safetensors_in_and_out(scanned, ckpt, tmp_path):
    file, cut = tmp_path / "all.safetensors", tmp_path / "cut"
    ckpt("export", scanned, file, "--to", "safetensors")
    found, wanted = safetensors.numpy.load_file(file), read(scanned)
    assert found.keys() == wanted.keys()
    assert all((found[path] == x).all() for path, x in wanted.items())
    ckpt("export", scanned, cut, "--to", "safetensors", "--prefix", "ema/")
    assert ckpt("inspect", cut)["format"] == "safetensors"
    ckpt("import", file, tmp_path / "back", "--from", "safetensors", "--as-step", 1)
    assert ckpt("diff", tmp_path / "back", scanned)["same"]


@pytest.mark.parametrize(
    ("dtype", "a", "b", "wanted"),
    [
        ("float32", [0.0, 1.0], [-0.0, 1.0], (1, 0.0, 1, 0)),
        ("float32", [np.nan, 1.0], [2.0, 1.0], (1, None, 0, 1)),
        ("float64", [1e308], [-1e308], (1, np.inf, None, 0)),
        ("bfloat16", [1.0, 2.0], [1.0078125, 2.0], (1, 0.0078125, 1, 0)),
        ("int64", [-(2**63)], [2**63 - 1], (1, 2**64 - 1, None, 0)),
        ("uint8", [0, 255], [255, 255], (1, 255, None, 0)),
        ("int4", [-8, 0], [7, 0], (1, 15, None, 0)),
        ("bool", [True], [False], (1, 1, None, 0)),
        ("complex64", [1j], [1.0], (1, 2**0.5, None, 0)),
    ],
)
def test_how_far_elements_are_apart(dtype, a, b, wanted):
    dtype = as_dtype(dtype)
    x, y = np.array(a).astype(dtype), np.array(b).astype(dtype)
    found = Difference.none(dtype).joined(x, x).joined(x, y)
    num, largest, ulp, not_finite = wanted
    assert (found.num_elements, found.num_not_finite) == (num, not_finite)
    assert found.max_abs == pytest.approx(largest)
    if dtype.name != "float64":
        assert found.max_ulp == ulp
    assert found == Difference.none(dtype).joined(y, x)
