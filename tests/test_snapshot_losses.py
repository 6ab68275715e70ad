"""Runs that lose devices and go on from what is in host memory."""

import itertools
import random
import threading
import time

import jax
import numpy as np
import pytest
from problems import consume, fields_of
from snapshotted import Recorder
from test_trainer import depends_on_the_device

import shardkit as sk
from shardkit.digest import combine_digests
from shardkit.mesh import device_ids
from shardkit.placement import Placement
from shardkit.snapshot.image import read_image
from shardkit.snapshot.restore import restore
from shardkit.snapshot.store import HostMemory
from shardkit.testing import run_digest

TIMEOUT_S = 60
FLAT = sk.MeshSpec(data=1, fsdp=-1)
EVERY_STEP = sk.SnapshotConfig()


class Losing:
    """A script of which lost devices lose their memory: nothing can be read there.

    Args:
        trainer: Whose.
        script: As for `sk.scripted`.
        also: Called first at every loss, with the ids of the lost devices.
    """

    def __init__(self, trainer, script, also=lambda lost: None):
        self._controller, self._also = trainer._controller, also
        self._script = sk.scripted(script)

    def __getattr__(self, name):
        return getattr(self._script, name)

    def poll(self, step, num_devices):
        change = self._script.poll(step, num_devices)
        if change is not None and change.lost:
            placement, state = self._controller.start()
            # Its copies on the devices may go as well, but are there before.
            self._controller._snapshots.hold()
            left = self._controller.placements.on(change.num_devices)
            lost = set(device_ids(placement.mesh)) - set(device_ids(left.mesh))
            self._also(lost)
            wipe(state, lost)
        return change


def wipe(tree, lost):
    """Deletes what devices hold of a tree of arrays."""
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            if shard.device.id in lost:
                shard.data.delete()


def lose(trainer, steps, script, **options):
    """Trains through losses; returns which steps were computed."""
    membership = Losing(trainer, script, **options)
    return [m.step for m in trainer.run(steps, membership=membership)]


@pytest.fixture
def expected(make):
    """The digest of a run that nothing happens to, by the number of its steps."""

    def expected(steps, **options):
        twin, _ = make(certify="off", **options)
        return run_digest(twin, steps)["state"]

    return expected


@pytest.mark.parametrize(
    "seed",
    [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))],
)
def test_losses_at_any_step_cost_none_and_are_certified(make, expected, seed):
    draw = random.Random(seed)
    steps = sorted(draw.sample(range(1, 9), 3))
    counts = draw.sample(range(1, 5), 3)
    script = dict(zip(steps, map(sk.Lost, sorted(counts, reverse=True)), strict=True))
    mesh = draw.choice([FLAT, sk.MeshSpec(data=2, fsdp=-1)])
    trainer, events = make(mesh=mesh, snapshot=EVERY_STEP, certify="always")
    assert lose(trainer, 10, script) == list(range(10))
    assert trainer.state_digest() == expected(10)
    changes = fields_of(events, "reconfigure")
    assert [change["certified"] for change in changes] == [True] * 3
    for rewind in fields_of(events, "rewind"):
        assert rewind["repeats"] == 0
        assert rewind["source"] == "snapshot"
    if mesh == FLAT:
        # Of the last of eight devices nothing but padding would be lost.
        assert fields_of(events, "rewind")


def test_survivors_are_certified_by_the_snapshot_before(make, expected):
    trainer, events = make(snapshot=EVERY_STEP, certify="always")
    # The second replica survives whole.
    assert lose(trainer, 6, {3: sk.Lost(4)}) == list(range(6))
    assert trainer.state_digest() == expected(6)
    [change] = fields_of(events, "reconfigure")
    assert change["certified"] is True
    assert fields_of(events, "rewind") == []
    names = [phase["name"] for phase in change["phases"]]
    assert names == [
        *("derive", "plan", "move", "compile", "compile", "old_digest", "batch"),
        *("restore", "new_step", "new_digest"),
    ]


