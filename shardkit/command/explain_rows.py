"""What is said of a step besides its collectives, in rows.

Owns the sums over leaves. How rows are written is the business of others.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from shardkit.command.explain_job import Job
from shardkit.explain.arguments import Argument
from shardkit.explain.leaves import Idle, PlacedLeaf
from shardkit.report.terminal import format_bytes, format_mesh

__all__ = [
    "ArgumentRow",
    "HeldRow",
    "PaddedRow",
    "argument_rows",
    "facts",
    "held_rows",
    "padded_rows",
    "spell_counts",
]

_PARTS = {
    "params": "parameters",
    "opt_state": "optimizer's state",
    "ema": "average of parameters",
    "model_state": "model's state",
    "grad_exponent": "ranges of gradients",
    "loss_scale": "scale of the loss",
    "batch": "microbatches of a step",
}


@dataclasses.dataclass(frozen=True)
class HeldRow:
    """Leaves that devices hold several times for one reason.

    Attributes:
        reason: Why.
        num_copies: How many devices hold the same.
        leaves: They, the largest first.
    """

    reason: str
    num_copies: int
    leaves: tuple[PlacedLeaf, ...]

    @property
    def num_bytes(self) -> int:
        """Of them on one device."""
        return sum(x.layout.piece_bytes for x in self.leaves)

    @property
    def extra_bytes(self) -> int:
        """What of that a device would not hold if each held another part."""
        return sum(x.extra_bytes for x in self.leaves)


@dataclasses.dataclass(frozen=True)
class ArgumentRow:
    """Arguments of one part of the state: how many, how large, and the largest."""

    name: str
    count: int
    num_bytes: int
    largest: Argument


def held_rows(leaves: Iterable[PlacedLeaf]) -> list[HeldRow]:
    """Joins leaves that are held several times for the same reason."""
    found: dict[tuple[str, int], list[PlacedLeaf]] = {}
    for leaf in leaves:
        if leaf.reason:
            found.setdefault((leaf.reason, leaf.num_copies), []).append(leaf)
    rows = [
        HeldRow(*key, tuple(sorted(each, key=lambda x: -x.layout.piece_bytes)))
        for key, each in found.items()
    ]
    return sorted(rows, key=lambda row: -row.extra_bytes)


@dataclasses.dataclass(frozen=True)
class PaddedRow:
    """Leaves of one shape that are padded alike.

    Attributes:
        leaves: They.
    """

    leaves: tuple[PlacedLeaf, ...]

    @property
    def shapes(self) -> tuple[str, str]:
        """The shape of each, and that with its padding."""
        layout = self.leaves[0].layout
        pairs = zip(layout.piece_shape, layout.counts, strict=True)
        physical = [piece * count for piece, count in pairs]
        return "×".join(map(str, layout.shape)), "×".join(map(str, physical))

    @property
    def lost_bytes(self) -> int:
        """Padding of them on all devices."""
        return sum(x.padding_bytes * x.num_copies for x in self.leaves)

    @property
    def part(self) -> float:
        """Which part of the memory of each is padding."""
        return self.leaves[0].padded_part


def padded_rows(leaves: Iterable[PlacedLeaf]) -> list[PaddedRow]:
    """Joins leaves with padding that lie alike, those that lose most first."""
    found: dict[object, list[PlacedLeaf]] = {}
    for leaf in leaves:
        if leaf.padding_bytes:
            key = leaf.layout.shape, leaf.layout.itemsize, leaf.layout.cuts
            found.setdefault(key, []).append(leaf)
    rows = [PaddedRow(tuple(each)) for each in found.values()]
    return sorted(rows, key=lambda row: -row.lost_bytes)


def argument_rows(arguments: Sequence[Argument]) -> list[ArgumentRow]:
    """Sums arguments up by the part of the state that they are in."""
    found: dict[str, list[Argument]] = {}
    for each in arguments:
        part = each.name.partition("/")[0]
        found.setdefault(_PARTS.get(part, part), []).append(each)
    rows = [
        ArgumentRow(
            name, len(each), sum(x.num_bytes for x in each), max(each, key=_num_bytes)
        )
        for name, each in found.items()
    ]
    return sorted(rows, key=lambda row: -row.num_bytes)


def _num_bytes(argument: Argument) -> int:
    return argument.num_bytes


def facts(job: Job) -> dict[str, str]:
    """Says the most of it in a few lines."""
    memory, leaves = job.program.memory, job.leaves
    num_used = 1
    for size in job.mesh.values():
        num_used *= size
    unused = job.num_devices - num_used
    idle = f"; {unused} of {job.num_devices} devices are left over" if unused else ""
    moved = [x for x in job.program.exchanged if x.moves]
    num = sum(x.exchange.count for x in moved)
    lost = sum(x.padding_bytes * x.num_copies for x in leaves)
    held = sum(x.layout.piece_bytes for x in leaves) * num_used
    extra = sum(x.extra_bytes for x in leaves)
    found = {
        "mesh": f"{format_mesh(job.mesh)} on {job.platform}{idle}",
        "exchanged": f"{format_bytes(sum(x.num_bytes for x in moved))} in the buffers "
        f"of {num} collectives on each device",
        "resharding": f"{len(job.program.reshardings) or 'none'} that nobody asked for",
        "held again": f"{format_bytes(extra)} a device of what others hold too",
        "padding": f"{format_bytes(lost)} on all devices, "
        f"{lost / held if held else 0:.1%} of the state"
        if lost
        else "none",
        "microbatches": _spell_idle(job.idle),
    }
    total = (memory.argument_bytes, memory.temp_bytes, memory.output_bytes)
    if None not in total:
        all_bytes = sum(x or 0 for x in total) - (memory.reused_bytes or 0)
        found["memory"] = f"{format_bytes(all_bytes)} of a device, by XLA's account"
    return found


def _spell_idle(idle: Idle) -> str:
    words = f"{idle.num_microbatches}, {spell_counts(idle.counts)}"
    if not idle.num_waiting:
        return f"{words}: nobody waits"
    return f"{words}: {idle.idle_part:.1%} of the time is waiting"


def spell_counts(counts: Sequence[int]) -> str:
    """Says how many microbatches each group computes.

    >>> spell_counts([3, 3, 2]), spell_counts([2, 2])
    ('2 to 3 on a device', '2 on a device')
    """
    low, high = min(counts), max(counts)
    return f"{low if low == high else f'{low} to {high}'} on a device"
