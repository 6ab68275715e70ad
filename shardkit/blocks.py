"""How a leaf is cut into blocks, each with a digest of its own.

Owns the one way of cutting, which depends on the logical shape alone and never on a
mesh. Blocks are boxes: whole in all dims after the one that is cut into chunks, and a
single index in those before it. Pure: neither JAX nor a device is touched.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

__all__ = ["BLOCK_BYTES", "Blocks"]

BLOCK_BYTES = 4 << 20
"""Above it a block is cut, unless only its last dim could be."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of a leaf.

    Attributes:
        shape: The logical shape of the leaf.
        dim: The dim that is cut into chunks; -1 for a leaf of one block.
        chunk: How many indices of that dim a block has; the last may have fewer.

    Example:
        >>> blocks = Blocks.of((12, 768, 3072), itemsize=4)
        >>> blocks.dim, blocks.chunk, blocks.grid
        (1, 341, (12, 3))
        >>> blocks.box((11, 2))
        ((11, 12), (682, 768), (0, 3072))
    """

    shape: tuple[int, ...]
    dim: int
    chunk: int

    @classmethod
    def of(cls, shape: tuple[int, ...], itemsize: int) -> "Blocks":
        """Cuts a leaf of `itemsize` bytes per element."""
        if math.prod(shape) * itemsize <= BLOCK_BYTES:
            return cls(shape, -1, 0)
        # The last dim is never cut: a digest of parts of a row costs a copy of it.
        for dim in range(len(shape) - 1):
            row_bytes = math.prod(shape[dim + 1 :]) * itemsize
            if row_bytes <= BLOCK_BYTES:
                return cls(
                    shape, dim, max(1, min(BLOCK_BYTES // row_bytes, shape[dim]))
                )
        if len(shape) < 2:
            return cls(shape, -1, 0)
        return cls(shape, len(shape) - 2, 1)

    @property
    def grid(self) -> tuple[int, ...]:
        """How many blocks there are, along the dims up to the one that is cut."""
        if self.dim < 0:
            return ()
        return (*self.shape[: self.dim], -(-self.shape[self.dim] // self.chunk))

    def __len__(self) -> int:
        return math.prod(self.grid)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*map(range, self.grid))

    def box(self, index: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """The box of global indices of a block."""
        if self.dim < 0:
            return tuple((0, size) for size in self.shape)
        *leading, last = index
        start, size = last * self.chunk, self.shape[self.dim]
        return (
            *((i, i + 1) for i in leading),
            (start, min(start + self.chunk, size)),
            *((0, size) for size in self.shape[self.dim + 1 :]),
        )