@pytest.mark.parametrize(
    ("certify", "verdicts"),
    [("first", [True, None]), ("off", [None, None])],
)
def test_certificates_after_a_loss_come_when_they_are_wanted(make, certify, verdicts):
    trainer, events = make(mesh=FLAT, snapshot=EVERY_STEP, certify=certify)
    lose(trainer, 9, {2: sk.Lost(4), 4: 8, 6: sk.Lost(4)})
    first, _, second = fields_of(events, "reconfigure")
    assert [first["certified"], second["certified"]] == verdicts


def test_a_run_that_computed_other_bits_before_the_loss_is_stopped(make):
    options = {"mesh": FLAT, "snapshot": EVERY_STEP, "certify": "always"}
    trainer, events = make(loss=depends_on_the_device, **options)
    with pytest.raises(sk.CertificateError, match=r"step 2: .*kernel") as caught:
        lose(trainer, 5, {3: sk.Lost(4)})
    assert "on the new devices, with what the old ones left" in str(caught.value)
    # It stands where the lost devices had got to, and can go on.
    assert trainer.step == int(trainer.state.step) == 3
    assert [m.num_devices for m in trainer.run(5)] == [4, 4]

    trainer, events = make(
        loss=depends_on_the_device, on_failed_certificate="continue", **options
    )
    assert lose(trainer, 5, {3: sk.Lost(4)}) == list(range(5))
    [change] = fields_of(events, "reconfigure")
    assert change["certified"] is False


def test_rarer_snapshots_repeat_the_steps_since(make, expected):
    snapshot = sk.SnapshotConfig(every=3)
    trainer, events = make(mesh=FLAT, snapshot=snapshot, certify="always")
    seen = lose(trainer, 8, {5: sk.Lost(3)})
    assert seen == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7]
    assert trainer.state_digest() == expected(8)
    [rewind] = fields_of(events, "rewind")
    assert rewind == {"step": 3, "repeats": 2, "source": "snapshot"}
    [change] = fields_of(events, "reconfigure")
    assert change["certified"] is None
    taken = [fields["step"] for fields in fields_of(events, "snapshot")]
    assert taken == [0, 3, 6]


def test_the_newest_of_snapshots_and_checkpoints_wins(make, expected, tmp_path):
    for every, step, source in ((5, 6, "checkpoint"), (1, 7, "snapshot")):
        trainer, events = make(
            mesh=FLAT,
            snapshot=sk.SnapshotConfig(every=every),
            checkpoint=sk.CheckpointConfig(directory=tmp_path / source, every=2),
        )
        lose(trainer, 9, {7: sk.Lost(3)})
        [rewind] = fields_of(events, "rewind")
        assert rewind == {"step": step, "repeats": 7 - step, "source": source}
        assert trainer.state_digest() == expected(9)


def test_after_going_back_older_snapshots_are_not_used(make, expected, tmp_path):
    checkpoint = sk.CheckpointConfig(directory=tmp_path, every=2, keep=None)
    snapshot = sk.SnapshotConfig(every=4)
    trainer, events = make(mesh=FLAT, snapshot=snapshot, checkpoint=checkpoint)
    consume(trainer, 9)
    assert trainer.restore(2) == 2
    lose(trainer, 3, {2: sk.Lost(3)})
    assert trainer.restore(2) == 2
    assert lose(trainer, 10, {3: sk.Lost(2)})[:2] == [2, 2]
    assert fields_of(events, "rewind")[-1]["source"] == "checkpoint"
    assert trainer.state_digest() == expected(10)


class Slow(Recorder):
    """Is not ready for an image before some more steps have run."""

    def reserve(self, num_bytes):
        time.sleep(0.1)
        return super().reserve(num_bytes)


