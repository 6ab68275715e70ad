"""States of every kind on any mesh, and ways to take and keep their snapshots."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import shardkit as sk
from shardkit.layout import LeafLayout
from shardkit.snapshot.assignment import assign
from shardkit.snapshot.image import ImageWriter
from shardkit.snapshot.kept import image_layout, list_claims
from shardkit.snapshot.layout import ImageLayout
from shardkit.snapshot.snapshots import Snapshots
from shardkit.snapshot.store import HostMemory
from shardkit.staging import Staging
from shardkit.state_moves import from_host, raw_leaf

DTYPES = [
    *("float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "int8", "uint16"),
    *("bool", "complex64", "int4", "float4_e2m1fn", "key"),
]


@dataclasses.dataclass
class State:
    """Random bits in leaves of one layout; words of random keys."""

    layout: dict
    words: dict

    def on(self, mesh):
        """The arrays on a mesh, padding included."""
        made = {}
        for path, leaf in self.layout.items():
            array = from_host(self.words[path], raw_leaf(leaf), mesh)
            is_key = leaf is not raw_leaf(leaf)
            made[path] = jax.random.wrap_key_data(array) if is_key else array
        return made


def random_state(shapes, seed=0):
    """Leaves of `(shape, dtype, dim)`, and perhaps what the axes of a group cut."""
    rng, layout, words = np.random.default_rng(seed), {}, {}
    for i, (shape, dtype, dim, *group) in enumerate(shapes):
        path = f"leaf{i}"
        found = jax.random.key(0).dtype if dtype == "key" else jnp.dtype(dtype)
        layout[path] = leaf = LeafLayout(path, shape, found, dim, None, *group)
        words[path] = random_bits(rng, raw_leaf(leaf))
    return State(layout, words)


def random_bits(rng, leaf):
    """Any bits that the dtype has, NaNs with a payload among them."""
    dtype = np.dtype(leaf.dtype)
    if dtype == np.bool_:
        return rng.integers(0, 2, leaf.shape).astype(bool)
    if dtype.name in ("int4", "float4_e2m1fn"):
        numbers = np.arange(-8, 8) if dtype.name == "int4" else np.arange(-6, 7)
        return rng.choice(numbers, leaf.shape).astype(dtype)
    num_bytes = int(np.prod(leaf.shape)) * dtype.itemsize
    data = np.frombuffer(rng.bytes(num_bytes), np.uint8)
    return data.view(dtype).reshape(leaf.shape)


def mesh_of(num_devices, data=1, **group):
    mesh = sk.MeshSpec(data=data, fsdp=-1, **group)
    return mesh.build(jax.devices()[:num_devices])


def staging_program(layout, mesh):
    """How a state is copied, and what does it."""
    staging = Staging(layout, mesh)
    specs = jax.tree.map(lambda leaf: leaf.spec_on(mesh.shape), layout)
    copy = jax.shard_map(
        staging.copy,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=staging.spec,
        check_vma=False,
    )
    return staging, jax.jit(copy)


def split(state, mesh, hosts, num_losses=0, step=3):
    """Images as processes of some hosts would write them, one device each."""
    staging, copy = staging_program(state.layout, mesh)
    ids = [device.id for device in mesh.devices.flat]
    process_of = {id: i % len(hosts) for i, id in enumerate(ids)}
    claims = [
        type(claim)(
            claim.leaf,
            claim.box,
            claim.num_bytes,
            tuple((process_of[device], device) for _, device in claim.holders),
        )
        for claim in list_claims(staging)
    ]
    host_of = dict(enumerate(hosts))
    alone = image_layout(staging, HostMemory())
    staged, images = copy(state.on(mesh)), {}
    for process, pieces in assign(claims, host_of, num_losses).items():
        layout = ImageLayout.plan(
            run="r",
            host=hosts[process],
            process=process,
            num_processes=len(hosts),
            leaves=alone.leaves,
            mesh=alone.mesh,
            pieces=pieces,
        )
        memory = bytearray(layout.num_bytes)
        writer = ImageWriter(memoryview(memory), layout, step=step, generation=0)
        kept = [(piece.leaf, piece.device) for piece in pieces]
        for index, words in staging.read(staging.start(staged, kept)):
            writer.view(index).view(words.dtype)[...] = words
            writer.put_done(index)
        writer.commit({})
        images[process] = memory
    return images


def take(state, mesh, *, step=3, store=None):
    """Takes one snapshot of a state on a mesh; returns where it is."""
    store, events = store or HostMemory(), sk.EventLog()
    seen = []
    events.subscribe(seen.append)
    snapshots = Snapshots(1, store, events)
    staging, copy = staging_program(state.layout, mesh)
    snapshots.take(step, staging, copy, state.on(mesh))
    snapshots.close()
    assert [event.name for event in seen] == ["snapshot"], seen
    return store


def same_words(found, state, count):
    """Compares arrays, without their padding, with what they should be."""
    for path, leaf in state.layout.items():
        x = found[path]
        assert x.dtype == leaf.dtype
        assert x.shape == leaf.physical_shape(count)
        bare = raw_leaf(leaf)
        words = np.asarray(jax.random.key_data(x) if bare is not leaf else x)
        words = words[tuple(slice(0, size) for size in bare.shape)]
        if words.dtype.name in ("int4", "float4_e2m1fn"):
            # The upper half of their bytes means nothing.
            words, wanted = (y.astype(np.float32) for y in (words, state.words[path]))
        else:
            wanted = state.words[path]
        assert words.tobytes() == wanted.tobytes(), path


class Recorder(HostMemory):
    """Keeps the bytes of every image that was ever committed."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def commit(self, slot, step):
        super().commit(slot, step)
        self.kept[step] = bytes(slot.memory)


@st.composite
def leaf_shapes(draw):
    """A shape, a dtype and the dim that is cut, -1 for none."""
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    dim = draw(st.integers(-1, len(shape) - 1))
    return shape, draw(st.sampled_from(DTYPES)), dim
