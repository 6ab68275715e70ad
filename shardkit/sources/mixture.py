"""Several sources mixed by weight.

Owns which source an example of the mixture comes from, and which of that source's
examples it is.

Invariant: both follow from the index of the example alone, exactly for rational
weights, without its predecessors and without a table. After any number of examples
the count of each source is less than half of ⌈log₂ sources⌉, or a half, from its share.
It reads no source.

References:
    Bresenham, Algorithm for Computer Control of a Digital Plotter (IBM Syst. J. 1965):
    the most even schedule of two.
"""

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, SupportsIndex

from shardkit.errors import DataError

__all__ = ["Mixture"]


@dataclass(frozen=True, slots=True)
class _Fork:
    """Two groups of sources, and the share of the right one of both."""

    left: "_Fork | int"
    right: "_Fork | int"
    share: Fraction

    def count_right(self, num_examples: int) -> int:
        """Returns how many of the first examples go right: the nearest integer."""
        top, bottom = self.share.numerator, self.share.denominator
        return (2 * num_examples * top + bottom - 1) // (2 * bottom)


class Mixture:
    """Several sources in one, each as often as its weight says.

    Give it to `sk.Examples` in place of a source. Every source has epochs of its own:
    none of its examples is skipped or comes twice within one, and a small source begins
    its next epoch when it is through. A source may be a mixture again.

    Attributes:
        sources: What is mixed.
        weights: Their shares as fractions that add up to 1. A float counts as the
            decimal number that it is written as, so 0.1 is one tenth.

    Args:
        sources: Pairs of a source and its weight, above 0; the sum need not be 1.

    Raises:
        DataError: If there is none, or a weight is not a number above 0.

    Example:
        >>> mixture = Mixture([(["a", "b"], 3), (["X", "Y", "Z"], 1)])
        >>> [mixture.locate(index) for index in range(5)]
        [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3)]
    """

    def __init__(self, sources: Sequence[tuple[Any, float | Fraction]]):
        pairs = list(sources)
        problems = [] if pairs else ["found no sources"]
        weights = []
        for number, pair in enumerate(pairs):
            if not (isinstance(pair, tuple | list) and len(pair) == 2):
                problems.append(f"source {number}: expected (source, weight)")
            elif (weight := _as_fraction(pair[1])) is None:
                problems.append(
                    f"source {number}: expected a weight above 0, found {pair[1]!r}"
                )
            else:
                weights.append(weight)
        if problems:
            raise DataError(
                "Mixture: "
                + "; ".join(problems)
                + ". Write sk.Mixture([(source, weight), …])."
            )
        self.sources = tuple(source for source, _ in pairs)
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self._tree = self._fork(0, len(weights))

    def _fork(self, start: int, stop: int) -> _Fork | int:
        if stop - start == 1:
            return start
        middle = (start + stop + 1) // 2
        share = sum(self.weights[middle:stop]) / sum(self.weights[start:stop])
        left, right = self._fork(start, middle), self._fork(middle, stop)
        return _Fork(left, right, Fraction(share))

    @property
    def digest(self) -> str | None:
        """Digest of the sources and weights; None if a source has none."""
        digests = [getattr(source, "digest", None) for source in self.sources]
        if None in digests:
            return None
        pairs = zip(self.weights, digests, strict=True)
        text = "\n".join(f"{weight} {digest}" for weight, digest in pairs)
        return hashlib.sha256(text.encode()).hexdigest()

    def locate(self, index: SupportsIndex) -> tuple[int, int]:
        """Says where one example comes from, in time that grows as log(sources).

        Args:
            index: Its place in the mixture, at least 0.

        Returns:
            The number of the source, and how many of that source came before.
        """
        place, node = operator.index(index), self._tree
        while isinstance(node, _Fork):
            before = node.count_right(place)
            if node.count_right(place + 1) > before:
                node, place = node.right, before
            else:
                node, place = node.left, place - before
        return node, place


def _as_fraction(weight: Any) -> Fraction | None:
    try:
        # By its digits: the binary fraction nearest to 0.1 is no tenth.
        exact = isinstance(weight, int | Fraction)
        fraction = Fraction(weight) if exact else Fraction(str(weight))
    except (ValueError, TypeError, ZeroDivisionError):
        return None
    return fraction if fraction > 0 else None