@pytest.mark.parametrize(
    "store", [pytest.param(Recorder, marks=pytest.mark.slow), Slow]
)
def test_a_snapshot_has_the_bits_of_its_step_whatever_runs_beside_it(make, store):
    store, digests = store(), {}
    config = sk.SnapshotConfig(store=store)
    trainer, _ = make(snapshot=config, certify="always")
    consume(trainer, 12, {4: 3, 8: 6})
    trainer.close()
    twin, _ = make(certify="off")
    digests[0] = twin.state_digest()
    for metrics in range(12):
        consume(twin, metrics + 1)
        digests[metrics + 1] = twin.state_digest()
    assert store.kept.keys() == digests.keys()
    on_two = twin._controller.placements.on(2)
    for step, memory in store.kept.items():
        image = read_image(memory)
        assert image.head.step == step
        found = restore([image], on_two.layout, on_two.mesh)
        assert combine_digests(on_two.digest(found), on_two.layout) == digests[step]


def test_a_snapshot_waits_for_the_one_before_and_says_so(make):
    trainer, events = make(snapshot=sk.SnapshotConfig(store=Slow()))
    consume(trainer, 5)
    trainer.close()
    taken = [event for event in events if event.name == "snapshot"]
    assert [event.fields["step"] for event in taken] == list(range(6))
    # Between the first two the step was compiled, and after the last there was none.
    for before, after in itertools.pairwise(taken[1:-1]):
        assert before.end_s <= after.start_s
        assert after.fields["stall_s"] > 0.05
    for event in taken:
        assert event.thread == "shardkit-snapshot"
        assert event.fields["copy_s"] >= 0.1
        assert event.fields["bytes"] > 0


def test_steps_that_always_wait_for_snapshots_are_told_of_once(make):
    trainer, events = make(snapshot=sk.SnapshotConfig(store=Slow()))
    consume(trainer, 12)
    trainer.close()
    notices = [event for event in events if event.name == "notice"]
    [message] = [x.fields["message"] for x in notices]
    assert "steps wait for snapshots" in message
    assert "snapshot.every=" in message


class Failing(HostMemory):
    """Cannot take the image of one step, in some way."""

    def __init__(self, step, way):
        super().__init__()
        self._step, self._way, self._num = step, way, 0

    def reserve(self, num_bytes):
        step, self._num = self._num, self._num + 1
        slot = super().reserve(num_bytes)
        if step == self._step and self._way == "no room":
            raise sk.SaveError(f"no room for step {step}")
        return slot

    def commit(self, slot, step):
        if step == self._step and self._way == "torn":
            # The process that writes dies before the record is written.
            slot.memory[:128] = bytes(128)
        super().commit(slot, step)
        if step == self._step and self._way == "damaged":
            # It was whole when it was committed.
            slot.memory[-1000:] = bytes(1000)


@pytest.mark.parametrize("way", ["no room", "torn", "damaged"])
def test_a_snapshot_that_is_not_whole_is_never_used(make, expected, way):
    store = Failing(4, way)
    trainer, events = make(
        mesh=FLAT, snapshot=sk.SnapshotConfig(store=store), certify="always"
    )
    assert lose(trainer, 7, {4: sk.Lost(3)}) == [0, 1, 2, 3, 3, 4, 5, 6]
    assert trainer.state_digest() == expected(7)
    [rewind] = fields_of(events, "rewind")
    assert rewind == {"step": 3, "repeats": 1, "source": "snapshot"}
    notices = [fields["message"] for fields in fields_of(events, "notice")]
    assert any("snapshot of step 4" in message for message in notices)


def test_without_any_that_is_whole_the_loss_ends_the_run(make):
    class Torn(HostMemory):
        def commit(self, slot, step):
            raise sk.SaveError("nothing can be kept")

    trainer, events = make(mesh=FLAT, snapshot=sk.SnapshotConfig(store=Torn()))
    with pytest.raises(sk.LostStateError, match="params/kernel"):
        lose(trainer, 4, {2: sk.Lost(4)})
    notices = [fields["message"] for fields in fields_of(events, "notice")]
    assert sum("nothing can be kept" in message for message in notices) == 3


