"""A mesh that was predicted, and what can be said of it beside others.

Owns `Choice` and `Plan`: plain numbers, and the words for why one mesh was beaten by
another. It predicts nothing and chooses nothing.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from shardkit.errors import ConfigError
from shardkit.mesh import GROUP_AXES, MESH_AXES, MeshSpec
from shardkit.planner.meshes import Meshes, Topology
from shardkit.words import format_mesh, format_microbatches

__all__ = ["Choice", "Plan", "make_plan", "why_not"]

_NUM_TOO_LARGE = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One mesh with its prediction.

    Attributes:
        sizes: Mesh axis → size.
        num_microbatches: Into how many the global batch is cut.
        rounds: How long the last device computes, in microbatches of one at speed 1.
        most: How many microbatches a device computes at most.
        remat: How activations are kept.
        offload: Whether the optimizer's state is in host memory.
        memory: Kind → bytes on one device.
        time_s: Part → seconds of a step.
        sent_bytes: Axis → what a device sends in a step.
        extra_s: Seconds per step that are no part of it, such as of a move.
    """

    sizes: Mapping[str, int]
    num_microbatches: int
    rounds: float
    most: int
    remat: str
    offload: bool
    memory: Mapping[str, float]
    time_s: Mapping[str, float]
    sent_bytes: Mapping[str, float]
    extra_s: float = 0.0

    @classmethod
    def at(
        cls, i: int, remat: str, meshes: Meshes, costs: Any, extra_s: Any
    ) -> "Choice":
        """Takes one out of many."""

        def pick(table: Mapping[str, Any]) -> dict[str, float]:
            return {key: _item(x, i) for key, x in table.items()}

        return cls(
            sizes={axis: int(size[i]) for axis, size in meshes.sizes.items()},
            num_microbatches=int(meshes.num_microbatches[i]),
            rounds=float(meshes.rounds[i]),
            most=int(meshes.most[i]),
            remat=remat,
            offload=bool(meshes.offload[i]),
            memory=pick(costs.memory),
            time_s=pick(costs.time_s),
            sent_bytes=pick(costs.sent_bytes),
            extra_s=_item(extra_s, i),
        )

    @property
    def mesh(self) -> MeshSpec:
        """What a trainer is given."""
        return MeshSpec(**self.sizes)

    @property
    def num_devices(self) -> int:
        """How many devices it uses."""
        return math.prod(self.sizes.values())

    @property
    def memory_bytes(self) -> float:
        """The peak of one device."""
        return sum(self.memory.values())

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(self.time_s.values())

    @property
    def total_s(self) -> float:
        """What was minimised."""
        return self.step_s + self.extra_s

    @property
    def beside(self) -> tuple[int, str, bool]:
        """What was chosen beside the mesh."""
        return self.num_microbatches, self.remat, self.offload

    def is_same(self, other: "Choice") -> bool:
        """Whether all that can be chosen is the same."""
        return self.beside == other.beside and dict(self.sizes) == dict(other.sizes)

    def __str__(self) -> str:
        sizes = [f"{a}={n}" for a, n in self.sizes.items() if n > 1] or ["one device"]
        words = [
            " ".join(sizes),
            format_microbatches(self.num_microbatches),
            self.remat,
        ]
        return ", ".join(words + ["optimizer offloaded"] * self.offload)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a search found.

    Attributes:
        best: The mesh to use.
        runners_up: The next best meshes, each with what makes it slower.
        too_large: Those that would be faster but do not fit, each with what is missing.
        counts: How many microbatches each group of devices computes.
        num_idle: Devices that are not used.
        notes: What else is worth knowing.
        num_predicted: How many meshes were predicted.
    """

    best: Choice
    runners_up: tuple[tuple[Choice, str], ...]
    too_large: tuple[tuple[Choice, str], ...]
    counts: tuple[int, ...]
    num_idle: int
    notes: tuple[str, ...]
    num_predicted: int

    def __str__(self) -> str:
        best = self.best
        lines = [
            f"{best}: {_seconds(best.step_s)} a step, {_bytes(best.memory_bytes)}",
            *(f"  {note}" for note in self.notes),
            *(f"  {choice}: {why}" for choice, why in self.runners_up),
            *(f"  {choice}: {why}" for choice, why in self.too_large),
        ]
        return "\n".join(lines)


def make_plan(
    fitting: Sequence[Choice],
    large: Sequence[Choice],
    whole: Choice | None,
    topology: Topology,
    limit_bytes: float,
    found: Any,
) -> Plan:
    """Says of the best meshes what sets them apart.

    Args:
        fitting: Meshes that fit, the fastest first.
        large: Those that do not.
        whole: The fastest of those that fit and use all devices, where `fitting[0]`
            does not; None if there is none.
        topology: The devices.
        limit_bytes: What a step may take of one.
        found: The search: its `quotas` and `num_predicted`.

    Raises:
        ConfigError: If none fits.
    """
    if not fitting:
        raise ConfigError(_nothing_fits(large, topology, limit_bytes))
    best, *rest = fitting
    inner = math.prod(best.sizes[axis] for axis in GROUP_AXES)
    groups = best.num_devices // inner
    counts = found.quotas[inner].counts(best.num_microbatches, groups)
    faster = [choice for choice in large if choice.total_s < best.total_s]
    idle = topology.num_devices - best.num_devices
    notes = []
    if idle:
        why = "no mesh of all of them fits"
        if whole is not None:
            is_alike = whole.beside == best.beside
            other = format_mesh(whole.sizes) if is_alike else whole
            why = f"with all of them, {other}: {_why_slower(best, whole, topology)}"
        notes.append(f"{idle} of {topology.num_devices} devices stay idle; {why}")
    if len(set(counts)) > 1:
        notes.append(
            f"groups of devices compute {min(counts)} to {max(counts)} microbatches"
        )

    def with_reasons(choices: Sequence[Choice]) -> tuple[tuple[Choice, str], ...]:
        return tuple((x, why_not(best, x, topology, limit_bytes)) for x in choices)

    return Plan(
        best=best,
        runners_up=with_reasons(rest),
        too_large=with_reasons(faster[:_NUM_TOO_LARGE]),
        counts=counts,
        num_idle=idle,
        notes=tuple(notes),
        num_predicted=found.num_predicted,
    )


def why_not(best: Choice, other: Choice, topology: Topology, limit_bytes: float) -> str:
    """Says why another choice is not the best one: it has no room, or is slower."""
    if other.memory_bytes > limit_bytes:
        return _why_large(best, other, limit_bytes)
    return _why_slower(best, other, topology)


def _why_slower(best: Choice, other: Choice, topology: Topology) -> str:
    """The ratio, and the part that makes most of it."""
    parts = {
        part: other.time_s.get(part, 0.0) - best.time_s.get(part, 0.0)
        for part in {**best.time_s, **other.time_s}
    }
    parts["moving, spread over the steps that are left,"] = other.extra_s - best.extra_s
    part = max(parts, key=lambda name: parts[name])
    ratio = _ratio(best, other)
    if other.total_s < best.total_s:
        return f"{ratio}, but its sizes were not looked for"
    if parts[part] <= 0 or other.total_s <= best.total_s:
        return f"{ratio}: as fast, with more devices or memory"
    name = f"communication {part}" if part.startswith("over ") else part
    axis = part.removeprefix("over ")
    if axis in MESH_AXES and not _is_on_one_host(other, axis, topology):
        name += " between hosts"
    return f"{ratio}: {name} takes {_seconds(parts[part])} more"


def _ratio(best: Choice, other: Choice) -> str:
    ratio = other.total_s / best.total_s
    digits = 2 if abs(ratio - 1) >= 0.005 else 4
    return f"time ×{ratio:.{digits}f}"


def _is_on_one_host(choice: Choice, axis: str, topology: Topology) -> bool:
    meshes = Meshes.of(choice.sizes, choice.num_microbatches)
    return bool(meshes.on_one_host(axis, topology)[0] >= choice.sizes[axis])


def _why_large(best: Choice, other: Choice, limit_bytes: float) -> str:
    kind = max(other.memory, key=lambda name: other.memory[name])
    over = other.memory_bytes - limit_bytes
    return (
        f"{_ratio(best, other)}, but memory over by "
        f"{_bytes(over)}: {_bytes(other.memory[kind])} of {kind}"
    )


def _nothing_fits(
    large: Sequence[Choice], topology: Topology, limit_bytes: float
) -> str:
    closest = min(large, key=lambda choice: choice.memory_bytes, default=None)
    text = f"planner: no mesh of {topology.num_devices} devices fits in "
    text += f"{_bytes(limit_bytes)} a device"
    if closest is None:
        return f"{text}: the sizes asked for leave none. Fix fewer axes."
    return (
        f"{text}; {closest} comes closest of the fastest with "
        f"{_bytes(closest.memory_bytes)}. Allow remat or offload, smaller microbatches "
        "or more devices."
    )


def _item(value: Any, i: int) -> float:
    return float(value[i]) if getattr(value, "ndim", 0) else float(value)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _bytes(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"
