"""What `reshard` is given, odd as it may be: bits, shapes, memory, the same twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from test_resharding import aligned, bits

from shardkit import carry
from shardkit.errors import ConfigError, InexactError, PartitionError
from shardkit.resharding import reshard

ALL_BITS = [
    "bfloat16", "float16", "float8_e5m2", "float8_e4m3fn", "int4", "uint4", "uint2",
]  # fmt: skip
PAIR = [((0, 1), ("x",)), ((0, 1), ())]
WAYS = [
    (((0,), ()), ((3,), ())),
    (((0, 1), ("x",)), ((2, 0), ("x",))),
    (((0, 1), ("x",)), ((2,), ())),
    (((0, 1), ("x",)), (tuple(range(8)), ("x",))),
    PAIR,
]


def spread(ids, spec):
    mesh = Mesh(np.array([jax.devices()[i] for i in ids]), ("x",))
    return NamedSharding(mesh, PartitionSpec(*spec))


@pytest.mark.parametrize("by_host", [False, True])
@pytest.mark.parametrize("dtype", ALL_BITS)
@pytest.mark.parametrize(("old", "new"), WAYS)
def test_every_pattern_of_bits_is_kept_alone_and_packed(
    monkeypatch, by_host, dtype, old, new
):
    monkeypatch.setattr(carry, "by_host", lambda devices: by_host)
    dtype = np.dtype(getattr(jnp, dtype))
    width = (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(
        dtype
    ).bits
    numbers = np.resize(np.arange(1 << width), max(16, 1 << width))
    truth = (
        numbers.astype(f"u{dtype.itemsize}").view(dtype)
        if width >= 8
        else numbers.astype(dtype)
    )
    # On the CPU collectives quiet NaNs; there they are not chosen.
    limit = 1 << 22 if [old, new] == PAIR and width >= 8 else None
    for count in (1, 2):
        tree = [jax.device_put(truth, spread(*old)) for _ in range(count)]
        for array in reshard(tree, spread(*new), scratch_bytes=limit):
            assert array.dtype == dtype
            for shard in array.addressable_shards:
                assert bits(shard.data) == bits(truth[shard.index])


def test_what_cannot_be_placed_is_named_before_anything_is_used_up():
    x = jax.device_put(jnp.arange(5.0), jax.devices()[0])
    tree = {"a": x, "b": jnp.ones(4), "c": jnp.ones(4)}
    half = spread((0, 1), ("x",))
    with pytest.raises(
        PartitionError, match=r"2 leaves .*a of shape \(5,\).*c of shape"
    ):
        reshard(tree, {"a": half, "b": half, "c": PartitionSpec("x")}, donate=True)
    assert bits(tree["b"]) == bits(np.ones(4, np.float32))


@pytest.mark.parametrize("value", [np.array([1, 2**40]), np.array([0.1]), 2**40])
def test_numbers_that_jax_would_alter_are_refused(value):
    with pytest.raises(
        InexactError, match=r"b is (int|float)64, would be (int|float)32"
    ):
        reshard({"a": np.arange(3), "b": value}, SingleDeviceSharding(jax.devices()[1]))


def test_numbers_in_host_memory_go_to_their_places_at_once(monkeypatch):
    host = {"w": aligned((64, 64), 1), "lr": 0.1, "n": 3}
    seen = []
    monkeypatch.setattr(carry, "carry", lambda *args, **options: seen.append(args))
    moved = reshard(host, spread((4, 5, 6, 7), ()))
    host["w"][...] = 7
    assert not seen
    assert bits(moved["w"]) == bits(np.ones((64, 64), np.float32))
    assert (float(moved["lr"]), int(moved["n"])) == (np.float32(0.1), 3)


@pytest.mark.parametrize("by_host", [False, True])
@pytest.mark.parametrize("limit", [None, 1 << 14])
@pytest.mark.parametrize("new", [((0, 1), ()), ((0, 1), ("x",)), ((2, 3), ("x",))])
def test_what_is_there_twice_is_moved_twice_and_then_freed(
    monkeypatch, by_host, limit, new
):
    monkeypatch.setattr(carry, "by_host", lambda devices: by_host)
    truth = np.arange(4096, dtype=np.float32)
    x = jax.device_put(truth, spread((0, 1), ("x",)))
    other = spread((5,), ())
    moved = reshard(
        [x, x, x], [spread(*new), spread(*new), other], donate=True, scratch_bytes=limit
    )
    assert x.is_deleted()
    stepped = jax.jit(lambda tree: [x + 1 for x in tree], donate_argnums=0)(moved[:2])
    for array in [*stepped, moved[2] + 1]:
        assert bits(array) == bits(truth + 1)


def test_collectives_free_what_they_cannot_use_again(monkeypatch):
    monkeypatch.setattr(carry, "by_host", lambda devices: False)
    x = jax.device_put(jnp.arange(8.0), spread((0, 1), ("x",)))
    moved = reshard(x, spread((0, 1), ()), donate=True)
    assert x.is_deleted()
    assert bits(moved) == bits(np.arange(8, dtype=np.float32))


@pytest.mark.parametrize("by_host", [False, True])
@pytest.mark.parametrize("donate", [False, True])
def test_other_memory_is_reached_and_left(monkeypatch, by_host, donate):
    monkeypatch.setattr(carry, "by_host", lambda devices: by_host)
    truth = np.arange(8, dtype=np.float32)
    half = spread((0, 1), ("x",))
    for there in (half, spread((2, 3), ("x",))):
        pinned = there.with_memory_kind("pinned_host")
        out = reshard(jax.device_put(truth, half), pinned, donate=donate)
        assert out.sharding == pinned
        back = reshard(out, half, donate=donate)
        assert back.sharding == half
        assert bits(back) == bits(truth)
        assert out.is_deleted() == donate


def test_arguments_that_are_no_shardings_or_bytes_are_told():
    x = jnp.ones(8)
    with pytest.raises(PartitionError, match="expected a Sharding, found P"):
        reshard({"a": x}, {"a": PartitionSpec("x")})
    with pytest.raises(PartitionError, match="shardings must be a tree like that"):
        reshard({"a": x, "b": x}, {"a": spread((0,), ())})
    for wrong in ("4MiB", 1.5):
        with pytest.raises(ConfigError, match=f"expected a number of bytes.*{wrong}"):
            reshard(x, spread((0, 1), ("x",)), scratch_bytes=wrong)
