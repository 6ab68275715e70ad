"""Saving and restoring any tree, for a loop of one's own."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import shardkit as sk
from shardkit.checkpoint import api
from shardkit.checkpoint.reader import open_checkpoint
from shardkit.testing import assert_same_bits


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
    with pytest.raises(sk.RestoreError, match="holds no checkpoint"):
        sk.checkpoint.open_checkpoint(tmp_path)


ONE = {"w": np.ones(3, np.float32)}
SAVES = {
    "bare array": (lambda at: sk.checkpoint.save(at, jnp.ones(3)), '"name": array'),
    "step -1": (lambda at: sk.checkpoint.save(at, ONE, step=-1), "found -1"),
    "step 1.5": (lambda at: sk.checkpoint.save(at, ONE, step=1.5), "found 1.5"),
    "step true": (lambda at: sk.checkpoint.save(at, ONE, step=True), "found True"),
    "no leaves": (lambda at: sk.checkpoint.save(at, {}), "the tree is empty"),
    "no elements": (
        lambda at: sk.checkpoint.save(at, {"w": np.zeros((0, 3))}),
        "all leaves are empty",
    ),
    "path and tree": (lambda at: sk.checkpoint.save(ONE, at), r"save\(path, tree\)"),
    "keys": (lambda at: sk.checkpoint.save(at, {"a": {1: 1.0, "b": 2.0}}), r"\[1, 'b'"),
    "no path": (lambda at: sk.checkpoint.save(at, {"..": ONE}), "is no path"),
    "a file": (lambda at: sk.checkpoint.save(Path(__file__), ONE), "is a file"),
    "in a file": (lambda at: sk.checkpoint.save(f"{__file__}/a", ONE), "is a file"),
    "views": (lambda at: sk.checkpoint.write_checkpoint(at, {}), "the tree is empty"),
}


@pytest.mark.parametrize("case", SAVES)
def test_what_cannot_be_saved_is_one_message_and_leaves_nothing(case, tmp_path, caplog):
    call, message = SAVES[case]
    with pytest.raises(sk.ConfigError, match=message):
        call(tmp_path / "new" / "one")
    assert [*tmp_path.iterdir()] == []
    # Orbax logs what fails in its threads.
    assert not caplog.records


@pytest.mark.parametrize("step", [np.int64(2), jnp.int32(2)])
def test_a_step_may_be_a_whole_number_of_others(step, tmp_path):
    assert sk.checkpoint.save(tmp_path, ONE, step=step).name == "2"
    found = sk.checkpoint.restore(tmp_path, ONE, step=step)
    assert (found["w"] == ONE["w"]).all()
    sk.checkpoint.verify(tmp_path, step=step)


def test_a_run_is_no_place_to_save_in(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.toml").touch()
    views = {"w": sk.checkpoint.ArrayView(ONE["w"])}
    for path in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(sk.ConfigError, match="is of a run"):
            sk.checkpoint.save(path, ONE)
        with pytest.raises(sk.ConfigError, match="is of a run"):
            sk.checkpoint.write_checkpoint(path, views)
    assert [*(tmp_path / "checkpoints").iterdir()] == []


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(directory, manifest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(api, "seal", full)
    with pytest.raises(sk.SaveError, match=r"could not be saved: No space left"):
        sk.checkpoint.save(tmp_path / "a" / "b", ONE)
    assert [*tmp_path.iterdir()] == []


RESTORES = {
    "rules": (dict(remap="layers.toml"), r"load_rules\('layers.toml'\)"),
    "a rule": (dict(remap=sk.checkpoint.Rule("a", "b")), r"Remap\(\[rule"),
    "step": (dict(step=-1), "found -1"),
}


@pytest.mark.parametrize("case", RESTORES)
def test_arguments_of_restore_that_are_something_else_are_named(case, tmp_path):
    options, message = RESTORES[case]
    with pytest.raises(sk.ConfigError, match=message):
        sk.checkpoint.restore(tmp_path, ONE, **options)
    with pytest.raises(sk.ConfigError, match="restore"):
        sk.checkpoint.restore(ONE, tmp_path)


def test_another_step_than_that_of_a_path_is_no_damage(tmp_path):
    where = sk.checkpoint.save(tmp_path, ONE, step=4)
    with pytest.raises(
        sk.RestoreError, match="of step 5, found one of step 4"
    ) as found:
        sk.checkpoint.restore(where, ONE, step=5)
    assert not isinstance(found.value, sk.DamagedError)


def test_params_alone_are_read_where_the_rest_may_stay_behind(tmp_path):
    sk.checkpoint.save(tmp_path, {"params": ONE, "opt_state": ONE, "step": 3})
    remap = sk.checkpoint.Remap([], keep_rest=True, allow=["opt_state/{p...}", "step"])
    found = sk.checkpoint.restore(tmp_path, {"params": ONE}, remap=remap)
    assert (found["params"]["w"] == ONE["w"]).all()


def test_lazy_modules_list_their_names():
    for module in (sk, sk.checkpoint):
        assert {*module.__all__} <= {*dir(module)}


def test_save_and_restore_on_any_mesh(tmp_path):
    big = np.random.default_rng(0).normal(size=(1200, 1000))
    big32 = big.astype(np.float32)
    tree = {
        "w": jnp.asarray(big32),
        "key": jax.random.split(jax.random.key(3), 4),
        "host": big[:3],
        "nested": [jnp.bfloat16(1.5), 7],
    }
    mesh = sk.MeshSpec(data=2, fsdp=2).build(jax.devices()[:4])
    cut = NamedSharding(mesh, PartitionSpec("fsdp", "data"))
    tree["w"] = jax.device_put(tree["w"], cut)
    where = sk.checkpoint.save(tmp_path / "a", tree, step=5)
    assert where == tmp_path / "a" / "5"
    sk.checkpoint.verify(tmp_path / "a", blocks=True)
    with pytest.raises(sk.RestoreError, match="is there already"):
        sk.checkpoint.save(tmp_path / "a", tree, step=5)
    other = sk.MeshSpec(data=1, fsdp=-1).build(jax.devices()[:3])
    where = NamedSharding(other, PartitionSpec("fsdp"))
    shape = jax.ShapeDtypeStruct((1200, 1000), jnp.float32, sharding=where)
    found = sk.checkpoint.restore(tmp_path / "a", {**tree, "w": shape})
    assert found["w"].sharding.is_equivalent_to(where, 2)
    assert_same_bits(found, tree)
    assert found["host"].dtype == np.float64
    like = {**tree, "w": shape}
    del like["host"]
    with pytest.raises(sk.RestoreError, match=r"host +expected nothing"):
        sk.checkpoint.restore(tmp_path / "a", like)
    rules = [sk.checkpoint.Rule("host", (), sk.checkpoint.Drop())]
    remap = sk.checkpoint.Remap(rules, keep_rest=True)
    assert_same_bits(
        sk.checkpoint.restore(tmp_path / "a", like, remap=remap)["w"], big32
    )
    remap = sk.checkpoint.Remap(rules, keep_rest=True, allow=["more"])
    with pytest.raises(sk.RestoreError, match="no rule makes more"):
        sk.checkpoint.restore(tmp_path / "a", {**like, "more": shape}, remap=remap)


def test_restored_blocks_are_verified(tmp_path):
    tree = {"w": jnp.arange(1000.0), "b": jnp.ones((3, 5))}
    where = sk.checkpoint.save(tmp_path, tree)
    found = sk.checkpoint.restore(tmp_path, jax.tree.map(jnp.zeros_like, tree))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, tree))
    remap = sk.checkpoint.Remap([], keep_rest=True)
    bits = np.asarray(tree["w"]).tobytes()
    for path in (where / "state").rglob("d/*"):
        changed = bits[:400] + b"\x01" + bits[401:]
        path.write_bytes(path.read_bytes().replace(bits, changed))
    with pytest.raises(sk.DamagedError, match=r"w +block 0 of 1"):
        sk.checkpoint.restore(tmp_path, tree)
    with pytest.raises(sk.DamagedError, match="not what was written"):
        sk.checkpoint.verify(tmp_path)
    with pytest.raises(sk.DamagedError, match="not what was written"):
        sk.checkpoint.restore(tmp_path, tree, remap=remap)


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex64", "complex128"])
def test_all_words_of_wide_elements_are_in_their_digests(dtype, tmp_path):
    x = np.arange(600).astype(dtype).reshape(20, 30)
    other = x.copy()
    other.view(np.uint32).reshape(-1)[0 if dtype == "float64" else 1] ^= 1
    records = []
    for name, array in (("a", x), ("b", other)):
        views = {"x": sk.checkpoint.ArrayView(array)}
        sk.checkpoint.write_checkpoint(tmp_path / name, views)
        records.append(open_checkpoint(tmp_path / name).manifest.leaves["x"])
    assert records[0].blocks != records[1].blocks
