"""`shardkit plan`: what it chooses beside the mesh."""

import contextlib
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.command.plan_job import Choices, read_job
from shardkit.config import from_dict
from shardkit.errors import ConfigError
from shardkit.mesh import MESH_AXES
from shardkit.planner.meshes import Topology
from shardkit.planner.profile import load_profile
from shardkit.planner.quotas import Quotas
from shardkit.planner.search import search


@pytest.fixture
def plan(verb):
    return verb("plan")


def gpt(*, model=(), data=(), train=()):
    options = {"num_layers": 1, "embed_dim": 64, "remat": True, **dict(model)}
    rows = {"global_batch_size": 24, "num_microbatches": 12, "sequence_length": 64}
    return {
        "model": {"factory": "models.gpt:build", "options": options},
        "data": {"factory": "tokens", "path": "nowhere", **rows, **dict(data)},
        "optimizer": {"learning_rate": 0.1},
        "train": {"steps": 10, **dict(train)},
    }


@pytest.fixture
def gpts(tmp_path):
    """Writes a config of a small GPT with changes to its tables."""

    def write(**changes):
        tables = gpt(**changes)
        tables["model.options"] = tables["model"].pop("options")
        lines = [
            f"{name}.{key} = {json.dumps(value)}"
            for name, table in tables.items()
            for key, value in table.items()
        ]
        path = tmp_path / "gpt.toml"
        path.write_text("\n".join(["devices = 8", *lines]))
        return path

    return write


CHOICES = ("--remat", "--offload", "--microbatches", "24,12")


def test_what_is_chosen_beside_the_mesh_is_the_best_of_all_configs():
    choices = Choices(remat="remat", offload=True, num_microbatches=[24, 12])
    job = read_job(from_dict(gpt()), "exact", choices=choices)
    # The oracle: a config for each choice, of which each has its best mesh.
    alone = {}
    for remat, num, away in itertools.product((True, False), (12, 24), (0, 1)):
        config = gpt(
            model={"remat": remat},
            data={"num_microbatches": num},
            train={"offload": bool(away)},
        )
        key = (f"remat={remat}".lower(), num, bool(away))
        alone[key] = read_job(from_dict(config), "exact")
    topology, h200 = Topology(8, 8), load_profile("h200")
    roomy = search(job, topology, h200).best.memory_bytes
    chosen = set()
    for part in (2.0, 0.9, 0.6, 0.3, 0.2):
        limit = {"memory_limit_bytes": part * roomy}
        best = search(job, topology, h200, **limit).best
        found = {}
        for key, other in alone.items():
            with contextlib.suppress(ConfigError):
                found[key] = search(other, topology, h200, **limit).best
        key = min(found, key=lambda key: found[key].step_s)
        assert (best.remat, best.num_microbatches, best.offload) == key
        assert best.step_s == pytest.approx(found[key].step_s)
        assert best.memory == pytest.approx(found[key].memory)
        chosen.add(key)
    assert len(chosen) > 2


def test_a_mesh_is_told_with_all_that_could_be_chosen_beside_it(plan, gpts):
    found = plan(gpts(), "--profile", "h200", "--json", *CHOICES)
    best = found["plan"]["best"]
    assert best["step_s"] == found["otherwise"][0]["step_s"]
    assert len(found["otherwise"]) == 8
    for choice in found["otherwise"]:
        assert choice["mesh"] == best["mesh"]
        words = "another run"
        if choice["num_microbatches"] == 12:
            groups = [choice["mesh"][axis] for axis in MESH_AXES[2:]]
            is_alike = choice["remat"] == "remat=true" and groups == [1, 1, 1]
            words = "exact" if is_alike else "equivalent"
        assert choice["consistency"] == words


def test_what_was_chosen_stays_chosen_after_a_loss(plan, gpts):
    words = [gpts(), "--profile", "h200", "--what-if-lose", "3", *CHOICES]
    found = plan(*words, "--json")
    best, after = found["plan"]["best"], found["after_loss"]["plan"]
    others = [after["best"], *after["runners_up"]]
    kept = ("remat", "offload", "num_microbatches")
    assert len(others) > 1
    assert all(x[key] == best[key] for x in others for key in kept)
    assert found["after_loss"]["consistency"] == "exact"
    said = plan(*words)
    assert "more, which --json has" in said
    assert said.count("; the config's mesh") == 1
    assert f"{best['num_microbatches']} microbatches" in said


def test_a_job_that_offloading_makes_room_for_is_not_refused(plan, gpts):
    path, words = gpts(), ["--profile", "h200", "--axes", "data", "--devices", "1"]
    chosen = plan(path, *words, "--offload", "--json")
    least = min(x["memory_bytes"] for x in chosen["otherwise"])
    words += ["--hbm", f"{least * 1.01 / 0.9 / 1e9:.12f}GB"]
    assert "offload = true" in plan(path, *words, code=2)
    assert plan(path, *words, "--offload", "--json")["plan"]["best"]["offload"] is True
    assert plan(gpts(train={"offload": True}), *words, "--json")["plan"]["best"]


