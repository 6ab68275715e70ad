"""What is known of JAX's operations: whether pieces of arrays keep their bits.

Owns the lists by name, and the questions that are answered from them. Invariant: an
operation that is in no list is taken to need whole arrays and to be disturbed by what
the compiler puts beside it, so that what nobody knows is slow and never wrong.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import source_info_util

from shardkit.local_rules import RULES
from shardkit.rounding import is_guarded

__all__ = [
    "CUMULATIVE",
    "ELEMENTWISE",
    "PRODUCTS",
    "REDUCTIONS",
    "Whole",
    "has_key",
    "is_elementwise",
    "is_float_sum",
    "is_light",
    "keeps_bits",
]

ELEMENTWISE = frozenset(
    """abs add add_any and ceil clamp convert_element_type copy copy_p div eq floor ge
    gt integer_pow is_finite le lt max min mul ne neg nextafter not
    or real reduce_precision rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sqrt square stop_gradient sub
    xor bitcast_convert_type""".split()
)
PRODUCTS = frozenset(["mul", "integer_pow", "square"])
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
REDUCTIONS += ("reduce_and", "reduce_or")
CUMULATIVE = ("cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp")
# Approximated by code that differs between the body and the rest of a vector loop,
# so that an element's bits depend on where in which array it stands.
_APPROXIMATED = frozenset(
    """acos acosh asin asinh atan atan2 atanh cbrt cos cosh digamma erf erf_inv erfc
    exp exp2 expm1 lgamma log log1p logistic pow sin sinh tan tanh""".split()
)
# Of complex numbers these are several operations, which could be fused.
_ROUNDED = PRODUCTS | frozenset(["abs", "div", "rsqrt", "sign", "sqrt"])
# Neither round nor depend on an order, so that no surroundings change their bits.
_MOVES = frozenset(
    """argmax argmin concatenate dynamic_slice dynamic_update_slice expand_dims gather
    iota pad random_bits random_clone random_fold_in random_seed random_split
    random_unwrap random_wrap rev slice sort split threefry2x32 top_k unstack""".split()
)


class Whole(NamedTuple):
    """An operation on whole arrays.

    Attributes:
        operation: Its name.
        shape: The shape of its largest operand.
        dtype: The dtype of that.
        source: The source line it is from.
    """

    operation: str
    shape: tuple[int, ...]
    dtype: Any
    source: str

    @property
    def type(self) -> str:
        """The largest operand, as in `float32[3,4]`."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @classmethod
    def of(cls, eqn: Any) -> "Whole | None":
        """Describes an equation, or returns None if it has only scalars."""
        sizes = [var.aval.size for var in eqn.invars]
        if max(sizes, default=0) <= 1:
            return None
        aval = eqn.invars[sizes.index(max(sizes))].aval
        source = source_info_util.summarize(eqn.source_info)
        return cls(eqn.primitive.name, aval.shape, aval.dtype, source)


def is_float_sum(eqn: Any) -> bool:
    """Whether an equation is a sum whose bits would depend on its order."""
    return eqn.primitive.name == "reduce_sum" and jnp.issubdtype(
        eqn.outvars[0].aval.dtype, jnp.floating
    )


def is_elementwise(eqn: Any, exact: bool) -> bool:
    """Whether an element of the result follows from those of the operands alone.

    Args:
        eqn: Any equation.
        exact: Whether that goes for all bits.
    """
    name = eqn.primitive.name
    if name in _APPROXIMATED:
        return not exact
    if name not in ELEMENTWISE:
        return False
    variables = (*eqn.invars, *eqn.outvars)
    return (
        not exact
        or name not in _ROUNDED
        or all(is_guarded(var.aval.dtype) for var in variables)
    )


def is_light(eqn: Any, exact: bool) -> bool:
    """Whether an equation can, as a rule, be carried out on pieces."""
    name = eqn.primitive.name
    if name in RULES or name in ("cond", "optimization_barrier"):
        return True
    return is_elementwise(eqn, exact) or is_float_sum(eqn)


def keeps_bits(eqn: Any, exact: bool) -> bool:
    """Whether an equation on whole arrays has the same bits whatever is beside it."""
    name = eqn.primitive.name
    return name in _MOVES or name in RULES or is_elementwise(eqn, exact)


def has_key(eqn: Any) -> bool:
    """Whether an equation takes or makes random keys."""
    return any(
        jnp.issubdtype(var.aval.dtype, jax.dtypes.prng_key)
        for var in (*eqn.invars, *eqn.outvars)
    )
