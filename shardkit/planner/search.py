"""The mesh that trains fastest, and why the others do not.

Owns the choice: every candidate that could be best is predicted, those over the memory
limit are set aside, and the rest is ordered by the time of a step. Invariant: what is
pruned has a lower bound above the last runner-up that is told. It predicts nothing
itself and moves nothing.

References:
    Zheng et al., Alpa: Automating Inter- and Intra-Operator Parallelism (OSDI 2022).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from shardkit.errors import ConfigError
from shardkit.exact_sum import Accumulator
from shardkit.mesh import GROUP_AXES, MESH_AXES
from shardkit.planner.candidates import divisors, inner_sizes, outer_meshes
from shardkit.planner.choice import Choice, Plan, make_plan
from shardkit.planner.cost import Costs, predict
from shardkit.planner.meshes import Meshes, Topology
from shardkit.planner.model_facts import ModelFacts
from shardkit.planner.profile import HardwareProfile
from shardkit.planner.quotas import Quotas

__all__ = ["KEPT_PART", "Job", "search"]

_NUM_TOLD = 5
KEPT_PART = 0.9
"""What a step may take of the memory, for want of a better limit: the runtime has its
own, and predictions are not exact."""

_ROWS = 64

Extra = Callable[[ModelFacts, Meshes], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained.

    Attributes:
        facts: How activations are kept → the model read that way, such as
            `{"kept": …, "remat": …}`.
        read: The same with other rows in a microbatch, where that was read and need not
            be scaled: how activations are kept and rows → the model.
        global_batch_size: The rows of a step.
        num_microbatches: Into how many to cut it: those to choose from; empty for all
            divisors of the batch.
        exact: Whether gradients are summed as integers.
        may_offload: Whether the optimizer's state may be in host memory.
        offload: Whether it is, on any mesh.
        fixed: Mesh axis → a size that is given.

    Raises:
        ConfigError: If nothing could be chosen.
    """

    facts: Mapping[str, ModelFacts]
    global_batch_size: int
    num_microbatches: Sequence[int] = ()
    exact: bool = True
    may_offload: bool = False
    offload: bool = False
    read: Mapping[tuple[str, int], ModelFacts] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [n for n in self.num_microbatches if self.global_batch_size % n]
        if wrong or not self.facts or self.global_batch_size < 1:
            raise ConfigError(
                f"planner: expected a model, at least one row, and numbers of "
                f"microbatches that divide them; found {len(self.facts)} models, "
                f"global_batch_size = {self.global_batch_size}, num_microbatches = "
                f"{list(self.num_microbatches)}"
            )
        if self.exact:
            for num in self.num_microbatches:
                # Refuses what its grid has no room for.
                Accumulator(num)
        unknown = sorted(set(self.fixed) - set(MESH_AXES))
        if unknown:
            raise ConfigError(
                f"planner: the mesh axes are {', '.join(MESH_AXES)}; found {unknown}"
            )

    def _can_add(self, num: int) -> bool:
        if self.exact:
            try:
                Accumulator(num)
            except ConfigError:
                return False
        return True

    def chosen(self, choice: Choice) -> "Job":
        """Returns the job with all but the mesh as it was chosen."""
        return dataclasses.replace(
            self,
            facts={choice.remat: self.facts[choice.remat]},
            num_microbatches=[choice.num_microbatches],
            may_offload=False,
            offload=choice.offload,
        )

    @property
    def has_choices(self) -> bool:
        """Whether more than the mesh is chosen."""
        num = len(self.num_microbatches)
        return len(self.facts) > 1 or num != 1 or self.chooses_offload

    @property
    def chooses_offload(self) -> bool:
        """Whether the optimizer's state may be in host memory, and may not."""
        return self.may_offload and not self.offload

    def blocks(self) -> Iterator[tuple[str, int, ModelFacts]]:
        """Yields how activations are kept, how many microbatches, and the model."""
        options = self.num_microbatches or [
            num for num in divisors(self.global_batch_size) if self._can_add(num)
        ]
        for remat in self.facts:
            for num in options:
                yield remat, num, self.model(remat, num)

    def model(self, remat: str, num_microbatches: int) -> ModelFacts:
        """Returns the model with so many microbatches."""
        num_rows = self.global_batch_size // num_microbatches
        read = self.read.get((remat, num_rows))
        return self.facts[remat].with_rows(num_rows) if read is None else read

    def placed(self, meshes: Meshes) -> Meshes:
        """Returns meshes with the optimizer's state where it may be."""
        if self.offload:
            return meshes.offloaded()
        if self.may_offload:
            return Meshes.join([meshes, meshes.offloaded()])
        return meshes


