import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import shardkit.nn as nn
from shardkit.errors import ConfigError


def scatter_names(fn, *args):
    """Names every scatter in the program of `fn`, inner programs included."""
    text = str(jax.make_jaxpr(fn)(*args))
    return [word for word in text.split() if word.startswith("scatter")]


def plain_embed(table, tokens):
    return table[tokens]


def plain_cross_entropy(logits, labels):
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_probability, labels[..., None], axis=-1)[..., 0]


def embed_case(vocab_size, batch_shape, embed_dim=3, seed=0):
    rng = np.random.default_rng(seed)
    table = jnp.asarray(rng.normal(size=(vocab_size, embed_dim)), jnp.float32)
    tokens = jnp.asarray(rng.integers(vocab_size, size=batch_shape), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(*batch_shape, embed_dim)), jnp.float32)
    return table, tokens, weights


def table_gradient(embed, table, tokens, weights):
    return jax.grad(lambda table: jnp.sum(weights * embed(table, tokens)))(table)


# Few shapes, as each is compiled, and many values.
vocab_sizes = st.sampled_from([1, 2, 37])
batch_shapes = st.sampled_from([(), (5,), (2, 3)])
jit_table_gradient = jax.jit(table_gradient, static_argnums=0)


@pytest.mark.parametrize("cut", [P(None, "context"), P("context"), P()], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_embed_looks_into_the_pieces_of_a_group(cut, dtype):
    # In several groups, and with tokens that another axis cuts: where XLA, left to
    # itself, ends the process.
    axes = {"fsdp": 2, "tensor": 2, "context": 2}
    mesh = jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * 3
    )
    pin = jax.lax.with_sharding_constraint

    def look_up(table, tokens):
        table, tokens = pin(table, P("tensor")), pin(tokens, cut)
        return pin(nn.embed(table, tokens, "tensor"), cut)

    table, tokens, _ = embed_case(36, (4, 6))
    tokens = tokens.at[0, :3].set(jnp.array([-1, 36, 99]))
    table = table.astype(dtype)
    specs = {"in_specs": (P(), P("fsdp")), "out_specs": P("fsdp")}
    by_groups = jax.jit(
        jax.shard_map(look_up, mesh=mesh, axis_names={"fsdp"}, check_vma=False, **specs)
    )
    found = by_groups(table, tokens)
    np.testing.assert_array_equal(found, plain_embed(table, tokens), strict=True)
    # A token's row is found in one piece and summed once, as it is.
    text = by_groups.lower(table, tokens).compile().as_text()
    assert re.findall(r" (all-\S+|collective\S+|reduce-scatter)\(", text) == [
        "all-reduce"
    ]


