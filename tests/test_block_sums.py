"""The digests of blocks do not depend on where the shards are, and add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardkit import blocks as blocks_module
from shardkit.blocks import Blocks
from shardkit.checkpoint.block_sums import BlockSums, hex_lanes
from shardkit.digest import leaf_digest
from shardkit.layout import LeafLayout
from shardkit.mesh import MeshSpec
from shardkit.state_moves import from_host

DTYPES = ["float32", "bfloat16", "int32", "float8_e4m3fn", "int4", "bool", "complex64"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 64)


def random_bits(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype)
    if dtype.name == "int4":
        return rng.integers(-8, 8, shape).astype(dtype)
    if dtype.name == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    data = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return data.view(dtype)[..., 0]


def sums_of(x, leaf, array):
    return BlockSums([(leaf, array)]).result()[leaf.path]


def words_of(x):
    """The bits of an array as uint32 words, a last dim of them per element."""
    if x.dtype == bool or x.dtype == jnp.int4:
        return x.astype(np.int8).astype(np.int32).view(np.uint32)[..., None]
    if x.dtype == np.complex64:
        return x.view(np.uint32).reshape(*x.shape, 2)
    return x.view(f"uint{8 * x.dtype.itemsize}").astype(np.uint32)[..., None]


def mix(x):
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def by_brute_force(x):
    """The definition, in numpy and block by block."""
    words = words_of(x)
    index = np.arange(words.size, dtype=np.uint32).reshape(words.shape)
    found = []
    for block in Blocks.of(x.shape, x.dtype.itemsize):
        box = Blocks.of(x.shape, x.dtype.itemsize).box(block)
        part = tuple(slice(a, b) for a, b in box)
        seeds = (0x6A09E667, 0xBB67AE85, 0x3C6EF373, 0xA54FF53B)
        spread = index[part] * np.uint32(0x9E3779B1)
        mixed = [mix(words[part] ^ mix(spread + np.uint32(seed))) for seed in seeds]
        found.append([lane.sum(dtype=np.uint32) for lane in mixed])
    return np.array(found, np.uint32).reshape(-1, 4)


CASES = [
    ((), "float32", 3, -1),
    ((40,), "float32", 3, 0),
    ((13, 5), "float32", 8, 0),
    ((13, 5), "bfloat16", 5, 1),
    ((5, 13, 3), "int32", 4, 1),
    ((5, 13, 3), "float32", 2, 2),
    ((5, 13, 3), "float32", 7, 0),
    ((3, 40), "float8_e4m3fn", 3, 1),
    ((30, 7), "int4", 3, 0),
    ((30, 7), "bool", 4, 0),
    ((9, 4), "complex64", 2, 0),
    ((2, 3, 4, 5), "float32", 3, 2),
    ((2, 3, 4, 5), "float32", 1, -1),
]


@pytest.mark.parametrize(("shape", "dtype", "num_devices", "dim"), CASES)
def test_every_count_of_devices_finds_the_same(shape, dtype, num_devices, dim):
    x = random_bits(shape, dtype)
    leaf = LeafLayout("w", shape, x.dtype, dim)
    mesh = MeshSpec(fsdp=-1).build(jax.devices()[:num_devices])
    array = from_host(x, leaf, mesh)
    found, wanted = sums_of(x, leaf, array), by_brute_force(x)
    assert (found == wanted).all()
    whole = jax.jit(leaf_digest, static_argnums=1)(array, leaf)
    assert (np.asarray(whole) == wanted.sum(0, dtype=np.uint32)).all()


@pytest.mark.parametrize(
    "specs",
    [("a", "b", None), (None, ("b", "a"), None), ("b", None, "a"), (None, None, "b")],
)
def test_any_named_sharding_finds_the_same(specs):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    x = random_bits((8, 16, 8), "float32")
    array = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*specs)))
    leaf = LeafLayout("w", x.shape, x.dtype)
    assert (sums_of(x, leaf, array) == by_brute_force(x)).all()


def test_keys_empty_leaves_and_single_devices():
    keys = jax.random.split(jax.random.key(0), 37)
    data = np.asarray(jax.random.key_data(keys))
    leaf = LeafLayout("k", keys.shape, keys.dtype)
    assert (sums_of(data, leaf, keys) == by_brute_force(data)).all()
    empty = np.zeros((0, 3), np.float32)
    leaf = LeafLayout("e", empty.shape, empty.dtype)
    assert (sums_of(empty, leaf, jnp.asarray(empty)) == 0).all()


def test_arrays_may_be_given_up_at_once():
    x = random_bits((64, 64), "float32")
    leaf = LeafLayout("w", x.shape, x.dtype)
    array = jnp.array(x)
    sums = BlockSums([(leaf, array)])
    array.delete()
    assert (sums.result()["w"] == by_brute_force(x)).all()


def test_any_change_of_an_element_shows_in_its_block_alone():
    x = random_bits((33, 5), "float32")
    leaf = LeafLayout("w", x.shape, x.dtype)
    before = sums_of(x, leaf, jnp.asarray(x))
    blocks = Blocks.of(x.shape, 4)
    for number, index in enumerate(blocks):
        box = blocks.box(index)
        y = x.copy()
        place = tuple(stop - 1 for _, stop in box)
        y.view(np.uint32)[place] ^= np.uint32(1 << (number % 32))
        changed = (sums_of(y, leaf, jnp.asarray(y)) != before).all(axis=1)
        assert changed.tolist() == [i == number for i in range(len(blocks))]


def test_blocks_tile_the_leaf_once():
    for shape in [(), (7,), (5, 3), (3, 5, 4), (2, 3, 5, 7), (100, 1), (1, 100)]:
        seen = np.zeros(shape, int)
        blocks = Blocks.of(shape, 4)
        for index in blocks:
            seen[tuple(slice(a, b) for a, b in blocks.box(index))] += 1
        assert (seen == 1).all()
        assert len(list(blocks)) == len(blocks)


def test_hex_lanes_spell_all_bits():
    assert hex_lanes(np.array([[1, 2, 3, 0xFFFFFFFF]], np.uint32)) == (
        "000000010000000200000003ffffffff",
    )
