import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental import io_callback
from jax.sharding import PartitionSpec

import shardkit.localize as localize
from shardkit.errors import InexactError
from shardkit.layout import LeafLayout
from shardkit.localize import Localizer
from shardkit.logical_axes import axes
from shardkit.mesh import MeshSpec
from shardkit.program import Program
from shardkit.recipe import Recipe
from shardkit.shards import Shards, pad_dim

COUNTS = (1, 2, 3, 5, 8)


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def place(x, leaf, mesh):
    """Places an array in pieces whose padding is the worst that it could be."""
    if leaf.dim < 0:
        return jax.device_put(x, leaf.sharding(mesh))
    fill = np.nan if jnp.issubdtype(x.dtype, jnp.floating) else 77
    physical = np.full(leaf.physical_shape(mesh.shape["fsdp"]), fill).astype(x.dtype)
    physical[tuple(slice(0, size) for size in leaf.shape)] = x
    return jax.device_put(physical, leaf.sharding(mesh))


@dataclasses.dataclass
class Result:
    """What came out of a function on shards, whole and in host memory."""

    out: object
    dims: object
    gathered: list


def on_shards(fn, args, dims, count, exact=True):
    """Evaluates a function of whole arrays on `count` shards."""
    mesh = MeshSpec(data=1).build(jax.devices()[:count])
    shards = Shards("fsdp", count, exact)
    layout = jax.tree.map(
        lambda x, dim: LeafLayout("", x.shape, x.dtype, dim), args, dims
    )
    shapes = jax.tree.map(lambda leaf: leaf.abstract, layout)
    specs = jax.tree.map(lambda leaf: leaf.spec, layout)
    found = []

    def spmd(zero, args):
        localizer = Localizer(shards, zero)
        out, out_dims = localizer(fn, args, dims, shapes)
        found.append((out_dims, localizer.gathered))

        def whole(x, dim, shape):
            return x if dim < 0 else shards.gather(x, dim, shape.shape[dim])

        return jax.tree.map(whole, out, out_dims, jax.eval_shape(fn, *shapes))

    program = Program(
        jax.shard_map(
            spmd,
            mesh=mesh,
            in_specs=(PartitionSpec(), specs),
            out_specs=PartitionSpec(),
            check_vma=False,
        ),
        exact=exact,
    )
    zero = jax.device_put(np.int32(0), jax.NamedSharding(mesh, PartitionSpec()))
    out = program(
        zero, jax.tree.map(lambda x, leaf: place(x, leaf, mesh), args, layout)
    )
    return Result(on_host(out), *found[-1])


def on_host(tree):
    return jax.tree.map(
        lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree
    )


def traced(fn, args, dims):
    """Returns the cut dims of the results and what was gathered; computes nothing."""
    localizer, found = Localizer(Shards()), []
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)

    def whole(*args):
        out, out_dims = localizer(fn, args, dims, shapes)
        found.append(out_dims)
        return out

    jax.eval_shape(whole, *shapes)
    return found[-1], localizer.gathered


def assert_same_bits(found, expected):
    found, treedef = jax.tree.flatten(found)
    expected, other = jax.tree.flatten(expected)
    assert treedef == other
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        same = np.frombuffer(a.tobytes(), np.uint8) == np.frombuffer(
            b.tobytes(), np.uint8
        )
        assert same.all(), f"{(~same).sum()} bytes differ\n{a}\n{b}"


def assert_close(found, expected, rtol=1e-4):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        b = np.asarray(b)
        assert a.shape == b.shape
        if b.dtype.kind in "iub":
            np.testing.assert_array_equal(a, b)
            continue
        tolerance = rtol if b.dtype.itemsize > 2 else 2e-2
        a, b = [x.astype(np.complex128) for x in (a, b)]
        scale = np.max(np.abs(b), where=~np.isnan(b), initial=1e-6)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


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
    "integers": np.arange(15, dtype=np.int32).reshape(5, 3) * 7919 % 1000,
}
DIMS = dict.fromkeys(ARGS, 0) | {"columns": 1, "bias": -1}


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
    "made here": of("x")(lambda x: x + jnp.arange(5.0)[:, None] + jnp.ones((5, 1))),
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

    assert traced(fn, [X], [0])[0] == (0, 1, -1, 0, 1, -1)
    assert traced(fn, [X], [1])[0] == (1, 0, 0, -1, 2, -1)
    assert traced(fn, [X], [-1])[0] == (-1,) * 6
    many = on_shards(fn, [X], [0], 3, exact=exact)
    assert many.dims == (0, 1, -1, 0, 1, -1)
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


