import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec
from sharded import COUNTS, normal

from shardkit.mesh import MeshSpec
from shardkit.shards import Shards, pad_dim


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 20),
    dim=st.integers(0, 2),
    count=st.sampled_from(COUNTS),
)
def test_pieces_joined_without_their_padding_are_the_array(size, dim, count):
    shape = tuple(size if d == dim else 2 for d in range(3))
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    shards = Shards("fsdp", count)
    piece = shards.piece(size)
    assert piece == -(-size // count)
    padded = np.asarray(pad_dim(jnp.asarray(x), dim, piece * count))
    assert padded.shape[dim] == piece * count
    np.testing.assert_array_equal(padded[tuple(slice(0, n) for n in shape)], x)
    assert padded.sum() == x.sum()


@pytest.mark.parametrize("count", COUNTS)
def test_cut_gather_and_mask_inside_shard_map(count):
    shards = Shards("fsdp", count)
    mesh = MeshSpec().build(jax.devices()[:count])
    x = normal(5, 3)

    def spmd(x):
        cut = shards.cut(x, 0)
        dirty = jnp.where(shards.mask(jnp.ones_like(cut), 0, 5, 0) > 0, cut, jnp.nan)
        masked = shards.mask(dirty, 0, 5, -2)
        return (
            shards.gather(dirty, 0, 5),
            lax.all_gather(masked, "fsdp", tiled=True),
            shards.pmax(cut.max()),
            shards.psum(jnp.int32(1)),
        )

    joined, masked, largest, ones = jax.jit(
        jax.shard_map(
            spmd,
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )(x)
    np.testing.assert_array_equal(joined, x)
    np.testing.assert_array_equal(masked[:5], x)
    np.testing.assert_array_equal(masked[5:], -2)
    assert float(largest) == max(x.max(), 0 if 5 % count else x.max())
    assert int(ones) == count


def test_outside_shard_map_nothing_is_cut():
    shards = Shards()
    x = normal(5, 3)
    assert shards.piece(5) == 5
    for out in (
        shards.cut(jnp.asarray(x), 0),
        shards.gather(jnp.asarray(x), 1, 3),
        shards.mask(x, 0, 5, 0),
        shards.pmax(x),
        shards.psum(x),
    ):
        np.testing.assert_array_equal(out, x)
