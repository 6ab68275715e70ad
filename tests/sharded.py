"""Runs a function of whole arrays on any number of shards, for the tests of that."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from shardkit.layout import LeafLayout
from shardkit.localize import Localizer
from shardkit.mesh import MeshSpec
from shardkit.program import Program
from shardkit.shards import Shards

COUNTS = (1, 2, 3, 5, 8)


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def place(x, leaf, mesh):
    """Places an array in pieces whose padding is the worst that it could be."""
    if leaf.dim < 0:
        return jax.device_put(x, leaf.sharding(mesh))
    fill = np.nan if jnp.issubdtype(x.dtype, jnp.floating) else 77
    physical = np.full(leaf.physical_shape(mesh.shape["fsdp"]), fill).astype(x.dtype)
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
    mesh = MeshSpec(data=1).build(jax.devices()[:count])
    shards = Shards("fsdp", count, exact)
    layout = jax.tree.map(
        lambda x, dim: LeafLayout("", x.shape, x.dtype, dim), args, dims
    )
    shapes = jax.tree.map(lambda leaf: leaf.abstract, layout)
    specs = jax.tree.map(lambda leaf: leaf.spec, layout)
    found = []

    def spmd(zero, args):
        localizer = Localizer(shards, zero)
        out, out_dims = localizer(fn, args, dims, shapes)
        found.append((out_dims, localizer.gathered))

        def whole(x, dim, shape):
            return x if dim < 0 else shards.gather(x, dim, shape.shape[dim])

        return jax.tree.map(whole, out, out_dims, jax.eval_shape(fn, *shapes))

    program = Program(
        jax.shard_map(
            spmd,
            mesh=mesh,
            in_specs=(PartitionSpec(), specs),
            out_specs=PartitionSpec(),
            check_vma=False,
        ),
        exact=exact,
    )
    zero = jax.device_put(np.int32(0), NamedSharding(mesh, PartitionSpec()))
    out = program(
        zero, jax.tree.map(lambda x, leaf: place(x, leaf, mesh), args, layout)
    )
    return Result(on_host(out), *found[-1])


def on_host(tree):
    return jax.tree.map(
        lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree
    )


def traced(fn, args, dims):
    """Returns the cut dims of the results and what was gathered; computes nothing."""
    localizer, found = Localizer(Shards()), []
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)

    def whole(*args):
        out, out_dims = localizer(fn, args, dims, shapes)
        found.append(out_dims)
        return out

    jax.eval_shape(whole, *shapes)
    return found[-1], localizer.gathered


def assert_same_bits(found, expected):
    found, treedef = jax.tree.flatten(found)
    expected, other = jax.tree.flatten(expected)
    assert treedef == other
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        same = np.frombuffer(a.tobytes(), np.uint8) == np.frombuffer(
            b.tobytes(), np.uint8
        )
        assert same.all(), f"{(~same).sum()} bytes differ\n{a}\n{b}"


def assert_close(found, expected, rtol=1e-4):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        b = np.asarray(b)
        assert a.shape == b.shape
        if b.dtype.kind in "iub":
            np.testing.assert_array_equal(a, b)
            continue
        tolerance = rtol if b.dtype.itemsize > 2 else 2e-2
        a, b = [x.astype(np.complex128) for x in (a, b)]
        scale = np.max(np.abs(b), where=~np.isnan(b), initial=1e-6)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