# Random functions.

UNARY = {
    "neg": lambda np, x: -x,
    "square": lambda np, x: x * x,
    "abs": lambda np, x: np.abs(x),
    "sqrt": lambda np, x: np.sqrt(np.abs(x)),
    "tanh": lambda np, x: np.tanh(x),
    "exp": lambda np, x: np.exp(-np.abs(x)),
    "reciprocal": lambda np, x: 1 / (1 + x * x),
    "where": lambda np, x: np.where(x > 0.5, x, 0.25),
    "clip": lambda np, x: np.clip(x, -0.5, 0.5),
}
BINARY = {
    "add": lambda np, x, y: x + y,
    "mul": lambda np, x, y: x * y,
    "decay": lambda np, x, y: np.float32(0.9) * x + np.float32(0.1) * y,
    "div": lambda np, x, y: x / (1 + y * y),
    "max": lambda np, x, y: np.maximum(x, y),
    "where": lambda np, x, y: np.where(x > y, x + 1, y),
}
REDUCTIONS = {
    "sum": lambda np, x, **axes: np.sum(x, **axes),
    "mean": lambda np, x, **axes: np.mean(x, **axes),
    "max": lambda np, x, **axes: np.max(x, **axes),
    "min": lambda np, x, **axes: np.min(x, **axes),
    "norm": lambda np, x, **axes: np.sqrt(np.sum(x * x, **axes)),
    "prod": lambda np, x, **axes: np.prod(x, **axes),
    "any": lambda np, x, **axes: np.where(np.any(x > 1, **axes), 1.0, x.sum()),
}
ALONG = {
    "sort": lambda np, x, axis: np.sort(x, axis=axis),
    "cumsum": lambda np, x, axis: np.cumsum(x, axis=axis),
    "flip": lambda np, x, axis: np.flip(x, axis),
    "twice": lambda np, x, axis: np.concatenate([x, x], axis=axis),
    "expand": lambda np, x, axis: np.expand_dims(x, axis),
    "argmax": lambda np, x, axis: np.argmax(x, axis=axis) * np.float32(0.5),
    "center": lambda np, x, axis: x - np.mean(x, axis=axis, keepdims=True),
    "row": lambda np, x, axis: np.take(x, 0, axis=axis),
}
SHAPING = {
    "transpose": lambda np, x, order: np.transpose(x, order),
    "reshape": lambda np, x, shape: np.reshape(x, shape),
    "gram": lambda np, x: np.tensordot(x, x, axes=((0,), (0,))),
    "cond": lambda np, x, y: condition(np, x, y),
    "jit": lambda np, x: (jax.jit(double_and_add) if np is jnp else double_and_add)(x),
}


def double_and_add(x):
    return x * 2 + x.sum()


def condition(np, x, y):
    if np is jnp:
        return lax.cond(x.sum() > y.sum(), lambda x, y: x * y, lambda x, y: -x, x, y)
    return x * y if x.sum() > y.sum() else -x