def test_slow_devices_compute_less(plan, gpts):
    words = [gpts(), "--axes", "data", "--profile", "h200", "--json"]
    found = plan(*words, "--speeds", "1,1,1,1,0.5,0.5,0.5,0.5")
    best = found["plan"]["best"]
    # Of 12 microbatches the fast ones compute two each, and the slow ones one.
    assert (best["mesh"]["data"], best["rounds"]) == (8, pytest.approx(2))
    assert found["current"]["rounds"] == pytest.approx(2)
    words += ["--devices", "2", "--what-if-lose", "1", "--speeds"]
    found, same = plan(*words, "2,1"), plan(*words, "1,0.5")
    assert found == same
    best, after = found["plan"]["best"], found["after_loss"]["plan"]["best"]
    assert (best["rounds"], best["most_microbatches"]) == (pytest.approx(8), 8)
    # Of the two it may be the faster one; the other takes twice as long.
    assert (after["rounds"], after["most_microbatches"]) == (24, 12)
    assert after["memory"]["batch"] * 8 == best["memory"]["batch"] * 12


def test_what_slow_devices_send_is_no_more(plan, gpts):
    words = [gpts(), "--axes", "tensor", "--profile", "h200", "--json", "--devices"]
    fast, slow = plan(*words, "2"), plan(*words, "3", "--speeds", "1,0.5,0.5")
    found = [
        (choice["sent_bytes"]["tensor"], choice["memory"]["batch"])
        for plan in (fast["plan"], slow["plan"])
        for choice in (plan["best"], *plan["runners_up"])
        if choice["mesh"]["tensor"] == 2
    ]
    assert len(found) == 2
    assert found[0] == found[1]


@given(
    st.lists(st.sampled_from([1.0, 0.75, 0.5, 0.3]), min_size=1, max_size=9),
    st.integers(1, 40),
)
def test_nobody_computes_more_microbatches_than_there_is_memory_for(speeds, num):
    quotas = Quotas(Topology(len(speeds), 8, tuple(speeds)), 1)
    for groups in range(1, len(speeds) + 1):
        [most] = quotas.most(num, quotas.rounds(num, np.array([groups])))
        assert 0 <= most - max(quotas.counts(num, groups)) <= 1


def test_a_ramp_has_the_microbatches_of_its_largest_batch(plan, gpts):
    path = gpts(data={"batch_ramp": "5:48"})
    found = plan(path, "--profile", "h200", "--remat", "--offload", "--json")
    assert {x["num_microbatches"] for x in found["otherwise"]} == {48}
    assert len(found["otherwise"]) == 4


def test_a_config_that_has_its_mesh_chosen_is_compared_with_that(plan, gpts):
    path = gpts()
    path.write_text(path.read_text() + "\nmesh.auto = true\n")
    words = [path, "--profile", "h200", "--json"]
    alone = plan(*words)["plan"]["best"]
    room = alone["memory_bytes"] * 0.97 / 0.9
    words += ["--hbm", f"{room / 1e9:.12f}GB"]
    other = plan(*words)["plan"]["best"]
    found = plan(*words, "--offload", "--microbatches", "24")
    assert found["current"]["mesh"] == other["mesh"] != alone["mesh"]
    assert found["current"]["fits"]


def test_a_mesh_that_was_not_looked_for_may_be_faster(plan, gpts):
    path = gpts()
    path.write_text(path.read_text() + "\nmesh.data = -1\nmesh.fsdp = 1\n")
    said = plan(path, "--profile", "h200", "--axes", "tensor")
    assert "but its sizes were not looked for; the config's mesh" in said


OPTIONS = """
from models import gpt

def build(policy="all", wide=False, **options):
    remat = {True: True, False: False, "all": True}[policy]
    return gpt.build(remat=remat, mlp_dim=256 if wide else 128, **options)
"""


def test_an_option_that_makes_another_model_is_no_remat(
    plan, gpts, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "optional.py").write_text(OPTIONS)
    text = gpts().read_text().replace("models.gpt", "optional")
    text = text.replace("model.options.remat = true", 'model.options.policy = "all"')
    (tmp_path / "gpt.toml").write_text(text)
    words = [tmp_path / "gpt.toml", "--profile", "h200", "--remat"]
    assert "this one makes another model" in plan(*words, "wide", code=2)
    # What is neither on nor off is the config's own, and stays among the choices.
    found = plan(*words, "policy", "--json")
    assert found["current"]["remat"] == "policy=all"
    remats = {choice["remat"] for choice in found["otherwise"]}
    assert remats == {"policy=all", "policy=true", "policy=false"}


def test_offloading_is_tried_where_it_can_be(plan, gpts):
    errors = plan(gpts(), "--profile", "cpu", "--offload", code=2)
    assert "in the host's memory already" in errors
    errors = plan(gpts(train={"offload": True}), "--offload", code=2)
    assert "without it both are tried" in errors


def test_choices_that_cannot_be_are_one_message(plan, gpts):
    def refused(*words, **changes):
        return plan(gpts(**changes), *words, code=2)

    assert "divide the 24 rows of a step, found 7" in refused("--microbatches", "8,7")
    assert "1 or more, found 'x'" in refused("--microbatches", "x")
    assert "makes another model" in refused("--remat", "scan_layers")
    errors = refused("--remat", "sequence_parallel")
    assert "makes no difference to its work" in errors
    errors = refused("--remat", "nothing_like_it")
    assert "unknown option 'nothing_like_it'; the options are" in errors
    assert "did you mean 'remat'? the options" in refused("--remat", "remta")
    for speeds in ("1,2", "1,1,1,1,1,1,1,0", "1,x"):
        assert "speeds" in refused("--speeds", speeds)
    ramp = {"batch_ramp": "5:48"}
    assert "of a batch_ramp" in refused("--microbatches", "any", data=ramp)
