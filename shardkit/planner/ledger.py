"""What a program computes and exchanges, in units that no mesh enters.

Owns `Cut`, how a value is cut by mesh axes of sizes yet unknown, `Ledger`, which
adds up work, memory accesses and exchanges by the axes that divide them, and `Habits`,
what of it compilers do in different ways. It knows no operations.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

__all__ = [
    "Axes",
    "Cut",
    "Entry",
    "Habits",
    "Item",
    "Ledger",
    "axes_in",
    "bytes_of",
    "joined",
]

Axes = frozenset[str]
Entry = str | tuple[str, ...] | None
"""What cuts a dim: nothing, one mesh axis, or several."""


def axes_in(entry: Entry) -> tuple[str, ...]:
    """The axes that cut one dim.

    >>> axes_in(None), axes_in("tensor"), axes_in(("context", "tensor"))
    ((), ('tensor',), ('context', 'tensor'))
    """
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def joined(axes: Iterable[str]) -> Entry:
    """A dim that these axes cut; the inverse of `axes_in`."""
    found = (*axes,)
    return found if len(found) > 1 else found[0] if found else None


@dataclasses.dataclass(frozen=True)
class Habits:
    """What compilers do in different ways.

    Attributes:
        sums_late: Whether addends are added up before devices exchange them, so that
            several products that end in one sum exchange once. XLA does that for GPUs
            (it reassociates all-reduces); for the CPU it exchanges after each product.
        scatters: Whether a sum of which each device needs a piece is a reduce-scatter;
            if not, all of it is exchanged and cut, as XLA does for the CPU.

    Example:
        >>> Habits.of("cpu")
        Habits(sums_late=False, scatters=False)
    """

    sums_late: bool = True
    scatters: bool = True

    @classmethod
    def of(cls, platform: str) -> "Habits":
        """Those of XLA for a platform, such as `"cpu"` or `"gpu"`."""
        return cls(sums_late=platform != "cpu", scatters=platform != "cpu")


@dataclasses.dataclass(frozen=True)
class Cut:
    """How one value is cut.

    Attributes:
        dims: For every dim the mesh axis that cuts it, or axes, or None.
        partial: Axes over which the devices hold addends, not the sum.
    """

    dims: tuple[Entry, ...]
    partial: Axes = frozenset()

    @classmethod
    def whole(cls, aval: Any) -> "Cut":
        """Every device has all of it."""
        return cls((None,) * len(getattr(aval, "shape", ())))

    @property
    def axes(self) -> Axes:
        """The axes that cut it."""
        return frozenset(axis for entry in self.dims for axis in axes_in(entry))

    def place(self, axis: str) -> int:
        """The dim that an axis cuts; -1 for none."""
        return next((d for d, e in enumerate(self.dims) if axis in axes_in(e)), -1)

    def without(self, axis: str) -> "Cut":
        """The same, whole along an axis."""
        dims = tuple(joined(a for a in axes_in(e) if a != axis) for e in self.dims)
        return Cut(dims, self.partial)

    def cut_at(self, dim: int, axis: str) -> "Cut":
        """The same, with a dim cut by an axis too."""
        entry = joined((*axes_in(self.dims[dim]), axis))
        return Cut((*self.dims[:dim], entry, *self.dims[dim + 1 :]), self.partial)


@dataclasses.dataclass(frozen=True)
class Item:
    """One collective of a program.

    Attributes:
        kind: XLA's name of it.
        axis: Over which axis.
        axes: What cuts its buffer.
        num_bytes: Of the buffer, on devices that cut nothing.
        source: The operation that needs it, as JAX names it.
        times: How often it is run.
        grows: Whether what comes out is larger by the size of the axis.
    """

    kind: str
    axis: str
    axes: Axes
    num_bytes: float
    source: str = ""
    times: int = 1
    grows: bool = False

    def bytes_on(self, sizes: Mapping[str, Any]) -> Any:
        """Of the buffer of a device, each time, on axes of these sizes."""
        count = math.prod(sizes.get(axis, 1) for axis in self.axes)
        more = sizes.get(self.axis, 1) if self.grows else 1
        return self.num_bytes / count * more * (sizes.get(self.axis, 1) != 1)


@dataclasses.dataclass
class Ledger:
    """Sums over a program; every key ends with the axes that divide the amount.

    Attributes:
        flops: `(dtype, axes)` → floating-point operations of matrix products and
            convolutions, a multiplication and an addition being two.
        num_products: How many there are, whatever divides them.
        product_bytes: Axes → bytes that these read and write.
        other_bytes: Axes → bytes that all other operations write.
        items: The collectives over axes.
        divisors: Axis → what divides all dims that it cuts in products.
        notes: What could not be followed or counted.
        habits: How the compiler exchanges.
        source: The operation that is followed just now.
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
    items: list[Item] = dataclasses.field(default_factory=list)
    divisors: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    notes: list[str] = dataclasses.field(default_factory=list)
    habits: Habits = dataclasses.field(default_factory=Habits)
    source: str = ""

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
        ]
        for mine, more in tables:
            for key, amount in more.items():
                mine[key] += amount * times
        self.items += [
            dataclasses.replace(x, times=x.times * times) for x in other.items
        ]
        self.num_products += other.num_products * times
        for axis, size in other.divisors.items():
            self.divisors[axis] = math.gcd(self.divisors[axis], size)
        self.notes += [note for note in other.notes if note not in self.notes]

    def exchange(self, kind: str, axis: str, aval: Any, cut: Cut) -> None:
        """Notes a collective over `axis` of `aval`, cut so."""
        # All devices have all of it before or after, but for those that swap pieces.
        axes = cut.axes | {axis} if kind == "all-to-all" else cut.axes - {axis}
        self.items.append(Item(kind, axis, axes, bytes_of(aval), self.source))

    def collect(self, axis: str, aval: Any, cut: Cut) -> None:
        """Notes that every device along `axis` gets what each has of `aval`'s size."""
        axes, size = cut.axes - {axis}, bytes_of(aval)
        item = Item("all-gather", axis, axes, size, self.source, grows=True)
        self.items.append(item)

    @property
    def exchanges(self) -> dict[tuple[str, str, Axes], float]:
        """`(kind, axis, axes)` → bytes of buffers, on devices that cut them so."""
        found: dict[tuple[str, str, Axes], float] = {}
        for x in self.items:
            key = x.kind, x.axis, x.axes
            found[key] = found.get(key, 0) + x.num_bytes * x.times
        return found

    def calls(self, axis: str) -> int:
        """How many collectives go over an axis."""
        return sum(x.times for x in self.items if x.axis == axis)

    def buffers(self, sizes: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
        """Bytes of the buffers of one device, by kind and axis, on axes of these sizes.

        There are none along an axis of size 1.
        """
        found: dict[tuple[str, str], Any] = {}
        for x in self._merged():
            part = x.bytes_on(sizes)
            found[x.kind, x.axis] = found.get((x.kind, x.axis), 0) + part
        return found

    def _merged(self) -> list[Item]:
        """The same bytes in fewer items, where none is asked for by itself."""
        sums: dict[Item, float] = {}
        for x in self.items:
            key = Item(x.kind, x.axis, x.axes, 0, grows=x.grows)
            sums[key] = sums.get(key, 0) + x.num_bytes * x.times
        return [dataclasses.replace(x, num_bytes=n) for x, n in sums.items()]

    def scaled(self, factor: float) -> "Ledger":
        """The same program on so many times the rows."""

        def times(table: Mapping[Any, float]) -> Any:
            return collections.Counter({k: n * factor for k, n in table.items()})

        return dataclasses.replace(
            self,
            flops=times(self.flops),
            product_bytes=times(self.product_bytes),
            other_bytes=times(self.other_bytes),
            items=[
                dataclasses.replace(x, num_bytes=x.num_bytes * factor)
                for x in self.items
            ],
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
