import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from sharded import assert_close, assert_same_bits, normal, on_shards, place, traced

from shardkit.errors import InexactError
from shardkit.layout import LeafLayout
from shardkit.localize import Localizer
from shardkit.mesh import MeshSpec
from shardkit.shards import Shards

X, Y, BIAS, COLUMN = normal(5, 3), normal(5, 3, seed=1), normal(3), normal(5)
NAN_FIRST, NAN_LAST = X.copy(), X.copy()
NAN_FIRST[0, 1] = NAN_LAST[4, 1] = np.nan
ARGS = {
    "x": X,
    "y": Y,
    "columns": Y.copy(),
    "bias": BIAS,
    "cut_bias": BIAS.copy(),
    "cut_column": COLUMN,
    "nan_first": NAN_FIRST,
    "nan_last": NAN_LAST,
    "whole": normal(5, 3, seed=2),
    "integers": np.arange(15, dtype=np.int32).reshape(5, 3) * 7919 % 1000,
}
DIMS = dict.fromkeys(ARGS, 0) | {"columns": 1, "bias": -1, "whole": -1}


def of(*names):
    """Makes a function of the named arguments one of all of them."""
    return lambda fn: lambda args: fn(*[args[name] for name in names])


LOCAL = {
    "arithmetic": of("x", "y", "bias")(
        lambda x, y, b: (x * y + b) / (1 + y * y) - jnp.maximum(x, b)
    ),
    "products and sums": of("x", "y", "bias")(
        lambda x, y, b: 0.9 * x + 0.1 * y + (x - y) ** 2 * 0.3 - b * b * x
    ),
    "where": of("x", "y", "bias")(
        lambda x, y, b: jnp.where(x > y, x, b) + jnp.where(b[0] > 0, x, y)
    ),
    "clip": of("x", "y")(
        lambda x, y: (jnp.clip(x, -1, y * y), jnp.clip(x, y.min(), x.mean()))
    ),
    "casts": of("x", "y")(
        lambda x, y: (
            x.astype(jnp.bfloat16) * y.astype(jnp.bfloat16),
            (x * 8).astype(jnp.int8) // 2,
            (x > 0) ^ (y > 0),
            lax.bitcast_convert_type(x, jnp.int32),
        )
    ),
    "barrier": of("x")(lambda x: lax.optimization_barrier(x * 2) + 1),
    "barrier of several": of("x", "bias", "cut_bias")(
        lambda x, b, c: [
            z.max() for z in lax.optimization_barrier((x, x[None], -abs(b), -abs(c)))
        ]
    ),
    "transpose": of("x", "y")(lambda x, y: (x.T + 1, (x.T * y.T).T)),
    "reshape": of("x")(lambda x: (x.reshape(5, 3, 1), x.reshape(1, 5, 1, 3) * 2)),
    "squeeze": of("x")(lambda x: lax.squeeze(x[None, :, None], (0, 2)) + x),
    "broadcast": of("x", "bias")(lambda x, b: jnp.broadcast_to(x, (2, 5, 3)) * b),
    "column": of("x", "cut_column")(lambda x, c: x * c[:, None]),
    "sums": of("x")(
        lambda x: (x.sum(), x.sum(0), x.sum(1), x.mean((0, 1), keepdims=True))
    ),
    "sums after sums": of("x", "y")(
        lambda x, y: (x - x.mean(0)) * y.sum() + ((x - x.mean()) ** 2).sum(1)[:, None]
    ),
    "sum over nothing": of("x")(lambda x: jnp.sum(x, axis=())),
    "int sums": of("integers")(
        lambda i: (i.sum(), i.astype(jnp.int8).sum(0, dtype=jnp.int8))
    ),
    "bfloat16 sums": of("x")(
        lambda x: [x.astype(jnp.bfloat16).sum(dim) for dim in (None, 0, 1)]
    ),
    # A compiler that sees both operations makes one of them, with other bits.
    "quotient of a quotient": of("whole", "bias", "x")(lambda w, b, x: (w / b) / x),
    "product with a mask": of("whole", "x")(lambda w, x: (w > 0) * x),
    "bfloat16 sum of sums": of("x", "y")(
        lambda x, y: lax.reduce_sum(x.astype(jnp.bfloat16) + y.astype("bfloat16"), (0,))
    ),
    "extrema": of("x", "integers")(
        lambda x, i: (x.max(), x.min(0), x.max(1), i.max(0), (i - 500).min())
    ),
    "small extrema": of("integers")(
        lambda i: [
            fn(i.astype(dtype), 0)
            for fn in (jnp.max, jnp.min)
            for dtype in (jnp.uint8, jnp.int8, jnp.bfloat16)
        ]
    ),
    "any and all": of("x")(
        lambda x: ((x > 1).any(), (x > -9).all(0), (x > 0).any(1), (x > 0).all())
    ),
    "norm": of("x")(lambda x: x / jnp.maximum(1, jnp.sqrt(jnp.sum(x * x)))),
    "jit": of("x")(lambda x: jax.jit(lambda x: jax.jit(jnp.square)(x) + x.sum())(x)),
    "custom_jvp": of("x")(lambda x: jax.nn.relu(x) + jax.nn.relu6(x)),
    "checkpoint": of("x")(lambda x: jax.checkpoint(lambda x: x * 2 + x.sum())(x)),
    "constants": of("x")(lambda x: x + np.arange(15, dtype=np.float32).reshape(5, 3)),
    "broadcasts": of("x", "cut_column", "cut_bias")(
        lambda x, c, b: (
            lax.min_p.bind(c[:, None], b[None]),
            lax.add_p.bind(x, b[None]),
            lax.mul_p.bind(c[:, None], x),
        )
    ),
    "made here": of("x")(lambda x: x + jnp.arange(5.0)[:, None] + jnp.ones((5, 1))),
    "mask made here": of("x")(lambda x: jnp.where(jnp.tri(5, 3, dtype=bool), x, 0)),
    "untouched": of("y")(lambda y: (y, jnp.float32(3))),
    "another dim": of("x", "columns")(lambda x, c: (x * c, c + x, c.sum(0), c.sum(1))),
    "nan": of("nan_first", "nan_last")(
        lambda x, y: [
            fn(z, dim)
            for fn in (jnp.max, jnp.min, jnp.sum)
            for z in (x, y)
            for dim in (None, 0)
        ]
    ),
}
"""What must not cost the memory of whole arrays."""