def search(
    job: Job,
    topology: Topology,
    profile: HardwareProfile,
    *,
    memory_limit_bytes: float | None = None,
    num_runners_up: int = _NUM_TOLD,
    min_devices: int = 1,
    extra_s: Extra | None = None,
) -> Plan:
    """Finds the mesh on which a step takes least.

    Args:
        job: What is to be trained.
        topology: The devices there are; some may be left idle.
        profile: What they can do.
        memory_limit_bytes: What a step may take of a device; None for nine tenths.
        num_runners_up: How many of the next best meshes are told, with reasons.
        min_devices: How many have to be in use, such as one of each process.
        extra_s: A model and meshes → seconds to add to a step, such as part of a move.

    Raises:
        ConfigError: If no mesh fits, saying which comes closest.
    """
    limit = memory_limit_bytes or profile.memory_bytes * KEPT_PART
    found = _Search(job, topology, profile, limit, extra_s)
    best = found.run(num_runners_up + 1, min_devices)
    whole = None
    if best.fitting() and best.fitting()[0].num_devices < topology.num_devices:
        whole = next(iter(found.run(1, topology.num_devices).fitting()), None)
    return make_plan(best.fitting(), best.too_large(), whole, topology, limit, found)


class _Search:
    """One search, which may look twice.

    Attributes:
        quotas: How many devices compute a microbatch together → their rounds.
        num_predicted: How many meshes were predicted.
    """

    def __init__(
        self,
        job: Job,
        topology: Topology,
        profile: HardwareProfile,
        limit: float,
        extra_s: Extra | None,
    ) -> None:
        self._job, self._topology, self._profile = job, topology, profile
        self._limit, self._extra_s = limit, extra_s
        self.quotas: dict[int, Quotas] = {}
        self.num_predicted = 0
        blocks = [self._bounded(*block) for block in job.blocks()]
        blocks = [block for block in blocks if len(block.bounds)]
        self._blocks = sorted(blocks, key=lambda block: block.bounds[0])

    def run(self, num: int, min_devices: int) -> "_Best":
        """Finds the best few meshes of so many devices or more."""
        best = _Best(num, self._limit)
        for block in self._blocks:
            for start in range(0, len(block.bounds), _ROWS):
                some = slice(start, start + _ROWS)
                rows = [
                    row
                    for row, bound in zip(
                        block.rows[some], block.bounds[some], strict=True
                    )
                    if bound < best.worst_s
                ]
                meshes = self._expand(block, rows) if rows else None
                if meshes is not None and min_devices > 1:
                    meshes = meshes.take(meshes.num_devices >= min_devices)
                if meshes is None or not len(meshes):
                    continue
                self._offer(best, block, meshes)
        return best

    def _offer(self, best: "_Best", block: "_Block", meshes: Meshes) -> None:
        costs = predict(
            block.facts, meshes, self._profile, self._topology, exact=self._job.exact
        )
        none = np.zeros(len(meshes))
        extra = self._extra_s(block.facts, meshes) if self._extra_s else none
        best.offer(block, meshes, costs, extra)
        self.num_predicted += len(meshes)

    def _bounded(self, remat: str, num: int, facts: ModelFacts) -> "_Block":
        """Bounds a step from below, for all sizes of the axes within a microbatch."""
        num_devices = self._topology.num_devices
        rows = list(inner_sizes(facts.divisors, num_devices, self._job.fixed))
        if not rows:
            return _Block(remat, num, facts, [], np.zeros(0))
        rounds, most = [], []
        for row in rows:
            inner = math.prod(row.values())
            if inner not in self.quotas:
                self.quotas[inner] = Quotas(self._topology, inner)
            dealt = self.quotas[inner]
            rounds.append(dealt.rounds(num, np.array([dealt.num_groups]))[0])
            most.append(dealt.most(num, rounds[-1]))
        sizes = {axis: [row[axis] for row in rows] for axis in GROUP_AXES}
        # One group alone, as if it were on one host: nothing is faster.
        meshes = Meshes.of(sizes, num, np.array(rounds), most=np.array(most))
        near = Topology(num_devices, num_devices)
        costs = predict(facts, meshes, self._profile, near, exact=self._job.exact)
        parts = ["compute", "overhead", *(f"over {axis}" for axis in GROUP_AXES)]
        bounds = np.sum([costs.time_s[part] for part in parts], axis=0)
        order = np.argsort(bounds, kind="stable")
        return _Block(remat, num, facts, [rows[i] for i in order], bounds[order])

    def _expand(self, block: "_Block", rows: list[dict[str, int]]) -> Meshes:
        """Lists the meshes to compare, for some sizes of the inner axes."""
        cut = [
            size
            for leaf in block.facts.params
            for axis, size in zip(leaf.cuts, leaf.shape, strict=True)
            if axis == "fsdp"
        ]
        found = [
            outer_meshes(
                row,
                self.quotas[math.prod(row.values())],
                block.num_microbatches,
                max(cut, default=1),
                self._job.fixed,
            )
            for row in rows
        ]
        return self._job.placed(Meshes.join(found))


