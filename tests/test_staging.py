"""Copies of a state on its devices."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshotted import leaf_shapes, mesh_of, random_state, staging_program

from shardkit import staging as staging_module


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    leaves=st.lists(leaf_shapes(), min_size=1, max_size=8),
    mesh=st.sampled_from([(8, 1), (8, 2), (6, 3), (5, 1), (3, 1), (1, 1)]),
    seed=st.integers(0, 99),
)
def test_every_piece_is_what_its_device_holds(leaves, mesh, seed):
    state, mesh = random_state(leaves, seed), mesh_of(*mesh)
    staging, copy = staging_program(state.layout, mesh)
    ids = [device.id for device in mesh.devices.flat]
    kept = [(leaf, id) for leaf in range(len(leaves)) for id in ids]
    found = dict(staging.read(staging.start(copy(state.on(mesh)), kept)))
    assert found.keys() == set(range(len(kept)))
    for index, (leaf, id) in enumerate(kept):
        path = staging.leaves[leaf].path
        whole, layout = state.words[path], staging.layouts[path]
        wanted = whole[tuple(slice(*ends) for ends in layout.box(id))]
        assert found[index].shape == wanted.shape
        piece = found[index].view(wanted.dtype)
        if wanted.dtype.name in ("int4", "float4_e2m1fn"):
            piece, wanted = piece.astype(np.float32), wanted.astype(np.float32)
        assert piece.tobytes() == wanted.tobytes()


LEAVES = [((5, 3), "float32", 0), ((7,), "bfloat16", 0), ((), "int32", -1)]


def test_the_memory_that_it_takes_is_known_before():
    state, mesh = random_state(LEAVES), mesh_of(4)
    staging, copy = staging_program(state.layout, mesh)
    held = [0] * 4
    for array in copy(state.on(mesh)):
        for i, shard in enumerate(array.addressable_shards):
            held[i] += shard.data.nbytes
    assert held == [staging.num_bytes] * 4


def test_what_is_copied_outlives_the_state():
    state, mesh = random_state(LEAVES), mesh_of(4)
    staging, copy = staging_program(state.layout, mesh)
    arrays = state.on(mesh)
    staged = copy(arrays)
    for array in arrays.values():
        array.delete()
    [(_, words)] = staging.read(staging.start(staged, [(0, 1)]))
    assert words.tobytes() == state.words["leaf0"][2:4].tobytes()


@pytest.mark.parametrize(("num_bytes", "num_copies"), [(1, 6), (16, 4)])
def test_large_leaves_have_copies_of_their_own(monkeypatch, num_bytes, num_copies):
    monkeypatch.setattr(staging_module, "_SMALL_BYTES", num_bytes)
    state, mesh = random_state([*LEAVES, *LEAVES]), mesh_of(2)
    staging, copy = staging_program(state.layout, mesh)
    staged = copy(state.on(mesh))
    # The rest share one for each size of their words.
    assert len(staged) == num_copies
    kept = [(leaf, 0) for leaf in range(6)]
    for index, words in staging.read(staging.start(staged, kept)):
        path = f"leaf{index}"
        box = staging.layouts[path].box(0)
        wanted = state.words[path][tuple(slice(*ends) for ends in box)]
        assert words.tobytes() == wanted.tobytes()


def test_a_program_takes_no_more_leaves_at_once_than_it_can(monkeypatch):
    monkeypatch.setattr(staging_module, "_MAX_TOGETHER", 2)
    state, mesh = random_state([((3,), "float32", 0)] * 5), mesh_of(2)
    staging, copy = staging_program(state.layout, mesh)
    staged = copy(state.on(mesh))
    assert [x.shape for x in staged] == [(8,), (8,), (4,)]
    assert all(isinstance(x, jax.Array) for x in staged)
    found = dict(staging.read(staging.start(staged, [(leaf, 1) for leaf in range(5)])))
    for leaf, words in found.items():
        assert words.tobytes() == state.words[f"leaf{leaf}"][2:].tobytes()


def test_what_shares_a_copy_is_bounded(monkeypatch):
    monkeypatch.setattr(staging_module, "_TOGETHER_BYTES", 40)
    state, mesh = random_state([((6,), "float32", 0)] * 7), mesh_of(2)
    _, copy = staging_program(state.layout, mesh)
    # Each device holds 12 bytes of a leaf.
    assert [x.shape for x in copy(state.on(mesh))] == [(18,), (18,), (6,)]


def test_devices_with_other_memory_write_to_the_host_themselves(monkeypatch):
    monkeypatch.setattr(staging_module, "by_host", lambda devices: False)
    state, mesh = random_state(LEAVES), mesh_of(4)
    staging, copy = staging_program(state.layout, mesh)
    kept = [(leaf, device.id) for leaf in range(3) for device in mesh.devices.flat]
    coming = staging.start(copy(state.on(mesh)), kept)
    kinds = {array.sharding.memory_kind for array, _ in coming.copies}
    assert kinds == {"pinned_host"}
    for index, words in staging.read(coming):
        path = f"leaf{kept[index][0]}"
        box = staging.layouts[path].box(kept[index][1])
        wanted = state.words[path][tuple(slice(*ends) for ends in box)]
        assert words.tobytes() == wanted.tobytes()
    assert not coming.copies


def test_more_than_the_pinned_memory_takes_another_way(monkeypatch):
    monkeypatch.setattr(staging_module, "by_host", lambda devices: False)
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "0")
    state, mesh = random_state(LEAVES), mesh_of(4)
    staging, copy = staging_program(state.layout, mesh)
    coming = staging.start(copy(state.on(mesh)), [(0, 1)])
    assert [array.sharding.memory_kind for array, _ in coming.copies] != ["pinned_host"]
    [(_, words)] = staging.read(coming)
    assert words.tobytes() == state.words["leaf0"][2:4].tobytes()
