"""Which strands of a program to cut for tensor parallelism.

Owns the choice: which strands are worth a cut, why the others are not, and which of
those that would cut an array twice. Invariant: what is chosen is closed by sums over
devices alone; nothing that is cut is ever put together or dealt out again, but for the
place of a largest element, of which every device offers one.

References:
    Shoeybi et al., Megatron-LM (2019): columns, then rows, then one sum.
    Tan et al., Redco (2023): the same, in turn, along any chain of products.
"""

import collections
import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence

from shardkit.planner.strands import Dims, Meeting, Strands

__all__ = ["Strand", "choose", "find_strands"]

_SMALL_PART = 1 / 8
"""How small sums have to be, beside what is cut, to make up for no row."""
_MOST_EXACT = 40
"""Strands in the way of one another up to which every choice is looked at."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strand:
    """Dims that are cut together, some of them parameters'.

    Attributes:
        number: What tells it from others.
        dims: The dims of parameters in it, as `(leaf, dim)`.
        meetings: What makes it and what ends it.
        divisor: What the number of pieces has to divide.
        flops: The work that a cut divides, per microbatch.
        num_bytes: Of the parameters that it cuts.
        problem: Why it is better left whole; `""` if nothing is known against it.
    """

    number: int
    dims: tuple[tuple[int, int], ...]
    meetings: tuple[Meeting, ...]
    divisor: int
    flops: int
    num_bytes: int
    problem: str = ""

    def met(self, *kinds: str) -> list[Meeting]:
        """The meetings of some kinds."""
        return [meeting for meeting in self.meetings if meeting.kind in kinds]

    @property
    def num_sums(self) -> int:
        """How many all-reduces it takes, per microbatch."""
        return sum(x.times for x in self.met("row", "sum", "lookup"))


def find_strands(strands: Strands, params: Sequence[tuple[Dims, int]]) -> list[Strand]:
    """Lists the strands that parameters are in, with what is known against each.

    They are in the order in which the program comes to them.

    Args:
        strands: A program's.
        params: The dims and the bytes of every parameter.
    """
    dims: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
    for leaf, (places, _) in enumerate(params):
        for place, dim in enumerate(places):
            if dim is not None:
                dims[strands.root(dim)].append((leaf, place))
    meetings: dict[int, list[Meeting]] = collections.defaultdict(list)
    for meeting in strands.meetings:
        meetings[strands.root(meeting.dim)].append(meeting)
    flops: collections.Counter[int] = collections.Counter()
    for used, work in strands.products:
        for root in {*strands.roots(used)}:
            flops[root] += work
    found = [
        Strand(
            number=root,
            dims=tuple(dims[root]),
            meetings=tuple(meetings[root]),
            divisor=strands.divisor(root),
            flops=flops[root],
            num_bytes=sum(params[leaf][1] for leaf, _ in dims[root]),
        )
        for root in dict.fromkeys([*meetings, *dims])
        if root in dims
    ]
    problems = _problems(strands)
    return [
        dataclasses.replace(
            strand, problem=problems.get(strand.number) or _problem(strand)
        )
        for strand in found
    ]


def _problems(strands: Strands) -> dict[int, str]:
    """What operations have against a cut, by strand."""
    found: dict[int, str] = {}
    for dim, why in strands.whole:
        found.setdefault(strands.root(dim), why)
    for dims in strands.arrays:
        roots = strands.roots(dims)
        for root in {root for root in roots if roots.count(root) > 1}:
            found.setdefault(root, "an array has it twice")
    # It is what a stream is called first, whatever else is against its cut.
    return {**found, **dict.fromkeys(strands.streams(), "residual stream")}


def _problem(strand: Strand) -> str:
    """What speaks against a cut that could be made."""
    columns, rows = strand.met("column"), strand.met("row")
    sums, lookups = strand.met("sum", "argmax"), strand.met("lookup")
    num_columns, num_rows = (sum(x.times for x in found) for found in (columns, rows))
    if not columns and not lookups:
        return "no product makes it" if rows else "no product has it"
    if any(row.leaf is None for row in rows):
        return "a product of activations sums over it"
    if not columns and (rows or sums or _bytes(lookups) > strand.num_bytes):
        return "its look-ups would exchange more than it has"
    if num_rows > num_columns:
        return f"{num_rows} all-reduces for {num_columns} products that make it"
    if columns and not rows and _bytes(sums) > _SMALL_PART * _bytes(columns):
        return "no product closes it"
    return "" if strand.divisor > 1 else "nothing divides all of its sizes"


def _bytes(meetings: Iterable[Meeting]) -> int:
    return sum(x.num_bytes * x.times for x in meetings)


def choose(
    candidates: Sequence[Strand], arrays: Iterable[Collection[int]]
) -> list[Strand]:
    """Chooses strands that cut most of the work, of which no two share an array.

    Of choices that cut as much, the one with the fewest all-reduces is taken, and of
    those the one that begins first, which is columns and rows in turn.

    Args:
        candidates: Those that nothing is known against.
        arrays: The strands of every array.
    """
    by_number = {strand.number: strand for strand in candidates}
    rivals: dict[int, set[int]] = {number: set() for number in by_number}
    for roots in {frozenset(by_number.keys() & set(roots)) for roots in arrays}:
        for root in roots:
            rivals[root] |= roots - {root}
    worth = {
        number: (strand.flops, -strand.num_sums, -place)
        for place, (number, strand) in enumerate(by_number.items())
    }
    chosen: set[int] = set()
    for group in _components(rivals):
        pick = _best if len(group) <= _MOST_EXACT else _greedy
        chosen |= pick(group, rivals, worth)
    return [strand for strand in candidates if strand.number in chosen]


Worth = Mapping[int, tuple[int, ...]]
Rivals = Mapping[int, set[int]]


def _components(rivals: Rivals) -> list[frozenset[int]]:
    """Groups of strands of which those of one have no rival in another."""
    left, groups = dict.fromkeys(rivals), []
    while left:
        group, todo = set(), [next(iter(left))]
        while todo:
            number = todo.pop()
            if number in left:
                del left[number]
                group.add(number)
                todo += rivals[number]
        groups.append(frozenset(group))
    return groups


def _greedy(group: Iterable[int], rivals: Rivals, worth: Worth) -> set[int]:
    taken: set[int] = set()
    for number in sorted(group, key=lambda n: worth[n], reverse=True):
        if not rivals[number] & taken:
            taken.add(number)
    return taken


def _best(group: frozenset[int], rivals: Rivals, worth: Worth) -> set[int]:
    """The most that can be had together: with or without the one most in the way."""

    @functools.cache
    def best(group: frozenset[int]) -> frozenset[int]:
        inside = {n: rivals[n] & group for n in group}
        parts = _components(inside)
        if len(parts) > 1:
            return frozenset().union(*map(best, parts))
        if len(group) <= 1:
            return group
        # Halfway along a chain there are two short ones left.
        most = max(map(len, inside.values()))
        wide = sorted(n for n in group if len(inside[n]) == most)
        number = wide[len(wide) // 2]
        with_it = best(group - inside[number] - {number}) | {number}
        without = best(group - {number})
        return max(with_it, without, key=total)

    def total(chosen: frozenset[int]) -> tuple[int, ...]:
        return tuple(map(sum, zip((0, 0, 0), *(worth[n] for n in chosen), strict=True)))

    return set(best(group))