GATHERED = {
    "dot_general": of("x", "y")(lambda x, y: x @ y.T),
    "sort": of("x")(lambda x: jnp.sort(x, axis=0)),
    "cumsum": of("x")(lambda x: jnp.cumsum(x, axis=0)),
    "reduce_prod": of("x")(lambda x: jnp.prod(x, axis=0)),
    "argmax": of("x")(lambda x: jnp.argmax(x, axis=0)),
    "rev": of("x")(lambda x: jnp.flip(x, 0)),
    "concatenate": of("x", "y")(lambda x, y: jnp.concatenate([x, y])),
    "slice": of("x")(lambda x: x[1:4]),
    "pad": of("x")(lambda x: jnp.pad(x, 1)),
    "reshape": of("x")(lambda x: x.reshape(3, 5) * 2),
    "while": of("x")(
        lambda x: lax.while_loop(lambda x: x.sum() < 50, lambda x: x + 1, x)
    ),
    "scan": of("x")(lambda x: lax.scan(lambda c, row: (c + row, c), x[0], x)[1]),
    "split": of("x")(lambda x: jnp.split(x, [2])),
    "bitcast_convert_type": of("x")(lambda x: lax.bitcast_convert_type(x, jnp.uint8)),
    "reduce": of("x")(
        lambda x: lax.reduce(x, np.float32(0), lambda a, b: a + b + a * b, (0,))
    ),
    "top_k": of("x")(lambda x: lax.top_k(x.T, 2)),
    "gather": of("x")(lambda x: x[jnp.array([4, 0, 4])]),
}
"""Primitive → a function in which it has no local form for one of the operands."""

