"""Where the pieces of an image are, the same from step to step.

Owns what an image holds: leaves, the mesh that cut them, and for each piece its box and
its bytes' place. Invariant: pieces that need protection come before those that do not,
each aligned and apart from the others, so that a prefix of the image is what has to be
protected. It holds no data and knows no steps.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardkit.checkpoint.views import Box, as_dtype, box_shape
from shardkit.errors import ConfigError
from shardkit.snapshot.head import RECORD_BYTES, Head, align

__all__ = ["META_ROOM_BYTES", "ImageLayout", "MeshRecord", "Piece", "SnapshotLeaf"]

META_ROOM_BYTES = 1 << 14
"""What an image can say besides, as JSON, unless its layout was planned otherwise."""

_MAX_DIMS = 32
_MAX_SIZE = 1 << 48
_MAX_PROCESSES = 1 << 20
_SUM_DIGITS = 16
_MESH_NUMBERS = ("shape", "ids", "processes")


@dataclasses.dataclass(frozen=True)
class SnapshotLeaf:
    """A leaf of the state.

    Attributes:
        path: Where it is in the state.
        shape: Its logical shape, without padding.
        dtype: The name of its dtype.
        dim: The dim that `fsdp` cuts; -1 for none.
        group: Which dims the axes of a group cut: `(axis, dim)`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    dim: int = -1
    group: tuple[tuple[str, int], ...] = ()

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return _itemsize(self.dtype)


@dataclasses.dataclass(frozen=True)
class MeshRecord:
    """The mesh that the state was on.

    Attributes:
        axes: Its axes, outermost first.
        shape: Their sizes.
        ids: The id of each device, in row-major order.
        processes: The process of each.
        hosts: The name of each one's host.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    ids: tuple[int, ...]
    processes: tuple[int, ...]
    hosts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one device held of one leaf.

    Attributes:
        leaf: The index of the leaf.
        device: The id of the device.
        box: Which part of the leaf, without padding.
        offset: Where its bytes begin in the image; found by the layout.
        num_bytes: How many they are; found by the layout.
        protected: Whether it must be rebuilt if its host is lost: no other has it.
    """

    leaf: int
    device: int
    box: Box
    offset: int = 0
    num_bytes: int = 0
    protected: bool = True


