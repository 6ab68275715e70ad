"""Which mesh axes a collective goes over, in every spelling."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import shardkit as sk
from shardkit.hlo import each_collective
from shardkit.replica_groups import axes_of_groups, replica_groups

MESH = {"data": 2, "fsdp": 1, "tensor": 2, "expert": 1, "context": 2}
PLACES = np.arange(8).reshape(tuple(MESH.values()))


def groups_over(axes):
    """By definition: those that differ along some axes alone."""
    inner = [list(MESH).index(axis) for axis in axes]
    outer = [d for d in range(len(MESH)) if d not in inner]
    size = math.prod(MESH[axis] for axis in axes)
    return PLACES.transpose(outer + inner).reshape(-1, size)


def some_axes():
    names = [axis for axis, size in MESH.items() if size > 1]
    return [x for n in range(1, 4) for x in itertools.combinations(names, n)]


@pytest.mark.parametrize("axes", some_axes())
def test_listed_groups(axes):
    listed = ",".join(f"{{{','.join(map(str, g))}}}" for g in groups_over(axes))
    assert axes_of_groups(f"channel_id=1, replica_groups={{{listed}}}", MESH) == axes


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("replica_groups=[4,2]<=[8]", ("context",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("tensor",)),
        ("replica_groups=[2,4]<=[8]", ("tensor", "context")),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "tensor")),
        ("replica_groups=[1,8]<=[8]", ("data", "tensor", "context")),
        ("replica_groups={}", ("data", "tensor", "context")),
        ("replica_groups=[8,1]<=[8]", ()),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("data",)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b','a'}", ("data", "tensor")),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x={1}", ("tensor",)),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}",
            ("context",),
        ),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}",
            ("context",),
        ),
        ("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", ("context",)),
        ("source_target_pairs={{0,4},{4,0}}", ("data",)),
        ("dimensions={0}", None),
        ("replica_groups={{0,9}}", None),
    ],
)
def test_spellings(text, axes):
    assert axes_of_groups(text, MESH) == axes


def test_groups_are_all_devices_once():
    text = "replica_groups=mesh['a'=4,'b'=2] {'b'}"
    assert replica_groups(text, 8) == [(0, 1), (2, 3), (4, 5), (6, 7)]


@pytest.mark.parametrize("axes", [("data",), ("data", "tensor"), ("context",)])
def test_what_this_compiler_writes(axes):
    mesh = sk.MeshSpec(data=2, fsdp=1, tensor=2, context=2).build(jax.devices())
    fn = jax.shard_map(
        lambda x: jax.lax.psum(x, axes),
        mesh=mesh,
        in_specs=PartitionSpec(axes),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    text = jax.jit(fn).lower(jnp.ones((8, 4))).compile().as_text()
    [found] = each_collective(text)
    assert axes_of_groups(found.attributes, MESH) == axes
    assert re.search(r"replica_groups=", found.attributes)
    assert found.num_bytes == 4 * 4 * 8 // math.prod(MESH[axis] for axis in axes)
