import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from shardkit import carry
from shardkit.errors import ConfigError, LostStateError
from shardkit.layout import LeafLayout
from shardkit.mesh import MeshSpec
from shardkit.resharding import reshard
from shardkit.state_moves import from_host, move_state, to_host

LEAVES = [
    LeafLayout("rows", (5, 3), np.dtype("float32"), 0),
    LeafLayout("columns", (3, 7), np.dtype(jnp.bfloat16), 1),
    LeafLayout("middle", (2, 6, 2), np.dtype("int32"), 1),
    LeafLayout("few", (2,), np.dtype("float16"), 0),
    LeafLayout("small", (9, 2), np.dtype(jnp.int4), 0),
    LeafLayout("flags", (11,), np.dtype("bool"), 0),
    LeafLayout("whole", (4, 3), np.dtype("float32"), -1),
    LeafLayout("step", (), np.dtype("int32"), -1),
]
# Where a group of devices computes together, its axes cut what they divide.
GROUPED = [
    LeafLayout("up", (5, 4), np.dtype("float32"), 0, group=(("tensor", 1),)),
    LeafLayout("down", (4, 6), np.dtype(jnp.bfloat16), 1, group=(("tensor", 0),)),
    LeafLayout("bias", (6,), np.dtype("float16"), -1, group=(("tensor", 0),)),
    LeafLayout(
        "experts", (4, 3, 8), np.dtype("int8"), 1, group=(("expert", 0), ("tensor", 2))
    ),
]


def truth_of(leaf):
    """Distinct values, so that no row passes for another; odd bits among them."""
    values = np.arange(np.prod(leaf.shape, dtype=int)).reshape(leaf.shape)
    if leaf.dtype == np.dtype("bool"):
        return values % 3 == 0
    whole = (
        values - 3 if leaf.dtype != np.dtype(jnp.int4) else values % 15 - 7
    ).astype(leaf.dtype)
    if leaf.dtype.kind == "f":
        whole = np.where(values == 1, np.array(np.nan, leaf.dtype), whole)
        whole = np.where(values == 2, np.array(-0.0, leaf.dtype), whole)
    return whole


def mesh_of(data, fsdp, first=0):
    devices = jax.devices()[first : first + data * fsdp]
    return MeshSpec(data=data, fsdp=-1).build(devices)


def garbage(shape, dtype):
    if dtype == np.dtype("bool"):
        return np.ones(shape, dtype)
    return np.full(shape, -6).astype(dtype)


