"""Which placement a change goes to, and in what order its devices are."""

import threading

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import consume, fields_of, linear_data

import shardkit as sk
from shardkit.elastic import Transition
from shardkit.mesh import device_ids
from shardkit.placement import Placement
from shardkit.testing import assert_same_bits, run_digest

TIMEOUT_S = 60
FLAT = sk.MeshSpec(data=1, fsdp=-1)


@pytest.fixture
def placements(make):
    """Placements of a problem, none of them compiled."""
    trainer, _ = make(mesh=FLAT)
    return trainer._controller.placements


def ids(placement):
    return list(device_ids(placement.mesh))


def pretend_compiled(placements, order):
    """Lets a placement that has its devices in this order count as compiled."""
    by_id = {device.id: device for device in placements.pool}
    placement = placements._derive(FLAT.build([by_id[i] for i in order]))
    placement.executable = object()
    return placement


def test_without_a_state_the_order_is_the_pool_s(placements):
    assert ids(placements.on(4)) == [0, 1, 2, 3]
    assert ids(placements.on(8)) == list(range(8))


def test_survivors_sit_where_they_hold_most(placements):
    placements.stand(placements.on(4), 4)
    grown = placements.on(8)
    # Of five rows the first three devices have two, two and one.
    assert [ids(grown).index(i) // 2 for i in range(3)] == [0, 1, 2]
    assert placements.on(8) is grown
    bytes_moved = placements._mesh_order.num_bytes(placements.present.mesh, grown.mesh)
    assert bytes_moved < placements.plain_bytes(placements.present, grown)


def test_in_the_pool_s_order_there_is_no_other_to_compare_with(placements):
    first = placements.on(8)
    assert placements.plain_bytes(first, placements.on(1)) is None


def test_what_is_compiled_comes_before_what_is_best(placements):
    placements.stand(placements.on(4), 4)
    ready = pretend_compiled(placements, [7, 6, 5, 4, 3, 2, 1, 0])
    assert placements.on(8) is ready
    # Of the two this one keeps more.
    better = pretend_compiled(placements, [0, 4, 1, 5, 6, 2, 7, 3])
    assert placements.on(8) is better
    # Others are for other devices.
    assert set(ids(placements.on(7))) == set(range(7))


def test_a_placement_is_its_own_even_if_another_moves_as_little(make):
    trainer, _ = make(mesh=sk.MeshSpec(data=-1, fsdp=1))
    placements = trainer._controller.placements
    ready = placements.on(4)
    ready.executable = object()
    devices = [placements.pool[i] for i in (3, 2, 1, 0)]
    other = placements._derive(sk.MeshSpec(data=-1, fsdp=1).build(devices))
    placements.stand(other, 8)
    other.executable = object()
    assert placements.on(4) is other


def test_without_a_state_any_that_is_compiled_will_do_and_first_the_plain(placements):
    ready = pretend_compiled(placements, [3, 2, 1, 0])
    assert placements.on(4) is ready
    plain = pretend_compiled(placements, [0, 1, 2, 3])
    assert placements.on(4) is plain


def test_what_is_being_compiled_is_waited_for(placements, monkeypatch):
    placements.stand(placements.on(4), 4)
    begun, may_end = threading.Event(), threading.Event()

    def prepare(placement, **options):
        begun.set()
        assert may_end.wait(TIMEOUT_S)
        return 7

    monkeypatch.setattr(Placement, "prepare", prepare)
    thread = threading.Thread(target=placements.preparing(8))
    thread.start()
    assert begun.wait(TIMEOUT_S)
    under_way = placements.on(8)
    placements.stand(placements.on(2), 2)
    assert placements.on(8) is under_way
    may_end.set()
    thread.join()
    # It came to nothing, so that the best from here is the best again.
    assert placements.on(8) is not under_way


def test_over_several_processes_the_order_is_the_pool_s(placements, monkeypatch):
    placements.stand(placements.on(4), 4)
    pretend_compiled(placements, [7, 6, 5, 4, 3, 2, 1, 0])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert ids(placements.on(8)) == list(range(8))


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(counts=st.lists(st.integers(1, 8), min_size=1, max_size=5))
def test_no_walk_moves_more_than_the_plain_order(counts, make):
    trainer, _ = make(mesh=FLAT)
    placements = trainer._controller.placements
    old = placements.on(8)
    state = old.init()
    before = jax.tree.map(np.asarray, old.logical(state))
    for count in [6, 8, 4, *counts]:
        placements.stand(old, old.num_devices)
        new = placements.on(count)
        transition = Transition(
            old, new, 0.0, plain_bytes=placements.plain_bytes(old, new)
        )
        state = transition.move(state)
        report = transition.report(0, None)
        assert report["bytes_moved"] <= report["plain_bytes_moved"]
        old = new
    assert_same_bits(jax.tree.map(np.asarray, old.logical(state)), before)


def test_a_change_tells_what_the_plain_order_would_have_moved(make):
    trainer, events = make(mesh=FLAT, certify="off")
    consume(trainer, 4, {0: 4, 1: 8, 2: 4, 3: 8})
    grown, back, again = fields_of(events, "reconfigure")
    assert grown["bytes_moved"] < grown["plain_bytes_moved"]
    # Four devices in the order of the pool were ready, and so are now eight.
    assert back["bytes_moved"] == back["plain_bytes_moved"]
    assert again["bytes_moved"] == grown["bytes_moved"]
    assert trainer.compiles["step"] == 2


def test_what_standby_prepares_is_what_the_change_asks_for(make):
    trainer, events = make(mesh=FLAT, certify="always", standby=8)
    # It ends before standby thinks of what comes after the change.
    for metrics in trainer.run(steps=7, membership=sk.scripted({0: 4, 5: 8})):
        if metrics.step == 3:
            assert trainer.wait_for_standby(TIMEOUT_S)
            num_compiled = trainer.compiles["step"]
    [change] = fields_of(events, "reconfigure")
    assert change["was_ready"] is True
    assert change["bytes_moved"] < change["plain_bytes_moved"]
    assert trainer.compiles["step"] == num_compiled
    twin, _ = make()
    assert trainer.state_digest() == run_digest(twin, 7)["state"]


def test_after_a_loss_without_replicas_the_order_is_the_one_compiled(make, tmp_path):
    checkpoint = sk.CheckpointConfig(directory=tmp_path, every=2)
    trainer, events = make(mesh=FLAT, checkpoint=checkpoint)
    consume(trainer, 4, {3: sk.Lost(6)})
    assert trainer.compiles["step"] == 2
    [change] = fields_of(events, "reconfigure")
    # It was read, not moved.
    assert change["bytes_moved"] == change["plain_bytes_moved"] == 0
    twin, _ = make()
    assert trainer.state_digest() == run_digest(twin, 4)["state"]


@pytest.mark.parametrize("certify", ["off", "always"])
def test_the_next_batch_is_fetched_while_the_state_moves(make, monkeypatch, certify):
    moving, fetched = threading.Event(), threading.Event()

    def data(step):
        if step == 3:
            assert moving.wait(TIMEOUT_S)
            fetched.set()
        return linear_data(step)

    move = Transition.move

    def slow_move(*args, **options):
        moving.set()
        assert fetched.wait(TIMEOUT_S)
        return move(*args, **options)

    monkeypatch.setattr(Transition, "move", slow_move)
    trainer, _ = make(data=data, certify=certify)
    assert len(consume(trainer, 5, {3: 4})) == 5
