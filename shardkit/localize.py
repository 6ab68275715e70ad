"""Runs a function of whole arrays on shards of them.

Owns the translation: a function written for global arrays (an optimizer update, a
norm, an average) is traced once, and its operations are then carried out on the
shard that this device holds. Elementwise work stays local; a float sum goes through
`exact_sum`; whatever has no local form is done on whole arrays, by one shard for each
of them, which gives the same bits on every mesh. Invariant: the result does not depend
on the number of shards. It must run inside `shard_map` (or on one shard).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from shardkit import matrices
from shardkit.exact_sum import exact_sum, exact_sums
from shardkit.inexact import check_operations
from shardkit.jaxprs import Step, flatten, results
from shardkit.layout import LeafLayout
from shardkit.local_rules import RULES, Shard, dim_after_reduction
from shardkit.matrices import Task
from shardkit.operations import (
    PRODUCTS,
    Whole,
    has_key,
    is_elementwise,
    is_float_sum,
    is_light,
    keeps_bits,
)
from shardkit.regions import Region, Round, cost_of, used_outside, values_to_join
from shardkit.rounding import not_broadcast, unfused
from shardkit.shards import Shards

__all__ = ["Localizer", "Shard", "Whole"]


class Localizer:
    """Evaluates traced functions on shards.

    Args:
        shards: How sharded leaves are cut.
        zero: An int32 zero that the compiler cannot know to be one. It keeps products
            from being fused with sums into operations that round once; which ones
            would be, differs with the shape of a piece.

    Attributes:
        gathered: What was made whole to be worked on: `(operation, shape)`. Each costs
            the memory of the whole array on one device.
        whole: The operations that could not be done on pieces, of arrays of more than
            one element.
    """

    def __init__(self, shards: Shards, zero: Array | int = 0) -> None:
        self.shards = shards
        self._zero = jnp.asarray(zero, jnp.int32)
        self.gathered: list[tuple[str, tuple[int, ...]]] = []
        self.whole: list[Whole] = []

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
        # Whole arrays are on no mesh; with one, what is made in `fn` would seem to be.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
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
        """Runs equations as soon as they can, and what can wait together.

        Every sum over shards costs two collectives, so sums that do not depend on
        one another are taken in one go; so is what has to be done on whole arrays.
        """
        values: list[Shard | None] = []
        steps, outs = flatten(jaxpr, consts, args, values, Shard)
        light = functools.partial(is_light, exact=self.shards.exact)
        leading = values_to_join(steps, light)
        while steps:
            waiting, sums, unknown = [], [], set()
            regions = Round(leading, light)
            for step in steps:
                eqn, ins, produced = step
                is_known = unknown.isdisjoint(ins)
                if is_known and regions.touches(ins) and regions.join(step, values):
                    continue
                if not is_known or regions.touches(ins):
                    waiting.append(step)
                    unknown.update(produced)
                elif is_float_sum(eqn):
                    sums.append(step)
                    unknown.update(produced)
                elif (found := self._apply(eqn, [values[i] for i in ins])) is None:  # pyright: ignore
                    regions.open(step)
                else:
                    for index, result in zip(produced, found, strict=True):
                        values[index] = result
            self._float_sums(sums, values)
            self._compute(regions.regions, waiting, outs, values)
            steps = waiting
        return [values[i] for i in outs]  # pyright: ignore

    def _apply(self, eqn: Any, args: list[Shard]) -> list[Shard] | None:
        """Carries out one equation, or returns None if it needs whole arrays."""
        name = eqn.primitive.name
        if all(arg.dim is None for arg in args):
            return self._apply_to_whole(eqn, args)
        if name == "cond":
            return self._cond(eqn, args)
        if name == "optimization_barrier":
            outs = results(eqn, [arg.array for arg in args])
            return [
                dataclasses.replace(arg, array=out)
                for arg, out in zip(args, outs, strict=True)
            ]
        if has_key(eqn) or not eqn.outvars:
            # Keys are small, and no integers that could be sent; prints have no result.
            return self._apply_to_whole(eqn, [Shard(self._whole(arg)) for arg in args])
        if is_elementwise(eqn, self.shards.exact):
            return self._elementwise(eqn, args)
        rule = RULES.get(name)
        out = rule(self.shards, eqn, args[0]) if rule is not None else None
        return None if out is None else [out]

    def _apply_to_whole(self, eqn: Any, args: list[Shard]) -> list[Shard] | None:
        """Carries out what every shard can do, unless one had better do it for all."""
        exact = self.shards.exact
        # To move an array is less work than to send it.
        is_cheap = is_light(eqn, exact) or keeps_bits(eqn, exact) or has_key(eqn)
        if not is_cheap and cost_of(eqn) >= matrices.WORTH_SENDING:
            return None
        self._tell(eqn, not keeps_bits(eqn, exact))
        return [Shard(x) for x in self._on_whole(eqn, [arg.array for arg in args])]

    def _tell(self, eqn: Any, needs_whole: bool) -> None:
        told = Whole.of(eqn) if needs_whole else None
        if told is not None:
            self.whole.append(told)

    def _on_whole(self, eqn: Any, arrays: list[Array]) -> list[Array]:
        """Works on whole arrays, apart from what surrounds it."""
        if is_float_sum(eqn):
            return [self._sum(arrays[0], eqn.params["axes"])]
        if not self.shards.exact or keeps_bits(eqn, True):
            return self._bind(eqn, arrays)
        outs = self._bind(eqn, lax.optimization_barrier(arrays))
        return self._apart(outs)

    def _apart(self, arrays: list[Array]) -> list[Array]:
        """Keeps results from being worked on together with what follows."""
        # One by one: XLA dies of a TopK whose results share a barrier.
        exact = self.shards.exact
        return [lax.optimization_barrier(x) for x in arrays] if exact else arrays

    def _compute(
        self,
        regions: Sequence[Region],
        waiting: Sequence[Step],
        outs: Sequence[int],
        values: list[Shard | None],
    ) -> None:
        """Runs what needs whole arrays."""
        needed = [x for x in used_outside(regions, waiting, outs) if x[1]]
        if not needed:
            return
        tasks = [self._task(region, wanted, values) for region, wanted in needed]
        found = matrices.compute(tasks, self.shards)
        for (_, wanted), arrays in zip(needed, found, strict=True):
            for index, result in zip(wanted, arrays, strict=True):
                values[index] = result

    def _task(
        self, region: Region, wanted: Sequence[int], values: Sequence[Shard | None]
    ) -> Task:
        avals: dict[int, Any] = {}
        for eqn, ins, produced in region.steps:
            avals |= zip(produced, [var.aval for var in eqn.outvars], strict=True)
            needs_whole = not is_light(eqn, self.shards.exact)
            for i, atom in zip(ins, eqn.invars, strict=True):
                value = values[i]
                if value is not None and value.dim is not None:
                    needs_whole, avals[i] = True, atom.aval
                    self.gathered.append((eqn.primitive.name, avals[i].shape))
            self._tell(eqn, needs_whole)

        def fn(arrays: list[Array]) -> list[Array]:
            if self.shards.exact:
                arrays = lax.optimization_barrier(arrays)
            known = dict(zip(region.inputs, arrays, strict=True))
            for eqn, ins, produced in region.steps:
                found = self._on_whole(eqn, [known[i] for i in ins])
                known |= zip(produced, found, strict=True)
            return self._apart([known[i] for i in wanted])

        args: list[Shard] = [values[i] for i in region.inputs]  # pyright: ignore
        cuts = [
            (avals[i].shape, arg.dim)
            for i, arg in zip(region.inputs, args, strict=True)
            if arg.dim is not None
        ]
        return Task(
            fn=fn,
            args=args,
            results=[
                jax.ShapeDtypeStruct(avals[i].shape, avals[i].dtype) for i in wanted
            ],
            dims=[_dim_like(avals[i].shape, cuts) for i in wanted],
            cost=region.cost,
        )

    def _bind(self, eqn: core.JaxprEqn, arrays: list[Any]) -> list[Array]:
        if not self.shards.exact:
            return results(eqn, arrays)
        if eqn.primitive.name == "rsqrt":
            # Both of these are rounded correctly, and it is not.
            return [1 / unfused(jnp.sqrt(arrays[0]), self._zero)]
        if eqn.primitive.name == "div":
            arrays = [arrays[0], not_broadcast(arrays[1], arrays[0], self._zero)]
        outs = results(eqn, arrays)
        if eqn.primitive.name in PRODUCTS:
            outs = [unfused(x, self._zero) for x in outs]
        return outs

    def _whole(self, value: Shard) -> Array:
        if value.dim is None:
            return value.array
        return self.shards.gather(value.array, value.dim, value.size)

    def _align(self, value: Shard, dim: int) -> Array:
        """Returns the piece of `value` along `dim`, whatever it was cut along."""
        if value.dim == dim:
            return value.array
        array = self._opaque(value.array)
        return self.shards.cut(self._whole(Shard(array, value.dim, value.size)), dim)

    def _opaque(self, x: Array) -> Array:
        """Hides how a value was made, where several shards would move or mask it.

        On one shard nothing is between it and what follows, and a compiler that sees
        both makes one of them: it divides by a product, or rounds once.
        """
        return unfused(x, self._zero) if self.shards.exact else x

    def _elementwise(self, eqn: Any, args: list[Shard]) -> list[Shard] | None:
        shape, shapes = eqn.outvars[0].aval.shape, [x.aval.shape for x in eqn.invars]
        # A bitcast to another width has a new dim.
        if jnp.broadcast_shapes(*shapes) != shape:
            return None
        leads = (x for x in args if x.dim is not None and x.size == shape[x.dim])
        lead = next(leads, None)
        if lead is None or lead.dim is None:
            return None
        arrays = [
            # Scalars and dims of size 1 are broadcast, so they go with any piece.
            self._align(arg, lead.dim)
            if whole and whole[lead.dim] == shape[lead.dim]
            else self._whole(arg)
            for arg, whole in zip(args, shapes, strict=True)
        ]
        outs = self._bind(eqn, arrays)
        return [Shard(out, lead.dim, lead.size) for out in outs]

    def _sum(self, x: Array, dims: Sequence[int]) -> Array:
        """Sums a whole array, or the pieces of one along other dims."""
        exact, merges = self.shards.exact, not self.shards.grouped
        total = exact_sum(x, dims, merges=merges) if exact else jnp.sum(x, dims)
        return total.astype(x.dtype)

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
                        array = self._opaque(array)
                        array = shards.mask(array, x.dim, x.size, 0)  # pyright: ignore
                    batch.append((target, x, array, dims))
            if not batch:
                continue
            addends = [(array, dims) for _, _, array, dims in batch]
            if shards.exact:
                over = {"pmax": shards.pmax, "psum": shards.psum} if across else {}
                totals = exact_sums(addends, merges=not shards.grouped, **over)
            else:
                totals = [jnp.sum(a, axis=tuple(dims)) for a, dims in addends]
                totals = [shards.psum(t) for t in totals] if across else totals
            for (target, x, array, dims), total in zip(batch, totals, strict=True):
                total = total.astype(array.dtype)
                cut = not across and x.dim is not None
                where = (dim_after_reduction(x.dim, dims), x.size) if cut else ()  # pyright: ignore
                values[target] = Shard(total, *where)

    def _cond(self, eqn: core.JaxprEqn, args: list[Shard]) -> list[Shard]:
        """Translates the branches, then brings their results to one cut."""
        index, *operands = args
        branches = eqn.params["branches"]
        arrays = [operand.array for operand in operands]

        def outs_of(branch: core.ClosedJaxpr, arrays: list[Array]) -> list[Shard]:
            values = [
                dataclasses.replace(operand, array=array)
                for operand, array in zip(operands, arrays, strict=True)
            ]
            return self._eval(branch.jaxpr, branch.consts, values)

        cuts: list[list[tuple[int | None, int]]] = []

        def learn(branch: core.ClosedJaxpr, arrays: list[Array]) -> None:
            cuts.append([(out.dim, out.size) for out in outs_of(branch, arrays)])

        # A first pass learns how each branch cuts; nothing of it is in the program.
        told = len(self.gathered), len(self.whole)
        for branch in branches:
            jax.eval_shape(functools.partial(learn, branch), arrays)
        del self.gathered[told[0] :], self.whole[told[1] :]
        wanted = [
            next((cut for cut in column if cut[0] is not None), (None, 0))
            for column in zip(*cuts, strict=True)
        ]

        def run(branch: core.ClosedJaxpr, arrays: list[Array]) -> list[Array]:
            return [
                self._whole(out) if dim is None else self._align(out, dim)
                for out, (dim, _) in zip(outs_of(branch, arrays), wanted, strict=True)
            ]

        outs = lax.switch(
            self._whole(index),
            [lambda *arrays, b=b: run(b, list(arrays)) for b in branches],
            *arrays,
        )
        return [Shard(x, d, n) for x, (d, n) in zip(outs, wanted, strict=True)]


def _dim_like(
    shape: Sequence[int], cuts: Sequence[tuple[Sequence[int], int]]
) -> int | None:
    """Returns the dim of a result that corresponds to the cut dim of an argument."""
    for whole, dim in cuts:
        if tuple(whole) == tuple(shape):
            return dim
    for whole, dim in cuts:
        if whole[dim] in shape:
            return list(shape).index(whole[dim])
    return None
