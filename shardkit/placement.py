"""One run on one mesh: the programs, and where their arguments lie.

Owns everything that is derived from a recipe plus a mesh. Invariant: it holds no
state of the run, so it can be thrown away and derived again at any time. What the
programs do is the business of `device_work`.

Where the batch grows in the course of a run, a mesh has a placement for each number of
microbatches. States lie alike in all of them, and they share all programs but the step.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardkit.device_work import DeviceWork, evaluated
from shardkit.digest import leaf_digest
from shardkit.events import EventLog
from shardkit.keys import root_key
from shardkit.layout import LeafLayout
from shardkit.mesh import MESH_AXES, group_size
from shardkit.microbatch import Grid
from shardkit.model_state import Combiner
from shardkit.offload import check_memory, put_away, resting, take_back
from shardkit.program import Program, in_this_context
from shardkit.program_report import ProgramReport, report_program
from shardkit.put import put
from shardkit.recipe import Recipe
from shardkit.slots import Slots
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
        batch: The global batch of step 0, abstractly.
        outputs: What `Recipe.output_structure` returns for it.
        events: Where compilations are recorded.
        waiter: What waits for programs.
        speeds: Device id → how fast it is beside the others; 1.0 if not named. Groups
            of devices share evenly all the same.
        stages: Whether states are to be copied, for snapshots.

    Attributes:
        staging: How they are.
        grid: Who computes which microbatch of a step.
        programs: What does not depend on the grid of a step, by name.
        not_donated: Leaves whose memory a step does not reuse; known after the first.
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
        if recipe.offload:
            check_memory(mesh.local_devices)
        self.recipe, self.layout, self.mesh = recipe, layout, mesh
        output, _, combiner = outputs
        # Groups all make as many passes, so that fewer for one would help nobody.
        is_even = group_size(mesh.shape) > 1
        speed_of = () if is_even else [speeds.get(d.id, 1.0) for d in mesh.devices.flat]
        num_groups = mesh.size // group_size(mesh.shape)
        grid = Grid(recipe.num_eval_microbatches, num_groups, tuple(speed_of))
        self._make = functools.partial(
            Program,
            exact=recipe.exact,
            events=events,
            groups=dict(mesh.shape) if is_even else None,
        )
        self._batch, self._eval_slots = batch, Slots(mesh, grid)
        self._work = work = DeviceWork(recipe, layout, mesh, grid, output, combiner)
        self.programs = {
            "init": self._make(work.first_state(), name="init"),
            "evaluate": self._make(work.evaluation(), name="evaluate"),
        }
        self.staging = Staging(layout, mesh)
        if stages:
            copies = work.copies(self.staging.copy, self.staging.spec)
            self.programs["stage"] = self._make(copies, name="stage", exact=False)
        self.root = put(root_key(recipe.seed), NamedSharding(mesh, PartitionSpec()))
        self._stage: Any = None
        self._set_grid(recipe.ramp(0))
        self._by_count = {recipe.ramp(0): self}

    def at(self, step: int) -> "Placement":
        """Returns the placement on this mesh of a step, with as many microbatches."""
        return self.with_grid(self.recipe.ramp(step))

    def with_grid(self, num_microbatches: int) -> "Placement":
        """Returns the placement on this mesh for a number of microbatches."""
        if num_microbatches not in self._by_count:
            other = copy.copy(self)
            other._set_grid(num_microbatches)
            # Another thread may make it too, and then one of them is kept.
            self._by_count.setdefault(num_microbatches, other)
        return self._by_count[num_microbatches]

    def _set_grid(self, num_microbatches: int) -> None:
        work, num = self._work, num_microbatches
        grid = dataclasses.replace(work.grid, num_microbatches=num)
        combiner = dataclasses.replace(work.combiner, num_microbatches=num)
        work = dataclasses.replace(work, grid=grid, combiner=combiner)
        self.grid, self._slots = grid, Slots(self.mesh, grid)
        self._step = self._make(work.step(), name="step", donate_argnums=(0,))
        self.executable: Any = None
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

    @property
    def is_compiled_for_any_step(self) -> bool:
        """Whether it can with some number of microbatches; the rest is ready then."""
        return any(x.is_compiled for x in list(self._by_count.values()))

    def compile(self) -> None:
        """Compiles the step, hearing signals; it may take minutes."""
        if not self.is_compiled:
            self.compile_stage()
            self.executable = self._ready(self._step, *self._step_args())

    def stage(self, state: TrainState) -> list[Array]:
        """Copies a state, as `staging` says, and leaves it as it is."""
        self.compile_stage()
        return self._stage(self.on_devices(state))

    def on_devices(self, state: TrainState) -> TrainState:
        """Returns a state with all of it in the memory of devices."""
        if not self.recipe.offload:
            return state
        return take_back(state, self.layout, self.mesh)

    def compile_stage(self) -> None:
        """Compiles what `stage` needs, where states are to be copied."""
        if self._stage is None and "stage" in self.programs:
            self._stage = self._ready(self.programs["stage"], self._state())

    def meet(self) -> None:
        """Lets all devices exchange something, which sets their connections up."""
        ones = put(np.ones(self.mesh.size, np.int32), NamedSharding(self.mesh, _ALL))
        jax.block_until_ready(jax.jit(jnp.sum)(ones))

    def compile_digests(self) -> None:
        """Compiles what `digest` needs, which then waits for nothing."""
        for leaf in jax.tree.leaves(self.layout):
            self._ready(*self._digester(leaf))

    def count_compiles(self) -> Iterator[tuple[str, int]]:
        """Yields how often each program of this mesh was compiled, with any grid."""
        steps = [("step", other._step) for other in list(self._by_count.values())]
        for name, program in [*list(self.programs.items()), *steps]:
            yield name, program.counts["compile"]

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
        self.executable = self._step.compile(*self._step_args())
        return sum(x.generated_code_size_in_bytes for x in added if x is not None)

    def preparing_at(self, step: int) -> Callable[[], int]:
        """Returns what compiles here what a step of another phase needs.

        It may run in any thread, and returns the bytes of code that it added.
        """
        return in_this_context(functools.partial(self.at(step).prepare, digests=False))

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
        yield self._step, self._step_args()
        if "stage" in self.programs:
            yield self.programs["stage"], (self._state(),)
        if digests:
            for leaf in jax.tree.leaves(self.layout):
                program, abstract = self._digester(leaf)
                yield program, (abstract,)
        if eval_batch is not None:
            yield self.programs["evaluate"], self._eval_args(eval_batch)

    def _state(self) -> Any:
        return jax.tree.map(lambda leaf: leaf.physical(self.mesh), self.layout)

    def _step_args(self) -> tuple[Any, ...]:
        state = self._state()
        if self.recipe.offload:

            def rest(x: Any, leaf: LeafLayout) -> Any:
                return x.update(sharding=resting(leaf, self.mesh))

            away = jax.tree.map(rest, state.opt_state, self.layout.opt_state)
            state = dataclasses.replace(state, opt_state=away)
        slots = self._slots.abstract(self._batch, self.recipe.ramp(0))
        return state, slots, self.root

    def _eval_args(self, batch: Any) -> tuple[Any, ...]:
        layout = evaluated(self.layout)
        variables = jax.tree.map(lambda leaf: leaf.physical(self.mesh), layout)
        whole = NamedSharding(self.mesh, PartitionSpec())
        number = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
        slots = self._eval_slots.abstract(batch)
        return variables, slots, self.root, number, number

    def step(
        self, state: TrainState, batch: Any, hold: Callable[[], None] = lambda: None
    ) -> tuple[TrainState, dict[str, Array]]:
        """Computes one step; the state is consumed.

        The first call records in `not_donated` the leaves above `_TOLD_BYTES` whose
        memory could not be reused, which therefore exist twice while a step runs.

        Args:
            state: On this mesh.
            batch: The global batch, in host memory, with the microbatches of the grid.
            hold: Called last before the state is used up.
        """
        self.compile()
        slots = self._slots.place(batch)
        if self.recipe.offload:
            state = put_away(state, self.layout, self.mesh)
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
        slots = self._eval_slots.place(batch)
        return executable(evaluated(state), slots, self.root, *numbers)

    def digest(self, state: TrainState) -> dict[str, np.ndarray]:
        """Digests every leaf where it lies; path → four sums."""
        state = self.on_devices(state)
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
        key = f"digest {leaf.shape} {leaf.dim} {leaf.group}"
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
            if not leaf.is_padded(self._work.shards.count):
                return x
            return lax.slice_in_dim(x, 0, leaf.shape[leaf.dim], axis=leaf.dim)

        return jax.tree.map(unpad, self.on_devices(state), self.layout)
