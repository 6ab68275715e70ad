"""The last steps that an image tells of."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import consume, fields_of
from snapshotted import Recorder
from test_snapshot_losses import FLAT, lose

import shardkit as sk
from shardkit.mesh import mesh_sizes
from shardkit.snapshot.image import ImageWriter, read_image
from shardkit.snapshot.layout import META_ROOM_BYTES, ImageLayout, MeshRecord
from shardkit.snapshot.recent import NUM_RECENT, LastStep, RecentSteps

NUMBERS = st.floats(width=32)
MESH = MeshRecord(("fsdp",), (1,), (0,), (0,), ("a",))


def step_metrics(step, **values):
    values = {"loss": np.float32(step), "weight": np.int32(64), **values}
    return sk.StepMetrics(
        step=step, num_devices=6, mesh={"fsdp": 6}, values=values, step_s=0.5
    )


def told(recent, step):
    """What an image of the state before a step tells, read from the image."""
    layout = ImageLayout.plan(
        run="r", host="a", process=0, num_processes=1, leaves=(), mesh=MESH, pieces=()
    )
    memory = memoryview(bytearray(layout.num_bytes))
    writer = ImageWriter(memory, layout, step=step, generation=1)
    writer.commit(recent.before(step)())
    return [LastStep.from_json(x) for x in read_image(memory).meta["recent"]]


def recent_steps(*metrics, room_bytes=META_ROOM_BYTES):
    found = RecentSteps(room_bytes)
    for one in metrics:
        found.add(one)
    return found


@settings(deadline=None)
@given(loss=NUMBERS, grad_norm=NUMBERS, count=st.integers(-(2**31), 2**31 - 1))
def test_numbers_come_back_as_they_were(loss, grad_norm, count):
    values = {"loss": np.float32(loss), "norm": np.float32(grad_norm)}
    metrics = step_metrics(7, **values, count=np.int32(count))
    (found,) = told(recent_steps(metrics), 8)
    assert (found.step, found.num_devices, found.mesh) == (7, 6, {"fsdp": 6})
    assert found.loss_bits == metrics.loss_bits
    assert np.float32(found.loss).tobytes() == values["loss"].tobytes()
    assert found.metrics.keys() == metrics.metrics.keys()
    for name, value in metrics.metrics.items():
        same = found.metrics[name] == value
        assert same or (math.isnan(value) and math.isnan(found.metrics[name]))


def test_a_nan_keeps_its_bits():
    loss = np.uint32(0x7FC12345).view(np.float32)
    (found,) = told(recent_steps(step_metrics(0, loss=loss)), 1)
    assert found.loss_bits == "7fc12345"
    assert found.step_s is found.tokens_per_s is None


def test_the_last_steps_before_a_state_are_told():
    recent = recent_steps(*map(step_metrics, range(9)))
    assert [x.step for x in told(recent, 9)] == [5, 6, 7, 8]
    assert len(told(recent, 9)) == NUM_RECENT
    # One that was dispatched since does not belong to it.
    assert [x.step for x in told(recent, 8)] == [5, 6, 7]
    assert told(recent, 30) == []


def test_steps_that_are_done_again_replace_what_was_known():
    recent = recent_steps(*map(step_metrics, range(9)))
    recent.add(step_metrics(7, loss=np.float32(0.5)))
    assert [(x.step, x.loss) for x in told(recent, 9)] == [
        *((5, 5.0), (6, 6.0), (7, 0.5))
    ]
    recent.clear()
    assert told(recent, 9) == []


def test_what_an_image_told_is_told_on():
    first = recent_steps(*map(step_metrics, range(6)))
    later = RecentSteps(META_ROOM_BYTES)
    later.learn(first.before(6)())
    # Of images that say nothing, as older ones, nothing is learned.
    later.learn({})
    assert told(later, 6) == told(first, 6)
    later.add(step_metrics(6))
    assert [x.step for x in told(later, 7)] == [3, 4, 5, 6]


def test_only_scalars_are_told():
    values = {"curve": jnp.ones(3), "one": jnp.ones((1,)), "z": np.complex64(1)}
    values["key"] = jax.random.key(0)
    (found,) = told(recent_steps(step_metrics(0, **values)), 1)
    assert found.metrics == {"weight": 64.0}


@pytest.mark.parametrize("length", [1, 40, 5000])
def test_what_has_no_room_is_left_out(length):
    many = {f"{i:0{length}}": jnp.float32(0.1) for i in range(300)}
    steps = [step_metrics(step, **many) for step in range(4)]
    recent = recent_steps(*steps)
    size = len(json.dumps(recent.before(4)(), separators=(",", ":")))
    found = told(recent, 4)
    assert size <= META_ROOM_BYTES
    assert [x.loss for x in found] == [0.0, 1.0, 2.0, 3.0]
    assert {"weight": 64.0}.items() <= found[0].metrics.items()
    if length < 5000:
        assert size > 0.9 * META_ROOM_BYTES
    # With no room at all nothing is told, and nothing fails.
    assert recent_steps(*steps, room_bytes=100).before(4)() == {"recent": []}


def test_what_is_on_devices_that_are_gone_costs_no_image():
    gone = jnp.float32(1)
    gone.delete()
    recent = recent_steps(step_metrics(0), step_metrics(1, norm=gone))
    assert [x.step for x in told(recent, 2)] == [0]


def test_a_step_is_read_once():
    reads = []

    @dataclasses.dataclass
    class Counted:
        step: int = 0
        loss_bits: str = "3f800000"
        num_devices: int = 1
        mesh: dict = dataclasses.field(default_factory=dict)

        @property
        def values(self):
            reads.append(self.step)
            return {}

    recent = recent_steps(Counted())
    assert told(recent, 1) == told(recent, 2)
    assert reads == [0]


def heard(make, store):
    """What a trainer hears that goes on from a store."""
    trainer, events = make(mesh=FLAT, snapshot=sk.SnapshotConfig(store=store))
    trainer.go_on()
    trainer.state_digest()
    trainer.close()
    (fields,) = fields_of(events, "last_steps")
    return fields["step"], [LastStep.from_json(x) for x in fields["recent"]]


def test_a_later_process_hears_of_the_last_steps(make):
    """Whoever did them may not have come to tell any of these."""
    store, unhurt = Recorder(), {}
    trainer, _ = make(mesh=FLAT, snapshot=sk.SnapshotConfig(store=store))
    for metrics in trainer.run(steps=6, membership=sk.scripted({3: 5, 5: 8})):
        unhurt[metrics.step] = metrics
    trainer.close()
    first = heard(make, store)
    step, found = first
    assert step == 6
    assert [x.step for x in found] == [2, 3, 4, 5]
    for last in found:
        wanted = unhurt[last.step]
        assert last.loss_bits == wanted.loss_bits
        assert last.loss == wanted.loss
        assert last.metrics == wanted.metrics
        assert (last.num_devices, last.mesh) == (wanted.num_devices, wanted.mesh)
    # The first successor did no step, and took a snapshot of its own.
    assert heard(make, store) == first


def test_what_was_dispatched_and_never_told_is_heard(make):
    store = Recorder()
    trainer, _ = make(mesh=FLAT, snapshot=sk.SnapshotConfig(store=store))
    told = []
    for metrics in trainer.run(steps=9):
        told.append(metrics.step)
        if metrics.step == 4:
            break
    trainer.close()
    step, found = heard(make, store)
    assert step == 6
    assert [x.step for x in found if x.step not in told] == [5]
    twin, _ = make(mesh=FLAT)
    assert found[-1].loss_bits == consume(twin, 6)[-1].loss_bits


def test_a_run_that_stays_in_its_process_has_told_all(make):
    trainer, events = make(mesh=FLAT, snapshot=sk.SnapshotConfig(every=4))
    assert lose(trainer, 8, {6: sk.Lost(3)}) == [*range(6), 4, 5, 6, 7]
    assert fields_of(events, "last_steps") == []
    # Images tell once, and last, of what was done twice.
    newest = trainer._controller._snapshots._recent.before(8)()["recent"]
    assert [x["step"] for x in newest] == [4, 5, 6, 7]
    mesh = mesh_sizes(trainer._controller.live[0].mesh)
    assert [x["mesh"] for x in newest] == [mesh] * 4
