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

__all__ = ["Dims", "Meeting", "Strands", "Value"]

Dims = tuple[int | None, ...]
"""For every dim of an array its number; None for one of size 1, which nobody cuts."""


class Value(NamedTuple):
    """What is known of an array while a program is walked.

    Attributes:
        dims: Its dims.
        seen: Bits of the meetings that it comes from.
        leaf: The parameter that it is, cast or seen otherwise; None for others.
    """

    dims: Dims
    seen: int = 0
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
    """

    kind: Literal["column", "row", "sum", "argmax", "lookup"]
    dim: int
    leaf: int | None
    num_bytes: int
    times: int


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
        self.skips: list[tuple[int, int]] = []
        """Dims of two addends, and the meetings that only one of them comes from."""

    def new(self, shape: Sequence[int]) -> Dims:
        """Makes dims that are tied to nothing yet."""
        found: list[int | None] = []
        for size in shape:
            found.append(None if size == 1 else len(self._parents))
            if size != 1:
                self._parents.append(len(self._parents))
                self._sizes.append(size)
        return tuple(found)

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
        self, kind: Any, dim: int | None, leaf: int | None, num_bytes: int, times: int
    ) -> int:
        """Notes a meeting and returns its bit; 0 for a dim that nobody cuts."""
        if dim is None:
            return 0
        self.meetings.append(Meeting(kind, dim, leaf, num_bytes, times))
        return 1 << (len(self.meetings) - 1)

    def streams(self) -> set[int]:
        """Strands of which what sums over them is added to what goes past.

        A residual stream is one: each layer reads it by products and adds what it has
        to say, so that the addends come from different meetings of the same strand.
        """
        bits: dict[int, int] = collections.defaultdict(int)
        for place, meeting in enumerate(self.meetings):
            if meeting.kind == "row":
                bits[self.root(meeting.dim)] |= 1 << place
        return {
            self.root(dim) for dim, seen in self.skips if seen & bits[self.root(dim)]
        }