def place(leaf, mesh, lost=frozenset()):
    """Places the truth, with garbage as padding and on devices that are lost."""
    count = mesh.shape["fsdp"]
    shape = leaf.physical_shape(count)
    whole = garbage(shape, leaf.dtype)
    whole[tuple(slice(0, n) for n in leaf.shape)] = truth_of(leaf)
    sharding = leaf.sharding(mesh)
    pieces = [
        jax.device_put(
            garbage(whole[index].shape, leaf.dtype)
            if device.id in lost
            else whole[index],
            device,
        )
        for device, index in sharding.devices_indices_map(shape).items()
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def bits(x):
    return np.ascontiguousarray(np.asarray(x)).tobytes()


def check(leaf, array, mesh):
    """Compares what every device holds with the truth, bit by bit."""
    shape = leaf.physical_shape(mesh.shape["fsdp"])
    assert array.sharding == leaf.sharding(mesh)
    assert array.shape == shape
    assert array.dtype == leaf.dtype
    truth = truth_of(leaf)
    where = array.sharding.devices_indices_map(shape)
    for shard in array.addressable_shards:
        # A slice of the truth ends where padding begins.
        expected = truth[where[shard.device]]
        held = np.asarray(shard.data)[tuple(slice(0, n) for n in expected.shape)]
        assert bits(held) == bits(expected), (leaf.path, shard.device)
    assert bits(to_host(array, leaf)) == bits(truth)


sizes = st.tuples(st.integers(1, 8), st.integers(1, 8)).filter(
    lambda s: s[0] * s[1] < 9
)
meshes = st.builds(
    lambda s, shift: mesh_of(*s, first=shift % (9 - s[0] * s[1])),
    sizes,
    st.integers(0, 7),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(old=meshes, new=meshes, keep=st.booleans())
def test_any_mesh_to_any_mesh_keeps_every_bit(old, new, keep):
    tree = [place(leaf, old) for leaf in LEAVES]
    moved = move_state(tree, LEAVES, old, new, keep_source=keep)
    for leaf, array in zip(LEAVES, moved.tree, strict=True):
        check(leaf, array, new)


AXES = st.sampled_from(["data", "fsdp", "tensor", "expert"])
grouped_meshes = st.builds(
    lambda axes, first: MeshSpec(
        **{axis: 2 ** axes.count(axis) for axis in ("data", "fsdp", "tensor", "expert")}
    ).build(jax.devices()[first % (9 - 2 ** len(axes)) :][: 2 ** len(axes)]),
    st.lists(AXES, max_size=3),
    st.integers(0, 7),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(old=grouped_meshes, new=meshes | grouped_meshes, turn=st.booleans())
def test_groups_of_any_size_to_any_other_keep_every_bit(old, new, turn):
    old, new = (new, old) if turn else (old, new)
    leaves = [*LEAVES[:3], *GROUPED]
    moved = move_state([place(leaf, old) for leaf in leaves], leaves, old, new)
    for leaf, array in zip(leaves, moved.tree, strict=True):
        check(leaf, array, new)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(old=meshes, new=meshes, data=st.data())
def test_what_is_lost_is_taken_from_replicas_or_named(old, new, data):
    ids = [device.id for device in old.devices.flat]
    lost = data.draw(st.frozensets(st.sampled_from(ids), max_size=len(ids)))
    tree = [place(leaf, old, lost) for leaf in LEAVES]
    count = old.shape["fsdp"]
    grid = old.devices.reshape(old.shape["data"], count)
    gone_pieces = {i for i in range(count) if all(d.id in lost for d in grid[:, i])}
    gone = [
        leaf.path
        for leaf in LEAVES
        if (leaf.dim < 0 and set(ids) <= lost)
        or (
            leaf.dim >= 0 and any(np.diff(leaf.interval(i, count)) for i in gone_pieces)
        )
    ]
    if not gone:
        moved = move_state(tree, LEAVES, old, new, lost=lost)
        for leaf, array in zip(LEAVES, moved.tree, strict=True):
            check(leaf, array, new)
        return
    with pytest.raises(LostStateError) as caught:
        move_state(tree, LEAVES, old, new, lost=lost)
    message = str(caught.value)
    assert gone[0] in message
    assert all(path in message for path in gone[:2])


def test_a_lost_state_is_left_where_it_is():
    old, new = mesh_of(1, 2), mesh_of(1, 1)
    tree = [place(leaf, old) for leaf in LEAVES]
    with pytest.raises(LostStateError):
        move_state(tree, LEAVES, old, new, lost=frozenset({1}))
    for leaf, array in zip(LEAVES, tree, strict=True):
        check(leaf, array, old)


@pytest.mark.parametrize("new", [(1, 4), (2, 2), (4, 1), (1, 2), (1, 8)])
def test_keep_source_really_keeps(new):
    old, new = mesh_of(1, 4), mesh_of(*new)
    tree = [place(leaf, old) for leaf in LEAVES]
    moved = move_state(tree, LEAVES, old, new, keep_source=True)
    consume = jax.jit(
        lambda tree: [x if x.dtype == jnp.bool_ else x * 0 for x in tree],
        donate_argnums=0,
    )
    jax.block_until_ready(consume(moved.tree))
    for leaf, array in zip(LEAVES, tree, strict=True):
        check(leaf, array, old)
    # And the other way round: the copy lives on when the source is consumed.
    moved = move_state(tree, LEAVES, old, new, keep_source=True)
    jax.block_until_ready(consume(tree))
    for leaf, array in zip(LEAVES, moved.tree, strict=True):
        check(leaf, array, new)


def test_moved_arrays_can_be_donated():
    old, new = mesh_of(1, 3), mesh_of(1, 5)
    leaf = LeafLayout("w", (512, 8), np.dtype("float32"), 0)
    [moved] = move_state([place(leaf, old)], [leaf], old, new).tree
    jax.jit(lambda x: x + 1, donate_argnums=0)(moved)
    assert moved.is_deleted()


@pytest.mark.parametrize(
    ("leaf", "old", "new", "expected"),
    [
        # 8 rows of 4 bytes in halves: nothing to fetch, a half each, three quarters.
        (LeafLayout("w", (8,), np.dtype("float32"), 0), (1, 2), (1, 2), 0),
        (LeafLayout("w", (8,), np.dtype("float32"), 0), (1, 2), (1, 1), 16),
        (LeafLayout("w", (8,), np.dtype("float32"), 0), (1, 1), (1, 4), 24),
        (LeafLayout("w", (8,), np.dtype("float32"), 0), (1, 1), (4, 1), 96),
        (LeafLayout("w", (8,), np.dtype("float32"), -1), (1, 2), (1, 4), 64),
        (LeafLayout("w", (8,), np.dtype("float32"), -1), (1, 4), (1, 2), 0),
        # 5 rows in 2 pieces of 3: the second device keeps 2 of its 3.
        (LeafLayout("w", (5, 2), np.dtype("float32"), 0), (1, 2), (1, 1), 16),
    ],
)
def test_bytes_moved_counts_what_changes_devices(leaf, old, new, expected):
    old, new = mesh_of(*old), mesh_of(*new)
    assert move_state([place(leaf, old)], [leaf], old, new).bytes_moved == expected


def test_typed_keys_move_like_any_leaf():
    key = jax.random.key(3)
    leaf = LeafLayout("key", (), key.dtype, -1)
    old, new = mesh_of(1, 2, first=1), mesh_of(1, 5, first=2)
    placed = jax.device_put(key, leaf.sharding(old))
    for keep in (True, False):
        [moved] = move_state([placed], [leaf], old, new, keep_source=keep).tree
        assert moved.sharding.device_set == set(new.devices.flat)
        assert bits(jax.random.key_data(moved)) == bits(jax.random.key_data(key))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(mesh=meshes)
def test_from_host_and_to_host_are_inverse(mesh):
    for leaf in LEAVES:
        array = from_host(truth_of(leaf), leaf, mesh)
        check(leaf, array, mesh)


def test_from_host_pads_with_zeros_and_borrows_nothing():
    leaf = LeafLayout("w", (5, 3), np.dtype("float32"), 0)
    whole = np.ones((5, 3), np.float32)
    array = from_host(whole, leaf, mesh_of(1, 4))
    np.testing.assert_array_equal(np.asarray(array)[5:], np.zeros((3, 3)))
    whole[:] = 7
    np.testing.assert_array_equal(to_host(array, leaf), np.ones((5, 3)))


def aligned(shape, fill):
    """Memory that the CPU backend would take as it is."""
    raw = np.empty(4 * math.prod(shape) + 64, np.uint8)
    start = -raw.ctypes.data % 64
    whole = raw[start : start + 4 * math.prod(shape)].view(np.float32).reshape(shape)
    whole[...] = fill
    return whole


@pytest.mark.parametrize("dim", [-1, 0])
def test_from_host_borrows_nothing_without_padding(dim):
    leaf = LeafLayout("w", (64, 64), np.dtype("float32"), dim)
    whole = aligned((64, 64), 1)
    array = jax.block_until_ready(from_host(whole, leaf, mesh_of(1, 4)))
    whole[...] = 7
    np.testing.assert_array_equal(to_host(array, leaf), np.ones((64, 64)))


@pytest.mark.parametrize("by_host", [False, True])
def test_leaves_that_are_padding_somewhere_can_be_donated_together(
    monkeypatch, by_host
):
    monkeypatch.setattr(carry, "by_host", lambda devices: by_host)
    leaves = [LeafLayout(f"w{i}", (5, 64), np.dtype("float32"), 0) for i in range(3)]
    old, new = mesh_of(1, 1), mesh_of(1, 8)
    tree = [
        from_host(np.full((5, 64), i, np.float32), leaf, old)
        for i, leaf in enumerate(leaves)
    ]
    moved = move_state(tree, leaves, old, new).tree
    # A buffer that two leaves share makes a donating program fail, and others wait.
    for device in range(8):
        data = [x.addressable_data(device) for x in moved]
        assert len({x.unsafe_buffer_pointer() for x in data}) == 3
    stepped = jax.jit(lambda tree: [x + 1 for x in tree], donate_argnums=0)(moved)
    for i, (array, leaf) in enumerate(zip(stepped, leaves, strict=True)):
        np.testing.assert_array_equal(to_host(array, leaf), np.full((5, 64), i + 1))


def test_the_tree_keeps_its_structure():
    old, new = mesh_of(1, 2), mesh_of(1, 3)
    leaf, other = LEAVES[:2]
    tree = {"a": [place(leaf, old)], "b": None, "c": (place(other, old),)}
    layout = {"a": [leaf], "b": None, "c": (other,)}
    moved = move_state(tree, layout, old, new)
    assert jax.tree.structure(moved.tree) == jax.tree.structure(tree)


DTYPES = [
    "float32", "bfloat16", "float16", "int32", "int8", "bool", "int4", "float8_e4m3fn",
    "complex64", "uint32",
]  # fmt: skip


@st.composite
def shardings(draw, shape):
    """Any mesh of up to eight devices, in any order, and any spec that divides."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    while math.prod(sizes) > 8:
        sizes[sizes.index(max(sizes))] -= 1
    devices = draw(st.permutations(jax.devices()))[: math.prod(sizes)]
    names = draw(st.permutations(["a", "b", "c"]))[: len(sizes)]
    mesh = Mesh(np.array(devices).reshape(sizes), tuple(names))
    free, spec = list(names), []
    for size in shape:
        cut = []
        for name in draw(st.permutations(free)):
            count = math.prod(mesh.shape[axis] for axis in [*cut, name])
            if draw(st.booleans()) and size % count == 0:
                cut.append(name)
        free = [name for name in free if name not in cut]
        spec.append(tuple(cut) or None)
    while spec and spec[-1] is None and draw(st.booleans()):
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


@st.composite
def reshards(draw):
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 4, 6, 8, 12]), max_size=3)))
    dtype = np.dtype(getattr(jnp, draw(st.sampled_from(DTYPES))))
    return shape, dtype, draw(shardings(shape)), draw(shardings(shape))


def values_of(shape, dtype):
    values = np.arange(math.prod(shape)).reshape(shape)
    return (values % 2 == 0) if dtype == np.bool_ else (values % 7).astype(dtype)


@pytest.mark.parametrize("by_host", [False, True])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=reshards(), donate=st.booleans())
def test_any_sharding_to_any_other_keeps_every_bit(by_host, case, donate):
    shape, dtype, old, new = case
    truth = values_of(shape, dtype)
    array = jax.device_put(truth, old)
    original = carry.by_host
    carry.by_host = lambda devices: by_host
    try:
        moved = reshard({"w": [array]}, new, donate=donate)["w"][0]
    finally:
        carry.by_host = original
    assert moved.sharding == new
    assert (moved.shape, moved.dtype) == (shape, dtype)
    assert bits(moved) == bits(truth)
    for shard in moved.addressable_shards:
        assert bits(shard.data) == bits(truth[shard.index])
    if not donate:
        assert bits(array) == bits(truth)
        moved.delete()
        for shard in array.addressable_shards:
            assert bits(shard.data) == bits(truth[shard.index])


def test_a_tree_of_anything_moves():
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    spread = NamedSharding(mesh, PartitionSpec("x"))
    keys = jax.random.split(jax.random.key(5), 8)
    tree = {
        "keys": jax.device_put(keys, spread),
        "host": np.arange(8),
        "one": jnp.float32(3),
        "none": None,
    }
    one = SingleDeviceSharding(jax.devices()[6])
    moved = reshard(tree, one)
    assert moved["none"] is None
    assert all(
        x.sharding.device_set == {jax.devices()[6]} for x in jax.tree.leaves(moved)
    )
    assert bits(jax.random.key_data(moved["keys"])) == bits(jax.random.key_data(keys))
    back = reshard(moved["keys"], spread)
    assert back.sharding == spread
    assert bits(jax.random.key_data(back)) == bits(jax.random.key_data(keys))


def test_a_limit_on_scratch_that_cannot_hold_names_the_least():
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    tree = [jax.device_put(jnp.ones((16, 64)), NamedSharding(mesh, PartitionSpec("x")))]
    whole = NamedSharding(mesh, PartitionSpec())
    with pytest.raises(ConfigError, match=r"needs 4096 bytes.*found 4095"):
        reshard(tree, whole, scratch_bytes=4095)
    [moved] = reshard(tree, whole, scratch_bytes=4096)
    assert bits(moved) == bits(np.ones((16, 64), np.float32))
