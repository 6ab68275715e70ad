"""What is told of tensor-parallel axes that were found.

Owns the types: which dim of every parameter `tensor` is to cut and why, which are left
whole and why, and the collectives that follow.
"""

import dataclasses
from collections.abc import Sequence

from shardkit.planner.written_rules import WrittenRules

__all__ = ["Exchange", "LeafRule", "Pair", "TensorRules", "add_up"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """Collectives over `tensor` in the loss of one microbatch.

    Attributes:
        kind: `"all-reduce"`; or `"all-gather"`, of what every device offers as the
            place of the largest element.
        of: `"row"` of what a product sums over, `"sum"`, `"lookup"` of rows of a
            table, or `"argmax"`.
        count: How many.
        num_bytes: Of their buffers, on one device, together; of an all-gather what one
            device has to offer, which the number of devices multiplies.
    """

    kind: str
    of: str
    count: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """What is cut together: products that make a dim, and those that sum over it.

    Attributes:
        number: From 1, in the order of the program.
        columns: Parameters whose products make the dim.
        rows: Parameters whose products sum over it. Without any, sums close it.
        tables: Parameters of which it is the rows, which are looked up.
        divisor: What the size of `tensor` has to divide.
        exchanges: What it takes.
    """

    number: int
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    tables: tuple[str, ...]
    divisor: int
    exchanges: tuple[Exchange, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafRule:
    """What is to become of one parameter.

    Attributes:
        path: Where it is.
        shape: Its shape.
        dim: The dim that `tensor` cuts; -1 for none.
        pair: The number of the pair; 0 for none.
        reason: Why, in words.
    """

    path: str
    shape: tuple[int, ...]
    dim: int
    pair: int
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRules:
    """What was found.

    Attributes:
        size: The size of `tensor` that was asked for; None if it was left open.
        leaves: Every parameter.
        pairs: What is cut.
        written: The same as rules for a program or a config.
    """

    size: int | None
    leaves: tuple[LeafRule, ...]
    pairs: tuple[Pair, ...]
    written: WrittenRules

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """Those of all pairs, one entry for a kind."""
        return add_up([x for pair in self.pairs for x in pair.exchanges])


def add_up(exchanges: Sequence[Exchange]) -> tuple[Exchange, ...]:
    """Makes one entry of all exchanges of a kind."""
    kinds = dict.fromkeys((x.kind, x.of) for x in exchanges)
    return tuple(
        Exchange(
            kind=kind,
            of=of,
            count=sum(x.count for x in exchanges if (x.kind, x.of) == (kind, of)),
            num_bytes=sum(
                x.num_bytes for x in exchanges if (x.kind, x.of) == (kind, of)
            ),
        )
        for kind, of in kinds
    )