@settings(max_examples=20, deadline=None)
@given(vocab_size=vocab_sizes, batch_shape=batch_shapes, seed=st.integers(0, 99))
def test_embed_equals_indexing(vocab_size, batch_shape, seed):
    case = embed_case(vocab_size, batch_shape, seed=seed)
    table, tokens, _ = case
    np.testing.assert_array_equal(
        nn.embed(table, tokens), plain_embed(table, tokens), strict=True
    )
    np.testing.assert_allclose(
        jit_table_gradient(nn.embed, *case),
        jit_table_gradient(plain_embed, *case),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("vocab_size", [256, 300], ids=["whole", "ragged"])
def test_embed_gradient_is_the_same_in_chunks(monkeypatch, vocab_size):
    case = embed_case(vocab_size, (4, 8))
    expected = table_gradient(nn.embed, *case)
    monkeypatch.setattr(nn, "_ONE_HOT_LIMIT_BYTES", 1024)
    chunked = str(jax.make_jaxpr(lambda *case: table_gradient(nn.embed, *case))(*case))
    assert "scan" in chunked
    np.testing.assert_allclose(table_gradient(nn.embed, *case), expected, rtol=1e-6)


def test_embed_accumulates_in_float32():
    # 1 + 2⁻⁸ + … + 2⁻⁸ stays at 1 where each partial sum is rounded to bfloat16.
    table = jnp.zeros((2, 1), jnp.bfloat16)
    tokens = jnp.zeros((257,), jnp.int32)
    weights = jnp.full((257, 1), 2.0**-8, jnp.bfloat16).at[0].set(1.0)
    gradient = table_gradient(nn.embed, table, tokens, weights)
    assert gradient.dtype == jnp.bfloat16
    assert gradient[0, 0] == 2.0


@functools.partial(jax.jit, static_argnums=0)
def weighted_loss_and_gradient(cross_entropy, logits, labels, weights):
    def total(logits):
        return jnp.sum(weights * cross_entropy(logits, labels))

    return jax.value_and_grad(total)(logits)


@settings(max_examples=20, deadline=None)
@given(
    vocab_size=vocab_sizes,
    batch_shape=batch_shapes,
    scale=st.sampled_from([0.1, 1.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_cross_entropy_equals_log_softmax(vocab_size, batch_shape, scale, seed):
    rng = np.random.default_rng(seed)
    logits = np.float32(scale * rng.normal(size=(*batch_shape, vocab_size)))
    labels = np.int32(rng.integers(vocab_size, size=batch_shape))
    weights = np.float32(rng.normal(size=batch_shape))
    ours = weighted_loss_and_gradient(nn.cross_entropy, logits, labels, weights)
    plain = weighted_loss_and_gradient(plain_cross_entropy, logits, labels, weights)
    for found, expected in zip(ours, plain, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * scale)


def test_cross_entropy_of_bfloat16_is_float32():
    logits = jnp.ones((2, 3), jnp.bfloat16)
    labels = jnp.zeros((2,), jnp.int32)
    losses, pullback = jax.vjp(lambda z: nn.cross_entropy(z, labels), logits)
    assert losses.dtype == jnp.float32
    assert pullback(losses)[0].dtype == jnp.bfloat16


def test_gradients_contain_no_scatter(monkeypatch):
    table, tokens, weights = embed_case(300, (4, 8))
    labels = tokens % 3

    def gradients(embed, cross_entropy):
        return lambda table: jax.grad(
            lambda table: jnp.sum(cross_entropy(weights * embed(table, tokens), labels))
        )(table)

    # The plain forms show that the search finds what it looks for.
    assert scatter_names(gradients(plain_embed, plain_cross_entropy), table)
    assert not scatter_names(gradients(nn.embed, nn.cross_entropy), table)
    monkeypatch.setattr(nn, "_ONE_HOT_LIMIT_BYTES", 1024)
    assert not scatter_names(gradients(nn.embed, nn.cross_entropy), table)


def test_dropout_keeps_the_mean_and_the_mask():
    x = jnp.full((200, 100), 2.0)
    key = jax.random.key(1)
    y = nn.dropout(x, key, 0.25)
    np.testing.assert_array_equal(
        y, jax.jit(nn.dropout, static_argnums=2)(x, key, 0.25)
    )
    np.testing.assert_allclose(np.mean(y == 0.0), 0.25, atol=0.02)
    np.testing.assert_allclose(y[y != 0.0], 2.0 / 0.75, rtol=1e-6)
    assert not np.array_equal(y, nn.dropout(x, jax.random.key(2), 0.25))
    gradient = jax.grad(lambda x: nn.dropout(x, key, 0.25).sum())(x)
    np.testing.assert_array_equal(gradient == 0.0, y == 0.0)


def test_dropout_off_returns_its_argument():
    x = jnp.ones(3)
    assert nn.dropout(x, jax.random.key(0), 0.0) is x
    assert nn.dropout(x, None, 0.5) is x
    assert (
        nn.dropout(x.astype(jnp.bfloat16), jax.random.key(0), 0.5).dtype == "bfloat16"
    )


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_dropout_refuses_a_rate_outside_its_range(rate):
    with pytest.raises(ConfigError, match="dropout rate"):
        nn.dropout(jnp.ones(3), jax.random.key(0), rate)


def test_entries_of_a_dtype_without_room_for_the_vocabulary():
    vocab_size = 320
    small = jnp.array([0, 63, 64, 255], jnp.uint8)
    wide = small.astype(jnp.int32)
    logits = jax.random.normal(jax.random.key(0), (4, vocab_size))
    for fn, x in (
        (lambda x, ids: nn.cross_entropy(x, ids).sum(), logits),
        (lambda x, ids: (nn.embed(x, ids) ** 2).sum(), logits.T),
    ):
        found, expected = (jax.value_and_grad(fn)(x, ids) for ids in (small, wide))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
