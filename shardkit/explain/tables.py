"""An explanation in rows.

Owns what the rows of a program are, and their words. How they are written — on a
terminal, a page, as text — is the business of others.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from shardkit.explain.advice import Resharding
from shardkit.explain.exchanges import CAUSES, Exchanged, Part
from shardkit.explain.memory import Memory, Temporary
from shardkit.report.terminal import format_bytes
from shardkit.tree import format_table

__all__ = [
    "ExchangeRow",
    "ReshardingRow",
    "TemporaryRow",
    "exchange_rows",
    "memory_facts",
    "plain_text",
    "resharding_rows",
    "spell_names",
    "temporary_rows",
]

_COMPARED = {"reduce_max", "reduce_min", "argmax", "argmin"}


@dataclasses.dataclass(kw_only=True)
class ExchangeRow:
    """Collectives that differ in nothing but their number.

    Attributes:
        kind: XLA's name of them.
        axis: The mesh axes that they go over, in words.
        count: How many a device takes part in.
        num_bytes: Of their buffers on a device, together.
        note: As that of a `Collective`.
        cause: A key of `CAUSES`.
        operation: What of the program they belong to.
        source: The line to look at.
        names: The leaves or arguments.
        moves: Whether anything leaves a device.
    """

    kind: str
    axis: str
    count: int
    num_bytes: int
    note: str
    cause: str
    operation: str
    source: str
    names: tuple[str, ...]
    moves: bool

    @property
    def words(self) -> str:
        """What they are for."""
        words = CAUSES[self.cause]
        if self.cause == "partial" and self.operation in _COMPARED:
            words = "partial results compared"
        if self.cause in ("program", "partial", "exact", "lookup", "resharding"):
            words += f" ({self.operation})" if self.operation else ""
        notes = [self.note] if self.note else []
        notes += [] if self.moves else ["groups of one: nothing is sent"]
        return "; ".join([words, *notes])


@dataclasses.dataclass(kw_only=True)
class ReshardingRow:
    """Reshardings of which the same is said: how many, and one of them."""

    count: int
    like: Resharding

    @property
    def size(self) -> str:
        """How many collectives of which kind and size, in words."""
        exchanged = self.like.exchanged
        times = f"{self.count} × " if self.count > 1 else ""
        return f"{times}{exchanged.kind} of {format_bytes(exchanged.num_bytes)}"


@dataclasses.dataclass(kw_only=True)
class TemporaryRow:
    """Temporaries alike: how many, and one of them."""

    count: int
    like: Temporary

    @property
    def num_bytes(self) -> int:
        """All of them."""
        return self.count * self.like.num_bytes


def exchange_rows(exchanged: Iterable[Exchanged]) -> list[ExchangeRow]:
    """Joins collectives alike, and lists the largest first."""
    rows: dict[tuple[object, ...], ExchangeRow] = {}
    for each in exchanged:
        for part in each.parts:
            row = _row(each, part)
            table = dataclasses.asdict(row)
            key = tuple(v for k, v in table.items() if k not in ("count", "num_bytes"))
            if key in rows:
                rows[key].count += row.count
                rows[key].num_bytes += row.num_bytes
            else:
                rows[key] = row
    return sorted(rows.values(), key=lambda row: -row.num_bytes)


def _row(exchanged: Exchanged, part: Part) -> ExchangeRow:
    count = exchanged.exchange.count
    # Of several arrays in one collective, the first stands for it.
    is_first = part is exchanged.parts[0]
    return ExchangeRow(
        kind=exchanged.kind if is_first else f"{exchanged.kind} +",
        axis=str(exchanged.span) or "none",
        count=count if is_first else 0,
        num_bytes=count * part.num_bytes,
        note=exchanged.exchange.note,
        cause=part.cause,
        operation=part.operation,
        source=part.source,
        names=part.names,
        moves=exchanged.moves,
    )


def resharding_rows(reshardings: Iterable[Resharding]) -> list[ReshardingRow]:
    """Joins reshardings of which the same is said, in the order of the first of each.

    Layers alike, and a loss and its gradient, each have theirs.
    """
    rows: dict[tuple[object, ...], ReshardingRow] = {}
    for each in reshardings:
        exchanged = each.exchanged
        key = exchanged.kind, exchanged.num_bytes, each.what, each.remedy
        if key in rows:
            rows[key].count += 1
        else:
            rows[key] = ReshardingRow(count=1, like=each)
    return list(rows.values())


def temporary_rows(memory: Memory) -> list[TemporaryRow]:
    """Joins temporaries that one line makes alike, and lists the largest first."""
    rows: dict[tuple[object, ...], TemporaryRow] = {}
    for each in memory.temporaries:
        key = each.shape, each.operation, each.source, each.num_bytes
        if key in rows:
            rows[key].count += 1
        else:
            rows[key] = TemporaryRow(count=1, like=each)
    return sorted(rows.values(), key=lambda row: -row.num_bytes)


def memory_facts(memory: Memory) -> list[tuple[str, int]]:
    """Names what XLA told, leaving out what it did not."""
    told = [
        ("arguments", memory.argument_bytes),
        ("results", memory.output_bytes),
        ("of these in place of arguments", memory.reused_bytes),
        ("temporaries", memory.temp_bytes),
    ]
    return [(name, number) for name, number in told if number is not None]


def spell_names(names: Sequence[str], most: int = 2) -> str:
    """Lists names, or as many as there is room for.

    >>> spell_names(["a", "b", "c", "d"])
    'a, b and 2 more'
    """
    more = len(names) - most
    if more <= 1:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {more} more"


def plain_text(
    exchanged: Iterable[Exchanged], reshardings: Iterable[Resharding], memory: Memory
) -> str:
    """Writes collectives, reshardings and memory as text."""
    rows = [
        (
            row.kind,
            row.axis,
            f"{row.count} ×" if row.count else "",
            format_bytes(row.num_bytes),
            row.words,
            row.source,
            spell_names(row.names),
        )
        for row in exchange_rows(exchanged)
    ]
    lines = [format_table(rows)] if rows else ["no collectives"]
    for row in resharding_rows(reshardings):
        times = f" {row.count} ×" if row.count > 1 else ""
        lines += [f"resharding{times}: {row.like.what}", f"  {row.like.remedy}"]
    lines += [f"{name}: {format_bytes(n)}" for name, n in memory_facts(memory)]
    return "\n".join(lines)
