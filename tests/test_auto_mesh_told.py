"""A mesh that is chosen: in configs, in `shardkit plan`, and in what a run reports."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest
from problems import fields_of
from reported import CHANGE, CONFIG, Metrics, emit_change, open_run
from stored_runs import store_run
from test_plan_verb import SMALL

import shardkit as sk
from shardkit import cli
from shardkit.build import build_mesh, build_trainer
from shardkit.certificate import Certificates
from shardkit.command.plan_job import read_job
from shardkit.config import differences, from_dict, load, to_dict
from shardkit.errors import ConfigError
from shardkit.mesh import MeshSpec
from shardkit.planner.auto_mesh import AutoMesh, find_profile
from shardkit.planner.mesh_planner import MeshPlanner
from shardkit.report import Report
from shardkit.report.jsonl import read_records
from shardkit.report.page_data import page_data
from shardkit.report.promises import reasons_to_differ
from shardkit.report.stored_run import StoredRun
from shardkit.report.twin import compare_runs

AUTO = """
[mesh]
auto = true
profile = "cpu"
memory = "1GB"
"""


@pytest.fixture
def config(tmp_path):
    """Writes a config with a section `[mesh]`; returns its path."""

    def write(mesh=AUTO):
        path = tmp_path / "small.toml"
        path.write_text(SMALL + mesh)
        return path

    return write


def test_a_config_asks_for_a_mesh_that_is_chosen(config):
    asked = build_mesh(load(config()).mesh)
    assert asked == AutoMesh(profile="cpu", memory_bytes=1e9)
    more = (
        '[mesh]\nauto = true\naxes = ["tensor"]\nallow_equivalent = true\ncontext = 2'
    )
    found = load(config(more))
    assert build_mesh(found.mesh) == AutoMesh(
        axes=("tensor",), context=2, allow_equivalent=True
    )
    assert from_dict(to_dict(found)) == found
    assert build_mesh(CONFIG.mesh) == MeshSpec()


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("auto = true\nfsdp = 4", "data and fsdp are chosen with auto = true"),
        ('profile = "cpu"\nmemory = "1GB"', "profile, memory: of no use without auto"),
        ('auto = true\nmemory = "80"', "memory: expected a size above 0 in GB"),
    ],
)
def test_what_does_not_go_together_in_a_config_is_refused(config, mesh, said):
    with pytest.raises(ConfigError) as caught:
        load(config(f"[mesh]\n{mesh}"))
    assert said in str(caught.value)
    assert "[mesh]" in str(caught.value)


def test_a_flag_has_the_mesh_chosen_whatever_the_config_says(config):
    path = str(config("[mesh]\ndata = 2\ntensor = 2"))
    assert not cli.parse_arguments([path]).config.mesh.auto
    mesh = cli.parse_arguments([path, "--mesh", "auto"]).config.mesh
    assert build_mesh(mesh) == AutoMesh(tensor=2)
    with pytest.raises(ConfigError, match="--mesh"):
        cli.parse_arguments([path, "--mesh", "automatic"])


def test_a_trainer_takes_what_the_plan_says(config, verb, tmp_path):
    path = config()
    found = verb("plan")(path, "--what-if-lose", "3", "--json")
    wanted = load(path)
    events = sk.EventLog()
    told = []
    events.subscribe(told.append)
    trainer, _ = build_trainer(
        wanted,
        devices=jax.devices(),
        checkpoints=tmp_path / "checkpoints",
        events=events,
    )
    with trainer:
        assert len(trainer.state.params) > 0
    [plan] = fields_of(told, "plan")
    best = found["plan"]["best"]
    for name in ("mesh", "step_s", "time_s", "memory_bytes", "memory"):
        assert plan[name] == best[name], name
    assert plan["limit_bytes"] == found["limit_bytes"] == 0.9e9
    assert plan["num_idle"] == found["plan"]["num_idle"]
    others = [(x["mesh"], x["why"]) for x in found["plan"]["runners_up"]]
    assert [(x["mesh"], x["why"]) for x in plan["runners_up"]] == others
    assert found["current"]["mesh"] == best["mesh"]
    # And so does what it would do after a loss.
    auto = build_mesh(wanted.mesh)
    profile = find_profile(auto, jax.devices())
    planner = MeshPlanner(read_job(wanted, "exact"), profile, auto)
    after = planner.choose(5, old=plan["mesh"], horizon=wanted.train.steps).plan
    lost = found["after_loss"]
    assert after["mesh"] == lost["plan"]["best"]["mesh"]
    assert after["notes"] == lost["plan"]["notes"]
    assert after["move_s"] == lost["moving_s"]
    assert after["consistency"] == lost["consistency"] == "exact"


def test_a_plan_of_a_chosen_mesh_says_so(config, verb):
    assert "the one that is chosen, with auto = true" in verb("plan")(config())
    groups = config("[mesh]\nauto = true\ntensor = 4")
    best = verb("plan")(groups, "--json")["plan"]["best"]["mesh"]
    assert best["tensor"] == 4
    errors = verb("plan")(groups, "--what-if-lose", "5", code=2)
    assert "--what-if-lose 5: no mesh of 3 devices: tensor=4 needs 4" in errors


PLAN = {
    "step": 5,
    "num_devices": 8,
    "num_idle": 1,
    "mesh": {"data": 7, "fsdp": 1},
    "step_s": 0.25,
    "memory_bytes": 2.0**30,
    "limit_bytes": 2.0**32,
    "runners_up": [{"mesh": {"data": 1, "fsdp": 7}, "why": "time ×1.20"}],
    "notes": ["1 of 8 devices stay idle"],
    "consistency": "equivalent",
}
EQUIVALENT = CHANGE | {
    "consistency": "equivalent",
    "from_mesh": {"tensor": 4},
    "certified": None,
}


def test_a_plan_and_an_equivalent_change_are_told(tmp_path, terminal, out):
    directory, log = open_run(tmp_path / "run"), sk.EventLog()
    with Report(directory, terminal, extras=False) as report:
        log.subscribe(report.event)
        report.begin(0)
        log.emit("plan", **PLAN)
        names = ("step", "from_devices", "to_devices", "from_mesh", "to_mesh")
        before = {name: EQUIVALENT[name] for name in (*names, "consistency")}
        log.emit("reconfiguring", **before)
        log.emit("reconfigure", **EQUIVALENT)
        report.step(Metrics(5))
    lines = out.getvalue().splitlines()
    [plan] = [line for line in lines if "predicted" in line]
    assert plan.startswith("step 5: mesh data=7 for 8 devices: 250 ms a step predicted")
    assert plan.endswith("1 of 4 GiB a device, equivalent")
    assert "  1 of 8 devices stay idle" in lines
    assert (
        "step 5: 8 -> 3 devices (tensor=4 -> fsdp=3): equivalent, to rounding" in lines
    )
    [change] = [line for line in lines if "moved" in line]
    assert change.endswith("equivalent, the move certified")
    kept = {record["event"]: record for record in read_records(directory.events)}
    assert kept["plan"].items() >= PLAN.items()
    assert kept["reconfiguring"]["consistency"] == "equivalent"
    data = page_data(StoredRun.read(directory.path))
    texts = [mark.text for mark in data.marks]
    assert "mesh chosen: data=7; 1 of 8 devices stay idle" in texts
    [(is_proven, words)] = data.certificates
    assert is_proven is None
    assert "rounds otherwise" in words
    assert "every bit of the state was moved" in words
    assert any(text.endswith("equivalent, the move certified") for text in texts)


def test_runs_in_other_groups_are_promised_no_bits(tmp_path):
    first = store_run(tmp_path / "first")
    second = store_run(tmp_path / "second")
    text = (second / "metrics.jsonl").read_text()
    old, new = json.dumps(CHANGE["to_mesh"]), json.dumps({"fsdp": 3, "tensor": 2})
    assert old in text
    (second / "metrics.jsonl").write_text(text.replace(old, new))
    a, b = StoredRun.read(first), StoredRun.read(second)
    assert reasons_to_differ(a, a) == []
    [reason] = reasons_to_differ(a, b)
    assert str(reason).startswith(
        "groups of devices single device / single device then"
    )

    def stored(path):
        return SimpleNamespace(
            metrics=path / "metrics.jsonl",
            summary=lambda: {"steps": 20, "state_digest": "aa", "eval_loss": None},
        )

    assert compare_runs(stored(first), stored(first)).is_promised
    other = compare_runs(stored(first), stored(second))
    assert not other.is_promised
    assert "equal to rounding" in other.rows()["promised"]


def test_a_change_is_told_as_before_where_bits_stay(tmp_path, terminal, out):
    directory, log = open_run(tmp_path / "run"), sk.EventLog()
    with Report(directory, terminal, extras=False) as report:
        log.subscribe(report.event)
        report.begin(0)
        emit_change(log)
    assert "equivalent" not in out.getvalue()


def placed(ids, sizes, count=4):
    devices = jax.devices()
    mesh = MeshSpec(**sizes).build([devices[i] for i in ids])
    found = SimpleNamespace(mesh=mesh, grid=SimpleNamespace(num_microbatches=count))
    found.at = lambda step: found
    return found


def test_only_what_was_compared_is_trusted():
    certificates = Certificates("first", stop_on_failure=True, events=sk.EventLog())
    four, two = placed([0, 1, 2, 3], {}), placed([0, 1], {})
    cut = placed([0, 1, 2, 3], {"tensor": 2})
    others = placed([0, 1, 2], {}), placed([0], {})
    wanted = certificates.are_wanted

    def judge(old, new):
        certificates.judge(SimpleNamespace(old=old, new=new), [], 3)

    assert wanted(four, two)
    judge(four, two)
    assert not wanted(two, four)
    # The same devices in groups are another program, and so is another grid.
    assert wanted(two, cut)
    assert wanted(two, placed([0, 1, 2, 3], {}, count=8))
    judge(*others)
    # Each of these two pairs agrees; between them nothing was compared.
    assert wanted(four, others[0])
    judge(two, others[1])
    assert not wanted(four, others[0])


def test_the_event_of_a_change_survives_older_runs(tmp_path):
    path = store_run(tmp_path / "run")
    records = read_records(path / "metrics.jsonl")
    with (path / "metrics.jsonl").open("w") as file:
        for record in records:
            for name in ("consistency", "move_certified"):
                record.pop(name, None)
            file.write(json.dumps(record) + "\n")
    [(is_proven, words)] = page_data(StoredRun.read(path)).certificates
    assert is_proven
    assert "equivalent" not in words


def test_a_config_that_changes_its_mesh_is_the_same_run():
    auto = dataclasses.replace(CONFIG.mesh, auto=True)
    assert differences(CONFIG, dataclasses.replace(CONFIG, mesh=auto)) == {}
