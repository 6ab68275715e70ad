"""The layout of a leaf on its own mesh axis."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from shardkit.layout import LeafLayout, state_shards
from shardkit.mesh import MeshSpec


def leaf_of(shape, dim, dtype="float32"):
    return LeafLayout("params/w", shape, np.dtype(dtype), dim)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(size=st.integers(1, 40), count=st.integers(1, 50), dim=st.integers(0, 2))
def test_the_pieces_of_a_leaf_are_equal_and_make_it_up(size, count, dim):
    shape = (3, *[2] * dim)[:dim] + (size,) + (4,) * (2 - dim)
    leaf = leaf_of(shape, dim)
    physical = leaf.physical_shape(count)
    assert physical[dim] % count == 0
    assert size <= physical[dim] < size + count
    assert physical[:dim] + physical[dim + 1 :] == shape[:dim] + shape[dim + 1 :]
    assert leaf.is_padded(count) == (size % count != 0)
    piece = physical[dim] // count
    intervals = [leaf.interval(i, count) for i in range(count)]
    rows = [row for start, stop in intervals for row in range(start, stop)]
    assert rows == list(range(size))
    for i, (start, stop) in enumerate(intervals):
        assert stop - start <= piece
        # What a piece holds begins where the piece begins, its padding follows.
        assert start == min(i * piece, size)
    assert leaf.piece_bytes(count) == np.prod(physical) * 4 // count


def test_a_whole_leaf_is_the_same_everywhere():
    leaf = leaf_of((5, 3), -1, "int8")
    assert leaf.spec == PartitionSpec()
    assert leaf.physical_shape(7) == (5, 3)
    assert not leaf.is_padded(7)
    assert leaf.piece_bytes(7) == 15


def test_a_cut_leaf_on_a_mesh():
    leaf = leaf_of((4, 5), 1, "bfloat16")
    assert leaf.spec == PartitionSpec(None, "fsdp")
    mesh = MeshSpec(data=2, fsdp=-1).build(jax.devices()[:6])
    assert leaf.physical(mesh).shape == (4, 6)
    assert leaf.physical(mesh).dtype == jax.numpy.bfloat16
    assert leaf.physical(mesh).sharding.shard_shape((4, 6)) == (4, 2)
    assert leaf.abstract.shape == (4, 5)
    assert leaf.piece_bytes(3) == 16
    assert (state_shards(mesh).axis, state_shards(mesh).count) == ("fsdp", 3)