@dataclasses.dataclass(frozen=True)
class _Block:
    """Meshes that share the shape of a microbatch.

    Attributes:
        remat: How activations are kept.
        num_microbatches: How many there are.
        facts: The model.
        rows: Sizes of the axes within a microbatch, the fastest first.
        bounds: What a step takes with them at least.
    """

    remat: str
    num_microbatches: int
    facts: ModelFacts
    rows: list[dict[str, int]]
    bounds: np.ndarray


class _Best:
    """The best of each mesh so far, and the best of those that do not fit."""

    def __init__(self, num: int, limit: float) -> None:
        self._num, self._limit = num, limit
        self._fitting: dict[Any, tuple[tuple[float, ...], Choice]] = {}
        self._large: dict[Any, tuple[tuple[float, ...], Choice]] = {}

    @property
    def worst_s(self) -> float:
        """What the last that is told takes; infinite while there are too few."""
        if len(self._fitting) < self._num:
            return math.inf
        return max(key[0] for key, _ in self._fitting.values())

    def offer(
        self, block: _Block, meshes: Meshes, costs: Costs, extra_s: np.ndarray
    ) -> None:
        total, used = costs.step_s + extra_s, costs.memory_bytes
        order = np.lexsort((used, meshes.num_devices, total))
        fits = used[order] <= self._limit
        for table, chosen in (
            (self._fitting, order[fits]),
            (self._large, order[~fits]),
        ):
            for i in self._first_meshes(meshes, chosen):
                key = (total[i], meshes.num_devices[i], used[i])
                name = tuple(int(meshes.sizes[axis][i]) for axis in MESH_AXES)
                if name not in table or key < table[name][0]:
                    choice = Choice.at(i, block.remat, meshes, costs, extra_s)
                    table[name] = (key, choice)
            for name in sorted(table, key=lambda n: table[n][0])[self._num :]:
                del table[name]

    def _first_meshes(self, meshes: Meshes, order: np.ndarray) -> list[int]:
        """The first few that differ in their mesh."""
        found: dict[Any, int] = {}
        for i in order[: 8 * self._num].tolist():
            name = tuple(int(meshes.sizes[axis][i]) for axis in MESH_AXES)
            found.setdefault(name, i)
            if len(found) == self._num:
                break
        return list(found.values())

    def fitting(self) -> list[Choice]:
        """Those that fit, the fastest first."""
        return [choice for _, choice in sorted(self._fitting.values(), key=_key)]

    def too_large(self) -> list[Choice]:
        """Those that do not, the fastest first."""
        return [choice for _, choice in sorted(self._large.values(), key=_key)]


def _key(entry: tuple[tuple[float, ...], Choice]) -> tuple[float, ...]:
    return entry[0]
