"""Runs a function of whole arrays on shards of them.

Owns the translation: a function written for global arrays (an optimizer update, a
norm, an average) is traced once, and its operations are then carried out on the
shard that this device holds. Elementwise work stays local; a float sum goes through
`exact_sum`; whatever has no local form is done on the gathered whole, which costs
memory but gives the same bits on every mesh. Invariant: the result does not depend
on the number of shards. It must run inside `shard_map` (or on one shard).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from shardkit.exact_sum import exact_sums
from shardkit.inexact import check_operations
from shardkit.jaxprs import Step, flatten, results
from shardkit.layout import LeafLayout
from shardkit.local_rules import RULES, Shard, dim_after_reduction
from shardkit.rounding import not_broadcast, unfused
from shardkit.shards import Shards

__all__ = ["Localizer", "Shard"]

_ELEMENTWISE = frozenset(
    """abs add add_any and ceil clamp convert_element_type copy copy_p div eq floor ge
    gt integer_pow is_finite le lt max min mul ne neg nextafter not
    or real reduce_precision rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sqrt square stop_gradient sub
    xor bitcast_convert_type""".split()
)
# Approximated by code that differs between the body and the rest of a vector loop,
# so that an element's bits depend on where in which array it stands.
_APPROXIMATED = frozenset(
    """acos acosh asin asinh atan atan2 atanh cbrt cos cosh digamma erf erf_inv erfc
    exp exp2 expm1 lgamma log log1p logistic pow sin sinh tan tanh""".split()
)
_PRODUCTS = frozenset(["mul", "integer_pow", "square"])


class Localizer:
    """Evaluates traced functions on shards.

    Args:
        shards: How sharded leaves are cut.
        zero: An int32 zero that the compiler cannot know to be one. It keeps products
            from being fused with sums into operations that round once; which ones
            would be, differs with the shape of a piece.

    Attributes:
        gathered: What had to be done on gathered arrays: `(operation, shape)`. Each
            costs the memory of the whole array on every device.
    """

    def __init__(self, shards: Shards, zero: Array | int = 0) -> None:
        self.shards = shards
        self._zero = jnp.asarray(zero, jnp.int32)
        self.gathered: list[tuple[str, tuple[int, ...]]] = []

    def __call__(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any],
        dims: Sequence[Any],
        shapes: Sequence[Any],
    ) -> tuple[Any, Any]:
        """Computes `fn(*args)`.

        Args:
            fn: A function of whole arrays.
            args: Trees of whole arrays or pieces, as `dims` says.
            dims: Trees like `args` with the cut dim of each leaf, or -1.
            shapes: Trees like `args` of `jax.ShapeDtypeStruct`: the whole arrays.

        Returns:
            The result, in pieces where the work left it so, and a tree of its cut
            dims (-1 for whole).

        Raises:
            InexactError: Where an operation cannot be made exact.
        """
        closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*shapes)
        if self.shards.exact:
            check_operations(closed, "the update")
        values = [
            Shard(x) if dim < 0 else Shard(x, dim, shape.shape[dim])
            for x, dim, shape in zip(
                jax.tree.leaves(list(args)),
                jax.tree.leaves(list(dims)),
                jax.tree.leaves(list(shapes)),
                strict=True,
            )
        ]
        outs = self._eval(closed.jaxpr, closed.consts, values)
        treedef = jax.tree.structure(out_shape)
        out_dims = [-1 if out.dim is None else out.dim for out in outs]
        return treedef.unflatten([o.array for o in outs]), treedef.unflatten(out_dims)

    def recut(self, array: Array, dim: int, leaf: LeafLayout) -> Array:
        """Brings a result of `__call__` to the cut that its layout wants."""
        if dim == leaf.dim:
            return array
        size = leaf.shape[dim] if dim >= 0 else 0
        value = Shard(array, None if dim < 0 else dim, size)
        return self._whole(value) if leaf.dim < 0 else self._align(value, leaf.dim)

    def _eval(
        self, jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Shard]
    ) -> list[Shard]:
        """Runs equations as soon as they can, and sums that can wait together.

        Every sum over shards costs two collectives, so sums that do not depend on
        one another are taken in one go.
        """
        values: list[Shard | None] = []
        steps, outs = flatten(jaxpr, consts, args, values, Shard)
        while steps:
            waiting, sums, unknown = [], [], set()
            for step in steps:
                eqn, ins, produced = step
                if not unknown.isdisjoint(ins):
                    waiting.append(step)
                    unknown.update(produced)
                elif _is_float_sum(eqn):
                    sums.append(step)
                    unknown.update(produced)
                else:
                    results = self._apply(eqn, [values[i] for i in ins])  # pyright: ignore
                    for index, result in zip(produced, results, strict=True):
                        values[index] = result
            self._float_sums(sums, values)
            steps = waiting
        return [values[i] for i in outs]  # pyright: ignore

    def _apply(self, eqn: Any, args: list[Shard]) -> list[Shard]:
        """Carries out one equation."""
        name = eqn.primitive.name
        if name in _APPROXIMATED and self.shards.exact:
            return self._gather_and_bind(eqn, args)
        if all(arg.dim is None for arg in args):
            return self._bind(eqn, [arg.array for arg in args])
        if name == "cond":
            return self._cond(eqn, args)
        if name == "optimization_barrier":
            outs = results(eqn, [arg.array for arg in args])
            return [
                dataclasses.replace(arg, array=out)
                for arg, out in zip(args, outs, strict=True)
            ]
        # A bitcast to another width has a new dim, hence the check of the shape.
        if name in _ELEMENTWISE and eqn.outvars[0].aval.shape == _cut_shape(eqn, args):
            return self._elementwise(eqn, args)
        rule = RULES.get(name)
        out = rule(self.shards, eqn, args[0]) if rule is not None else None
        return self._gather_and_bind(eqn, args) if out is None else [out]

    def _bind(self, eqn: core.JaxprEqn, arrays: list[Any]) -> list[Shard]:
        if not self.shards.exact:
            return [Shard(x) for x in results(eqn, arrays)]
        if eqn.primitive.name == "rsqrt":
            # Both of these are rounded correctly, and it is not.
            return [Shard(1 / unfused(jnp.sqrt(arrays[0]), self._zero))]
        if eqn.primitive.name == "div":
            arrays = [arrays[0], not_broadcast(arrays[1], arrays[0], self._zero)]
        outs = results(eqn, arrays)
        if eqn.primitive.name in _PRODUCTS:
            outs = [unfused(x, self._zero) for x in outs]
        return [Shard(x) for x in outs]

    def _gather_and_bind(self, eqn: Any, args: list[Shard]) -> list[Shard]:
        """Works on whole arrays, apart from what surrounds it."""
        for arg, atom in zip(args, eqn.invars, strict=True):
            if arg.dim is not None:
                self.gathered.append((eqn.primitive.name, atom.aval.shape))
        arrays = [self._whole(arg) for arg in args]
        if not self.shards.exact:
            return self._bind(eqn, arrays)
        outs = self._bind(eqn, lax.optimization_barrier(arrays))
        return [Shard(lax.optimization_barrier(out.array)) for out in outs]

    def _whole(self, value: Shard) -> Array:
        if value.dim is None:
            return value.array
        return self.shards.gather(value.array, value.dim, value.size)

    def _align(self, value: Shard, dim: int) -> Array:
        """Returns the piece of `value` along `dim`, whatever it was cut along."""
        if value.dim == dim:
            return value.array
        return self.shards.cut(self._whole(value), dim)

    def _elementwise(self, eqn: core.JaxprEqn, args: list[Shard]) -> list[Shard]:
        lead = next(arg for arg in args if arg.dim is not None)
        assert lead.dim is not None
        arrays = []
        for arg in args:
            shape = jnp.shape(arg.array)
            # Scalars and dims of size 1 are broadcast, so they go with any piece.
            if arg.dim != lead.dim and (not shape or shape[lead.dim] == 1):
                arrays.append(self._whole(arg))
            else:
                arrays.append(self._align(arg, lead.dim))
        outs = self._bind(eqn, arrays)
        return [Shard(out.array, lead.dim, lead.size) for out in outs]

    def _float_sums(self, steps: list[Step], values: list[Shard | None]) -> None:
        """Sums floats to the same bits on any number of shards."""
        shards = self.shards
        for across in (False, True):
            batch = []
            for eqn, [source], [target] in steps:
                x, dims = values[source], eqn.params["axes"]
                assert x is not None
                if (x.dim in dims) == across:
                    array = x.array
                    if across:
                        array = shards.mask(array, x.dim, x.size, 0)  # pyright: ignore
                    batch.append((target, x, array, dims))
            if not batch:
                continue
            addends = [(array, dims) for _, _, array, dims in batch]
            if shards.exact:
                over = {"pmax": shards.pmax, "psum": shards.psum} if across else {}
                totals = exact_sums(addends, **over)
            else:
                totals = [jnp.sum(a, axis=tuple(dims)) for a, dims in addends]
                totals = [shards.psum(t) for t in totals] if across else totals
            for (target, x, array, dims), total in zip(batch, totals, strict=True):
                total = total.astype(array.dtype)
                cut = not across and x.dim is not None
                values[target] = (
                    Shard(total, dim_after_reduction(x.dim, dims), x.size)  # pyright: ignore
                    if cut
                    else Shard(total)
                )

    def _cond(self, eqn: core.JaxprEqn, args: list[Shard]) -> list[Shard]:
        """Translates the branches, then brings their results to one cut."""
        index, *operands = args
        branches = eqn.params["branches"]
        # A first pass, whose results are dropped, learns how each branch cuts.
        cuts = [
            [(o.dim, o.size) for o in self._eval(b.jaxpr, b.consts, operands)]
            for b in branches
        ]
        wanted = [
            next((cut for cut in column if cut[0] is not None), (None, 0))
            for column in zip(*cuts, strict=True)
        ]

        def run(branch: core.ClosedJaxpr, arrays: list[Array]) -> list[Array]:
            values = [
                dataclasses.replace(operand, array=array)
                for operand, array in zip(operands, arrays, strict=True)
            ]
            outs = self._eval(branch.jaxpr, branch.consts, values)
            return [
                self._whole(out) if dim is None else self._align(out, dim)
                for out, (dim, _) in zip(outs, wanted, strict=True)
            ]

        outs = lax.switch(
            self._whole(index),
            [lambda *arrays, b=b: run(b, list(arrays)) for b in branches],
            *[operand.array for operand in operands],
        )
        return [
            Shard(out, dim, size) for out, (dim, size) in zip(outs, wanted, strict=True)
        ]


def _is_float_sum(eqn: Any) -> bool:
    is_float = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    return eqn.primitive.name == "reduce_sum" and is_float


def _cut_shape(eqn: Any, args: list[Shard]) -> tuple[int, ...]:
    """Returns the whole shape of the first operand that is cut."""
    pairs = zip(args, eqn.invars, strict=True)
    return next(atom.aval.shape for arg, atom in pairs if arg.dim is not None)
