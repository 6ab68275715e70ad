"""Orders of meshes for a state, against all permutations and known by heart."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.device_order import choose_order
from shardkit.layout import Layout, LeafLayout
from shardkit.mesh import MeshSpec, device_ids
from shardkit.mesh_order import MeshOrder
from shardkit.places import Places
from shardkit.transfer import plan_transfer

FLAT = MeshSpec(data=1, fsdp=-1)


def mesh(ids, spec=FLAT):
    return spec.build([jax.devices()[i] for i in ids])


def layouts(leaves, on):
    return {leaf.path: Layout.of_leaf(leaf, Places.of_mesh(on)) for leaf in leaves}


def moved(leaves, old, new):
    """What a plan moves, leaf by leaf."""
    plan = plan_transfer([layouts(leaves, old)], layouts(leaves, new))
    return plan.totals.bytes_moved


def state(*sizes):
    """Kernels that are cut along either dim, some of them alike, and a bias each."""
    leaves = []
    for i, size in enumerate(sizes):
        for copy in range(1 + i % 2):
            dim = i % 2
            shape = (3, size) if dim else (size, 3)
            leaves.append(LeafLayout(f"{i}/{copy}", shape, np.dtype("float32"), dim))
        leaves.append(LeafLayout(f"{i}/bias", (size,), np.dtype("int8")))
    return leaves


@pytest.mark.parametrize(
    ("old", "new", "parts", "plain_parts"),
    [
        # Of 840 rows each of the four has 2/8 and keeps 1/8.
        (4, 8, 420, 735),
        (2, 8, 630, 735),
        # Nobody is left who has anything of the last sixth.
        (8, 6, 385, 630),
        # 0 and 2, or those beside them, lie where a quarter begins.
        (8, 4, 630, 735),
        (8, 1, 735, 735),
        (1, 8, 735, 735),
    ],
)
def test_what_the_best_order_moves_is_known(old, new, parts, plain_parts):
    leaves = [LeafLayout("w", (840, 1), np.dtype("int8"), 0)]
    order, places = MeshOrder(leaves), [mesh(range(n)) for n in (old, new)]
    assert order.num_bytes(*places) == plain_parts
    best = FLAT.build(order.devices(*places))
    assert order.num_bytes(places[0], best) == parts
    assert set(device_ids(best)) == set(range(new))


@st.composite
def changes(draw):
    specs = st.sampled_from(
        [FLAT, MeshSpec(data=2, fsdp=-1), MeshSpec(data=-1, fsdp=2)]
    )
    some = st.permutations(range(8))
    old = mesh(draw(some)[: draw(st.integers(1, 8))], draw(specs))
    new = mesh(draw(some)[: draw(st.integers(1, 4))], draw(specs))
    return state(*draw(st.lists(st.integers(0, 11), min_size=1, max_size=4))), old, new


@settings(max_examples=60, deadline=None, derandomize=True)
@given(change=changes())
def test_no_permutation_moves_less(change):
    leaves, old, new = change
    order = MeshOrder(leaves)
    best = order.devices(old, new)
    assert order.num_bytes(old, new) == moved(leaves, old, new)

    def ordered(devices):
        grid = np.reshape(np.array(devices, dtype=object), new.devices.shape)
        return jax.sharding.Mesh(grid, new.axis_names)

    found = moved(leaves, old, ordered(best))
    everyone = itertools.permutations(new.devices.flat)
    assert found == min(moved(leaves, old, ordered(each)) for each in everyone)
    assert found <= order.num_bytes(old, new)


def test_leaves_that_are_alike_count_each():
    leaves = [*state(24, 7, 16), LeafLayout("key", (), jax.random.key(0).dtype)]
    old, new = mesh(range(3)), mesh([5, 1, 0, 2])
    whole = choose_order(layouts(leaves, old), layouts(leaves, new))
    order = MeshOrder(leaves)
    assert order.num_bytes(old, new) == whole.plain_bytes_moved
    best = FLAT.build(order.devices(old, new))
    assert order.num_bytes(old, best) == whole.bytes_moved
