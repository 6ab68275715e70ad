"""The gradient of the global batch, from the microbatches of every device.

Owns the loop over a device's microbatches and the sum over all of them. Invariant in
exact mode: loss, gradient and metrics are functions of the multiset of microbatch
results, so neither the number of devices nor the order of arrival enters. It must
run inside `shard_map` over a mesh with the batch axes; it updates nothing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from shardkit.collectives import psum, sum_to_pieces
from shardkit.exact_sum import (
    Accumulator,
    exact_sum,
    is_summable,
    next_exponent,
    peak_bits,
)
from shardkit.groups import each_of_group, pin
from shardkit.keys import step_key
from shardkit.labels import label
from shardkit.layout import state_shards
from shardkit.mesh import BATCH_AXES, exchange_axes, group_size
from shardkit.microbatch import Grid
from shardkit.model import LossOutput, call_loss
from shardkit.model_state import Combiner
from shardkit.noise import with_squares
from shardkit.rounding import opaque_zero, unfused

__all__ = ["MicrobatchLoop"]

LOSS_STREAM = "loss"

T = TypeVar("T")

Kept = tuple[Array, list[Array]]
"""What microbatches return beside gradients: rows of sums, and the model's states."""


@dataclasses.dataclass(frozen=True)
class MicrobatchLoop:
    """Runs a loss over the microbatches of this device, and sums over devices.

    In every method `slots` holds this device's microbatches, `[max_count, rows, ...]`
    per leaf, `root` is the run's root key and `step` the step, for the random keys.

    Attributes:
        loss: `(params, microbatch, key) → scalar or LossOutput`; with the model's state
            after the parameters if it has one.
        output: The tree structure of that `LossOutput`, without a state; for gradients.
        mesh: The mesh whose batch axes share the work.
        grid: How they share it.
        exact: Whether sums keep their bits on every mesh.
        combiner: How the model's states that microbatches leave become one.
        noise: Whether the squares of microbatch gradients are summed too.
        names: The paths of the parameters, to label their sums.
        specs: For each parameter how it, and its gradient, is cut within a group of
            devices; empty if a microbatch is one device's.
    """

    loss: Callable[..., Any]
    output: Any
    mesh: Mesh
    grid: Grid
    exact: bool = True
    combiner: Combiner = dataclasses.field(default_factory=Combiner)
    noise: bool = False
    names: tuple[str, ...] = ()
    specs: tuple[PartitionSpec, ...] = ()

    def evaluate(
        self, params: Any, model_state: Any, slots: Any, root: Array, step: Array
    ) -> LossOutput:
        """Sums loss, weight and metrics over the global batch."""
        start, count, own = self._bounds()

        def call(i: Array) -> LossOutput:
            key = step_key(root, LOSS_STREAM, step, start + i)
            return call_loss(self.loss, params, model_state, _at(slots, i), key)[0]

        def body(i: Array, rows: Array) -> Array:
            return self._if(i < own, _put(rows, call(i), start + i), rows)

        # What is measured may follow from which leaves a batch has.
        output = jax.tree.structure(jax.eval_shape(call, start))
        loop = dataclasses.replace(self, output=output)
        return loop._sum_rows(lax.fori_loop(0, count, body, loop._empty_rows()))

    def gradient(
        self,
        params: Any,
        model_state: Any,
        slots: Any,
        root: Array,
        step: Array,
        dims: Any,
        *,
        grad_exponent: Any = None,
        loss_scale: Array | None = None,
    ) -> tuple[LossOutput, Any, Any, Any, Array]:
        """Sums loss, weight, metrics and gradient over the global batch.

        Args:
            params: The whole parameters.
            model_state: The whole state of the model, or None.
            slots: This device's microbatches.
            root: The run's root key.
            step: The step.
            dims: The dim along which each gradient is wanted cut, -1 for whole.
            grad_exponent: The grid per parameter leaf; exact mode only.
            loss_scale: Multiplies the loss, divides the gradient.

        Returns:
            The sums; the next state of the model; Σ grad(loss_sum) / Σ weight in
            pieces; the grids for the next step; and how many passes over the
            microbatches it took: two if a gradient outgrew its grid.
        """
        start, _, own = self._bounds()
        scale = jnp.float32(1) if loss_scale is None else loss_scale
        before, state_tree = jax.tree.flatten(model_state)

        def value_and_grad(i: Array, kept: Kept) -> tuple[Kept, list[Array]]:
            key = step_key(root, LOSS_STREAM, step, start + i)

            def scaled(p: Any) -> tuple[Array, Any]:
                found = call_loss(self.loss, p, model_state, _at(slots, i), key)
                return found[0].loss_sum * scale, found

            grads, (out, left) = jax.grad(scaled, has_aux=True)(params)
            found = out, jax.tree.leaves(left), self._pin(jax.tree.leaves(grads))
            if self.exact:
                # Fused with what sums it, a gradient's bits could follow that sum's
                # shape.
                found = lax.optimization_barrier(found)
            out, left, grads = found
            if self.noise:
                out = with_squares(out, grads, scale)
            rows, states = kept
            states = self.combiner.put(states, before, left, start + i)
            found = (_put(rows, out, start + i), states), grads
            nothing = kept, [*map(jnp.zeros_like, grads)]
            return self._if(i < own, found, nothing)

        leaves, treedef = jax.tree.flatten(params)
        empty = self._empty_rows(), self.combiner.empty(before)
        if self.exact:
            exponents = jnp.stack(jax.tree.leaves(grad_exponent))
            (rows, states), sums, exponents, passes = self._exact_pass(
                value_and_grad, leaves, jax.tree.leaves(dims), exponents, empty
            )
            grad_exponent = treedef.unflatten(list(exponents))
        else:
            (rows, states), sums = self._fast_pass(
                value_and_grad, leaves, jax.tree.leaves(dims), empty
            )
            passes = jnp.int32(1)
        out = self._sum_rows(rows)
        # One after the other, as their product can leave the range of a float.
        factors = (
            [1 / out.weight] if loss_scale is None else [1 / scale, 1 / out.weight]
        )
        if self.exact:
            # Dividing by a broadcast is rewritten differently on one device.
            factors, sums = lax.optimization_barrier((factors, sums))
        zero = opaque_zero(step)
        for factor in factors:
            sums = [unfused(g * factor, zero) for g in sums]
        grads = [g.astype(p.dtype) for g, p in zip(sums, leaves, strict=True)]
        with label("state"):
            states = self.combiner.finish(states, before, self._add_whole, zero)
        after, grads = state_tree.unflatten(states), treedef.unflatten(grads)
        return out, after, grads, grad_exponent, passes

    def _exact_pass(
        self,
        value_and_grad: Callable[[Array, Kept], tuple[Kept, list[Array]]],
        leaves: list[Array],
        dims: list[int],
        exponents: Array,
        kept: Kept,
    ) -> tuple[Kept, list[Array], Array, Array]:
        """Sums on integer grids, again on wider ones if a gradient outgrew its own."""
        _, count, _ = self._bounds()
        accumulator = Accumulator(self.grid.num_microbatches)
        empty = (
            [accumulator.zeros(leaf.shape) for leaf in leaves],
            jnp.zeros(len(leaves), jnp.int32),
            kept,
        )

        def outgrown(carry: Any) -> Array:
            (_, peaks, _), exponents, passes = carry
            return (passes == 0) | next_exponent(exponents, peaks)[1].any()

        def one_pass(carry: Any) -> Any:
            (_, peaks, _), exponents, passes = carry
            wider, _ = next_exponent(exponents, peaks)
            exponents = jnp.where(passes == 0, exponents, wider)

            def body(i: Array, carry: Any) -> Any:
                limbs, peaks, kept = carry
                kept, grads = value_and_grad(i, kept)
                limbs = [
                    accumulator.add(sums, grad, exponents[n])
                    for n, (sums, grad) in enumerate(zip(limbs, grads, strict=True))
                ]
                peaks = jnp.maximum(peaks, jnp.stack([peak_bits(g) for g in grads]))
                limbs = [*zip(*map(self._pin, zip(*limbs, strict=True)), strict=True)]
                return limbs, peaks, kept

            limbs, peaks, kept = lax.fori_loop(0, count, body, empty)
            if axes := exchange_axes(self.mesh):
                with label("range"):
                    peaks = lax.pmax(peaks, axes)
            return (limbs, peaks, kept), exponents, passes + 1

        (limbs, peaks, kept), exponents, passes = lax.while_loop(
            outgrown, one_pass, (empty, exponents, jnp.int32(0))
        )
        num = len(leaves)
        limbs = [pair[0] for pair in limbs] + [pair[1] for pair in limbs]
        limbs = self._add_over_devices(limbs, dims * 2, self.names * 2, self.specs * 2)
        sums = [
            jnp.where(
                is_summable(peaks[n]),
                accumulator.total((limbs[n], limbs[n + num]), exponents[n]),
                jnp.nan,
            )
            for n in range(num)
        ]
        return kept, sums, next_exponent(exponents, peaks)[0], passes

    def _fast_pass(
        self,
        value_and_grad: Callable[[Array, Kept], tuple[Kept, list[Array]]],
        leaves: list[Array],
        dims: list[int],
        kept: Kept,
    ) -> tuple[Kept, list[Array]]:
        _, count, _ = self._bounds()

        def body(i: Array, carry: Any) -> Any:
            sums, kept = carry
            kept, grads = value_and_grad(i, kept)
            sums = [s + g for s, g in zip(sums, grads, strict=True)]
            return self._pin(sums), kept

        empty = [jnp.zeros(leaf.shape, jnp.float32) for leaf in leaves]
        sums, kept = lax.fori_loop(0, count, body, (empty, kept))
        return kept, self._add_over_devices(sums, dims, self.names, self.specs)

    @property
    def _is_grouped(self) -> bool:
        return group_size(self.mesh.shape) > 1

    def _bounds(self) -> tuple[Array, Array, Array]:
        """This device's first microbatch, passes of its loop, and those that count.

        Groups of devices all make as many passes, as what a compiler lets a group
        exchange may wait for all devices. It takes no longer than the busiest group.
        """
        index = lax.axis_index(BATCH_AXES)
        starts, counts = self.grid.starts, self.grid.counts
        own = jnp.asarray(counts)[index]
        passes = jnp.int32(counts.max()) if self._is_grouped else own
        # Where all compute as many the compiler would know how many, and a loop that it
        # unrolls is fused otherwise.
        return lax.optimization_barrier((jnp.asarray(starts)[index], passes, own))

    def _if(self, counts: Array, found: T, nothing: T) -> T:
        """Takes what a pass found if it counts; all do where groups are devices."""
        if not self._is_grouped:
            return found
        return jax.tree.map(lambda a, b: jnp.where(counts, a, b), found, nothing)

    def _pin(self, arrays: Sequence[Array]) -> list[Array]:
        """Keeps gradients, or sums of them, cut as the parameters are."""
        return pin(list(arrays), list(self.specs))

    def _add_over_devices(
        self,
        arrays: list[Array],
        dims: list[int],
        names: tuple[str, ...] = (),
        specs: tuple[PartitionSpec, ...] = (),
    ) -> list[Array]:
        shards, axes = state_shards(self.mesh), exchange_axes(self.mesh)

        def add(arrays: list[Array]) -> list[Array]:
            return sum_to_pieces(arrays, dims, shards, axes, names)

        return each_of_group(add, specs)(arrays)

    def _add_whole(self, arrays: list[Array]) -> list[Array]:
        return self._add_over_devices(arrays, [-1] * len(arrays))

    def _empty_rows(self) -> Array:
        shape = self.output.num_leaves, self.grid.num_microbatches
        return jnp.zeros(shape, jnp.float32)

    def _sum_rows(self, rows: Array) -> LossOutput:
        """Adds the results of all microbatches, each known to one device."""
        # As integers, since adding 0.0 would turn -0.0 into 0.0.
        bits = lax.bitcast_convert_type(rows, jnp.int32)
        with label("metrics"):
            bits = psum(bits, exchange_axes(self.mesh))
        rows = lax.bitcast_convert_type(bits, jnp.float32)
        sums = exact_sum(rows, [1]) if self.exact else jnp.sum(rows, axis=1)
        return self.output.unflatten(list(sums))


def _at(tree: Any, i: Array) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(rows: Array, out: LossOutput, i: Array) -> Array:
    column = jnp.stack(jax.tree.leaves(out))
    return lax.dynamic_update_index_in_dim(rows, column, i, axis=1)
