"""How much a device holds while a state is on its way."""

import collections
import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardkit import carry, device_copies
from shardkit.errors import ConfigError
from shardkit.layout import LeafLayout
from shardkit.mesh import MeshSpec
from shardkit.resharding import reshard
from shardkit.state_moves import compile_move, from_host, move_state, to_host


def held_bytes(ids):
    """Bytes that each device holds; buffers of which there are two views count once."""
    held = collections.Counter()
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            if shard.device.id in ids and not shard.data.is_deleted():
                key = shard.device.id, shard.data.unsafe_buffer_pointer()
                held[key] = max(held[key], shard.data.nbytes)
    return collections.Counter(
        {id: sum(n for (at, _), n in held.items() if at == id) for id in ids}
    )


@pytest.fixture
def peaks(monkeypatch):
    """The most that each device held, looked at after every program and transfer."""
    found = collections.Counter()
    everyone = {device.id for device in jax.devices()}

    def looked_at(method):
        def looking(*args, **kwargs):
            out = method(*args, **kwargs)
            jax.block_until_ready(out)
            for id, held in held_bytes(everyone).items():
                found[id] = max(found[id], held)
            return out

        return looking

    monkeypatch.setattr(carry, "by_host", lambda devices: False)
    for name in ("call", "send", "zeros"):
        method = getattr(device_copies._Doer, name)
        monkeypatch.setattr(device_copies._Doer, name, looked_at(method))
    return found


def sharding(devices, dim):
    """Cut along a dim, or -1 for a copy on every device."""
    mesh = Mesh(np.array(devices), ("x",))
    spec = PartitionSpec(*[None] * dim, "x") if dim >= 0 else PartitionSpec()
    return NamedSharding(mesh, spec)


def dim_of(shape, dim):
    return dim if dim < len(shape) else -1


shapes = st.sampled_from([(24, 24), (48, 24), (24, 72), (120, 24), (24,)])
counts = st.sampled_from([1, 2, 3, 4, 6, 8])
dims = st.integers(-1, 1)


moves = given(
    shapes=st.lists(shapes, min_size=1, max_size=6),
    ends=st.tuples(counts, dims, counts, dims, st.integers(0, 7)),
    more=st.sampled_from([0, 4096, 1 << 20]),
)


@settings(max_examples=2, deadline=None, derandomize=True)
@moves
def test_no_device_holds_more_than_either_end_and_the_limit(shapes, ends, more):
    with pytest.MonkeyPatch.context() as patch:
        check_peaks(peaks.__wrapped__(patch), shapes, ends, more)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=25, deadline=None, derandomize=True)
@moves
def test_no_device_ever_holds_more_than_either_end_and_the_limit(shapes, ends, more):
    with pytest.MonkeyPatch.context() as patch:
        check_peaks(peaks.__wrapped__(patch), shapes, ends, more)


def check_peaks(peaks, shapes, ends, more):
    num_old, old_dim, num_new, new_dim, shift = ends
    devices = jax.devices()
    old = [sharding(devices[:num_old], dim_of(s, old_dim)) for s in shapes]
    turned = devices[shift:] + devices[:shift]
    new = [sharding(turned[:num_new], dim_of(s, new_dim)) for s in shapes]
    gc.collect()
    everyone = {device.id for device in devices}
    truth = [np.arange(np.prod(s), dtype=np.float32).reshape(s) for s in shapes]
    # Computed, not put, so that the devices own their memory.
    tree = [
        jax.jit(lambda x: x + 1, out_shardings=s)(x)
        for x, s in zip(truth, old, strict=True)
    ]
    jax.block_until_ready(tree)
    before = held_bytes(everyone)
    with pytest.raises(ConfigError) as caught:
        reshard(tree, new, donate=True, scratch_bytes=0)
    least = int(str(caught.value).split("needs ")[1].split()[0])
    peaks.clear()
    moved = reshard(tree, new, donate=True, scratch_bytes=least + more)
    del tree
    gc.collect()
    after = held_bytes(everyone)
    for id in everyone:
        bound = max(before[id], after[id]) + least + more
        assert peaks[id] <= bound, (id, before[id], after[id], least)
    for array, x in zip(moved, truth, strict=True):
        np.testing.assert_array_equal(np.asarray(array), x + 1)
    largest = max(shard.data.nbytes for x in moved for shard in x.addressable_shards)
    assert least >= largest


@pytest.mark.slow
def test_leaves_that_shrink_make_room_for_those_that_grow(peaks):
    devices = jax.devices()[:4]
    whole, cut = sharding(devices, -1), sharding(devices, 0)
    growing = [jax.device_put(jnp.ones((64, 64)), cut) for _ in range(8)]
    shrinking = [jax.device_put(jnp.ones((64, 64)), whole) for _ in range(8)]
    tree = jax.block_until_ready([x + 0 for x in growing + shrinking])
    del growing, shrinking
    gc.collect()
    before = held_bytes({d.id for d in devices})
    moved = reshard(tree, [whole] * 8 + [cut] * 8, donate=True, scratch_bytes=1 << 15)
    for device in devices:
        assert peaks[device.id] <= before[device.id] + (1 << 15)
    assert all((np.asarray(x) == 1).all() for x in moved)


def compiled_names(caplog, work):
    with jax.log_compiles(True), caplog.at_level("WARNING"):
        caplog.clear()
        out = work()
    return out, {r.args[0] for r in caplog.records if "Compiling" in r.msg}


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_programs_that_were_compiled_before_are_not_compiled_again(
    caplog, monkeypatch, keep
):
    monkeypatch.setattr(carry, "by_host", lambda devices: False)
    leaves = [LeafLayout(f"w{i}", (37, 5), np.dtype("float32"), 0) for i in range(11)]
    leaves += [LeafLayout(f"v{i}", (5, 37), np.dtype("int32"), 1) for i in range(3)]
    leaves += [LeafLayout("step", (), np.dtype("int32"), -1)]
    wanted = {"_cut", "_join", "jit(_cut)", "jit(_join)"}
    for counts in ((3, 2), (2, 5), (4, 1), (1, 2)):
        old, new = (MeshSpec(fsdp=-1).build(jax.devices()[1 : 1 + n]) for n in counts)

        def move(leaves=leaves, old=old, new=new):
            tree = [from_host(np.ones(x.shape, x.dtype), x, old) for x in leaves]
            # As a step makes them: the only shard of one device then has the mesh's
            # sharding, not the device's.
            places = [x.sharding(old) for x in leaves]
            copied = jax.jit(
                lambda tree: [x.copy() for x in tree], out_shardings=places
            )
            tree = copied(tree)
            return move_state(tree, leaves, old, new, keep_source=keep)

        compile_move(leaves, old, new, keep_source=keep)
        moved, names = compiled_names(caplog, move)
        assert not names & wanted
        assert all(
            (to_host(array, leaf) == 1).all()
            for array, leaf in zip(moved.tree, leaves, strict=True)
        )
        # What nobody has compiled is compiled, and seen.
        others = [dataclasses.replace(x, shape=(*x.shape, 2 + keep)) for x in leaves]
        _, names = compiled_names(caplog, functools.partial(move, others))
        assert names & wanted
