"""Device orders against all permutations, and where they are known by heart."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit import device_order
from shardkit.device_order import choose_order
from shardkit.errors import MeshError
from shardkit.layout import Layout
from shardkit.places import Medium, Places
from shardkit.transfer import plan_transfer


def grid(ids, num_per_host=8, tensor=1):
    ids = np.reshape(ids, (-1, tensor))
    return Places(("fsdp", "tensor"), ids, ids // num_per_host)


def leaves(places, sizes):
    cuts = [("fsdp",), ("tensor",)], [("fsdp", "tensor"), ()], [(), ()]
    return {
        str(i): Layout(places, (size, 6), 4, tuple(map(tuple, cuts[i % 3])))
        for i, size in enumerate(sizes)
    }


def moved(old, new, places):
    target = {
        path: Layout(places, x.shape, x.itemsize, x.cuts) for path, x in new.items()
    }
    return plan_transfer([old], target).totals.bytes_moved


@st.composite
def changes(draw):
    num_per_host = draw(st.sampled_from([2, 3, 8]))
    tensor = draw(st.sampled_from([1, 2]))
    old = draw(st.permutations(range(tensor * draw(st.integers(1, 4)))))
    num = tensor * draw(st.integers(1, 6 // tensor))
    ids = draw(st.permutations(range(draw(st.integers(num, 6)))))
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    spares = [id // num_per_host for id in ids[num:]]
    return (
        leaves(grid(old, num_per_host, tensor), sizes),
        leaves(grid(ids[:num], num_per_host, tensor), sizes),
        Places.listed(ids[num:], spares, Medium.DEVICE),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(change=changes())
def test_an_order_is_the_best_of_those_allowed(change):
    old, new, spares = change
    places = new["0"].places
    order = choose_order(old, new, spares=spares)
    ids = order.places.ids.ravel().tolist()
    everyone = places.ids.ravel().tolist() + spares.ids.ravel().tolist()
    assert len(set(ids)) == len(ids) == places.ids.size
    assert set(ids) <= set(everyone)
    assert order.plain_bytes_moved == moved(old, new, places)
    assert order.bytes_moved == moved(old, new, order.places)
    assert order.bytes_moved <= order.plain_bytes_moved
    if "blocks" not in order.reason and "one by one" not in order.reason:
        assert order.places == places
        return
    ids_there = [*places.ids.ravel().tolist(), *spares.ids.tolist()]
    hosts_there = [*places.hosts.ravel().tolist(), *spares.hosts.tolist()]
    host = dict(zip(ids_there, hosts_there, strict=True))
    tensor = places.axis_sizes["tensor"]
    block = hosts_there.count(hosts_there[0])

    def is_allowed(ids):
        hosts = [host[id] for id in ids]
        if "blocks" in order.reason:
            return all(len(set(x)) == 1 for x in np.reshape(hosts, (-1, block)))
        runs = [host for host, _ in itertools.groupby(hosts)]
        inside = all(len(set(x)) == 1 for x in np.reshape(hosts, (-1, tensor)))
        return inside and len(runs) == len(set(runs))

    assert is_allowed(ids)
    if len(everyone) < 6:
        assert order.bytes_moved == min(
            moved(old, new, Places(places.axes, np.reshape(p, places.ids.shape), 0))
            for p in itertools.permutations(everyone, len(ids))
            if is_allowed(p)
        )


def test_survivors_stay_where_they_were():
    # Someone listed the survivors in a bad order.
    old = leaves(grid(range(16)), [48])
    new = leaves(grid([*range(8, 16), *range(8)][::-1]), [48])
    order = choose_order(old, new)
    assert order.places.ids.ravel().tolist() == list(range(16))
    assert order.bytes_moved == 0 < order.plain_bytes_moved
    assert order.reason == "2 blocks of 8 assigned to hosts, devices within"


def test_a_host_that_comes_takes_the_place_of_the_one_that_went():
    old = leaves(grid(range(24)), [48, 48, 48])
    survivors = [*range(8), *range(16, 24)]
    new = leaves(grid([*survivors, *range(24, 32)]), [48, 48, 48])
    order = choose_order(old, new)
    assert order.places.ids.ravel().tolist() == [
        *range(8),
        *range(24, 32),
        *range(16, 24),
    ]


def test_the_one_that_is_left_out_is_the_one_that_has_least():
    old = leaves(grid(range(7)), [7])
    new = leaves(grid([7, *range(6)]), [7])
    order = choose_order(old, new, spares=Places.listed([6], 0, Medium.DEVICE))
    assert 7 not in order.places.ids
    assert "blocks" not in order.reason or order.bytes_moved < order.plain_bytes_moved


def test_a_device_fewer_leaves_uneven_hosts():
    old = leaves(grid(range(16)), [160])
    new = leaves(grid([id for id in range(16) if id != 3]), [160])
    order = choose_order(old, new)
    assert "plain" in order.reason or "uneven" in order.reason
    hosts = order.places.hosts.ravel().tolist()
    assert hosts == sorted(hosts)


def test_hosts_are_not_mixed_for_the_sake_of_bytes():
    # Device by device, 0 4 1 5 2 6 would keep everything.
    old = leaves(grid([0, 4, 1, 5, 2, 6, 3], 4), [28])
    new = leaves(grid([0, 1, 2, 3, 4, 5, 6], 4), [28])
    order = choose_order(old, new)
    assert order.places == new["0"].places
    assert order.reason.startswith("plain order: hosts are uneven")


@pytest.mark.parametrize("num_lost", [0, 1, 8])
def test_the_greedy_way_is_good_too(monkeypatch, num_lost):
    old = leaves(grid(range(32)), [64, 70, 5])
    ids = np.random.default_rng(0).permutation(range(num_lost, 32))
    new = leaves(grid(ids[np.argsort(ids // 8 % 3, kind="stable")]), [64, 70, 5])
    best = choose_order(old, new)
    monkeypatch.setattr(device_order, "_MAX_EXACT", 1)
    order = choose_order(old, new)
    assert sorted(order.places.ids.ravel()) == sorted(ids)
    assert best.bytes_moved <= order.bytes_moved <= order.plain_bytes_moved
    if num_lost == 0:
        assert order.bytes_moved == best.bytes_moved == 0
        assert "largest shares first for 32 devices" in order.reason


def test_targets_on_two_grids_are_refused():
    new = leaves(grid(range(4)), [4])
    with pytest.raises(MeshError, match="found 2 grids and 1 leaves"):
        choose_order(new, {**new, "b": leaves(grid(range(3)), [4])["0"]})
