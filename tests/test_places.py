"""Grids of places, and layouts of any sharding against what JAX says."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from shardkit.errors import MeshError, PartitionError
from shardkit.layout import Layout, LeafLayout
from shardkit.mesh import MeshSpec
from shardkit.places import Medium, Places


@st.composite
def shardings(draw):
    """A sharding over the emulated devices, and a shape that it divides."""
    sizes = draw(st.sampled_from([(8,), (6,), (2, 4), (3, 2), (2, 2, 2), (1, 5), (1,)]))
    devices = draw(st.permutations(jax.devices()))[: int(np.prod(sizes))]
    axes = tuple(draw(st.permutations("xyz")))[: len(sizes)]
    mesh = Mesh(np.array(devices).reshape(sizes), axes)
    ndim = draw(st.integers(0, 3))
    cuts = [[] for _ in range(ndim)]
    for axis in draw(st.permutations(axes)) if ndim else ():
        dim = draw(st.integers(-1, ndim - 1))
        if dim >= 0:
            cuts[dim].append(axis)
    counts = [int(np.prod([mesh.shape[a] for a in c], dtype=int)) for c in cuts]
    shape = tuple(draw(st.integers(0, 3)) * count for count in counts)
    entries = [
        None if not c else c[0] if len(c) == 1 and draw(st.booleans()) else tuple(c)
        for c in cuts
    ]
    while entries and entries[-1] is None and draw(st.booleans()):
        entries.pop()
    return NamedSharding(mesh, PartitionSpec(*entries)), shape


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=shardings())
def test_boxes_are_those_of_jax(case):
    sharding, shape = case
    layout = Layout.of_sharding(sharding, shape, jnp.bfloat16)
    assert layout.piece_shape == sharding.shard_shape(shape)
    assert layout.num_bytes == 2 * np.prod(shape, dtype=int)
    for device, index in sharding.devices_indices_map(shape).items():
        box = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        found = layout.box(device.id)
        if all(shape):
            assert found == box
        assert layout.piece_bytes == 2 * np.prod(layout.piece_shape, dtype=int)


@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_leaves_of_the_state_have_the_layout_they_had(dim, count):
    leaf = LeafLayout("w", (5, 9), np.dtype("float32"), dim)
    mesh = MeshSpec().build(jax.devices()[:count])
    layout = Layout.of_leaf(leaf, Places.of_mesh(mesh))
    assert layout.piece_bytes == leaf.piece_bytes(count)
    for i, device in enumerate(mesh.devices.flat):
        want = [(0, 5), (0, 9)]
        if dim >= 0:
            want[dim] = leaf.interval(i, count)
        assert layout.box(device.id) == tuple(want)


def test_dtypes_of_keys_and_of_single_bytes():
    key = jax.random.key(0)
    sharding = SingleDeviceSharding(jax.devices()[2])
    assert Layout.of_sharding(sharding, (), key.dtype).num_bytes == 8
    layout = Layout.of_sharding(sharding, (3,), jnp.float8_e4m3fn)
    assert layout.num_bytes == 3
    assert layout.box(2) == ((0, 3),)


def test_shardings_that_cannot_be_told_are_refused():
    class Odd:
        is_fully_replicated = False

    with pytest.raises(PartitionError, match="no NamedSharding"):
        Layout.of_sharding(Odd(), (4,), np.float32)


@pytest.mark.parametrize(
    "cuts", [(("fsdp",),), (("fsdp",), ("fsdp",)), ((), ("tensor",)), ((), (), ())]
)
def test_cuts_that_do_not_fit_are_refused(cuts):
    with pytest.raises(PartitionError, match="different axes"):
        Layout(Places(("fsdp",), [0, 1], 0), (4, 4), 4, cuts)


def test_grids_that_do_not_fit_are_refused():
    with pytest.raises(MeshError, match="axis names"):
        Places(("a",), [[0, 1]], 0)
    with pytest.raises(MeshError, match="axis names"):
        Places(("a", "a"), [[0, 1]], 0)
    with pytest.raises(MeshError, match="2 ids of which 1 differ"):
        Places(("a",), [3, 3], 0)


def test_grids_are_equal_by_content():
    a, b = (Places(("a",), [0, 1], [0, 1]) for _ in range(2))
    assert a == b
    assert len({a, b, a.on(Medium.HOST), Places(("a",), [1, 0], [0, 1])}) == 3
    with pytest.raises(ValueError, match="read-only"):
        a.ids[0] = 5


def test_hosts_are_processes_unless_told_otherwise():
    device = types.SimpleNamespace
    devices = np.array([device(id=4, process_index=1), device(id=5, process_index=2)])
    mesh = types.SimpleNamespace(axis_names=("a",), devices=devices)
    assert Places.of_mesh(mesh).hosts.tolist() == [1, 2]
    assert Places.of_mesh(mesh, lambda d: d.id // 4).hosts.tolist() == [1, 1]
    assert Places.listed([3, 4]).host(4) == 4
    assert Places.listed([3, 4], -1, Medium.DISK).host(4) == -1
