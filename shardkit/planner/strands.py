"""Which dims of a program's arrays are cut together or not at all.

Owns strands, sets of dims that one operation after the other ties together, and what is
noted of them on the way: products that make or sum them, sums, look-ups, and what needs
them whole. Invariant: two dims are in one strand only where a cut of one is a cut of
the other, element by element, so that nothing has to be dealt out again. Which
operation ties what is said in `strand_rules`, and which strands to cut in
`tensor_choice`.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

__all__ = ["Dims", "Meeting", "Past", "Strands", "Value"]

Dims = tuple[int | None, ...]
"""For every dim of an array its number; None for one of size 1, which nobody cuts."""


class Past(NamedTuple):
    """What an array comes from, as bits.

    Attributes:
        met: All meetings before it.
        sources: What it was before the last product: inputs of the program that are no
            parameters, and results of products, of which it is made without another.
    """

    met: int = 0
    sources: int = 0

    def __or__(self, other: Any) -> "Past":
        return Past(self.met | other.met, self.sources | other.sources)


class Value(NamedTuple):
    """What is known of an array while a program is walked.

    Attributes:
        dims: Its dims.
        past: What it comes from.
        leaf: The parameter that it is, cast or seen otherwise; None for others.
    """

    dims: Dims
    past: Past = Past()
    leaf: int | None = None


@dataclasses.dataclass(frozen=True)
class Meeting:
    """An operation that makes a dim or ends it.

    Attributes:
        kind: `"column"` where a product with a parameter makes the dim, `"row"` where a
            product sums over it, `"sum"` where a reduction does, `"argmax"` where one
            finds a place in it, and `"lookup"` where rows of a table are.
        dim: The dim.
        leaf: The parameter in it, if there is one.
        num_bytes: Of the result of one pass.
        times: How often it is done.
        sources: Those of what is summed over.
    """

    kind: Literal["column", "row", "sum", "argmax", "lookup"]
    dim: int
    leaf: int | None
    num_bytes: int
    times: int
    sources: int = 0


class Strands:
    """Dims by their numbers, and what was noted of them."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._sizes: list[int] = []
        self.meetings: list[Meeting] = []
        self.arrays: set[Dims] = set()
        self.whole: list[tuple[int, str]] = []
        """Dims that an operation needs whole, and why."""
        self.products: list[tuple[Dims, int]] = []
        """The dims of every product, and its floating-point operations."""
        self.skips: list[tuple[int, int, int]] = []
        """Dims of two addends, the sources of one and the meetings of the other."""
        self._num_sources = 0

    def new(self, shape: Sequence[int]) -> Dims:
        """Makes dims that are tied to nothing yet."""
        found: list[int | None] = []
        for size in shape:
            found.append(None if size == 1 else len(self._parents))
            if size != 1:
                self._parents.append(len(self._parents))
                self._sizes.append(size)
        return tuple(found)

    def source(self) -> Past:
        """The past of something new."""
        self._num_sources += 1
        return Past(0, 1 << self._num_sources)

    def root(self, dim: int) -> int:
        """The number that all dims of a strand share."""
        while self._parents[dim] != dim:
            self._parents[dim] = self._parents[self._parents[dim]]
            dim = self._parents[dim]
        return dim

    def tie(self, one: int | None, other: int | None) -> None:
        """Makes one strand of two."""
        if one is None or other is None:
            return
        # The older number stays, so that strands are in the order of the program.
        first, second = sorted((self.root(one), self.root(other)))
        if first != second:
            self._parents[second] = first
            self._sizes[first] = math.gcd(self._sizes[first], self._sizes[second])

    def divisor(self, dim: int) -> int:
        """What the number of pieces has to divide."""
        return self._sizes[self.root(dim)]

    def keep_whole(self, dims: Iterable[int | None], why: str) -> None:
        """Notes that an operation needs these dims whole."""
        self.whole += [(dim, why) for dim in dims if dim is not None]

    def roots(self, dims: Dims) -> list[int]:
        """The strands of an array, dim by dim."""
        return [self.root(dim) for dim in dims if dim is not None]

    def meet(
        self,
        kind: Any,
        dim: int | None,
        leaf: int | None,
        num_bytes: int,
        times: int,
        sources: int = 0,
    ) -> Past:
        """Notes a meeting, as part of a past; a dim that nobody cuts has none."""
        if dim is None:
            return Past()
        self.meetings.append(Meeting(kind, dim, leaf, num_bytes, times, sources))
        return Past(1 << (len(self.meetings) - 1))

    def streams(self) -> set[int]:
        """Strands of which what a product sums over is also added to what follows.

        A residual stream is one: each layer reads it by products and adds to it what
        it has to say.
        """
        rows: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
        for place, meeting in enumerate(self.meetings):
            if meeting.kind == "row":
                rows[self.root(meeting.dim)].append((1 << place, meeting.sources))
        found: set[int] = set()
        for dim, sources, met in self.skips:
            root = self.root(dim)
            if root not in found and any(
                met & bit and sources & read for bit, read in rows[root]
            ):
                found.add(root)
        return found