EITHER = {
    "bitwise reductions": of("integers")(
        lambda i: [
            fn(i, axes=axes)
            for fn in (lax.reduce_or, lax.reduce_and, lax.reduce_xor)
            for axes in ((0,), (1,), (0, 1))
        ]
    ),
    "functions": of("x")(
        lambda x: (jnp.exp(x), jnp.tanh(x), jax.nn.gelu(x), x**2.5, lax.rsqrt(x * x))
    ),
    "softmax": of("x")(lambda x: (jax.nn.softmax(x, 0), jax.nn.logsumexp(x, 1))),
    "variance": of("x")(lambda x: (x.var(), x.std(0), jnp.linalg.norm(x, axis=1))),
    "complex sums": of("x", "y")(lambda x, y: jnp.sum(x + 1j * y, 0)),
    "rows of the whole": of("x", "bias")(lambda x, b: x[0] * b + x[4]),
    "cut bias": of("x", "cut_bias")(lambda x, b: (x * b, b + x, x * b[None])),
    "select and sort": of("x")(lambda x: jnp.where(x > jnp.sort(x, 0), x, 0).sum()),
}


def everything(args):
    return {name: fn(args) for name, fn in (LOCAL | GATHERED | EITHER).items()}


@functools.cache
def results_on(count):
    return on_shards(everything, [ARGS], [DIMS], count)


@functools.cache
def plain_results():
    return jax.jit(everything)(ARGS)


@pytest.mark.parametrize("name", LOCAL | GATHERED | EITHER)
def test_one_shard_computes_what_jax_computes(name):
    assert_close(results_on(1).out[name], plain_results()[name])


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("name", LOCAL | GATHERED | EITHER)
def test_every_number_of_shards_computes_the_same_bits(name, count):
    assert_same_bits(results_on(count).out[name], results_on(1).out[name])
    assert results_on(count).dims[name] == results_on(1).dims[name]


@pytest.mark.parametrize("name", sorted(LOCAL.keys() - {"another dim"}))
def test_work_that_has_a_local_form_stays_local(name):
    assert traced(LOCAL[name], [ARGS], [DIMS])[1] == []


@pytest.mark.parametrize("name", ["made here", "mask made here"])
def test_what_stays_local_for_the_layout_stays_so_on_a_mesh(name):
    assert on_shards(LOCAL[name], [ARGS], [DIMS], 2).gathered == []


@pytest.mark.parametrize("name", GATHERED)
def test_what_has_no_local_form_is_done_on_the_whole_and_told(name):
    found = [operation for operation, _ in traced(GATHERED[name], [ARGS], [DIMS])[1]]
    assert name in found


@pytest.mark.parametrize("count", [2, 5])
def test_signed_zeros_have_an_order(count):
    zeros = np.zeros((5, 2), np.float32)
    zeros[3] = -0.0
    zeros[:, 1] *= -1

    def fn(x):
        return x.max(0), x.min(0), x.max(), x.min()

    one, many = [on_shards(fn, [zeros], [0], n) for n in (1, count)]
    assert_same_bits(many.out, one.out)


@pytest.mark.parametrize("exact", [True, False])
def test_results_are_cut_where_the_work_left_them(exact):
    def fn(x):
        return x * 2, x.T, x.sum(0), x.sum(1), x.reshape(1, 5, 3), x @ x.T

    assert traced(fn, [X], [0])[0] == (0, 1, -1, 0, 1, 0)
    assert traced(fn, [X], [1])[0] == (1, 0, 0, -1, 2, -1)
    assert traced(fn, [X], [-1])[0] == (-1,) * 6
    many = on_shards(fn, [X], [0], 3, exact=exact)
    assert many.dims == (0, 1, -1, 0, 1, 0)
    assert_close(many.out, jax.jit(fn)(X))


def test_recut_brings_a_result_to_any_cut():
    leaves = [LeafLayout("", (5, 3), np.dtype("float32"), dim) for dim in (-1, 0, 1)]
    mesh, shards = MeshSpec().build(jax.devices()[:4]), Shards("fsdp", 4)
    for source in leaves:

        def spmd(x, source=source):
            localizer = Localizer(shards)
            return [localizer.recut(x, source.dim, leaf) for leaf in leaves]

        out = jax.jit(
            jax.shard_map(
                spmd,
                mesh=mesh,
                in_specs=source.spec,
                out_specs=[leaf.spec for leaf in leaves],
                check_vma=False,
            )
        )(place(X, source, mesh))
        for array in out:
            np.testing.assert_array_equal(np.asarray(array)[:5, :3], X)


# Conditions, whose branches may cut their results in different ways.


