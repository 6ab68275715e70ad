"""The primitives that are carried out piece by piece, by brute force."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from sharded import (
    assert_same_bits,
    normal,
    on_host,
)

from shardkit.operations import ELEMENTWISE as CALLED_ELEMENTWISE

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
    assert CALLED_ELEMENTWISE - NOT_BOUND <= ELEMENTWISE.keys()


def elementwise_cases():
    return sorted(CALLED_ELEMENTWISE & ELEMENTWISE.keys())


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