@st.composite
def programs(draw):
    """Steps `(function, operands, options)` over numbered values, and input dims."""
    shapes = [(5, 3), (5, 3), (3,), (5,), ()]
    dims = [draw(st.sampled_from(range(-1, len(shape)))) for shape in shapes]
    steps = []
    for _ in range(draw(st.integers(3, 7))):
        # The newest values more often, so that operations build on one another.
        recent = st.integers(max(0, len(shapes) - 3), len(shapes) - 1)
        i = draw(st.one_of(recent, st.integers(0, len(shapes) - 1)))
        rank, size = len(shapes[i]), int(np.prod(shapes[i]))
        kinds = ["unary", "binary", "cond", "jit"]
        kinds += ["reduce", "along", "transpose", "reshape"] * (rank > 0)
        kinds += ["gram"] * (rank == 2)
        kind = draw(st.sampled_from(kinds))
        operands, options = [i], {}
        if kind == "unary":
            fn = draw(st.sampled_from(sorted(UNARY))), UNARY
        elif kind in ("binary", "cond"):
            fits = [j for j, s in enumerate(shapes) if can_broadcast(s, shapes[i])]
            if kind == "cond":
                fits = [j for j in fits if shapes[j] == shapes[i]]
            operands.append(draw(st.sampled_from(fits)))
            name = draw(st.sampled_from(sorted(BINARY)))
            fn = (name, BINARY) if kind == "binary" else (kind, SHAPING)
        elif kind == "reduce":
            axes = draw(st.sets(st.integers(0, rank - 1), min_size=1))
            options = {"axis": tuple(sorted(axes)), "keepdims": draw(st.booleans())}
            fn = draw(st.sampled_from(sorted(REDUCTIONS))), REDUCTIONS
        elif kind == "along":
            options = {"axis": draw(st.integers(0, rank - 1))}
            fn = draw(st.sampled_from(sorted(ALONG))), ALONG
        elif kind == "transpose":
            options = {"order": tuple(draw(st.permutations(range(rank))))}
            fn = kind, SHAPING
        elif kind == "reshape":
            splits = [(a, size // a) for a in range(1, size + 1) if size % a == 0]
            options = {"shape": draw(st.sampled_from([*splits, (size,)]))}
            fn = kind, SHAPING
        else:
            fn = kind, SHAPING
        values = [np.zeros(shapes[j], np.float32) for j in operands]
        shape = fn[1][fn[0]](np, *values, **options).shape
        if np.prod(shape) > 200 or len(shape) > 4:
            continue
        shapes.append(shape)
        steps.append((*fn, operands, options))
    return steps, dims


def can_broadcast(one, other):
    try:
        np.broadcast_shapes(one, other)
    except ValueError:
        return False
    return True


def run_steps(xp, steps, inputs):
    values = list(inputs)
    for name, table, operands, options in steps:
        values.append(table[name](xp, *[values[j] for j in operands], **options))
    return values[len(inputs) :]


INPUTS = [X, Y, BIAS, COLUMN, np.float32(0.7)]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(program=programs(), count=st.sampled_from([2, 3, 4, 5, 6, 7, 8]))
def test_random_functions_compute_the_same_bits_on_any_number_of_shards(program, count):
    steps, dims = program

    def fn(*inputs):
        return run_steps(jnp, steps, inputs)

    one = on_shards(fn, INPUTS, dims, 1)
    many = on_shards(fn, INPUTS, dims, count)
    assert_same_bits(many.out, one.out)
    assert (many.dims, many.gathered) == (one.dims, one.gathered)
    # Step by step, as errors of one would be magnified by the next.
    values = [*INPUTS, *one.out]
    for step, found in zip(steps, one.out, strict=True):
        name, table, operands, options = step
        operands = [np.asarray(values[j], np.float64) for j in operands]
        assert_close(found, np.asarray(table[name](np, *operands, **options)))


# Optimizers: one update each, on random parameters, gradients and state.


def decays(params):
    return jax.tree.map(lambda x: x.ndim >= 2, params)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1, mask=decays),
    "lion": lambda: optax.lion(1e-2, weight_decay=0.1),
    "sgd": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adafactor": lambda: optax.adafactor(
        1e-2, min_dim_size_to_factor=2, momentum=0.9, weight_decay_rate=1e-3
    ),
    "lamb": lambda: optax.lamb(1e-2, weight_decay=0.1, mask=decays),
    "adagrad": lambda: optax.adagrad(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2, centered=True, momentum=0.9),
    "novograd": lambda: optax.novograd(1e-2, weight_decay=0.1),
    "adabelief": lambda: optax.adabelief(1e-2),
    "accumulates": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "accumulated": lambda: optax.MultiSteps(optax.adam(1e-2), 1),
    "if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "clip_by_global_norm": lambda: optax.chain(
        optax.clip_by_global_norm(0.1), optax.clip(0.01), optax.adam(1e-2)
    ),
    "clip_by_block_rms": lambda: optax.chain(
        optax.clip_by_block_rms(0.1), optax.normalize_by_update_norm(), optax.sgd(1e-2)
    ),
    "adaptive_grad_clip": lambda: optax.chain(
        optax.adaptive_grad_clip(0.01), optax.sgd(1e-2, momentum=0.9)
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.linear_schedule(1e-2, 0, 9), weight_decay=0.1
    ),
    "ema": lambda: optax.chain(optax.ema(0.9), optax.sgd(1e-2)),
    "partitioned": lambda: optax.partition(
        {True: optax.adam(1e-2), False: optax.sgd(1e-1)}, decays
    ),
}
ALL_COUNTS = ("adamw",)
LOCAL_OPTIMIZERS = ("adamw", "lion", "sgd", "adagrad", "clip_by_global_norm", "ema")