@dataclasses.dataclass(frozen=True)
class ImageLayout:
    """What the images of one process hold, and where; made by `plan`.

    Attributes:
        run: The id of the run.
        host: The host that keeps the image.
        process: Whose image it is.
        num_processes: Of how many.
        leaves: All leaves of the state, also those of which nothing is here.
        mesh: The mesh.
        pieces: The pieces, in the order in which they were given.
        header_bytes: The room for the header.
        protected_bytes: The prefix that must be protected.
        num_bytes: Everything.

    Example:
        >>> leaf = SnapshotLeaf("w", (5, 2), "float32", 0)
        >>> mesh = MeshRecord(("fsdp",), (2,), (0, 1), (0, 1), ("a", "b"))
        >>> piece = Piece(leaf=0, device=0, box=((0, 3), (0, 2)))
        >>> layout = ImageLayout.plan(
        ...     run="r", host="a", process=0, num_processes=2, leaves=[leaf], mesh=mesh,
        ...     pieces=[piece], meta_room_bytes=100)
        >>> layout.pieces[0].num_bytes, layout.protected_bytes == layout.num_bytes
        (24, True)
    """

    run: str
    host: str
    process: int
    num_processes: int
    leaves: tuple[SnapshotLeaf, ...]
    mesh: MeshRecord
    pieces: tuple[Piece, ...]
    header_bytes: int
    protected_bytes: int
    num_bytes: int

    @classmethod
    def plan(
        cls,
        *,
        run: str,
        host: str,
        process: int,
        num_processes: int,
        leaves: Sequence[SnapshotLeaf],
        mesh: MeshRecord,
        pieces: Iterable[Piece],
        meta_room_bytes: int = META_ROOM_BYTES,
    ) -> "ImageLayout":
        """Finds a place for every piece.

        Args:
            run: The id of the run.
            host: The host that keeps the image.
            process: Whose image it is.
            num_processes: Of how many.
            leaves: All leaves of the state.
            mesh: The mesh.
            pieces: What is kept; offsets and bytes are found here.
            meta_room_bytes: The most bytes that `meta` will take as JSON.

        Raises:
            ConfigError: Listing every piece that does not lie in its leaf.
        """
        pieces, leaves = list(pieces), tuple(leaves)
        bad = [
            f"  piece {index} (device {piece.device}): leaf {piece.leaf}, {piece.box}"
            for index, piece in enumerate(pieces)
            if not _lies_in(piece, leaves)
        ]
        if bad:
            raise ConfigError(
                "snapshot: pieces outside their leaves:\n" + "\n".join(bad)
            )
        itemsizes = [leaf.itemsize for leaf in leaves]
        pieces = [
            dataclasses.replace(
                piece, num_bytes=math.prod(box_shape(piece.box)) * itemsizes[piece.leaf]
            )
            for piece in pieces
        ]
        end = protected_end = 0
        for index in sorted(
            range(len(pieces)), key=lambda index: not pieces[index].protected
        ):
            piece = dataclasses.replace(pieces[index], offset=end)
            pieces[index] = piece
            end = align(end + piece.num_bytes)
            protected_end = end if piece.protected else protected_end
        draft = cls(
            *(run, host, process, num_processes, leaves, mesh, tuple(pieces)),
            *(RECORD_BYTES, protected_end, end),
        )
        num_text = len(draft.text([0] * len(pieces), {})) + meta_room_bytes
        start = align(RECORD_BYTES + num_text)
        return dataclasses.replace(
            draft,
            pieces=tuple(
                dataclasses.replace(piece, offset=start + piece.offset)
                for piece in pieces
            ),
            header_bytes=start - RECORD_BYTES,
            protected_bytes=start + protected_end,
            num_bytes=start + end,
        )

    @property
    def body_start(self) -> int:
        """Where the first piece may begin."""
        return RECORD_BYTES + self.header_bytes

    def text(self, sums: Sequence[int], meta: Mapping[str, Any]) -> bytes:
        """Spells the header.

        Args:
            sums: The XXH3 of every piece.
            meta: Anything that JSON can hold.
        """
        spelled = "".join(f"{value:0{_SUM_DIGITS}x}" for value in sums)
        changing = json.dumps({"sums": spelled, "meta": meta}, separators=(",", ":"))
        return f"{self._fixed[:-1]},{changing[1:]}".encode()

    @functools.cached_property
    def _fixed(self) -> str:
        """The part of the header that is the same at every step, spelled once."""
        start = min((piece.offset for piece in self.pieces), default=0)
        # Offsets count from the first piece: the header's length depends on this text.
        pieces = [
            [x.leaf, x.device, x.offset - start, x.num_bytes, *sum(x.box, ())]
            for x in self.pieces
        ]
        fields = {
            "run": self.run,
            "host": self.host,
            "leaves": [dataclasses.astuple(leaf) for leaf in self.leaves],
            "mesh": dataclasses.asdict(self.mesh),
            "pieces": pieces,
        }
        return json.dumps(fields, separators=(",", ":"))


