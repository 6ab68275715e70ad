import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental import io_callback
from jax.sharding import PartitionSpec

import shardkit.localize as localize
from shardkit.errors import InexactError
from shardkit.layout import LeafLayout
from shardkit.localize import Localizer
from shardkit.mesh import MeshSpec
from shardkit.program import Program
from shardkit.recipe import Recipe
from shardkit.shards import Shards, pad_dim

COUNTS = (1, 2, 3, 5, 8)


def mesh_of(count):
    return MeshSpec(data=1).build(jax.devices()[:count])


def place(x, leaf, mesh):
    """Places an array in pieces whose padding is the worst that it could be."""
    physical = np.full(leaf.physical_shape(mesh.shape["fsdp"]), 77).astype(x.dtype)
    if jnp.issubdtype(x.dtype, jnp.floating):
        physical = np.full(physical.shape, np.nan, x.dtype)
    physical[tuple(slice(0, size) for size in leaf.shape)] = x
    return jax.device_put(physical, leaf.sharding(mesh))


@dataclasses.dataclass
class Result:
    """What came out of a function on shards, whole and in host memory."""

    out: object
    dims: object
    gathered: list


def on_shards(fn, args, dims, count, exact=True):
    """Evaluates a function of whole arrays on `count` shards."""
    mesh, shards = mesh_of(count), Shards("fsdp", count, exact)
    layout = jax.tree.map(
        lambda x, dim: LeafLayout("", x.shape, np.dtype(x.dtype), dim), args, dims
    )
    shapes = jax.tree.map(lambda leaf: leaf.abstract, layout)
    localizer, found = Localizer(shards), []

    def pieces(*args):
        out, out_dims = localizer(fn, args, dims, shapes)
        found.append(out_dims)

        def whole(x, dim, shape):
            return x if dim < 0 else shards.gather(x, dim, shape.shape[dim])

        return jax.tree.map(whole, out, out_dims, jax.eval_shape(fn, *shapes))

    spmd = jax.shard_map(
        pieces,
        mesh=mesh,
        in_specs=tuple(jax.tree.map(lambda leaf: leaf.spec, leaves) for leaves in layout),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    placed = jax.tree.map(lambda x, leaf: place(x, leaf, mesh), args, layout)
    out = jax.tree.map(np.asarray, Program(spmd, exact=exact)(*placed))
    return Result(out, found[-1], localizer.gathered)


def bits(tree):
    return [
        (np.ascontiguousarray(x).tobytes(), x.shape, x.dtype)
        for x in jax.tree.leaves(tree)
    ]


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        b = np.asarray(b)
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if b.dtype.kind in "iub":
            np.testing.assert_array_equal(a, b)
        else:
            rtol = 1e-4 if b.dtype == np.float32 else 3e-2
            np.testing.assert_allclose(
                a.astype(np.float32), b.astype(np.float32), rtol=rtol, atol=rtol / 10
            )


def check(fn, args, dims, counts=COUNTS):
    """One shard agrees with plain JAX, and any number of them with one."""
    one = on_shards(fn, args, dims, 1)
    assert_close(one.out, jax.jit(fn)(*args))
    for count in counts[1:]:
        many = on_shards(fn, args, dims, count)
        assert bits(many.out) == bits(one.out), count
        assert many.dims == one.dims
        assert many.gathered == one.gathered
    return one


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integers(*shape, seed=0, dtype=np.int32):
    return np.random.default_rng(seed).integers(-9, 9, shape).astype(dtype)


# --- what a function may consist of


def unary(x):
    return [
        jnp.sin(x), jnp.exp(-x * x), jnp.sqrt(jnp.abs(x)), jnp.tanh(x), jax.nn.gelu(x),
        jnp.where(x > 0, x, 0.1 * x), lax.rsqrt(1 + x * x), x.astype(jnp.bfloat16) * 2,
    ]
