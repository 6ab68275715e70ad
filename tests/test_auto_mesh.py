"""A mesh that is chosen: a run keeps its bits through all of them."""

import jax
import numpy as np
import pytest
from auto_meshes import APART, FREE, LATE, groups, mlp, planner, used, write_profile
from problems import consume, fields_of

import shardkit as sk
from shardkit.membership import Change
from shardkit.planner.auto_mesh import AutoMesh


@pytest.fixture
def free(tmp_path):
    """A profile by which all devices are best."""
    return write_profile(tmp_path, FREE)


@pytest.fixture
def late(tmp_path):
    """A profile by which four microbatches are best on four devices, and then two."""
    return write_profile(tmp_path, LATE)


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


def test_too_little_memory_for_one_device_cuts_the_state(make, tmp_path):
    apart = write_profile(tmp_path, APART)
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
    plain, events = make(**mlp(1, mesh=AutoMesh(profile=free)))
    by_one = [m.loss for m in consume(plain, 4)]
    [plan] = fields_of(events, "plan")
    assert groups(plan["mesh"]) == {}
    assert used(plan) == 1

    auto = AutoMesh(profile=free, axes=("tensor",), allow_equivalent=True)
    trainer, events = make(**mlp(1, mesh=auto, certify="always"))
    found = [m.loss for m in consume(trainer, 4, {1: 3, 2: 8})]
    np.testing.assert_allclose(found, by_one, rtol=1e-5)
    plans = fields_of(events, "plan")
    many, two, again = ({a: n for a, n in p["mesh"].items() if n > 1} for p in plans)
    assert again == many
    assert many["tensor"] > 2
    assert two == {"tensor": 2}
    told = [None, "equivalent", "equivalent"]
    assert [p["consistency"] for p in plans] == told
    before = fields_of(events, "reconfiguring")
    assert [x["consistency"] for x in before] == told[1:]
    assert [x["to_mesh"] for x in before] == [two, many]
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
    trainer, _ = make(**mlp(1, mesh=auto))
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
    options = mlp(1, mesh=auto, **saving)
    first, _ = make(**options)
    consume(first, 1)
    first.save()
    first.close()
    again, events = make(**options, devices=jax.devices()[:2])
    again.restore()
    if not allowed:
        with pytest.raises(sk.MeshError, match=r"tensor=\d needs .* allow_equivalent"):
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


def test_what_cannot_be_asked_for_is_told_all_at_once(make):
    with pytest.raises(sk.ConfigError) as caught:
        AutoMesh(axes=("tensor", "data"), tensor=0, context=2.0, memory_bytes=-1)
    for part in ("axes: expected some of", "tensor: expected", "context: expected"):
        assert part in str(caught.value)
    assert "memory_bytes: expected more than 0, found -1" in str(caught.value)
    with pytest.raises(sk.ConfigError, match="tensor: has the size 2, and is in axes"):
        AutoMesh(axes=("tensor",), tensor=2)
    with pytest.raises(sk.ConfigError) as caught:
        AutoMesh(axes=[["tensor"]], profile=3, memory_bytes=True)
    for part in ("axes: expected", "profile: expected", "memory_bytes: expected"):
        assert part in str(caught.value)
    with pytest.raises(sk.ConfigError, match="allow_equivalent: is of no use"):
        AutoMesh(allow_equivalent=True)
    with pytest.raises(sk.ConfigError, match="found 'automatic'"):
        make(mesh="automatic")
    with pytest.raises(sk.ConfigError, match="profile: expected cpu, h100"):
        make(mesh=AutoMesh(profile="h900"))
    with pytest.raises(sk.MeshError, match="at least one, found none"):
        make(mesh="auto", devices=[])


def test_whoever_gives_a_mesh_traces_nothing_for_it(make, monkeypatch):
    def fail(*args, **options):
        raise AssertionError("the planner was asked")

    monkeypatch.setattr("shardkit.planner.jobs.read_job", fail)
    make()
    with pytest.raises(AssertionError, match="was asked"):
        make(mesh="auto")