def init(key):
    shapes = {"w": (5, 3), "e": (4, 7), "g": (7,), "s": ()}
    keys = jax.random.split(key, len(shapes))
    names = {"w": ("cut", None), "e": (None, "cut"), "g": ("cut",)}
    return {
        name: axes(jax.random.normal(k, shape), *names.get(name, (None,) * len(shape)))
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def problem(tx, exact=True):
    """Returns an update, its arguments and how they are cut."""
    recipe = Recipe(
        init=init, loss=lambda p, x, k: 0.0, tx=tx, num_microbatches=1, exact=exact
    )
    layout, _ = recipe.layout({"cut": "fsdp"})
    state = recipe.first_state(jax.random.key(0))
    rng = np.random.default_rng(0)

    def moments(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return (0.01 * abs(rng.normal(size=x.shape))).astype(x.dtype)
        return x

    state = dataclasses.replace(state, opt_state=jax.tree.map(moments, state.opt_state))
    state = jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), state)
    grads = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), state.params
    )
    dims = jax.tree.map(lambda leaf: leaf.dim, layout)
    return (
        recipe.update,
        [state, grads, state.grad_exponent],
        [dims, dims.params, dims.grad_exponent],
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_update_to_the_same_bits_on_any_number_of_shards(name):
    update, args, dims = problem(OPTIMIZERS[name]())
    one = on_shards(update, args, dims, 1)
    assert_close(one.out, on_host(jax.jit(update)(*args)))
    for count in COUNTS[1:] if name in ALL_COUNTS else (3, 8):
        assert_same_bits(on_shards(update, args, dims, count).out, one.out)


@pytest.mark.parametrize("name", LOCAL_OPTIMIZERS)
def test_common_optimizers_gather_nothing(name):
    assert traced(*problem(OPTIMIZERS[name]()))[1] == []


@pytest.mark.parametrize("where", [("w", (4, 2)), ("s", ())])
def test_a_gradient_that_is_not_finite_is_seen_by_all_shards(where):
    update, args, dims = problem(OPTIMIZERS["if_finite"]())
    name, index = where
    args[1][name] = np.array(args[1][name])
    args[1][name][index] = np.nan
    one, many = [on_shards(update, args, dims, count) for count in (1, 8)]
    assert_same_bits(many.out, one.out)
    state, _ = many.out
    assert_same_bits(state.params, args[0].params)
    assert int(state.opt_state.notfinite_count) == 1


# What is refused.


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


# Each primitive in the list of elementwise ones, by brute force.

FLOATS = np.concatenate([normal(30, seed=3), [0, -0.0, 1, -1, 0.5, 1e-3, 3e4]]).astype(
    np.float32
)
OTHERS = FLOATS[::-1].copy()
INTEGERS = np.random.default_rng(0).integers(-(2**31), 2**31, 37).astype(np.int32)
SMALL = np.arange(37, dtype=np.int32) % 31
PREDICATES = FLOATS > 0
POSITIVE = np.abs(FLOATS) + np.float32(0.1)
ONE, TWO, WHOLE, BITS = (FLOATS,), (FLOATS, OTHERS), (INTEGERS,), (INTEGERS, SMALL)
primitives = jax.extend.core.primitives

ELEMENTWISE = {
    "abs": (lax.abs, ONE),
    "acos": (lax.acos, ONE),
    "acosh": (lax.acosh, (POSITIVE + 1,)),
    "add": (lax.add, TWO),
    "add_any": (lambda x, y: primitives.add_jaxvals_p.bind(x, y), TWO),
    "and": (lax.bitwise_and, BITS),
    "asin": (lax.asin, ONE),
    "asinh": (lax.asinh, ONE),
    "atan": (lax.atan, ONE),
    "atan2": (lax.atan2, TWO),
    "atanh": (lax.atanh, (FLOATS / 4e4,)),
    "bitcast_convert_type": (lambda x: lax.bitcast_convert_type(x, np.int32), ONE),
    "cbrt": (lax.cbrt, ONE),
    "ceil": (lax.ceil, ONE),
    "clamp": (lax.clamp, (-POSITIVE, OTHERS, POSITIVE)),
    "convert_element_type": (lambda x: lax.convert_element_type(x, jnp.bfloat16), ONE),
    "conj": (lax.conj, (FLOATS + 1j * OTHERS,)),
    "copy": (lambda x: primitives.copy_p.bind(x), ONE),
    "copy_p": (lambda x: primitives.copy_p.bind(x), ONE),
    "cos": (lax.cos, ONE),
    "cosh": (lax.cosh, (FLOATS / 1e4,)),
    "digamma": (lax.digamma, (POSITIVE,)),
    "div": (lax.div, (FLOATS, POSITIVE)),
    "eq": (lax.eq, TWO),
    "erf": (lax.erf, ONE),
    "erf_inv": (lax.erf_inv, (FLOATS / 4e4,)),
    "erfc": (lax.erfc, ONE),
    "exp": (lax.exp, (FLOATS / 1e3,)),
    "exp2": (lax.exp2, (FLOATS / 1e3,)),
    "expm1": (lax.expm1, (FLOATS / 1e3,)),
    "floor": (lax.floor, ONE),
    "ge": (lax.ge, TWO),
    "gt": (lax.gt, TWO),
    "igamma": (lax.igamma, (POSITIVE, POSITIVE[::-1])),
    "igammac": (lax.igammac, (POSITIVE, POSITIVE[::-1])),
    "imag": (lax.imag, (FLOATS + 1j * OTHERS,)),
    "integer_pow": (lambda x: lax.integer_pow(x, 3), ONE),
    "is_finite": (lax.is_finite, (np.where(PREDICATES, FLOATS, np.float32(np.inf)),)),
    "le": (lax.le, TWO),
    "lgamma": (lax.lgamma, (POSITIVE,)),
    "log": (lax.log, (POSITIVE,)),
    "log1p": (lax.log1p, (POSITIVE,)),
    "logistic": (lax.logistic, ONE),
    "lt": (lax.lt, TWO),
    "max": (lax.max, TWO),
    "min": (lax.min, TWO),
    "mul": (lax.mul, TWO),
    "ne": (lax.ne, TWO),
    "neg": (lax.neg, ONE),
    "nextafter": (lax.nextafter, TWO),
    "not": (lax.bitwise_not, WHOLE),
    "optimization_barrier": (lax.optimization_barrier, ONE),
    "or": (lax.bitwise_or, BITS),
    "population_count": (lax.population_count, WHOLE),
    "pow": (lax.pow, (POSITIVE, np.clip(OTHERS, -3, 3))),
    "real": (lax.real, (FLOATS + 1j * OTHERS,)),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 6, 9), ONE),
    "rem": (lax.rem, (FLOATS, POSITIVE[::-1].copy())),
    "round": (lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN), ONE),
    "rsqrt": (lax.rsqrt, (POSITIVE,)),
    "select_n": (lax.select_n, (PREDICATES, *TWO)),
    "shift_left": (lax.shift_left, BITS),
    "shift_right_arithmetic": (lax.shift_right_arithmetic, BITS),
    "shift_right_logical": (lax.shift_right_logical, BITS),
    "sign": (lax.sign, ONE),
    "sin": (lax.sin, ONE),
    "sinh": (lax.sinh, (FLOATS / 1e4,)),
    "sqrt": (lax.sqrt, (POSITIVE,)),
    "square": (lax.square, ONE),
    "sub": (lax.sub, TWO),
    "tan": (lax.tan, ONE),
    "tanh": (lax.tanh, ONE),
    "xor": (lax.bitwise_xor, BITS),
}
# Of the total order that sorting uses, and names of other versions of JAX.
NOT_BOUND = {"eq_to", "lt_to", "le_to", "stop_gradient"}


