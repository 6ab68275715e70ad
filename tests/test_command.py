"""`shardkit ckpt` as people and scripts meet it: output, exit codes, what is left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from problems import consume, linear, linear_data

import shardkit as sk
from shardkit.checkpoint.manifest import FILE_NAME
from shardkit.checkpoint.reader import open_checkpoint
from shardkit.checkpoint.stored import StoredView
from shardkit.checkpoint.sums import SUMS_NAME, write_sums
from shardkit.checkpoint.views import whole_box
from shardkit.command.main import main
from shardkit.command.options import MESH_AXES
from shardkit.mesh import MESH_AXES as REAL_AXES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, compile_cache):
    """The checkpoints of a run of three steps."""
    path = tmp_path_factory.mktemp("run") / "checkpoints"
    config = sk.CheckpointConfig(directory=path, every=1, keep=None)
    evaluation = sk.EvalConfig(data=linear_data, every=1)
    with sk.Trainer(**linear(ema=0.9, checkpoint=config, eval=evaluation)) as trainer:
        consume(trainer, 3)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(saved.parent, tmp_path / "copy"))


@pytest.fixture
def ckpt(capsys):
    """Runs a verb in this process and returns what it printed."""

    def run(*args, code=0):
        found = main(["ckpt", *map(str, args)])
        out, errors = capsys.readouterr()
        assert found == code, (out, errors)
        assert "Traceback" not in errors
        if code == 2:
            assert errors
            assert not out
            return errors
        return json.loads(out) if "--json" in args else out

    return run


def read(path, step=None):
    views = open_checkpoint(path, step).views
    return {p: np.asarray(v.read(whole_box(v.shape))) for p, v in views.items()}


def data_files(item):
    """The files with arrays in them, the largest last."""
    files = [p for p in item.rglob("d/*") if p.is_file()]
    return sorted(files, key=lambda path: path.stat().st_size)


def flip(path):
    """Changes a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_inspect_shows_what_is_known(saved, ckpt):
    for path in (saved.parent, saved, saved / "3", saved / "3" / "state"):
        out = ckpt("inspect", path)
        assert "params/kernel          float32[5, 3]   60 B  in out" in out
        assert "data=2 fsdp=4" in out
        assert "next_step 3" in out
    found = ckpt("inspect", saved, "--step", 2, "--json")
    assert (found["step"], found["steps"], found["format"]) == (
        2,
        [1, 2, 3],
        "shardkit",
    )
    assert found["num_leaves"] == len(found["leaves"]) == 12
    assert found["bytes"] == sum(leaf["bytes"] for leaf in found["leaves"]) == 304
    assert found["metrics"]["loss"] > 0
    leaf = next(x for x in found["leaves"] if x["path"] == "params/kernel")
    assert leaf["axes"] == ["in", "out"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_the_pieces_on_a_mesh_are_those_of_training(saved, ckpt, count):
    mesh = sk.MeshSpec(data=1, fsdp=-1)
    trainer = sk.Trainer(**linear(mesh=mesh, ema=0.9, devices=jax.devices()[:count]))
    with trainer:
        placement, state = trainer._controller.start()
        layouts = {x.path: x for x in jax.tree.leaves(placement.layout)}
        arguments = ["--mesh", f"fsdp={count}", "--axis-rules", "in=fsdp", "--json"]
        found = ckpt("inspect", saved, *arguments)
        pieces = {leaf["path"]: leaf["piece"] for leaf in found["leaves"]}
        for path, layout in layouts.items():
            shard = layout.sharding(placement.mesh)
            shape = shard.shard_shape(layout.physical_shape(count))
            assert tuple(pieces[path]["shape"]) == shape
            assert pieces[path]["bytes"] == layout.piece_bytes(count)
            assert pieces[path]["padded"] == layout.is_padded(count)
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        assert found["on_mesh"]["bytes_per_device"] == held
    assert MESH_AXES == REAL_AXES


def test_a_cut_that_is_not_recorded_is_called_unknown(saved, ckpt):
    out = ckpt("inspect", saved, "--mesh", "fsdp=4,data=2")
    assert "in out  unknown" in out
    assert "Each of 8 devices (fsdp=4 data=2) holds at least 16 B of 304 B" in out
    assert "--axis-rules" in out
    found = ckpt("inspect", saved, "--mesh", "fsdp=4", "--json")["on_mesh"]
    assert found["unknown_leaves"] == 8


def test_verify_finds_a_changed_bit_and_names_its_place(copy, ckpt):
    assert "whole" in ckpt("verify", copy)
    assert ckpt("verify", copy, "--all", "--blocks", "--json")["whole"]
    item = copy / "checkpoints" / "2" / "state"
    damaged = data_files(item)[-1]
    flip(damaged)
    assert str(damaged) in ckpt("verify", copy, "--step", 2, code=1)
    assert "whole" in ckpt("verify", copy)
    out = ckpt("verify", copy, "--all", code=1)
    assert out.count("whole") == 2
    assert "are there; verify --all" in ckpt("verify", item, code=1)
    assert f"{item}: damaged" in out
    found = ckpt("verify", item, "--json", code=1)
    assert not found["whole"]
    assert found["steps"][0]["files"] == [
        f"{damaged}: its bytes are not what was written"
    ]


def test_verify_names_leaf_and_block(ckpt, tmp_path):
    """A value that is not what was in memory, though its file is what was written."""
    wide = np.random.default_rng(0).normal(size=(3000, 1000)).astype(np.float32)
    tree = {"params/w": wide, "params/b": np.ones(3)}
    views = {path: sk.checkpoint.ArrayView(x) for path, x in tree.items()}
    where = sk.checkpoint.write_checkpoint(tmp_path, views)
    row, changed = wide[2500].tobytes(), wide[2500].copy()
    changed[3] = np.nextafter(changed[3], np.float32(9))
    for path in data_files(where / "state"):
        path.write_bytes(path.read_bytes().replace(row, changed.tobytes()))
    found = ckpt("verify", tmp_path, "--blocks", "--json", code=1)["steps"][0]
    assert len(found["files"]) == 1
    write_sums(where / "state")
    assert ckpt("verify", tmp_path, "--json")["whole"]
    out = ckpt("verify", tmp_path, "--blocks", code=1)
    assert "  params/w      2  [2096:3000, 0:1000]" in out
    found = ckpt("verify", tmp_path, "--blocks", "--json", code=1)["steps"][0]
    assert found["num_blocks"] == 4
    assert [(x["leaf"], x["block"]) for x in found["blocks"]] == [("params/w", 2)]


def test_verify_names_a_leaf_that_cannot_be_read(copy, ckpt):
    item = copy / "checkpoints" / "3" / "state"
    for path in data_files(item):
        flip(path)
    write_sums(item)
    assert "cannot be read" in ckpt("verify", copy, "--blocks", code=1)


@pytest.mark.parametrize("name", [FILE_NAME, SUMS_NAME, "manifest.ocdbt"])
def test_verify_finds_damage_to_what_is_not_an_array(copy, ckpt, name):
    for change in (flip, lambda path: path.write_bytes(b""), Path.unlink):
        path = copy / "checkpoints" / "3" / "state" / name
        before = path.read_bytes()
        change(path)
        assert name in ckpt("verify", copy, code=1)
        assert "steps 1, 2 are there; verify --all" in ckpt("verify", copy, code=1)
        assert not ckpt("verify", copy, "--all", "--blocks", "--json", code=1)["whole"]
        path.write_bytes(before)
    ckpt("verify", copy)


def test_diff_says_what_differs_and_by_how_much(saved, ckpt, tmp_path):
    out = ckpt("diff", saved, saved / "3")
    assert "the same by their recorded digests: 12 leaves; nothing was read" in out
    assert ckpt("diff", saved, saved, "--json")["leaves_unread"] == 12
    assert "the same: 12 leaves" in ckpt("diff", saved, saved, "--full")
    found = ckpt("diff", saved, saved / "3", "--full", "--json")
    assert found["same"]
    assert (found["bytes_compared"], found["leaves_unread"]) == (304, 0)
    found = ckpt("diff", saved, saved, "--step-a", 2, "--json", code=1)
    a, b = read(saved, 2), read(saved, 3)
    rows = {row["leaf"]: row for row in found["leaves"]}
    assert rows.keys() == {path for path in a if (a[path] != b[path]).any()}
    for path, row in rows.items():
        assert row["max_abs"] == np.abs(a[path].astype(float) - b[path]).max()
        assert row["num_elements"] == (a[path] != b[path]).sum()
    changed = a["params/bias"].copy()
    changed[1] = np.nextafter(changed[1], np.float32(9))
    tree = {k: v for k, v in a.items() if k != "step"} | {"params/bias": changed}
    tree |= {"ema/bias": a["ema/bias"][:2], "more": np.zeros(3)}
    views = {path: sk.checkpoint.ArrayView(x) for path, x in tree.items()}
    sk.checkpoint.write_checkpoint(tmp_path, views, step=2)
    found = ckpt("diff", saved / "2", tmp_path, "--json", code=1)
    rows = {row["leaf"]: row for row in found["leaves"]}
    assert {path: row["differs"] for path, row in rows.items()} == {
        "step": "only in a",
        "more": "only in b",
        "ema/bias": "array",
        "params/bias": "values",
    }
    assert rows["params/bias"]["max_ulp"] == rows["params/bias"]["num_elements"] == 1
    assert found["bytes_compared"] == 12
    out = ckpt("diff", saved / "2", tmp_path, code=1)
    assert "float32[3] | float32[2]" in out
    assert "4 of 13 leaves differ" in out


MESH = ["--mesh", "fsdp=2", "--axis-rules"]
MERGE = ["merge", "{tmp}/o", "{run}", "--how"]
NNX = ["--tree", "nnx", "--model", "model"]
BAD = {
    "nothing": (["inspect", "{tmp}/none"], "there is no such path"),
    "nearly": (["inspect", "{run}/../checkpoint"], "did you mean"),
    "a file": (["verify", "{file}"], "is a file"),
    "empty": (["inspect", "{tmp}"], "holds no checkpoint"),
    "above runs": (["inspect", "{run}/../.."], "there are some in run"),
    "no step": (["inspect", "{run}", "--step", "9"], "step 9; there are 1, 2, 3"),
    "no step there": (["inspect", "{run}/9"], "no step 9; there are 1, 2, 3"),
    "other step": (["inspect", "{run}/3", "--step", "1"], "step 1, found one of step"),
    "bad step": (["inspect", "{run}", "--step", "-1"], "--step"),
    "bad mesh": (["inspect", "{run}", "--mesh", "fdsp=4"], "found fdsp=4"),
    "bad size": (["inspect", "{run}", "--mesh", "fsdp=-1"], "found fsdp=-1"),
    "bad rules": (["inspect", "{run}", "--axis-rules", "in"], "NAME=VALUE"),
    "odd name": (["inspect", "{run}", *MESH, "inn=fsdp"], "there are in, out"),
    "odd axis": (["inspect", "{run}", *MESH, "in=fdsp"], "there are data, fsdp"),
    "no mesh": (["inspect", "{run}", "--axis-rules", "in=fsdp"], "goes with --mesh"),
    "no file": (["verify", "{file}.safetensors"], "there is no such path"),
    "no verb": ([], "required"),
    "odd verb": (["inpsect", "{run}"], "invalid choice"),
    "odd flag": (["inspect", "{run}", "--yaml"], "--yaml"),
    "both": (["verify", "{run}", "--all", "--step", "1"], "exclude"),
    "diff none": (["diff", "{run}", "{tmp}/none"], "there is no such path"),
    "no rules": (["remap", "{run}", "{tmp}/o"], "--rules"),
    "rules none": (
        ["remap", "{run}", "{tmp}/o", "--rules", "{tmp}/r"],
        "cannot be read: No such file",
    ),
    "not toml": (["remap", "{run}", "{tmp}/o", "--rules", "{file}"], "not TOML"),
    "no out": (["remap", "{run}", "--rules", "{file}"], "OUT is missing"),
    "how": (["merge", "{tmp}/o", "{run}"], "--how"),
    "no decay": ([*MERGE, "ema"], "needs --decay"),
    "bad decay": ([*MERGE, "ema", "--decay", "2"], "decay"),
    "misplaced": ([*MERGE, "average", "--decay", "0.5"], "goes with --how ema"),
    "weights": ([*MERGE, "average", "--weights", "1,2"], "a weight for each of 3"),
    "weights sum": ([*MERGE, "average", "--weights", "0,0,0"], "weights"),
    "steps": ([*MERGE, "average", "--steps", "1,7"], "found 7"),
    "params": ([*MERGE, "average", "--params", "parms"], "did you mean 'params'"),
    "metric": ([*MERGE, "metric", "--metric", "f1"], "is not recorded"),
    "temperature": (
        [*MERGE, "metric", "--metric", "loss"],
        "needs either --temperature T or --power P",
    ),
    "format": (["export", "{run}", "{tmp}/o", "--to", "onnx"], "invalid choice"),
    "no decoder": (["export", "{run}", "{tmp}/o", "--to", "huggingface"], "decoder"),
    "no maxtext": (["export", "{run}", "{tmp}/o", "--to", "maxtext"], "decoder"),
    "prefix": (
        ["export", "{run}", "{tmp}/o", "--to", "orbax", "--prefix", "x/"],
        "has nothing under",
    ),
    "taken": (["export", "{run}", "{run}", "--to", "orbax"], "is there already"),
    "not hf": (["import", "{run}", "{tmp}/o", "--from", "huggingface"], "of shardkit"),
    "not maxtext": (["import", "{run}", "{tmp}/o", "--from", "maxtext"], "MaxText"),
    "not nnx": (
        ["import", "{run}", "{tmp}/o", "--from", "orbax", *NNX],
        "expected leaves at",
    ),
    "out is a run": (
        ["import", "{run}", "{run}/..", "--from", "orbax"],
        "expected a new directory, or one of checkpoints",
    ),
    "step taken": (
        ["import", "{run}", "{run}", "--from", "orbax", "--as-step", "3"],
        "step 3 is there already",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=[*BAD])
def test_bad_input_is_one_message(arguments, message, saved, ckpt, tmp_path):
    file = tmp_path / "file.txt"
    empty = tmp_path / "empty"
    empty.mkdir()
    file.write_text("? ?")
    places = {"{run}": saved, "{tmp}": empty, "{file}": file}
    for name, path in places.items():
        arguments = [text.replace(name, str(path)) for text in arguments]
    errors = ckpt(*arguments, code=2)
    assert message in errors
    assert errors.split(":")[0] in ("ConfigError", "RestoreError", "DamagedError")
    assert [*empty.iterdir()] == []


def test_a_checkpoint_that_is_damaged_is_not_made_into_another(copy, ckpt, tmp_path):
    rules = tmp_path / "rules.toml"
    rules.write_text("keep_rest = true")
    damaged = data_files(copy / "checkpoints" / "3" / "state")[0]
    flip(damaged)
    out = tmp_path / "new" / "out"
    for arguments in (
        ["remap", copy, out, "--rules", rules],
        ["merge", out, copy, "--how", "average"],
        ["export", copy, out, "--to", "orbax"],
        ["export", copy, out, "--to", "safetensors"],
        ["import", copy, out, "--from", "orbax"],
    ):
        assert str(damaged) in ckpt(*arguments, code=2)
        assert not out.parent.exists()


@pytest.mark.parametrize("verb", ["import", "export"])
def test_an_interrupted_command_leaves_nothing(
    verb, saved, tmp_path, monkeypatch, capsys
):
    before = signal.getsignal(signal.SIGINT)
    read, main_thread = StoredView.read, threading.main_thread()

    def interrupted(self, box):
        signal.pthread_kill(main_thread.ident, signal.SIGINT)
        return read(self, box)

    monkeypatch.setattr(StoredView, "read", interrupted)
    flag = "--from" if verb == "import" else "--to"
    arguments = [verb, str(saved), str(tmp_path / "a" / "out"), flag, "orbax"]
    assert main(["ckpt", *arguments]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert [*tmp_path.iterdir()] == []
    assert signal.getsignal(signal.SIGINT) is before


def test_the_process_reads_metadata_and_files_without_jax(saved):
    program = (
        "import sys; from shardkit.command.main import main; "
        "codes = [main(['ckpt', *words.split()]) for words in sys.argv[1:]]; "
        "print(codes, 'jax' in sys.modules)"
    )
    verbs = [
        f"inspect {saved} --mesh fsdp=3",
        f"verify {saved} --all",
        f"diff {saved}/2 {saved}/3",
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, *verbs],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 1] False"


def test_the_module_is_the_command(copy):
    def run(*args, **options):
        command = [sys.executable, "-m", "shardkit", "ckpt", *map(str, args)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, timeout=60, **options
        )

    flip(data_files(copy / "checkpoints" / "3" / "state")[0])
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = run("verify", copy, env=env)
    assert (done.returncode, done.stderr) == (1, "")
    done = run("verify", copy / "none")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "verify" in run("--help").stdout
