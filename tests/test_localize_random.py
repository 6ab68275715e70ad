import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from sharded import assert_close, assert_same_bits, normal, on_shards

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
    "maximum": lambda np, x, y: np.maximum(x, y),
    "choose": lambda np, x, y: np.where(x > y, x + 1, y),
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


FUNCTIONS = UNARY | BINARY | REDUCTIONS | ALONG | SHAPING
"""Name → a function of numpy, or what stands for it, and of arrays."""


def double_and_add(x):
    return x * 2 + x.sum()


def condition(np, x, y):
    if np is jnp:
        return lax.cond(x.sum() > y.sum(), lambda x, y: x * y, lambda x, y: -x, x, y)
    return x * y if x.sum() > y.sum() else -x


@st.composite
def programs(draw):
    """Draws steps `(function, operands, options)` over values, and input dims."""
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
        name, operands, options = kind, [i], {}
        if kind == "unary":
            name = draw(st.sampled_from(sorted(UNARY)))
        elif kind in ("binary", "cond"):
            fits = [j for j, s in enumerate(shapes) if can_broadcast(s, shapes[i])]
            if kind == "cond":
                fits = [j for j in fits if shapes[j] == shapes[i]]
            operands.append(draw(st.sampled_from(fits)))
            if kind == "binary":
                name = draw(st.sampled_from(sorted(BINARY)))
        elif kind == "reduce":
            axes = draw(st.sets(st.integers(0, rank - 1), min_size=1))
            options = {"axis": tuple(sorted(axes)), "keepdims": draw(st.booleans())}
            name = draw(st.sampled_from(sorted(REDUCTIONS)))
        elif kind == "along":
            options = {"axis": draw(st.integers(0, rank - 1))}
            name = draw(st.sampled_from(sorted(ALONG)))
        elif kind == "transpose":
            options = {"order": tuple(draw(st.permutations(range(rank))))}
        elif kind == "reshape":
            splits = [(a, size // a) for a in range(1, size + 1) if size % a == 0]
            options = {"shape": draw(st.sampled_from([*splits, (size,)]))}
        values = [np.zeros(shapes[j], np.float32) for j in operands]
        shape = FUNCTIONS[name](np, *values, **options).shape
        if np.prod(shape) > 200 or len(shape) > 4:
            continue
        shapes.append(shape)
        steps.append((name, operands, options))
    return steps, dims


def can_broadcast(one, other):
    try:
        np.broadcast_shapes(one, other)
    except ValueError:
        return False
    return True


def run_steps(xp, steps, inputs):
    values = list(inputs)
    for name, operands, options in steps:
        values.append(FUNCTIONS[name](xp, *[values[j] for j in operands], **options))
    return values[len(inputs) :]


INPUTS = [normal(5, 3), normal(5, 3, seed=1), normal(3), normal(5), np.float32(0.7)]


@settings(max_examples=8, deadline=None, derandomize=True)
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
        name, operands, options = step
        operands = [np.asarray(values[j], np.float64) for j in operands]
        assert_close(found, np.asarray(FUNCTIONS[name](np, *operands, **options)))
