"""The image of one process's state in a segment.

Owns writing it, the commit record last, and reading it. Invariant: a piece that has
been read is, bit for bit, what was put there; whatever is torn or changed is a
`TornError`. Where pieces lie is `ImageLayout`'s; segments and devices are others'.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from shardkit.checkpoint.views import as_dtype, box_shape
from shardkit.errors import ConfigError, SaveError, TornError
from shardkit.snapshot.head import (
    IMAGE,
    Buffer,
    Head,
    as_bytes,
    byte_sum,
    clear_head,
    header_fields,
    read_head,
    torn,
    write_head,
)
from shardkit.snapshot.layout import ImageLayout, Piece, parse_layout

__all__ = ["Image", "ImageWriter", "read_image"]


class ImageWriter:
    """Writes one image; until `commit` there is none.

    What was in the segment is taken back at once. Pieces may be put from several
    threads, each piece by one.

    Args:
        memory: A segment, at least as large as the image.
        layout: What goes where.
        step: The step after which the state is taken.
        generation: The generation that takes it.

    Raises:
        SaveError: If the segment is too small.

    Example:
        >>> from shardkit.snapshot.layout import MeshRecord, SnapshotLeaf
        >>> layout = ImageLayout.plan(
        ...     run="r", host="a", process=0, num_processes=1,
        ...     leaves=[SnapshotLeaf("w", (2,), "float32")],
        ...     mesh=MeshRecord(("fsdp",), (1,), (0,), (0,), ("a",)),
        ...     pieces=[Piece(leaf=0, device=0, box=((0, 2),))])
        >>> memory = memoryview(bytearray(layout.num_bytes))
        >>> writer = ImageWriter(memory, layout, step=7, generation=1)
        >>> writer.put(0, np.float32([1, 2]))
        >>> writer.commit({"loss": 0.5}).step
        7
        >>> image = read_image(memory)
        >>> image.piece(0), image.meta
        (array([1., 2.], dtype=float32), {'loss': 0.5})
    """

    def __init__(
        self, memory: memoryview, layout: ImageLayout, *, step: int, generation: int
    ) -> None:
        if len(memory) < layout.num_bytes:
            raise SaveError(
                f"snapshot of step {step}: expected a segment of {layout.num_bytes} "
                f"bytes or more, found {len(memory)}. Reserve a larger one."
            )
        clear_head(memory)
        self.layout, self._memory = layout, memory
        self._step, self._generation = step, generation
        self._sums: list[int | None] = [None] * len(layout.pieces)

    def put(self, index: int, array: np.ndarray) -> None:
        """Copies a piece in, and sums it up.

        Args:
            index: Which piece of the layout.
            array: Its elements, without padding, of the shape of its box.

        Raises:
            ConfigError: If shape or dtype are not the piece's.
        """
        target = self.view(index)
        if array.shape != target.shape or array.dtype != target.dtype:
            leaf = self.layout.leaves[self.layout.pieces[index].leaf]
            raise ConfigError(
                f"snapshot: {leaf.path}: expected {target.dtype}{list(target.shape)}, "
                f"found {array.dtype}{list(array.shape)}. Cut the padding off."
            )
        target[...] = array
        self.put_done(index)

    def view(self, index: int) -> np.ndarray:
        """The place of a piece, to be written to; `put_done` must follow."""
        return _array(self._data(index), self.layout, self.layout.pieces[index])

    def put_done(self, index: int) -> None:
        """Sums up a piece that was written through `view`."""
        self._sums[index] = byte_sum(self._data(index))

    def _data(self, index: int) -> memoryview:
        piece = self.layout.pieces[index]
        return self._memory[piece.offset : piece.offset + piece.num_bytes]

    def commit(self, meta: Mapping[str, Any]) -> Head:
        """Writes the header and, last of all, the record.

        Args:
            meta: Anything that JSON can hold, within the layout's room for it.

        Raises:
            SaveError: If pieces are missing, or `meta` takes too much room.
        """
        sums = [value for value in self._sums if value is not None]
        if missing := len(self._sums) - len(sums):
            raise SaveError(
                f"snapshot of step {self._step}: expected all {len(self._sums)} pieces "
                f"before it is committed; {missing} are missing."
            )
        layout = self.layout
        text = layout.text(sums, meta)
        if len(text) > layout.header_bytes:
            raise SaveError(
                f"snapshot of step {self._step}: meta takes "
                f"{len(text) - layout.header_bytes} bytes more than there is room for. "
                "Plan the layout with a larger meta_room_bytes."
            )
        head = Head(
            magic=IMAGE,
            step=self._step,
            generation=self._generation,
            process=layout.process,
            num_processes=layout.num_processes,
            num_bytes=layout.num_bytes,
            solid_bytes=layout.protected_bytes,
            header_bytes=layout.header_bytes,
            header_sum=0,
        )
        return write_head(self._memory, head, text.ljust(layout.header_bytes))


@dataclasses.dataclass(frozen=True)
class Image:
    """An image whose header is whole; pieces are verified as they are read.

    Attributes:
        head: What its record says: step, generation, process.
        layout: What is where.
        sums: The XXH3 of every piece.
        meta: What was committed with it.
        memory: Its bytes. If it was rebuilt, only those that were protected.
        where: What it is, for messages.
    """

    head: Head
    layout: ImageLayout
    sums: tuple[int, ...]
    meta: dict[str, Any]
    memory: memoryview
    where: str

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What is in it."""
        return self.layout.pieces

    def has(self, index: int) -> bool:
        """Whether a piece is here: not if it was not protected, and was lost."""
        piece = self.layout.pieces[index]
        return piece.offset + piece.num_bytes <= len(self.memory)

    def ask(self, index: int) -> None:
        """Says that a piece will be read soon; memory needs no such notice."""

    def piece(self, index: int) -> np.ndarray:
        """Reads a piece, after its checksum.

        Returns:
            The elements, of the shape of the piece's box, not writeable, in the
            image's own memory: copy what must outlive the segment's next use.

        Raises:
            TornError: If it is not what was put there.
        """
        if not self.has(index):
            raise self._torn(index, "is not here")
        data = self._data(index)
        if byte_sum(data) != self.sums[index]:
            raise self._torn(index, "is not what was written")
        array = _array(data, self.layout, self.layout.pieces[index])
        array.flags.writeable = False
        return array

    def _data(self, index: int) -> memoryview:
        piece = self.layout.pieces[index]
        return self.memory[piece.offset : piece.offset + piece.num_bytes]

    def _torn(self, index: int, problem: str) -> TornError:
        piece = self.layout.pieces[index]
        path = self.layout.leaves[piece.leaf].path
        return torn(self.where, f"{path} {piece.box} {problem}")

    def with_memory(self, memory: memoryview) -> "Image":
        """The same image elsewhere: what its header says stays."""
        return dataclasses.replace(self, memory=memory)

    def verify(self) -> None:
        """Reads all pieces that are here.

        Raises:
            TornError: If one of them is not what was put there.
        """
        for index in range(len(self.layout.pieces)):
            if self.has(index):
                self.piece(index)


def read_image(
    memory: Buffer, where: str = "snapshot", *, header_only: bool = False
) -> Image:
    """Reads an image's header; no piece is read yet, and nothing is copied.

    Args:
        memory: A segment.
        where: What it is, for messages.
        header_only: Whether the header is enough, to see what is in the rest.

    Raises:
        TornError: If it is not all there, or was changed.
    """
    memory = as_bytes(memory)
    head = read_head(memory, where)
    if head.magic != IMAGE:
        raise torn(where, "expected an image, found what protects images")
    if len(memory) < head.num_bytes and not header_only:
        raise torn(where, f"expected {head.num_bytes} bytes, found {len(memory)}")
    fields = header_fields(memory, head, where)
    try:
        layout, sums, meta = parse_layout(head, fields)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise torn(where, f"its header: {error!s:.200}") from None
    return Image(head, layout, sums, meta, memory[: head.num_bytes], where)


def _array(data: memoryview, layout: ImageLayout, piece: Piece) -> np.ndarray:
    dtype, shape = as_dtype(layout.leaves[piece.leaf].dtype), box_shape(piece.box)
    return np.frombuffer(data, np.uint8).view(dtype).reshape(shape)
