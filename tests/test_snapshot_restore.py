"""From images back to a live state, on any mesh."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import PROBLEMS
from snapshotted import (
    Recorder,
    leaf_shapes,
    mesh_of,
    random_state,
    same_words,
    split,
    staging_program,
    take,
)

import shardkit as sk
from shardkit.digest import combine_digests
from shardkit.snapshot.image import read_image
from shardkit.snapshot.restore import restore
from shardkit.snapshot.snapshots import Snapshots
from shardkit.snapshot.store import HostMemory

MESHES = [(8, 1), (8, 2), (8, 8), (6, 3), (5, 1), (3, 1), (2, 1), (1, 1)]
meshes = st.sampled_from(MESHES)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shapes=st.lists(leaf_shapes(), min_size=1, max_size=8),
    old=meshes,
    new=st.lists(meshes, min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_a_snapshot_comes_back_on_any_mesh(shapes, old, new, seed):
    state = random_state(shapes, seed)
    store = take(state, mesh_of(*old))
    for sizes in new:
        found = restore(store.images(3), state.layout, mesh_of(*sizes))
        mesh = mesh_of(*sizes)
        same_words(found, state, mesh.shape["fsdp"])
        for path, leaf in state.layout.items():
            assert found[path].sharding.is_equivalent_to(
                leaf.sharding(mesh), len(leaf.shape)
            )


@pytest.mark.parametrize(
    "group", [{"tensor": 2}, {"tensor": 4, "expert": 2}, {"expert": 3}]
)
def test_a_snapshot_of_groups_comes_back_on_any_mesh(group):
    tensor, expert = ("tensor", 1), ("expert", 0)
    shapes = [
        ((5, 4), "float32", 0, (tensor,)),
        ((6, 8), "bfloat16", -1, (tensor, expert)),
        ((12,), "int8", -1, (expert,)),
        ((3, 5), "float32", 1, ()),
    ]
    state = random_state(shapes)
    size = np.prod(list(group.values()))
    old = mesh_of(8 // size * size, **group)
    store = take(state, old)
    for mesh in (old, mesh_of(6, tensor=2), mesh_of(8, 2, expert=2), mesh_of(3)):
        found = restore(store.images(3), state.layout, mesh)
        same_words(found, state, mesh.shape["fsdp"])


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_state_of_every_problem_comes_back(name, compile_cache):
    rng = np.random.default_rng(len(name))
    meshes = [MESHES[i] for i in rng.permutation(len(MESHES))[:4]]
    with sk.Trainer(**{"mesh": sk.MeshSpec(), **PROBLEMS[name]()}) as trainer:
        placements = trainer._controller.placements
        old = placements.on(meshes[0][0])
        state = old.init()
        expected = old.digest(state)
        store, events = HostMemory(), sk.EventLog()
        snapshots = Snapshots(1, store, events)
        staging, copy = staging_program(old.layout, old.mesh)
        snapshots.take(0, staging, copy, state)
        snapshots.wait()
        for count, _ in meshes[1:]:
            new = placements.on(count)
            step, found = snapshots.load(new.layout, new.mesh)
            assert step == 0
            digest = combine_digests(new.digest(found), new.layout)
            assert digest == combine_digests(expected, old.layout)
        snapshots.close()


LEAVES = [((5, 3), "float32", 0), ((7,), "bfloat16", 0), ((4,), "key", -1)]


def opened(images):
    return [read_image(memory, f"image {i}") for i, memory in images.items()]


def test_images_of_several_processes_are_put_together():
    state, mesh = random_state(LEAVES), mesh_of(3)
    images = split(state, mesh_of(6, 2), ["a", "b", "b"])
    for order in ([0, 1, 2], [2, 0, 1]):
        some = [opened(images)[i] for i in order]
        same_words(restore(some, state.layout, mesh, host="b"), state, 3)


def test_without_the_images_of_one_host_its_pieces_are_named():
    state, mesh = random_state(LEAVES), mesh_of(3)
    images = split(state, mesh_of(4), ["a", "b", "b", "b"])
    del images[1]
    with pytest.raises(sk.LostStateError, match=r"step 3: .*\(of a, b\): .*leaf0 \[\("):
        restore(opened(images), state.layout, mesh)


def test_what_two_hosts_have_survives_one_of_them():
    state, mesh = random_state(LEAVES), mesh_of(5)
    # Two replicas on two hosts each.
    images = split(state, mesh_of(4, 2), ["a", "a", "b", "b"], num_losses=1)
    for lost in ((0, 1), (2, 3)):
        left = {i: memory for i, memory in images.items() if i not in lost}
        same_words(restore(opened(left), state.layout, mesh), state, 5)


def test_what_this_host_has_is_not_read_elsewhere():
    state, mesh = random_state(LEAVES), mesh_of(2)
    images = split(state, mesh_of(4, 2), ["a", "a", "b", "b"], num_losses=1)
    # No piece of the other host could be read.
    for process in (0, 1):
        layout = opened(images)[process].layout
        start = min(piece.offset for piece in layout.pieces)
        images[process][start:] = bytes(len(images[process]) - start)
    found = restore(opened(images), state.layout, mesh, host="b")
    same_words(found, state, 2)
    with pytest.raises(sk.DamagedError):
        restore(opened(images), state.layout, mesh, host="a")


def test_a_damaged_piece_is_named():
    state = random_state(LEAVES)
    images = split(state, mesh_of(4), ["a", "b", "b", "b"])
    image = opened(images)[2]
    [piece] = [x for x in image.pieces if x.leaf == 0]
    images[2][piece.offset] ^= 1
    message = rf"step 3: leaf0, .* device {piece.device} in .* process 2 on b: "
    with pytest.raises(sk.DamagedError, match=message):
        restore(opened(images), state.layout, mesh_of(3))


def test_every_piece_is_verified_once(monkeypatch):
    state = random_state(LEAVES)
    store = take(state, mesh_of(8))
    [image] = store.images(3)
    seen, piece = [], type(image).piece
    monkeypatch.setattr(
        type(image), "piece", lambda self, i: seen.append(i) or piece(self, i)
    )
    restore([image], state.layout, mesh_of(3))
    assert sorted(seen) == list(range(len(image.pieces)))


def test_little_host_memory_is_enough():
    state, mesh = random_state(LEAVES), mesh_of(3)
    images = take(state, mesh_of(8)).images(3)
    same_words(restore(images, state.layout, mesh, limit_bytes=1), state, 3)


def test_what_was_restored_is_its_own():
    state, mesh = random_state(LEAVES), mesh_of(2)
    images = split(state, mesh, ["a"])
    found = restore(opened(images), state.layout, mesh)
    images[0][:] = bytes(len(images[0]))
    same_words(found, state, 2)


def test_another_state_is_refused():
    state = random_state(LEAVES)
    images = take(state, mesh_of(8)).images(3)
    other = random_state([((5, 4), "float32", 0), ((7,), "float16", 0)])
    with pytest.raises(sk.RestoreError, match=r"3 leaves differ: leaf0: .* leaf2:"):
        restore(images, other.layout, mesh_of(3))
    with pytest.raises(sk.RestoreError, match="found none"):
        restore([], state.layout, mesh_of(3))
    later = take(state, mesh_of(8), step=4).images(4)
    with pytest.raises(sk.RestoreError, match=r"steps \[3, 4\]"):
        restore([*images, *later], state.layout, mesh_of(3))


def test_two_newest_are_kept_and_what_is_written_is_not_listed():
    state, mesh = random_state(LEAVES), mesh_of(2)
    store = Recorder()
    for step in (1, 2, 3):
        take(state, mesh, step=step, store=store)
    assert store.steps() == [2, 3]
    slot = store.reserve(len(store.kept[3]))
    assert store.steps() == [3]
    with pytest.raises(sk.errors.TornError):
        store.commit(slot, 5)
    assert store.steps() == [3]
    store.forget(3)
    assert store.steps() == []
    assert store.images(3) == []


def test_what_snapshots_take_is_known_before():
    state, mesh = random_state(LEAVES), mesh_of(4)
    snapshots = Snapshots(1, HostMemory(), sk.EventLog())
    staging, _ = staging_program(state.layout, mesh)
    store = take(state, mesh)
    [image] = store.images(3)
    assert snapshots.predict(staging) == {
        "device_bytes": staging.num_bytes,
        "image_bytes": len(image.memory),
        "pinned_bytes": 0,
    }
    assert jax.process_count() == 1