def test_every_primitive_that_is_called_elementwise_is_checked():
    assert localize._ELEMENTWISE - NOT_BOUND <= ELEMENTWISE.keys()


def elementwise_cases():
    return sorted(localize._ELEMENTWISE & ELEMENTWISE.keys())


def slices_of(arrays):
    """Cuts of many sizes and offsets, as vector code treats ends in its own way."""
    for start, stop in ((0, 37), (0, 1), (3, 11), (32, 37), (5, 28)):
        yield slice(start, stop), [x[start:stop] for x in arrays]


@functools.cache
def elementwise_results():
    """Computes every primitive on every slice, in one program per kind of slice."""

    def compute(tables):
        return {name: ELEMENTWISE[name][0](*args) for name, args in tables.items()}

    out = []
    args = {name: ELEMENTWISE[name][1] for name in elementwise_cases()}
    for cut, _ in slices_of(()):
        pieces = {name: tuple(x[cut] for x in xs) for name, xs in args.items()}
        out.append((cut, on_host(jax.jit(compute)(pieces))))
    return out


@pytest.mark.parametrize("name", elementwise_cases())
def test_elementwise_primitives_are(name):
    fn, args = ELEMENTWISE[name]
    names = {eqn.primitive.name for eqn in jax.make_jaxpr(fn)(*args).eqns}
    assert name in names or name == "copy_p"
    (_, whole), *parts = elementwise_results()
    for cut, part in parts:
        assert_same_bits(part[name], np.ascontiguousarray(whole[name][cut]))
    # Not one element of the result depends on another element of an operand.
    order = np.random.default_rng(0).permutation(len(args[0]))
    shuffled = np.asarray(fn(*[x[order] for x in args]))
    unshuffled = np.asarray(fn(*args))[order]
    np.testing.assert_array_equal(shuffled, unshuffled)


