"""One run on one mesh: the programs, and where their arguments lie.

Owns everything that is derived from a recipe plus a mesh. Invariant: it holds no
state of the run, so it can be thrown away and derived again at any time. One SPMD
path serves every device count: gather the parameters, run this device's
microbatches, sum, update this device's pieces.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from shardkit.collectives import gather_pieces
from shardkit.digest import leaf_digest
from shardkit.events import EventLog
from shardkit.gradient import MicrobatchLoop
from shardkit.keys import root_key, stream
from shardkit.layout import LeafLayout, state_shards
from shardkit.localize import Localizer
from shardkit.mesh import BATCH_AXES, MESH_AXES
from shardkit.microbatch import Grid
from shardkit.model_state import Combiner
from shardkit.program import Program, in_this_context
from shardkit.program_report import ProgramReport, report_program
from shardkit.put import put
from shardkit.recipe import Recipe, update_arguments
from shardkit.rounding import opaque_zero
from shardkit.staging import Staging
from shardkit.state import TrainState
from shardkit.waits import Waiter

__all__ = ["Placement"]

_ALL = PartitionSpec(MESH_AXES)
# Smaller leaves that exist twice are not worth telling.
_TOLD_BYTES = 1024


class Placement:
    """The programs of a run on one mesh.

    Args:
        recipe: What is computed.
        layout: A `TrainState` of `LeafLayout`.
        mesh: Where.
        batch: The global batch, abstractly.
        outputs: What `Recipe.output_structure` returns for it.
        events: Where compilations are recorded.
        waiter: What waits for programs.
        speeds: Device id → how fast it is beside the others; 1.0 if not named.
        stages: Whether states are to be copied, for snapshots.

    Attributes:
        staging: How they are.
    """

    def __init__(
        self,
        recipe: Recipe,
        layout: Any,
        mesh: Mesh,
        batch: Any,
        outputs: tuple[Any, Any, Combiner],
        events: EventLog,
        waiter: Waiter,
        *,
        speeds: Mapping[int, float],
        stages: bool = False,
    ) -> None:
        self._waiter = waiter
        self.recipe, self.layout, self.mesh = recipe, layout, mesh
        self.grid = Grid(
            recipe.num_microbatches,
            mesh.size,
            tuple(speeds.get(d.id, 1.0) for d in mesh.devices.flat),
        )
        self._shards = state_shards(mesh, exact=recipe.exact)
        self._dims = jax.tree.map(lambda leaf: leaf.dim, layout)
        self._abstract = jax.tree.map(lambda leaf: leaf.abstract, layout)
        self._slots = jax.tree.map(self._abstract_slots, batch)
        self._output, _, self._combiner = outputs
        make = functools.partial(Program, exact=recipe.exact, events=events)
        state_specs = jax.tree.map(lambda leaf: leaf.spec, layout)
        whole, slots = PartitionSpec(), PartitionSpec(BATCH_AXES)
        self.programs = {
            "init": make(self._spmd(self._init, whole, state_specs), name="init"),
            "step": make(
                self._spmd(
                    self._step, (state_specs, slots, whole), (state_specs, whole)
                ),
                name="step",
                donate_argnums=(0,),
            ),
            "evaluate": make(
                self._spmd(
                    self._evaluate,
                    (
                        (state_specs.params, state_specs.model_state),
                        *(slots, whole, whole, whole),
                    ),
                    whole,
                ),
                name="evaluate",
            ),
        }
        self.staging = Staging(layout, mesh)
        if stages:
            copy = self._spmd(self.staging.copy, (state_specs,), self.staging.spec)
            self.programs["stage"] = make(copy, name="stage", exact=False)
        self.root = put(root_key(recipe.seed), NamedSharding(mesh, whole))
        self.executable: Any = None
        self._stage: Any = None
        self.not_donated: list[str] = []
        self._has_run = False

    @property
    def num_devices(self) -> int:
        """How many devices the mesh has."""
        return self.mesh.size

    def init(self) -> TrainState:
        """Computes the state before step 0."""
        return self._call(self.programs["init"], self.root)

    @property
    def is_compiled(self) -> bool:
        """Whether `step` can run at once."""
        return self.executable is not None

    def compile(self) -> None:
        """Compiles the step, hearing signals; it may take minutes."""
        if not self.is_compiled:
            self.compile_stage()
            self.executable = self._ready(self.programs["step"], *self._step_args())

    def stage(self, state: TrainState) -> list[Array]:
        """Copies a state, as `staging` says, and leaves it as it is."""
        self.compile_stage()
        return self._stage(state)

    def compile_stage(self) -> None:
        """Compiles what `stage` needs, where states are to be copied."""
        if self._stage is None and "stage" in self.programs:
            self._stage = self._ready(self.programs["stage"], self._step_args()[0])

    def meet(self) -> None:
        """Lets all devices exchange something, which sets their connections up."""
        ones = put(np.ones(self.mesh.size, np.int32), NamedSharding(self.mesh, _ALL))
        jax.block_until_ready(jax.jit(jnp.sum)(ones))

    def compile_digests(self) -> None:
        """Compiles what `digest` needs, which then waits for nothing."""
        for leaf in jax.tree.leaves(self.layout):
            self._ready(*self._digester(leaf))

    def prepare(self, *, digests: bool, eval_batch: Any = None) -> int:
        """Compiles all that a change to this placement needs, in this thread.

        Args:
            digests: Whether it needs digests.
            eval_batch: What it may evaluate on, abstractly, or None.

        Returns:
            The bytes of code that this added, as far as they are known.
        """
        added = []
        for program, args in self._needed(digests, eval_batch):
            if program.find(*args) is None:
                added.append(program.compile(*args).memory_analysis())
        self.executable = self.programs["step"].compile(*self._step_args())
        return sum(x.generated_code_size_in_bytes for x in added if x is not None)

    def inspect(self, *, eval_batch: Any = None) -> dict[str, ProgramReport]:
        """Reports the step and, with a batch, the evaluation; compiles if need be."""
        return {
            program.name: report_program(
                program.name, self.num_devices, self._ready(program, *args)
            )
            for program, args in self._needed(False, eval_batch)
            if program.name != "stage"
        }

    def _needed(
        self, digests: bool, eval_batch: Any
    ) -> Iterator[tuple[Program, tuple[Any, ...]]]:
        """Yields programs with abstract arguments, the longest to compile first."""
        yield self.programs["step"], self._step_args()
        if "stage" in self.programs:
            yield self.programs["stage"], self._step_args()[:1]
        if digests:
            for leaf in jax.tree.leaves(self.layout):
                program, abstract = self._digester(leaf)
                yield program, (abstract,)
        if eval_batch is not None:
            yield self.programs["evaluate"], self._eval_args(eval_batch)

    def _step_args(self) -> tuple[Any, ...]:
        state = jax.tree.map(lambda leaf: leaf.physical(self.mesh), self.layout)
        return state, self._slots, self.root

    def _eval_args(self, batch: Any) -> tuple[Any, ...]:
        layout = evaluated(self.layout)
        variables = jax.tree.map(lambda leaf: leaf.physical(self.mesh), layout)
        whole = NamedSharding(self.mesh, PartitionSpec())
        number = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
        slots = jax.tree.map(self._abstract_slots, batch)
        return variables, slots, self.root, number, number

    def step(
        self, state: TrainState, batch: Any, hold: Callable[[], None] = lambda: None
    ) -> tuple[TrainState, dict[str, Array]]:
        """Computes one step; the state is consumed.

        The first call records in `not_donated` the leaves above `_TOLD_BYTES` whose
        memory could not be reused, which therefore exist twice while a step runs.

        Args:
            state: On this mesh.
            batch: The global batch, in host memory.
            hold: Called last before the state is used up.
        """
        self.compile()
        slots = self.place_batch(batch)
        hold()
        out = self.executable(state, slots, self.root)
        if not self._has_run:
            self._has_run = True
            leaves = zip(*map(jax.tree.leaves, (self.layout, state)), strict=True)
            kept = [(leaf.path, x) for leaf, x in leaves if not x.is_deleted()]
            self.not_donated = [path for path, x in kept if x.nbytes > _TOLD_BYTES]
        return out

    def evaluate(
        self, state: TrainState, batch: Any, step: int, index: int
    ) -> dict[str, Array]:
        """Computes loss, weight and metric sums of one batch, without a gradient.

        Args:
            state: On this mesh; the average of its parameters counts if there is one.
            batch: A global batch, in host memory.
            step: The step, and …
            index: … the number of the batch, for the keys of a loss that draws.
        """
        whole = NamedSharding(self.mesh, PartitionSpec())
        numbers = [put(np.int32(number), whole) for number in (step, index)]
        # As for digests: what a step returns need not be found as it is.
        args = self._eval_args(jax.tree.map(np.asarray, batch))
        executable = self._ready(self.programs["evaluate"], *args)
        slots = self.place_batch(batch)
        return executable(evaluated(state), slots, self.root, *numbers)

    def digest(self, state: TrainState) -> dict[str, np.ndarray]:
        """Digests every leaf where it lies; path → four sums."""
        leaves = zip(jax.tree.leaves(self.layout), jax.tree.leaves(state), strict=True)
        # Each is waited for: programs with collectives that do not depend on one
        # another can hold all threads of the CPU backend, each waiting for its rest.
        return {
            leaf.path: np.asarray(self._ready(*self._digester(leaf))(x))
            for leaf, x in leaves
        }

    def _ready(self, program: Program, *args: Any) -> Any:
        """Returns an executable, compiling so that a signal is heard."""
        found = program.find(*args)
        return found or self._waiter(in_this_context(lambda: program.compile(*args)))

    def _call(self, program: Program, *args: Any) -> Any:
        return self._ready(program, *args)(*args)

    def _digester(self, leaf: LeafLayout) -> tuple[Program, jax.ShapeDtypeStruct]:
        """Returns the program for leaves like this one, and what it is compiled for.

        A state has few shapes. What a step returns can name its sharding otherwise,
        where an axis has one device, and would not be found again.
        """
        key = f"digest {leaf.shape} {leaf.dim}"
        if key not in self.programs:
            whole = NamedSharding(self.mesh, PartitionSpec())

            def digest(x: Array) -> Array:
                return lax.with_sharding_constraint(leaf_digest(x, leaf), whole)

            # Another thread may prepare this placement, and then one of them is kept.
            self.programs.setdefault(key, Program(digest, name="digest", exact=False))
        return self.programs[key], leaf.physical(self.mesh)

    def logical(self, state: TrainState) -> TrainState:
        """Drops the padding; leaves without any are the very same arrays."""

        def unpad(x: Array, leaf: LeafLayout) -> Array:
            if not leaf.is_padded(self._shards.count):
                return x
            return lax.slice_in_dim(x, 0, leaf.shape[leaf.dim], axis=leaf.dim)

        return jax.tree.map(unpad, state, self.layout)

    def place_batch(self, batch: Any) -> Any:
        """Cuts a global batch into microbatches and gives each device its own."""
        sharding = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
        num = self.recipe.num_microbatches

        def place(x: Any) -> Array:
            x = np.asarray(x)
            return put(x.reshape(num, -1, *x.shape[1:])[self.grid.slots], sharding)

        return jax.tree.map(place, batch)

    def _abstract_slots(self, x: Any) -> jax.ShapeDtypeStruct:
        num = self.recipe.num_microbatches
        shape = (len(self.grid.slots), x.shape[0] // num, *x.shape[1:])
        sharding = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _spmd(self, fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
        return jax.shard_map(
            fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _loop(self, loss: Callable[..., Any]) -> MicrobatchLoop:
        return MicrobatchLoop(
            loss,
            self._output,
            self.mesh,
            self.grid,
            self.recipe.exact,
            self._combiner,
            self.recipe.noise_scale,
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
        wholes = gather_pieces([arrays[i] for i in cut], dims, sizes, self._shards)
        for i, whole in zip(cut, wholes, strict=True):
            arrays[i] = whole
        # What follows must see parameters, not slices of a gathered buffer.
        return lax.optimization_barrier(treedef.unflatten(arrays))

    def _init(self, root: PRNGKeyArray) -> TrainState:
        state = lax.optimization_barrier(self.recipe.first_state(root))
        return jax.tree.map(
            lambda x, leaf: x if leaf.dim < 0 else self._shards.cut(x, leaf.dim),
            state,
            self.layout,
        )

    def _step(
        self, state: TrainState, slots: Any, root: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, Array]]:
        loop = self._loop(self.recipe.loss)
        params, model_state = self._gather((state.params, state.model_state))
        out, model_state, grads, grad_exponent, passes = loop.gradient(
            params,
            model_state,
            slots,
            root,
            state.step,
            self._dims.params,
            grad_exponent=state.grad_exponent,
            loss_scale=state.loss_scale and state.loss_scale[0],
        )
        localizer = Localizer(self._shards, zero := opaque_zero(state.step))
        (state, metrics), (new_dims, _) = localizer(
            self.recipe.update,
            (state, grads, grad_exponent, model_state),
            update_arguments(self._dims, lambda _: -1),
            update_arguments(self._abstract, lambda x: x),
        )
        state = jax.tree.map(localizer.recut, state, new_dims, self.layout)
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
