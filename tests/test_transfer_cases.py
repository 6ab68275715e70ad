"""Plans that are known by heart."""

import collections
import dataclasses

import jax
import numpy as np
import pytest

from shardkit.errors import LostStateError, PartitionError
from shardkit.layout import Layout
from shardkit.places import Medium, Places
from shardkit.senders import Cost
from shardkit.transfer import plan_transfer


def state(places, sizes, itemsize=4):
    cuts = (("fsdp",), ())
    return {
        f"layers/{i}/kernel": Layout(places, (size, 3), itemsize, cuts)
        for i, size in enumerate(sizes)
    }


def grid(num, data=1, first=0):
    ids = np.arange(first, first + num).reshape(data, -1)
    return Places(("data", "fsdp"), ids, ids // 8)


def test_repeated_leaves_go_around_the_senders():
    # One newcomer takes 40 leaves from 4 replicas on another host.
    plan = plan_transfer(
        [state(grid(4, 4), [6] * 40)], state(grid(1, first=9), [6] * 40)
    )
    assert plan.totals.sent == dict.fromkeys(range(4), 10 * 6 * 3 * 4)


def test_large_and_small_requests_in_turn_make_no_sender_busier():
    # The targets' columns are 3 and 2 wide, so that every other request is smaller.
    old = Layout.whole(grid(2, 2), (6, 5), np.int8)
    places = Places(("a", "b"), np.arange(8, 20).reshape(6, 2), 1)
    plan = plan_transfer([old], Layout(places, (6, 5), 1, (("a",), ("b",))))
    assert plan.totals.sent == {0: 15, 1: 15}


def test_senders_on_several_hosts_are_used_alike():
    # Eight newcomers, each with its own part of what sixteen devices have.
    old, new = grid(16, 16), grid(8, first=16)
    plan = plan_transfer([state(old, [8])], state(new, [8]))
    hosts = collections.Counter()
    for (source, _), num_bytes in plan.totals.links.items():
        hosts[source] += num_bytes
    assert hosts == {0: 48, 1: 48}


def test_a_host_copy_on_the_same_host_is_read_before_one_elsewhere():
    live, new = grid(4), grid(2, first=8)
    copies = Places.listed([0, 1, 2])
    whole = Layout.whole(copies, (4, 3), np.float32)
    [leaf], [target] = state(live, [4]).values(), state(new, [4]).values()
    plan = plan_transfer([leaf, whole], target, lost=frozenset({0, 3}))
    found = [(t.medium, t.source, t.box[0]) for t in plan.pieces("", 8)]
    assert found == [(Medium.HOST, 1, (0, 1)), (Medium.DEVICE, 1, (1, 2))]
    assert set(plan.totals.by_cost) == {Cost.NETWORK, Cost.HOST_MEMORY}
    assert not plan.missing


def test_a_lost_host_takes_its_copies_along():
    places = grid(4)
    [leaf] = state(places, [4]).values()
    copy = dataclasses.replace(leaf, places=places.on(Medium.HOST, [[1, 1, 0, 0]]))
    disk = Layout.whole(Places.listed([0], [-1], Medium.DISK), (4, 3), np.float32)
    target = dataclasses.replace(leaf, places=grid(1, first=9))
    lost = frozenset(range(4))
    plan = plan_transfer([leaf, copy, disk], target, lost=lost, lost_hosts={0})
    assert {t.box[0]: t.medium for t in plan.pieces("", 9)} == {
        (0, 1): Medium.HOST,
        (1, 2): Medium.HOST,
        (2, 4): Medium.DISK,
    }
    with pytest.raises(LostStateError, match=r"1 parts of 1 leaves.*\(2, 4\)"):
        plan_transfer([leaf, copy], target, lost=lost, lost_hosts=frozenset({0}))


def test_padding_can_be_lost_without_a_loss():
    # 5 rows in 8 pieces: the last three hold nothing but padding.
    old, new = state(grid(8), [5]), state(grid(4), [5])
    assert plan_transfer([old], new, lost=frozenset({5, 6, 7})).missing == {}
    with pytest.raises(LostStateError, match=r"layers/0/kernel \[\(4, 5\), \(0, 3\)\]"):
        plan_transfer([old], new, lost=frozenset({4}))


def test_all_leaves_that_are_lost_are_counted_and_the_first_are_named():
    old, new = state(grid(4), [4] * 9), state(grid(3), [4] * 9)
    with pytest.raises(LostStateError, match=r"18 parts of 9 leaves.*; …") as caught:
        plan_transfer([old], new, lost=frozenset({0, 2}))
    assert "2 devices [0, 2]" in str(caught.value)
    assert len(str(caught.value)) < 500
    plan = plan_transfer([old], new, lost=frozenset({0, 2}), partial=True)
    assert plan.missing["layers/8/kernel"] == [((0, 1), (0, 3)), ((2, 3), (0, 3))]


def test_a_leaf_without_a_source_is_missing():
    new = state(grid(3), [4, 5])
    with pytest.raises(LostStateError, match=r"1 parts of 1 leaves.*layers/1/kernel"):
        plan_transfer([state(grid(4), [4])], new)


def test_leaves_that_differ_are_refused_all_at_once():
    old, new = state(grid(4), [4, 5, 6]), state(grid(4), [4, 7, 8])
    with pytest.raises(PartitionError, match=r"2 leaves differ.*kernel.*kernel"):
        plan_transfer([old], new)
    mixed = {**new, "copy": Layout.whole(Places.listed([0]), (), np.int32)}
    with pytest.raises(PartitionError, match="one medium"):
        plan_transfer([mixed], mixed)


def test_nothing_moves_where_nothing_changes():
    old = state(grid(16, 2), [5, 8, 0])
    plan = plan_transfer([old], old)
    assert plan.totals.bytes_moved == 0
    assert plan.totals.scratch == {}
    assert all(p.cost is Cost.HELD for p in plan.pieces("layers/0/kernel", 3))


def test_a_plan_is_the_same_every_time():
    def listing():
        plan = plan_transfer([state(grid(12, 4), [9] * 5)], state(grid(10, 5), [9] * 5))
        return [list(plan.for_target(id)) for id in range(10)]

    assert listing() == listing()


def test_an_empty_state_has_a_plan():
    assert plan_transfer([{}], {}).totals.bytes_moved == 0


def test_arrays_are_put_together_as_planned(devices):
    # The carrier in miniature: numpy shards of JAX arrays on the real emulated pool.
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    truth = np.arange(48 * 8, dtype=np.int32).reshape(48, 8)
    old = NamedSharding(
        Mesh(np.array(devices).reshape(4, 2), ("a", "b")), PartitionSpec("a", "b")
    )
    new = NamedSharding(Mesh(np.array(devices[5:2:-1]), ("c",)), PartitionSpec("c"))
    array = jax.device_put(truth, old)
    source, target = (Layout.of_sharding(s, (48, 8), np.int32) for s in (old, new))
    plan = plan_transfer([source], target)
    shards = {s.device.id: np.asarray(s.data) for s in array.addressable_shards}
    for shard in jax.device_put(truth, new).addressable_shards:
        out = np.zeros(target.piece_shape, np.int32)
        for piece in plan.pieces("", shard.device.id):
            where = source.slices(piece.source, piece.box)
            out[target.slices(piece.target, piece.box)] = shards[piece.source][where]
        np.testing.assert_array_equal(out, shard.data)