# The cutting rule itself.


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 20),
    dim=st.integers(0, 2),
    count=st.sampled_from(COUNTS),
)
def test_pieces_joined_without_their_padding_are_the_array(size, dim, count):
    shape = tuple(size if d == dim else 2 for d in range(3))
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    shards = Shards("fsdp", count)
    piece = shards.piece(size)
    assert piece == -(-size // count)
    padded = np.asarray(pad_dim(jnp.asarray(x), dim, piece * count))
    assert padded.shape[dim] == piece * count
    np.testing.assert_array_equal(padded[tuple(slice(0, n) for n in shape)], x)
    assert padded.sum() == x.sum()


@pytest.mark.parametrize("count", COUNTS)
def test_cut_gather_and_mask_inside_shard_map(count):
    shards = Shards("fsdp", count)
    mesh = MeshSpec().build(jax.devices()[:count])
    x = normal(5, 3)

    def spmd(x):
        cut = shards.cut(x, 0)
        dirty = jnp.where(shards.mask(jnp.ones_like(cut), 0, 5, 0) > 0, cut, jnp.nan)
        masked = shards.mask(dirty, 0, 5, -2)
        return (
            shards.gather(dirty, 0, 5),
            lax.all_gather(masked, "fsdp", tiled=True),
            shards.pmax(cut.max()),
            shards.psum(jnp.int32(1)),
        )

    joined, masked, largest, ones = jax.jit(
        jax.shard_map(
            spmd,
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )(x)
    np.testing.assert_array_equal(joined, x)
    np.testing.assert_array_equal(masked[:5], x)
    np.testing.assert_array_equal(masked[5:], -2)
    assert float(largest) == max(x.max(), 0 if 5 % count else x.max())
    assert int(ones) == count


def test_outside_shard_map_nothing_is_cut():
    shards = Shards()
    x = jnp.asarray(X)
    assert shards.piece(5) == 5
    for out in (
        shards.cut(x, 0),
        shards.gather(x, 1, 3),
        shards.mask(x, 0, 5, 0),
        shards.pmax(x),
        shards.psum(x),
    ):
        np.testing.assert_array_equal(out, X)
