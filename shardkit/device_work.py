"""What the devices of a mesh do together: one SPMD program text for every count.

Owns the functions under `shard_map` of which a placement makes programs: gather the
parameters, run this device's microbatches, sum, update this device's pieces. Invariant:
they are functions of the run, the mesh and the grid, and compile nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PRNGKeyArray

from shardkit.collectives import gather_pieces
from shardkit.gradient import MicrobatchLoop
from shardkit.groups import each_of_group, pin
from shardkit.keys import stream
from shardkit.labels import label
from shardkit.layout import LeafLayout, state_shards
from shardkit.localize import Localizer
from shardkit.mesh import BATCH_AXES, group_size
from shardkit.microbatch import Grid
from shardkit.model_state import Combiner
from shardkit.offload import put_away, take_back
from shardkit.recipe import Recipe, update_arguments
from shardkit.rounding import opaque_zero
from shardkit.shards import Shards
from shardkit.state import TrainState

__all__ = ["DeviceWork", "evaluated"]


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceWork:
    """The work of a run on one mesh, with one grid.

    Attributes:
        recipe: What is computed.
        layout: A `TrainState` of `LeafLayout`.
        mesh: Where.
        grid: Who computes which microbatch.
        output: The structure of what the loss returns.
        combiner: How the model's states that microbatches leave become one.
    """

    recipe: Recipe
    layout: Any
    mesh: Mesh
    grid: Grid
    output: Any
    combiner: Combiner

    @functools.cached_property
    def shards(self) -> Shards:
        """How leaves are cut."""
        return state_shards(self.mesh, exact=self.recipe.exact)

    @functools.cached_property
    def specs(self) -> Any:
        """How `fsdp` cuts a state: a tree of `PartitionSpec`."""
        return jax.tree.map(lambda leaf: leaf.spec, self.layout)

    @functools.cached_property
    def _group_specs(self) -> Any:
        """How the axes of a group cut it, if there are groups."""
        if group_size(self.mesh.shape) == 1:
            return None
        sizes = self.mesh.shape
        return jax.tree.map(lambda x: x.spec_on(sizes, gathered=True), self.layout)

    def first_state(self) -> Callable[[PRNGKeyArray], TrainState]:
        """Makes the function that computes the state before step 0."""
        return self._spmd(self._first_state, PartitionSpec(), self.specs)

    def step(self) -> Callable[..., Any]:
        """Makes that of one step: `(state, slots, root) → (state, metrics)`."""
        whole, slots = PartitionSpec(), PartitionSpec(BATCH_AXES)
        specs = (self.specs, slots, whole), (self.specs, whole)
        run = self._spmd(self._step, *specs)
        if not self.recipe.offload:
            return run

        def step(state: TrainState, slots: Any, root: PRNGKeyArray) -> Any:
            state, metrics = run(take_back(state, *where), slots, root)
            return put_away(state, *where), metrics

        where = self.layout, self.mesh
        return step

    def evaluation(self) -> Callable[..., Any]:
        """Makes that of sums: `(variables, slots, root, step, index) → sums`."""
        whole, slots = PartitionSpec(), PartitionSpec(BATCH_AXES)
        variables = self.specs.params, self.specs.model_state
        in_specs = variables, slots, whole, whole, whole
        return self._spmd(self._evaluate, in_specs, whole)

    def copies(self, fn: Callable[[TrainState], Any], out_specs: Any) -> Any:
        """Makes a function of a global state of one of what each device has of it."""
        sizes = self.mesh.shape
        specs = jax.tree.map(lambda leaf: leaf.spec_on(sizes), self.layout)
        return self._spmd(fn, (specs,), out_specs, self.mesh.axis_names)

    def _spmd(
        self,
        fn: Callable[..., Any],
        in_specs: Any,
        out_specs: Any,
        axes: Sequence[str] = (),
    ) -> Any:
        """Makes a function of global arrays of one of a group's pieces.

        What a group does together is the compiler's: of the axes of the group it sees
        whole arrays, and partitions them. A group of one device leaves it nothing.
        """
        of_group = (
            BATCH_AXES if group_size(self.mesh.shape) > 1 else self.mesh.axis_names
        )
        return jax.shard_map(
            fn,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names={*(axes or of_group)},
            check_vma=False,
        )

    def _loop(self, loss: Callable[..., Any]) -> MicrobatchLoop:
        return MicrobatchLoop(
            loss,
            self.output,
            self.mesh,
            self.grid,
            self.recipe.exact,
            self.combiner,
            self.recipe.noise_scale,
            tuple(leaf.path for leaf in jax.tree.leaves(self.layout.params)),
            tuple(jax.tree.leaves(self._group_specs and self._group_specs.params)),
        )

    def _gather(self, variables: Any) -> Any:
        """Makes parameters, and the model's state, whole."""
        arrays, treedef = jax.tree.flatten(variables)
        leaves: list[LeafLayout] = jax.tree.leaves(
            (self.layout.params, self.layout.model_state)
        )
        cut = [i for i, leaf in enumerate(leaves) if leaf.dim >= 0]
        dims = [leaves[i].dim for i in cut]
        sizes = [leaves[i].shape[leaves[i].dim] for i in cut]
        names = [leaves[i].path for i in cut]
        specs: list[PartitionSpec] = []
        if self._group_specs is not None:
            found = self._group_specs.params, self._group_specs.model_state
            of_leaves = jax.tree.leaves(found)
            specs = [of_leaves[i] for i in cut]

        def gather(pieces: list[Array]) -> list[Array]:
            return gather_pieces(pieces, dims, sizes, self.shards, names)

        wholes = each_of_group(gather, specs)([arrays[i] for i in cut])
        for i, whole in zip(cut, wholes, strict=True):
            arrays[i] = whole
        # What follows must see parameters, not slices of a gathered buffer.
        return lax.optimization_barrier(treedef.unflatten(arrays))

    def _first_state(self, root: PRNGKeyArray) -> TrainState:
        state = lax.optimization_barrier(self.recipe.first_state(root))
        state = jax.tree.map(
            lambda x, leaf: x if leaf.dim < 0 else self.shards.cut(x, leaf.dim),
            state,
            self.layout,
        )
        return pin(state, self._group_specs)

    def _step(
        self, state: TrainState, slots: Any, root: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, Array]]:
        loop = self._loop(self.recipe.loss)
        dims = jax.tree.map(lambda leaf: leaf.dim, self.layout)
        abstract = jax.tree.map(lambda leaf: leaf.abstract, self.layout)
        params, model_state = self._gather((state.params, state.model_state))
        out, model_state, grads, grad_exponent, passes = loop.gradient(
            params,
            model_state,
            slots,
            root,
            state.step,
            dims.params,
            grad_exponent=state.grad_exponent,
            loss_scale=state.loss_scale and state.loss_scale[0],
        )
        localizer = Localizer(self.shards, zero := opaque_zero(state.step))
        with label("update"):
            (state, metrics), (new_dims, _) = localizer(
                self.recipe.update,
                (state, grads, grad_exponent, model_state),
                update_arguments(dims, lambda _: -1),
                update_arguments(abstract, lambda x: x),
            )
            state = jax.tree.map(localizer.recut, state, new_dims, self.layout)
            state = pin(state, self._group_specs)
        metrics |= self.recipe.metrics(out, metrics["grad_norm"], zero)
        return state, metrics | {"gradient_passes": passes}

    def _evaluate(
        self, variables: Any, slots: Any, root: PRNGKeyArray, step: Array, index: Array
    ) -> dict[str, Array]:
        root = jax.random.fold_in(stream(root, "evaluation"), index)
        loss = self.recipe.eval_loss or self.recipe.loss
        params, model_state = self._gather(variables)
        out = self._loop(loss).evaluate(params, model_state, slots, root, step)
        return {"loss": out.loss_sum, "weight": out.weight, **out.metrics}


def evaluated(state: Any) -> tuple[Any, Any]:
    """What of a state, or of a tree like one, a loss is evaluated with."""
    params = state.params if state.ema is None else state.ema
    return params, state.model_state