def branches(x, y):
    """Results of two branches that agree in nothing but their shapes."""

    def one(x, y):
        return x + y, y.sum(), jnp.zeros((5, 3)), x.sum(0), jnp.sort(x, 0)

    def other(x, y):
        return jnp.ones((5, 3)), jnp.float32(2), x * y, jnp.ones(3), x - y.mean()

    return one, other, (x, y)


@pytest.mark.parametrize("sign", [1, -1])
def test_branches_of_a_condition_come_to_one_cut(sign):
    def fn(x, y):
        one, other, operands = branches(x, y)
        return lax.cond(sign * jnp.sum(x * x) > 0, one, other, *operands)

    one = on_shards(fn, [X, Y], [0, 1], 1)
    assert_close(one.out, jax.jit(fn)(X, Y))
    many = on_shards(fn, [X, Y], [0, 1], 3)
    assert_same_bits(many.out, one.out)
    assert many.dims == one.dims


def test_conditions_nest_and_switch():
    def fn(x, i):
        def inner(x):
            return lax.cond(x[0, 0] > 0, lambda x: x * x.sum(), jnp.abs, x)

        return lax.switch(i, [lambda x: x, inner, lambda x: -inner(x)], x)

    for i in (0, 1, 2, 7):
        args = [X, np.int32(i)]
        one, many = [on_shards(fn, args, [0, -1], count) for count in (1, 8)]
        assert_same_bits(many.out, one.out)
        assert_close(one.out, jax.jit(fn)(*args))


def test_a_quotient_whose_numerator_repeats_is_a_quotient():
    def fn(x, y, w):
        quotient = jnp.broadcast_to(w[0], w.shape) / x.sum()
        return x + quotient * 0.3, y + quotient, (quotient + 0.3 - y) - quotient

    args = [normal(17, 13, seed=seed) for seed in (0, 2, 4)]
    one, many = [on_shards(fn, args, [0, 1, -1], count) for count in (1, 3)]
    assert_same_bits(many.out, one.out)


def test_keys_are_chosen_by_what_is_cut():
    def fn(x, keys):
        return jnp.where(x > 0, keys, keys[::-1])

    args = [COLUMN, jax.random.split(jax.random.key(0), 5)]
    one, many = [on_shards(fn, args, [0, -1], count) for count in (1, 3)]
    assert_same_bits(many.out, one.out)
    assert_same_bits(one.out, jax.random.key_data(fn(*args)))


def test_what_has_no_result_is_carried_out():
    seen = []

    def fn(x):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return x * 2

    assert_same_bits(on_shards(fn, [X], [0], 3).out, X * 2)
    jax.effects_barrier()
    assert seen
    for x in seen:
        np.testing.assert_array_equal(x, X)


def test_a_branch_that_is_not_taken_leaves_nothing():
    seen = []

    def loud(x):
        jax.debug.callback(lambda x: seen.append(x), x.sum())
        return x

    def fn(x):
        return lax.cond(jnp.sum(x * x) > 0, lambda x: x * 2, loud, x)

    assert_same_bits(on_shards(fn, [X], [0], 2).out, X * 2)
    jax.effects_barrier()
    assert not seen


def callback(x):
    return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


REFUSED = {
    "pure_callback": callback,
    "io_callback": lambda x: io_callback(
        np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x
    ),
    "rng_bit_generator": lambda x: (
        x + lax.rng_bit_generator(jnp.zeros(4, jnp.uint32), x.shape)[1]
    ),
    "rng_uniform": lambda x: x + lax.rng_uniform(0.0, 1.0, x.shape),
}
WRAPPERS = {
    "bare": lambda fn: fn,
    "jit": jax.jit,
    "cond": lambda fn: lambda x: lax.cond(x.sum() > 0, fn, jnp.abs, x),
    "checkpoint": jax.checkpoint,
    "scan": lambda fn: lambda x: lax.scan(lambda c, _: (fn(c), None), x, length=2)[0],
    "while": lambda fn: lambda x: lax.while_loop(lambda x: x.sum() < 0, fn, x),
}


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(name, wrapper, dim):
    with pytest.raises(InexactError, match=name) as caught:
        traced(WRAPPERS[wrapper](REFUSED[name]), [X], [dim])
    assert "consistency='fast'" in str(caught.value)