def test_a_copy_that_was_on_its_way_is_lost_with_its_devices(
    make, expected, monkeypatch
):
    staged, is_lost = [], threading.Event()

    class Late(HostMemory):
        """Holds the copies of step 3 back until devices are lost."""

        def reserve(self, num_bytes):
            if len(staged) == 4:
                assert is_lost.wait(TIMEOUT_S)
            return super().reserve(num_bytes)

    stage = Placement.stage

    def kept(placement, state):
        staged.append(stage(placement, state))
        return staged[-1]

    def lose_copies(lost):
        wipe(staged[-1], lost)
        is_lost.set()

    monkeypatch.setattr(Placement, "stage", kept)
    trainer, events = make(
        mesh=FLAT, snapshot=sk.SnapshotConfig(store=Late()), certify="always"
    )
    seen = lose(trainer, 6, {3: sk.Lost(3)}, also=lose_copies)
    assert seen == [0, 1, 2, 2, 3, 4, 5]
    assert trainer.state_digest() == expected(6)
    [rewind] = fields_of(events, "rewind")
    assert rewind == {"step": 2, "repeats": 1, "source": "snapshot"}
    notices = [fields["message"] for fields in fields_of(events, "notice")]
    assert any(
        text.startswith("no snapshot of step 3, the newest is of step 2")
        for text in notices
    )


def test_a_device_without_room_for_a_copy_does_not_end_the_run(make, monkeypatch):
    def full(placement, state):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(Placement, "stage", full)
    trainer, events = make(snapshot=EVERY_STEP)
    consume(trainer, 3)
    trainer.close()
    notices = [fields["message"] for fields in fields_of(events, "notice")]
    assert len(notices) == 4
    assert "RESOURCE_EXHAUSTED" in notices[-1]


def test_a_later_process_goes_on_from_what_the_store_has(make, expected):
    store = Recorder()
    trainer, _ = make(mesh=FLAT, snapshot=sk.SnapshotConfig(store=store))
    consume(trainer, 5)
    trainer.close()
    successor, _ = make(snapshot=sk.SnapshotConfig(store=store))
    assert successor.go_on() == 5
    assert [m.step for m in consume(successor, 8, {0: 3})] == [5, 6, 7]
    assert successor.state_digest() == expected(8)


def test_snapshots_compile_nothing_where_a_change_is_ready(make):
    trainer, _ = make(mesh=FLAT, snapshot=EVERY_STEP, certify="off", standby=8)
    for metrics in trainer.run(steps=7, membership=sk.scripted({0: 4, 5: 8})):
        if metrics.step == 3:
            assert trainer.wait_for_standby(TIMEOUT_S)
            num_compiled = trainer.compiles
    assert trainer.compiles["stage"] == num_compiled["stage"]
    assert "stage" not in trainer.inspect(4)


def test_without_snapshots_nothing_is_copied(make):
    trainer, events = make()
    consume(trainer, 2)
    assert "stage" not in trainer.compiles
    assert fields_of(events, "snapshot") == []


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_how_often_must_be_a_number_of_steps(every):
    with pytest.raises(sk.ConfigError, match="every: expected 1 or more"):
        sk.SnapshotConfig(every=every)


def test_several_processes_need_a_store_that_outlives_them(make, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(sk.ConfigError, match="shardkit launch"):
        make(snapshot=EVERY_STEP)


def test_losing_devices_really_takes_their_memory(make):
    trainer, _ = make(mesh=FLAT)
    consume(trainer, 1)
    _, state = trainer._controller.start()
    wipe(state, {7})
    shard = state.params["kernel"].addressable_shards[-1]
    assert shard.device.id == 7
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(shard.data)
