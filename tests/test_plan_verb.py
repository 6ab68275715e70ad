"""`shardkit plan`: what it says of a config, without devices and without data."""

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from shardkit.command.plan_job import abstract_microbatch, find_modules, read_job
from shardkit.config import from_dict
from shardkit.mesh import MESH_AXES
from shardkit.sources import configured

ROOT = Path(__file__).parents[1]
SMALL = """
devices = 8
[model]
factory = "models.mlp:build"
[model.options]
hidden_dim = 8
num_layers = 1
[data]
factory = "models.mlp:digits"
global_batch_size = 24
num_microbatches = 12
[optimizer]
learning_rate = 0.1
[train]
steps = 10
"""


PLAIN = ("--axes", "data,fsdp")


@pytest.fixture
def plan(verb):
    return verb("plan")


@pytest.fixture
def small(tmp_path):
    """Writes a config with changes to it."""

    def write(*changes):
        text = SMALL
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "small.toml"
        path.write_text(text)
        return path

    return write


def test_a_model_that_never_fits_is_planned_where_there_is_no_device():
    # Whoever asked for a device would be told that there is no such platform.
    program = (
        "import os, sys; os.environ['JAX_PLATFORMS'] = 'none_such';"
        "from shardkit.command.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["plan", "configs/llama_1b.toml", "--devices", "8", "--hbm", "80GB"]
    words += ["--profile", "h200", "--what-if-lose", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"]["num_params"] == 1_235_814_400
    best = found["plan"]["best"]
    assert best["num_devices"] == 8
    assert set(best["mesh"]) == set(MESH_AXES)
    assert [best["mesh"][axis] for axis in MESH_AXES[2:]] == [1, 1, 1]
    assert sum(best["memory"].values()) == pytest.approx(best["memory_bytes"])
    assert sum(best["time_s"].values()) == pytest.approx(best["step_s"])
    assert best["memory_bytes"] < found["limit_bytes"] == 0.9 * 80e9
    assert 0.1 < best["mfu"] < 0.6
    # All parameters are gathered once, and each gradient sent as two integers.
    sent = {(x["axis"], x["collective"]): x for x in found["collectives"]}
    gathered = sent["fsdp", "all-gather"]["buffer_bytes"]
    assert gathered == pytest.approx(4 * 1_235_814_400, rel=1e-3)
    assert sent["fsdp", "reduce-scatter"]["buffer_bytes"] == 2 * gathered
    assert sum(x["sent_bytes"] for x in found["collectives"]) == pytest.approx(
        sum(best["sent_bytes"].values())
    )
    times = [best["step_s"], *(x["step_s"] for x in found["plan"]["runners_up"])]
    assert times == sorted(times)
    assert len(times) > 3
    assert all(x["why"].startswith("time ×") for x in found["plan"]["runners_up"])
    after = found["after_loss"]
    assert after["consistency"] == "exact"
    assert after["plan"]["best"]["num_devices"] + after["plan"]["num_idle"] == 7
    assert after["moving_s"] > 0
    assert after["plan"]["best"]["step_s"] > best["step_s"]
    assert found["profile"]["is_measured"] is True


def test_tables(plan, small):
    words = [small(), "--profile", "v5e", "--what-if-lose", "5"]
    said = plan(*words)
    assert "memory of a device" in said
    assert "all-reduce" in said
    assert "is measured by nobody yet" in said
    assert "Without 5 of these 8 devices" in said
    assert "the run keeps its bits" in said
    assert said.count("; the config's mesh") == 1
    found = plan(*words, "--consistency", "fast", "--json")
    assert found["consistency"] == "fast"
    assert found["after_loss"]["consistency"] == "equivalent"
    sums = plan(*words, "--json")["plan"]["best"]["memory"]["sums"]
    assert found["plan"]["best"]["memory"]["sums"] == sums / 2


MOE = """
devices = 8
[model]
factory = "models.moe:build"
[model.options]
num_layers = 1
[data]
factory = "tokens"
path = "nowhere"
sequence_length = 32
global_batch_size = 16
num_microbatches = 4
[optimizer]
learning_rate = 0.1
[train]
steps = 10
[mesh]
tensor = 2
"""


def test_axes_are_those_that_the_model_has_a_use_for(plan, tmp_path):
    path = tmp_path / "moe.toml"
    path.write_text(MOE)
    found = plan(path, "--json")
    assert found["current"]["mesh"] == dict(
        zip(MESH_AXES, (1, 4, 2, 1, 1), strict=True)
    )
    meshes = [found["plan"]["best"], *found["plan"]["runners_up"]]
    assert found["current"]["consistency"] == meshes[0]["consistency"]
    for choice in meshes:
        group = [choice["mesh"][axis] for axis in MESH_AXES[2:]]
        is_alike = group == [2, 1, 1]
        assert choice["consistency"] == ("exact" if is_alike else "equivalent")
    job = read_job(from_dict(tomllib.loads(MOE)), "exact")
    assert job.fixed == {}
    assert next(iter(job.facts.values())).divisors == {
        "tensor": 4,
        "expert": 4,
        "context": 32,
    }


@pytest.mark.parametrize("axis", ["tensor", "expert", "context"])
def test_what_a_group_exchanges_is_told(plan, tmp_path, axis):
    path = tmp_path / "moe.toml"
    path.write_text(MOE.replace("tensor = 2", f"{axis} = 2"))
    found = plan(path, "--axes", "fsdp", "--json")
    choices = [found["plan"]["best"], *(x for x in found["plan"]["runners_up"])]
    assert all(x["mesh"][axis] == 2 for x in choices)
    assert all(x["mesh"]["data"] == 1 for x in choices)
    assert all(x["consistency"] == "exact" for x in choices)
    rows = [x for x in found["collectives"] if x["axis"] == axis]
    assert {"all-reduce", "all-gather"} <= {x["collective"] for x in rows}
    sent = sum(x["sent_bytes"] for x in rows)
    assert sent == pytest.approx(found["plan"]["best"]["sent_bytes"][axis])
    said = plan(path, "--axes", "fsdp")
    assert f"{axis}  all-reduce" in said
    assert "microbatches" in said


def test_axes_of_the_command_line(plan, small):
    found = plan(small(), "--axes", "data", "--json")["plan"]
    meshes = [found["best"]["mesh"], *(x["mesh"] for x in found["runners_up"])]
    assert all(mesh["fsdp"] == mesh["tensor"] == 1 for mesh in meshes)
    assert "--axes: expected some of data,fsdp" in plan(
        small(), "--axes", "data,pipe", code=2
    )
    path = small(("[train]", "[mesh]\nfsdp = 1\ncontext = 16\n[train]"))
    assert "context" in plan(path, code=2)


def test_one_device_exchanges_nothing(plan, small):
    assert "Nothing is exchanged" in plan(small(), "--devices", "1")


def test_hosts_and_devices_are_those_of_the_command_line(plan, small):
    words = ["--devices", "12", "--devices-per-host", "4", "--hbm", "2GiB", "--json"]
    found = plan(small(), *words)
    assert (found["devices"], found["devices_per_host"]) == (12, 4)
    assert found["hbm_bytes"] == 2 * 2**30
    assert found["current"]["mesh"]["fsdp"] == 12
    best = found["plan"]["best"]
    assert best["num_devices"] + found["plan"]["num_idle"] == 12
    assert best["rounds"] == -(-12 // best["num_devices"])


def hbm(plan, path, factor, *args):
    """So many times the memory that the smallest of the best meshes needs."""
    found = plan(path, "--json", *args)["plan"]
    options = [found["best"], *found["runners_up"]]
    # A tenth is left to the runtime.
    least = min(x["memory_bytes"] for x in options) / 0.9
    return f"{least * factor / 1e6:.6f}MB"


def test_what_would_fit_is_said_and_is_true(plan, small):
    size = hbm(plan, small(), 0.8, *PLAIN)
    errors = plan(small(), "--hbm", size, *PLAIN, code=2)
    assert errors.count("\n") == 1
    assert "no mesh of 8 devices fits: fsdp=8 takes least" in errors
    assert "most of it sums" in errors
    assert "more than" in errors
    assert "What would fit: --hbm" in errors
    assert "consistency = fast" in errors
    plan(small(), "--hbm", size, "--consistency", "fast", *PLAIN)
    # And what is not said, as it makes another run: groups need less.
    found = plan(small(), "--hbm", size, "--json")["plan"]["best"]
    assert (found["mesh"]["tensor"] > 1, found["consistency"]) == (True, "equivalent")


def test_a_loss_that_leaves_no_room_is_refused(plan, small):
    size = hbm(plan, small(), 1.02, *PLAIN)
    plan(small(), "--hbm", size, *PLAIN)
    errors = plan(small(), "--hbm", size, "--what-if-lose", "7", *PLAIN, code=2)
    assert "--what-if-lose 7: no single device has the room" in errors
    assert "2 devices" in errors or "4 devices" in errors or "8 devices" in errors


def test_a_ramp_is_planned_at_its_largest_and_an_average_is_kept(plan, small):
    changed = small(
        ("num_microbatches = 12", 'num_microbatches = 12\nbatch_ramp = "5:24"'),
        ("steps = 10", "steps = 10\nema = 0.9"),
    )
    found = plan(changed, "--json")
    assert (found["global_batch_size"], found["num_microbatches"]) == (48, 24)
    job = read_job(from_dict(table(ema=0.9)), "exact")
    plain = read_job(from_dict(table()), "exact")
    (facts,), (bare,) = job.facts.values(), plain.facts.values()
    average = facts.state_bytes("opt_state") - bare.state_bytes("opt_state")
    assert average == bare.state_bytes("params")


def table(ema=None, **data):
    return {
        "model": {"factory": "models.mlp:build", "options": {"hidden_dim": 4}},
        "data": {"factory": "models.mlp:digits", "global_batch_size": 4}
        | {"num_microbatches": 2, **data},
        "optimizer": {"learning_rate": 0.1},
        "train": {"steps": 1} | ({} if ema is None else {"ema": ema}),
    }


@pytest.mark.parametrize("name", ["tokens", "documents"])
def test_shapes_of_built_in_data_are_those_that_it_makes(tmp_path, name):
    path = tmp_path / ("data.txt" if name == "documents" else "data.npy")
    if name == "documents":
        path = tmp_path / "data.jsonl"
        lines = [json.dumps({"text": "some words " * 9}) for _ in range(40)]
        path.write_text("\n".join(lines))
    else:
        np.save(path, np.arange(900, dtype=np.uint16) % 200)
    given = {"path": str(path), "sequence_length": 16, "global_batch_size": 4}
    batch = getattr(configured, name)(**given)(0)
    config = from_dict(table(factory=name, path="nowhere", sequence_length=16))
    found = abstract_microbatch(config)
    expected = {k: ((2, *x.shape[1:]), x.dtype) for k, x in batch.items()}
    assert {k: (x.shape, x.dtype) for k, x in found.items()} == expected


def test_bad_input_is_one_message(plan, small, tmp_path):
    def refused(*args):
        return plan(*args, code=2)

    assert "there is no such file" in refused(tmp_path / "none.toml")
    assert "expected cpu, h100" in refused(small(), "--profile", "h900")
    assert "such as 80GB, found '80'" in refused(small(), "--hbm", "80")
    assert "above 0" in refused(small(), "--hbm", "0GB")
    assert "fewer than the 8" in refused(small(), "--what-if-lose", "8")
    assert "--devices N" in refused(small(("devices = 8", "")))
    assert "has no 'buidl'" in refused(small(("mlp:build", "mlp:buidl")))
    assert "learning_rate" in refused(small(("learning_rate", "learning_rat")))
    errors = refused(small(("models.mlp:digits", "os:fspath")))
    assert "first batch is needed" in errors


def test_factories_are_found_below_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert importlib.util.find_spec("of_mine") is None
    find_modules()
    assert importlib.util.find_spec("of_mine") is not None
    find_modules()
    assert sys.path.count(str(tmp_path)) == 1