def parse_layout(
    head: Head, fields: Mapping[str, Any]
) -> tuple[ImageLayout, tuple[int, ...], dict[str, Any]]:
    """Reads what `ImageLayout.text` has spelled, believing nothing.

    Args:
        head: The record before it.
        fields: The JSON object.

    Returns:
        The layout, the sums of the pieces and `meta`.

    Raises:
        KeyError: If something is missing.
        ValueError: If something cannot be.
    """
    mesh = _mesh(_exact(fields["mesh"], dict))
    leaves = tuple(_leaf(_exact(x, list)) for x in _exact(fields["leaves"], list))
    itemsizes = [leaf.itemsize for leaf in leaves]
    pieces = []
    for found in _exact(fields["pieces"], list):
        numbers = _wholes(found)
        if len(numbers) < 4 or len(numbers) % 2:
            raise ValueError("a piece is not described by its numbers")
        leaf, device, offset, num_bytes, *box = numbers
        box = tuple(zip(box[::2], box[1::2], strict=True))
        offset += head.body_start
        protected = offset + num_bytes <= head.solid_bytes
        piece = Piece(leaf, device, box, offset, num_bytes, protected)
        if not _lies_in(piece, leaves):
            raise ValueError(f"a piece is outside leaf {leaf}")
        if num_bytes != math.prod(box_shape(box)) * itemsizes[leaf]:
            raise ValueError(f"a piece of leaf {leaf} has {num_bytes} bytes")
        pieces.append(piece)
    spelled = _exact(fields["sums"], str)
    if len(spelled) != _SUM_DIGITS * len(pieces):
        raise ValueError(f"{len(pieces)} pieces have other sums")
    sums = tuple(
        int(spelled[start : start + _SUM_DIGITS], 16)
        for start in range(0, len(spelled), _SUM_DIGITS)
    )
    if not head.process < head.num_processes <= _MAX_PROCESSES:
        raise ValueError(f"process {head.process} of {head.num_processes}")
    layout = ImageLayout(
        run=_exact(fields["run"], str),
        host=_exact(fields["host"], str),
        process=head.process,
        num_processes=head.num_processes,
        leaves=leaves,
        mesh=mesh,
        pieces=tuple(pieces),
        header_bytes=head.body_start - RECORD_BYTES,
        protected_bytes=head.solid_bytes,
        num_bytes=head.num_bytes,
    )
    return layout, sums, _exact(fields["meta"], dict)


@functools.lru_cache(maxsize=256)
def _itemsize(dtype: str) -> int:
    """Bytes per element; looked up once, as there are many leaves and few dtypes."""
    return as_dtype(dtype).itemsize


def _lies_in(piece: Piece, leaves: Sequence[SnapshotLeaf]) -> bool:
    if not 0 <= piece.leaf < len(leaves):
        return False
    shape = leaves[piece.leaf].shape
    return len(piece.box) == len(shape) and all(
        0 <= start <= stop <= size
        for (start, stop), size in zip(piece.box, shape, strict=True)
    )


def _leaf(found: list[Any]) -> SnapshotLeaf:
    path, shape, dtype, dim, group = found
    pairs = [_exact(pair, list) for pair in _exact(group, list)]
    group = tuple((_exact(axis, str), cut) for axis, cut in pairs)
    kind = _exact(path, str), _wholes(shape), _exact(dtype, str)
    leaf = SnapshotLeaf(*kind, dim, group)
    leaf.itemsize  # noqa: B018  # Raises for a name that is none.
    num_dims = len(leaf.shape)
    is_dim = type(dim) is int and -1 <= dim < max(num_dims, 1)
    cuts = [dim, *(cut for _, cut in group)]
    are_cuts = all(type(x) is int and 0 <= x < num_dims for x in cuts[1:])
    # Each axis cuts one dim, and each dim is cut by one.
    axes = {"fsdp", *(axis for axis, _ in group)}
    if not is_dim or not are_cuts or num_dims > _MAX_DIMS:
        raise ValueError(f"leaf {path!r:.80}: dims {cuts!r:.60}")
    if len({*cuts}) < len(cuts) or len(axes) < len(cuts):
        raise ValueError(f"leaf {path!r:.80}: cut twice, {group!r:.60}")
    if math.prod(size for size in leaf.shape if size) > _MAX_SIZE:
        raise ValueError(f"leaf {path!r:.80}: too large")
    return leaf


def _mesh(found: dict[str, Any]) -> MeshRecord:
    axes, hosts = (_exact(found[key], list) for key in ("axes", "hosts"))
    shape, ids, processes = (_wholes(found[key]) for key in _MESH_NUMBERS)
    axes, hosts = (tuple(_exact(x, str) for x in names) for names in (axes, hosts))
    mesh = MeshRecord(axes, shape, ids, processes, hosts)
    sizes = {len(mesh.ids), len(mesh.processes), len(mesh.hosts), math.prod(mesh.shape)}
    fits = len(mesh.axes) == len({*mesh.axes}) == len(mesh.shape)
    if not fits or len(sizes) > 1:
        raise ValueError("the mesh does not fit together")
    return mesh


def _wholes(found: Any) -> tuple[int, ...]:
    for value in _exact(found, list):
        if type(value) is not int or not 0 <= value <= _MAX_SIZE:
            raise ValueError(f"expected a whole number, found {value!r:.40}")
    return tuple(found)


def _exact(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value
