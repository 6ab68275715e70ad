"""What a remapping does to a tree, as a table.

Owns the account of every path on either side. Invariant: each source is in exactly one
of the rows, what was dropped, and what is left over. It maps nothing itself.
"""

import dataclasses
from collections.abc import Iterable

__all__ = ["Mapped", "MappingTable", "counted", "format_rows"]


@dataclasses.dataclass(frozen=True)
class Mapped:
    """How one target is made.

    Attributes:
        target: Its path.
        shape: Its shape.
        dtype: Its dtype's name.
        sources: The paths it is made of.
        ops: What is done to them, in words; empty if nothing is.
        rule: The number of the rule, from 1; None if it is passed unchanged.
    """

    target: str
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[str, ...]
    ops: str
    rule: int | None


@dataclasses.dataclass(frozen=True)
class MappingTable:
    """The dry run of a remapping.

    Attributes:
        rows: Every target.
        dropped: Sources that a rule drops.
        allowed: Paths on either side that may be without a counterpart.
        unmatched: Sources that no rule takes.
        missing: Targets that are wanted and that no rule makes.
        problems: `(path or rule, what is wrong)` of everything else.
    """

    rows: list[Mapped]
    dropped: list[str]
    allowed: list[str]
    unmatched: list[str]
    missing: list[str]
    problems: list[tuple[str, str]]

    @property
    def is_complete(self) -> bool:
        """Whether everything is accounted for, so that the remapping can be applied."""
        return not (self.unmatched or self.missing or self.problems)

    def wrong(self) -> list[tuple[str, str]]:
        """Lists `(path or rule, what is wrong)` of everything unaccounted for."""
        return [
            *((path, "is taken by no rule") for path in self.unmatched),
            *((path, "is wanted and made by no rule") for path in self.missing),
            *self.problems,
        ]

    def __str__(self) -> str:
        rows = [
            (
                row.target,
                f"{row.dtype}{list(row.shape)}",
                "<- " + (_shorten(row.sources) or "nothing"),
                row.ops,
            )
            for row in self.rows
        ]
        rows += [(path, "", "dropped", "") for path in self.dropped]
        rows += [(path, "", "allowed", "") for path in self.allowed]
        rows += [(path, "", "!", what) for path, what in self.wrong()]
        return format_rows(rows)


def counted(num: int, noun: str, one: str = "", more: str = "") -> str:
    """Writes a number and what it counts, with a verb for one and one for more.

    >>> counted(1, "leaf"), counted(2, "leaf"), counted(0, "entry"), counted(3, "path")
    ('1 leaf', '2 leaves', '0 entries', '3 paths')
    >>> counted(1, "block", "is", "are"), counted(2, "block", "is", "are")
    ('1 block is', '2 blocks are')
    """
    plural = {"leaf": "leaves", "entry": "entries"}.get(noun, f"{noun}s")
    words = (noun, one) if num == 1 else (plural, more)
    return " ".join(filter(None, (str(num), *words)))


def format_rows(rows: Iterable[tuple[str, ...]]) -> str:
    """Aligns rows of strings into indented columns.

    >>> print(format_rows([("a", "b"), ("ccc", "d")]))
      a    b
      ccc  d
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _shorten(sources: tuple[str, ...]) -> str:
    if len(sources) <= 3:
        return ", ".join(sources)
    return f"{sources[0]}, … {sources[-1]} ({len(sources)})"
