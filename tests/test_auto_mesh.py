"""A mesh that is chosen: which, and that a run keeps its bits through all of them."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import consume, fields_of

import shardkit as sk
from shardkit.membership import Change
from shardkit.planner import profile as profiles
from shardkit.planner.auto_mesh import AutoMesh, find_profile
from shardkit.planner.jobs import read_job
from shardkit.planner.mesh_planner import MeshPlanner
from shardkit.ramp import BatchRamp

FREE = {
    "is_shared = true": "is_shared = false",
    "start_s = 5.0": "start_s = 0.0",
    "step_overhead_s = 2e-3": "step_overhead_s = 1e-6",
    "microbatch_overhead_s = 2e-4": "microbatch_overhead_s = 1e-6",
    "inside = 1e-4": "inside = 0.0",
    "between = 1e-4": "between = 0.0",
}
"""Changes to the profile of emulated devices: each computes as fast as all together,
and nothing but work and bytes takes time."""

LATE = FREE | {
    "inside = 1e-4": "inside = 1e-5",
    "microbatch_overhead_s = 2e-4": "microbatch_overhead_s = 1e-3",
}
"""And microbatches take long, so that devices are used only if they save one."""

APART = FREE | {"inside = 1e-4": "inside = 1.0"}
"""And a collective takes so long that one device is best."""


@pytest.fixture
def profile(tmp_path):
    """Writes a profile with changes; returns its path."""
    folder = Path(profiles.__file__).parent / "profiles"

    def write(changes):
        text = (folder / "cpu.toml").read_text()
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "profile.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def free(profile):
    """A profile by which all devices are best."""
    return profile(FREE)


@pytest.fixture
def late(profile):
    """A profile by which four microbatches are best on four devices, and then two."""
    return profile(LATE)


WIDTH, ROWS = 16, 60


def mlp(num_microbatches=12, **options):
    """`Trainer` arguments of a layer and back, which `tensor` can cut."""

    def init(key):
        up, down = jax.random.split(key)
        shapes = {"up": (up, (WIDTH, 4 * WIDTH)), "down": (down, (4 * WIDTH, WIDTH))}
        names = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
        return {
            name: sk.axes(jax.random.normal(key, shape) * 0.1, *names[name])
            for name, (key, shape) in shapes.items()
        }

    def loss(params, microbatch, key):
        hidden = jnp.tanh(microbatch["x"] @ params["up"])
        return jnp.mean((hidden @ params["down"] - microbatch["x"]) ** 2)

    def data(step):
        x = np.random.default_rng(step).normal(size=(ROWS, WIDTH))
        return {"x": x.astype(np.float32)}

    return {
        "init": init,
        "loss": loss,
        "data": data,
        "tx": optax.sgd(0.1, momentum=0.9),
        "axis_rules": {"embed": "fsdp", "mlp": "tensor"},
        "num_microbatches": num_microbatches,
        "certify": "off",
        **options,
    }


def planner(auto, *, num_microbatches=12, num_processes=1, **options):
    """What chooses meshes for that problem."""
    problem = mlp(num_microbatches)
    rows = jax.ShapeDtypeStruct((ROWS // num_microbatches, WIDTH), "float32")
    model = sk.Model(init=problem["init"], loss=problem["loss"])
    job = read_job(
        model,
        {"x": rows},
        problem["tx"],
        BatchRamp({0: num_microbatches}),
        axis_rules=problem["axis_rules"],
        **options,
    )
    found = find_profile(auto, jax.devices())
    return MeshPlanner(job, found, auto, num_processes=num_processes)


def used(fields):
    return math.prod(fields["mesh"].values())


def groups(mesh):
    return {a: n for a, n in mesh.items() if n > 1 and a not in ("data", "fsdp")}


def losses_and_digest(trainer, steps, script=None):
    losses = [m.loss_bits for m in consume(trainer, steps, script)]
    return losses, trainer.state_digest()


def test_no_bit_depends_on_the_meshes_that_are_chosen(make, free):
    alone, _ = make(**mlp(15, mesh=None, devices=jax.devices()[:1]))
    expected = losses_and_digest(alone, 5)
    trainer, events = make(**mlp(15, mesh=AutoMesh(profile=free)))
    assert losses_and_digest(trainer, 5, {1: 5, 2: 2, 4: 8}) == expected
    plans = fields_of(events, "plan")
    assert [p["num_devices"] for p in plans] == [8, 5, 2, 8]
    assert [p["consistency"] for p in plans] == [None, "exact", "exact", "exact"]
    assert [(used(p), p["num_idle"]) for p in plans] == [(8, 0), (5, 0), (2, 0), (8, 0)]
    changes = fields_of(events, "reconfigure")
    sizes = [{a: n for a, n in p["mesh"].items() if n > 1} for p in plans]
    assert [x["to_mesh"] for x in changes] == sizes[1:]


def test_what_is_told_of_a_plan_is_json_and_whole(free):
    plan = planner(AutoMesh(profile=free)).choose(8).plan
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan
    assert plan["step_s"] == pytest.approx(sum(plan["time_s"].values()))
    assert plan["memory_bytes"] == pytest.approx(sum(plan["memory"].values()))
    assert plan["memory_bytes"] <= plan["limit_bytes"] == 0.9 * 4e9
    times = [plan["step_s"], *(x["step_s"] for x in plan["runners_up"])]
    assert times == sorted(times)
    assert all(x["why"] for x in plan["runners_up"])


def test_too_little_memory_for_one_device_cuts_the_state(make, profile):
    apart = profile(APART)
    whole = planner(AutoMesh(profile=apart)).choose(8).plan
    assert used(whole) == 1
    assert whole["num_idle"] == 7
    auto = AutoMesh(profile=apart, memory_bytes=0.95 * whole["memory_bytes"] / 0.9)
    tight, events = make(**mlp(mesh=auto))
    consume(tight, 1)
    [plan] = fields_of(events, "plan")
    assert plan["mesh"]["fsdp"] > 1
    assert plan["memory_bytes"] <= plan["limit_bytes"] < whole["memory_bytes"]
    [missed] = [x for x in plan["too_large"] if x["mesh"] == whole["mesh"]]
    assert "memory over by" in missed["why"]
    up = tight.state.params["up"]
    assert len(up.sharding.device_set) == used(plan)
    assert up.addressable_shards[0].data.shape != up.shape


def test_a_mesh_that_has_no_room_is_refused_and_what_would_do_is_said(make):
    with pytest.raises(sk.ConfigError) as caught:
        make(**mlp(mesh=AutoMesh(profile="cpu", memory_bytes=1000)))
    message = str(caught.value)
    assert "mesh: no mesh of 8 devices fits" in message
    assert "takes least" in message
    assert "What would fit:" in message
    assert "of memory on each device" in message


def test_groups_are_chosen_where_that_is_allowed(make, free):
    """With fewer microbatches than devices only a group can use them all."""
    plain, events = make(**mlp(2, mesh=AutoMesh(profile=free)))
    by_one = [m.loss for m in consume(plain, 4)]
    [plan] = fields_of(events, "plan")
    assert groups(plan["mesh"]) == {}
    assert used(plan) == 2

    auto = AutoMesh(profile=free, axes=("tensor",), allow_equivalent=True)
    trainer, events = make(**mlp(2, mesh=auto, certify="always"))
    found = [m.loss for m in consume(trainer, 4, {1: 3, 2: 8})]
    np.testing.assert_allclose(found, by_one, rtol=1e-5)
    plans = fields_of(events, "plan")
    assert [used(p) for p in plans] == [8, 2, 8]
    assert [groups(p["mesh"]) for p in plans] == [
        {"tensor": 4},
        {"tensor": 2},
        {"tensor": 4},
    ]
    told = [None, "equivalent", "equivalent"]
    assert [p["consistency"] for p in plans] == told
    before = fields_of(events, "reconfiguring")
    assert [x["consistency"] for x in before] == told[1:]
    assert [x["to_mesh"] for x in before] == [
        {"tensor": 2},
        {"fsdp": 2, "tensor": 4},
    ]
    for change in fields_of(events, "reconfigure"):
        assert change["consistency"] == "equivalent"
        # No second step is computed, and nothing is claimed of one.
        assert change["certified"] is None
        assert change["move_certified"] is True
        names = [phase["name"] for phase in change["phases"]]
        assert "compare" in names
        assert not {"old_step", "new_step"} & {*names}


def test_an_equivalent_change_moves_every_bit(make, free):
    auto = AutoMesh(profile=free, axes=("tensor",), allow_equivalent=True)
    trainer, _ = make(**mlp(2, mesh=auto))
    consume(trainer, 2)
    before, digest = jax.tree.map(np.asarray, trainer.state), trainer.state_digest()
    controller = trainer._controller
    assert controller.moves_to(3)
    assert controller.reconfigure(3, Change(3)) is None
    after = jax.tree.map(np.asarray, trainer.state)
    assert len(trainer.state.params["up"].sharding.device_set) == 2
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert trainer.state_digest() == digest


def test_groups_keep_their_size_where_nothing_else_is_said(make, free):
    auto = AutoMesh(profile=free, axes=("tensor",))
    trainer, events = make(**mlp(2, mesh=auto, certify="first"))
    found = losses_and_digest(trainer, 5, {1: 4, 2: 3, 3: 6})
    fixed = sk.MeshSpec(tensor=4)
    alone, _ = make(**mlp(2, mesh=fixed, devices=jax.devices()[:4]))
    assert found == losses_and_digest(alone, 5)
    plans = fields_of(events, "plan")
    assert [p["num_devices"] for p in plans] == [8, 4, 6]
    assert [groups(p["mesh"]) for p in plans] == [{"tensor": 4}] * 3
    assert [x["certified"] for x in fields_of(events, "reconfigure")] == [True]
    [notice] = [
        fields["message"]
        for fields in fields_of(events, "notice")
        if "no change of devices" in fields["message"]
    ]
    assert "tensor=4 needs at least 4 devices, found 3" in notice
    assert "allow_equivalent" in notice


@pytest.mark.parametrize("chosen", [True, False])
def test_too_few_devices_that_are_left_end_a_run_with_what_would_do(make, free, chosen):
    mesh = sk.MeshSpec(tensor=4)
    if chosen:
        mesh = AutoMesh(profile=free, tensor=4)
    trainer, _ = make(**mlp(2, mesh=mesh))
    with pytest.raises(sk.MeshError) as caught:
        consume(trainer, 3, {1: sk.Lost(3)})
    message = str(caught.value)
    assert "step 1: devices are lost" in message
    assert "no mesh for the 3 that are left" in message
    assert "at least 4" in message
    assert "smaller" in message
    assert "checkpoint" in message


class Recorded:
    """A script that notes how many devices it is told that there are."""

    def __init__(self, script):
        self.told, self._source = [], sk.scripted(script)

    def __getattr__(self, name):
        return getattr(self._source, name)

    def poll(self, step, num_devices):
        self.told.append(num_devices)
        return self._source.poll(step, num_devices)


def test_idle_devices_are_counted_and_can_go_without_a_trace(make, late):
    trainer, events = make(**mlp(4, mesh=AutoMesh(profile=late)))
    source = Recorded({1: 7, 2: sk.Lost(6), 3: 8})
    metrics = list(trainer.run(steps=5, membership=source))
    assert source.told == [8, 8, 7, 6, 8]
    assert [m.num_devices for m in metrics] == [4] * 5
    # Neither has anything moved, nor was a state lost with devices that had none.
    assert fields_of(events, "reconfigure") == []
    assert [p["num_devices"] for p in fields_of(events, "plan")] == [8, 7, 6, 8]
    messages = [x["message"] for x in fields_of(events, "notice")]
    assert "step 1: 7 devices, of which 4 are in use, as before" in messages
    notes = fields_of(events, "plan")[0]["notes"]
    assert notes[0].startswith("4 of 8 devices stay idle; with all of them")


def test_devices_that_are_left_idle_still_have_their_shards(make, late):
    trainer, _ = make(**mlp(4, mesh=AutoMesh(profile=late)))
    consume(trainer, 1)
    placements = trainer._controller.placements
    old = placements.present
    assert old.num_devices == 4
    # Of three devices two are used; the third is there, and what it holds can be read.
    assert placements.on(3).num_devices == 2
    assert placements.lost(old, 3) == {3}


def test_groups_that_are_not_full_move_nothing(make):
    trainer, events = make(**mlp(2, mesh=sk.MeshSpec(tensor=2)))
    consume(trainer, 4, {0: 6, 2: 7})
    assert fields_of(events, "reconfigure") == []
    messages = [x["message"] for x in fields_of(events, "notice")]
    assert "step 2: 7 devices, of which 6 are in use, as before" in messages


def test_a_move_has_to_pay_in_the_steps_that_are_left(profile):
    auto = AutoMesh(profile=profile(FREE | {"start_s = 5.0": "start_s = 1e-3"}))
    found = planner(auto)
    old = found.choose(2).sizes
    assert math.prod(old.values()) == 2

    def sizes(steps_left, horizon=10**6):
        asked = {"old": old, "horizon": horizon, "steps_left": steps_left}
        return found.choose(8, **asked)

    moved = sizes(10**6)
    assert math.prod(moved.sizes.values()) == 8
    saved = found.choose(2).plan["step_s"] - moved.plan["step_s"]
    turn = moved.plan["move_s"] / saved
    assert sizes(math.ceil(turn) + 1).sizes == moved.sizes
    stays = sizes(math.floor(turn) - 1)
    assert stays.sizes == old
    assert stays.plan["num_idle"] == 6
    assert stays.plan["move_s"] == 0
    assert "moving takes 1" in stays.plan["notes"][0]
    assert "6 of 8 devices stay idle" in stays.plan["notes"][1]
    # What a guess has prepared is not asked to pay: it is the same whenever it comes.
    assert found.choose(8, old=old, horizon=10**6).sizes == moved.sizes
    # A run that is at its end when it gets there would go nowhere.
    assert sizes(None, horizon=1).sizes == old


def test_a_change_takes_what_was_prepared(make, late):
    options = {"mesh": AutoMesh(profile=late), "standby": 1, "standby_counts": [3]}
    trainer, events = make(**mlp(4, **options))
    consume(trainer, 4)
    assert trainer.wait_for_standby(60)
    # Where seven devices are no change, three mean what was prepared when it had eight.
    consume(trainer, 10, {4: 7, 7: 3})
    [change] = fields_of(events, "reconfigure")
    assert (change["to_devices"], change["was_ready"]) == (2, True)
    assert trainer.compiles["step"] == 2


@pytest.mark.parametrize("allowed", [True, False])
def test_a_run_that_goes_on_keeps_its_groups(make, free, tmp_path, allowed):
    saving = {"checkpoint": sk.CheckpointConfig(directory=tmp_path / "saved", every=9)}
    auto = AutoMesh(profile=free, axes=("tensor",), allow_equivalent=allowed)
    options = mlp(2, mesh=auto, **saving)
    first, _ = make(**options)
    consume(first, 1)
    first.save()
    first.close()
    again, events = make(**options, devices=jax.devices()[:2])
    again.restore()
    if not allowed:
        with pytest.raises(sk.MeshError, match=r"tensor=4 needs .* allow_equivalent"):
            consume(again, 2)
        return
    assert again.state_digest() == first.state_digest()
    [plan] = fields_of(events, "plan")
    assert groups(plan["mesh"]) == {"tensor": 2}
    assert plan["consistency"] == "equivalent"


def test_snapshots_say_in_which_groups_their_run_was(make, free):
    auto = AutoMesh(profile=free, axes=("tensor",))
    options = mlp(2, mesh=auto)
    trainer, _ = make(**options, snapshot=sk.SnapshotConfig(every=1))
    consume(trainer, 2)
    controller = trainer._controller
    controller._snapshots.wait()
    mesh = dict(controller.placements.present.mesh.shape)
    assert controller._snapshots.mesh == mesh
    assert groups(mesh) == {"tensor": 4}


def test_every_process_has_a_device_in_use(profile):
    auto = AutoMesh(profile=profile(APART))
    one = planner(auto).choose(8).sizes
    assert math.prod(one.values()) == 1
    five = planner(auto, num_processes=5).choose(8).sizes
    assert math.prod(five.values()) >= 5
    again = planner(auto, num_processes=5).choose(8).sizes
    assert again == five


def test_an_optimizer_in_host_memory_takes_none_of_a_device(free):
    auto = AutoMesh(profile=free)
    plans = [planner(auto, offload=x).choose(8).plan for x in (False, True)]
    assert [p["memory"]["optimizer"] > 0 for p in plans] == [True, False]
    assert [p["time_s"]["offload"] > 0 for p in plans] == [False, True]


def test_sums_of_floats_keep_no_bits(free):
    for exact, kind in ((True, "exact"), (False, "equivalent")):
        found = planner(AutoMesh(profile=free), exact=exact)
        chosen = found.choose(4, old=found.choose(8).sizes)
        assert chosen.plan["consistency"] == kind


def fake(kind, limit=None, platform="gpu"):
    stats = None if limit is None else {"bytes_limit": limit}
    return SimpleNamespace(
        device_kind=kind,
        platform=platform,
        process_index=0,
        memory_stats=lambda: stats,
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("cpu", "cpu"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
    ],
)
def test_devices_say_what_they_are(kind, name):
    expected = profiles.load_profile(name)
    assert find_profile(AutoMesh(), [fake(kind)]) == expected
    pool = [fake(kind, 7e9), fake(kind, 5e9)]
    least = dataclasses.replace(expected, memory_bytes=5e9)
    assert find_profile(AutoMesh(), pool) == least
    given = find_profile(AutoMesh(memory_bytes=2e9, profile="h100"), pool)
    assert (given.memory_bytes, given.name) == (2e9, profiles.load_profile("h100").name)


@pytest.mark.parametrize("kind", ["NVIDIA GH200 480GB", "TPU v4", "TPU v6 lite"])
def test_devices_that_nobody_knows_are_asked_about(kind):
    with pytest.raises(sk.ConfigError, match=r"no profile of .*profile.*cpu, h100"):
        find_profile(AutoMesh(), [fake(kind)])


def test_what_cannot_be_asked_for_is_told_all_at_once(make):
    with pytest.raises(sk.ConfigError) as caught:
        AutoMesh(axes=("tensor", "data"), tensor=0, context=2.0, memory_bytes=-1)
    for part in ("axes: expected some of", "tensor: expected", "context: expected"):
        assert part in str(caught.value)
    assert "memory_bytes: expected more than 0, found -1" in str(caught.value)
    with pytest.raises(sk.ConfigError, match="tensor: has the size 2, and is in axes"):
        AutoMesh(axes=("tensor",), tensor=2)
    with pytest.raises(sk.ConfigError, match="allow_equivalent: is of no use"):
        AutoMesh(allow_equivalent=True)
    with pytest.raises(sk.ConfigError, match="found 'automatic'"):
        make(mesh="automatic")
    with pytest.raises(sk.ConfigError, match="profile: expected cpu, h100"):
        make(mesh=AutoMesh(profile="h900"))


def test_whoever_gives_a_mesh_traces_nothing_for_it(make, monkeypatch):
    def fail(*args, **options):
        raise AssertionError("the planner was asked")

    monkeypatch.setattr("shardkit.planner.jobs.read_job", fail)
    make()
    with pytest.raises(AssertionError, match="was asked"):
        make(mesh="auto")
