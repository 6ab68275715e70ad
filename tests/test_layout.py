"""The layout is pure, so that meshes of imaginary devices are as good as real ones."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from shardkit.layout import LeafLayout, plan_pieces, state_shards
from shardkit.mesh import MESH_AXES, MeshSpec


@dataclasses.dataclass(frozen=True)
class Device:
    id: int


def imaginary_mesh(ids, data, fsdp):
    grid = np.empty((data, fsdp, 1, 1, 1), dtype=object)
    grid.ravel()[:] = [Device(i) for i in ids[: data * fsdp]]
    shape = dict(zip(MESH_AXES, grid.shape, strict=True))
    return types.SimpleNamespace(axis_names=MESH_AXES, shape=shape, devices=grid)


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


@st.composite
def moves(draw):
    """A leaf, two meshes that share some devices, and devices that are lost."""
    dim = draw(st.integers(-1, 1))
    shape = tuple(draw(st.integers(2, 30)) for _ in range(2))
    meshes = []
    for _ in range(2):
        data, fsdp = draw(st.integers(1, 4)), draw(st.integers(1, 9))
        ids = draw(st.permutations(range(data * fsdp + draw(st.integers(0, 4)))))
        meshes.append(imaginary_mesh(list(ids), data, fsdp))
    ids = [device.id for device in meshes[0].devices.flat]
    lost = draw(st.frozensets(st.sampled_from(ids), max_size=len(ids) - 1))
    return leaf_of(shape, dim), *meshes, lost


def hold(leaf, mesh, truth):
    """Device → the rows of the truth that it holds, by brute force."""
    held = {}
    for index, device in np.ndenumerate(mesh.devices):
        rows = range(len(truth))
        if leaf.dim >= 0:
            rows = range(*leaf.interval(index[1], mesh.shape["fsdp"]))
        held[device] = dict(zip(rows, truth[list(rows)], strict=True))
    return held


@settings(max_examples=300, deadline=None, derandomize=True)
@given(move=moves())
def test_a_plan_brings_every_device_exactly_what_it_is_to_hold(move):
    leaf, old, new, lost = move
    num_rows = leaf.shape[leaf.dim] if leaf.dim >= 0 else 1
    truth = np.arange(num_rows)
    held = {d: rows for d, rows in hold(leaf, old, truth).items() if d.id not in lost}
    reachable = set().union(*held.values())
    plan = plan_pieces(leaf, old, new, lost)
    assert (plan is None) == (reachable < set(truth))
    if plan is None:
        return
    wanted = hold(leaf, new, truth)
    assert plan.keys() == wanted.keys()
    for target, pieces in plan.items():
        assert all(piece.source in held for piece in pieces)
        if leaf.dim < 0:
            [piece] = pieces
            assert target not in held or piece.source == target
            continue
        assert all(piece.start < piece.stop for piece in pieces)
        got = {}
        for piece in pieces:
            for row in range(piece.start, piece.stop):
                assert row not in got
                got[row] = held[piece.source][row]
        assert list(got) == sorted(got)
        assert got == wanted[target]
        for piece in pieces:
            # What a device has, it does not fetch.
            if target in held and piece.start in held[target]:
                assert piece.source == target


def test_a_plan_fails_only_when_rows_are_gone():
    # 5 rows in 8 pieces: the last three hold nothing but padding.
    leaf = leaf_of((5, 3), 0)
    old, new = imaginary_mesh(range(8), 1, 8), imaginary_mesh(range(5), 1, 5)
    assert plan_pieces(leaf, old, new, frozenset({4})) is None
    assert plan_pieces(leaf, old, new, frozenset({5, 6, 7})) is not None


def test_replicas_share_the_load():
    leaf = leaf_of((8, 3), 0)
    old = imaginary_mesh(range(4), 4, 1)
    new = imaginary_mesh(range(10, 18), 1, 8)
    sources = [piece.source.id for [piece] in plan_pieces(leaf, old, new).values()]
    assert sorted(sources) == sorted(list(range(4)) * 2)


def test_a_thousand_devices_are_planned_at_once():
    leaf = leaf_of((1000, 3), 0)
    old, new = imaginary_mesh(range(4096), 4, 1024), imaginary_mesh(range(999), 1, 999)
    plan = plan_pieces(leaf, old, new, frozenset(range(0, 1024)))
    assert plan is not None
    total = sum(p.stop - p.start for pieces in plan.values() for p in pieces)
    assert total == 1000


@pytest.mark.parametrize("dim", [-1, 0])
def test_losing_all_replicas_of_a_piece_loses_the_leaf(dim):
    leaf = leaf_of((8, 3), dim)
    old, new = imaginary_mesh(range(4), 2, 2), imaginary_mesh(range(3), 1, 3)
    assert plan_pieces(leaf, old, new, frozenset({0, 3})) is not None
    lost = frozenset({1, 3}) if dim == 0 else frozenset(range(4))
    assert plan_pieces(leaf, old, new, lost) is None
