"""What changed since another checkpoint: nothing is lost."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import shardkit as sk
from shardkit.checkpoint.delta import delta, undelta
from shardkit.checkpoint.reader import open_checkpoint
from shardkit.checkpoint.store import write_checkpoint
from shardkit.checkpoint.views import ArrayView, whole_box

DTYPES = [np.float32, np.int32, jnp.bfloat16, np.bool_, np.complex64, jnp.int4]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_bits_come_back(data, dtype):
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, max_side=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))

    def draw():
        if np.dtype(dtype).name in ("bool", "int4"):
            return rng.integers(0, 2, shape).astype(dtype)
        size = np.dtype(dtype).itemsize
        return rng.integers(0, 256, (*shape, size), np.uint8).view(dtype)[..., 0]

    new, old = draw(), draw()
    views = {"w": ArrayView(old)}
    change = delta({"w": ArrayView(new)}, views)
    again = undelta(change, views)["w"]
    box = tuple(sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape)
    box = tuple((a, b) for a, b in box)
    part = new[tuple(slice(a, b) for a, b in box)]
    assert again.read(box).tobytes() == np.ascontiguousarray(part).tobytes()
    assert (again.shape, again.dtype) == (new.shape, new.dtype)


@pytest.mark.parametrize("compress", ["none", "zstd", "planes"])
def test_a_difference_is_stored_small_and_read_again(tmp_path, compress):
    rng = np.random.default_rng(0)
    old = rng.normal(size=(400, 300)).astype(np.float32)
    new = old.copy()
    new[7] += 1
    base = {"w": ArrayView(old)}
    change = delta({"w": ArrayView(new)}, base)
    where = write_checkpoint(tmp_path, change, compress=compress)
    saved = open_checkpoint(where).verified()
    found = undelta(saved.views, base)["w"].read(whole_box(new.shape))
    assert found.tobytes() == new.tobytes()
    size = sum(x.stat().st_size for x in where.rglob("*") if x.is_file())
    assert size < (20_000 if compress != "none" else 600_000)


def test_trees_that_are_not_alike_are_refused():
    one, other = ArrayView(np.zeros(3)), ArrayView(np.zeros(4))
    with pytest.raises(sk.RestoreError, match="2 paths are not: a, b"):
        delta({"a": one, "c": one}, {"a": other, "b": one, "c": one})


def test_an_unknown_compression_is_named(tmp_path):
    with pytest.raises(sk.ConfigError, match="compress"):
        write_checkpoint(tmp_path, {}, compress="best")
