"""Saving and restoring any tree, for a loop of one's own."""

import jax
import numpy as np
import pytest

import shardkit as sk


def test_leaves_that_could_not_be_read_again_are_not_saved(tmp_path):
    tree = {"a/b": np.zeros(3), "a": {"b": np.ones(3)}, "c.d": np.zeros(2)}
    tree |= {"c": {"d": np.ones(2)}, "key": jax.random.key(0, impl="rbg")}
    with pytest.raises(sk.ConfigError, match="cannot be saved") as caught:
        sk.checkpoint.save(tmp_path, tree)
    assert len(str(caught.value).splitlines()) == 4
    assert "key<rbg>" in str(caught.value)


def test_what_jax_would_cut_off_is_not_restored(tmp_path):
    tree = {"count": np.array([5_000_000_000, 1])}
    sk.checkpoint.save(tmp_path, tree)
    like = {"count": jax.ShapeDtypeStruct((2,), np.int64)}
    with pytest.raises(sk.RestoreError, match=r"count \(int64\).*jax_enable_x64"):
        sk.checkpoint.restore(tmp_path, like)
    assert (sk.checkpoint.restore(tmp_path, tree)["count"] == tree["count"]).all()


def test_copies_that_differ_are_not_saved_as_one(tmp_path):
    devices = jax.devices()[:2]
    mesh = sk.MeshSpec(fsdp=-1).build(devices)
    pieces = [
        jax.device_put(np.full(3, i, np.float32), d) for i, d in enumerate(devices)
    ]
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    array = jax.make_array_from_single_device_arrays((3,), whole, pieces)
    with pytest.raises(sk.DamagedError, match=r"w: device .* holds other bits"):
        sk.checkpoint.save(tmp_path, {"w": array})
    with pytest.raises(sk.RestoreError, match="expected a checkpoint"):
        sk.checkpoint.open_checkpoint(tmp_path)
