"""What a program computes and exchanges, in units that no mesh enters.

Owns `Cut`, how a value is cut by mesh axes of sizes yet unknown, and `Ledger`, which
adds up work, memory accesses and exchanges by the axes that divide them. It knows no
operations.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["Axes", "Cut", "Ledger", "bytes_of"]

Axes = frozenset[str]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How one value is cut.

    Attributes:
        dims: For every dim the mesh axis that cuts it, or None.
        partial: Axes over which the devices hold addends, not the sum.
    """

    dims: tuple[str | None, ...]
    partial: Axes = frozenset()

    @classmethod
    def whole(cls, aval: Any) -> "Cut":
        """Every device has all of it."""
        return cls((None,) * len(getattr(aval, "shape", ())))

    @property
    def axes(self) -> Axes:
        """The axes that cut it."""
        return frozenset(axis for axis in self.dims if axis)

    def without(self, axis: str) -> "Cut":
        """The same, whole along an axis."""
        dims = tuple(None if a == axis else a for a in self.dims)
        return Cut(dims, self.partial)


@dataclasses.dataclass
class Ledger:
    """Sums over a program; every key ends with the axes that divide the amount.

    Attributes:
        flops: `(dtype, axes)` → floating-point operations of matrix products and
            convolutions, a multiplication and an addition being two.
        num_products: How many there are, whatever divides them.
        product_bytes: Axes → bytes that these read and write.
        other_bytes: Axes → bytes that all other operations write.
        exchanges: `(kind, axis, axes)` → bytes of the buffers of collectives over
            `axis`, on devices that cut them along `axes`.
        calls: Axis → how many such collectives there are.
        divisors: Axis → what divides all dims that it cuts in products.
        notes: What could not be followed or counted.
    """

    flops: collections.Counter[tuple[str, Axes]] = dataclasses.field(
        default_factory=collections.Counter
    )
    num_products: int = 0
    product_bytes: collections.Counter[Axes] = dataclasses.field(
        default_factory=collections.Counter
    )
    other_bytes: collections.Counter[Axes] = dataclasses.field(
        default_factory=collections.Counter
    )
    exchanges: collections.Counter[tuple[str, str, Axes]] = dataclasses.field(
        default_factory=collections.Counter
    )
    calls: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    divisors: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def total_flops(self) -> int:
        """All operations, on any number of devices."""
        return sum(self.flops.values())

    def add(self, other: "Ledger", times: int = 1) -> None:
        """Adds what another part does, so often."""
        tables: list[tuple[Any, Any]] = [
            (self.flops, other.flops),
            (self.product_bytes, other.product_bytes),
            (self.other_bytes, other.other_bytes),
            (self.exchanges, other.exchanges),
            (self.calls, other.calls),
        ]
        for mine, more in tables:
            for key, amount in more.items():
                mine[key] += amount * times
        self.num_products += other.num_products * times
        for axis, size in other.divisors.items():
            self.divisors[axis] = math.gcd(self.divisors[axis], size)
        self.notes += [note for note in other.notes if note not in self.notes]

    def exchange(self, kind: str, axis: str, aval: Any, cut: Cut) -> None:
        """Notes a collective over `axis` whose larger buffer is `aval`, cut so."""
        self.exchanges[kind, axis, cut.axes - {axis}] += bytes_of(aval)
        self.calls[axis] += 1

    def scaled(self, factor: float) -> "Ledger":
        """The same program on so many times the rows."""

        def times(table: Mapping[Any, float]) -> Any:
            return collections.Counter({k: n * factor for k, n in table.items()})

        return dataclasses.replace(
            self,
            flops=times(self.flops),
            product_bytes=times(self.product_bytes),
            other_bytes=times(self.other_bytes),
            exchanges=times(self.exchanges),
        )

    def share(self, table: Mapping[Axes, float], sizes: Mapping[str, Any]) -> Any:
        """What one device has of a table, on axes of these sizes."""
        return sum(
            amount / math.prod(sizes.get(axis, 1) for axis in axes)
            for axes, amount in table.items()
        )


def bytes_of(aval: Any) -> int:
    """Bytes of an abstract array; keys count as 8 bytes each."""
    size = math.prod(getattr(aval, "shape", ()))
    dtype = getattr(aval, "dtype", None)
    itemsize = getattr(dtype, "itemsize", None)
    if not isinstance(itemsize, int):
        itemsize = np.dtype(dtype).itemsize if dtype is not None else 0
    return size * itemsize
