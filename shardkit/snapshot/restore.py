"""From images of a snapshot to a live state on any mesh.

Owns which image gives which piece, and the way of boxes from there to this process's
devices. Invariants: no byte reaches a device before the checksum of its piece was found
right, once; no piece is asked for that none of these devices wants; host memory holds
`ahead_bytes` of pieces, or those of one leaf, and `limit_bytes` of what is on its way.
What a target takes from where is `transfer`'s decision; how an image is read, and
whether it is whole, that of the images.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from shardkit.errors import DamagedError, LostStateError, RestoreError, TornError
from shardkit.keys import is_key_dtype
from shardkit.layout import SHARD_AXIS, Box, Layout, LeafLayout
from shardkit.mesh import GROUP_AXES
from shardkit.places import Medium, Places
from shardkit.snapshot.image import Image
from shardkit.state_moves import laid_out, raw_leaf
from shardkit.transfer import Transfer, TransferPlan, plan_transfer

__all__ = ["restore"]

LIMIT_BYTES = 256 << 20
AHEAD_BYTES = 64 << 20


def restore(
    images: Sequence[Image],
    layout: Any,
    mesh: Mesh,
    *,
    host: str = "",
    limit_bytes: int = LIMIT_BYTES,
    ahead_bytes: int = AHEAD_BYTES,
) -> Any:
    """Makes a state of the images of one step, on devices of any number.

    Args:
        images: What survives: of any processes, in any order, also more than needed.
        layout: A tree of `LeafLayout`; what the state is like.
        mesh: Where it goes; of its devices, those of this process are filled.
        host: The host that this is; its own images are read first.
        limit_bytes: How much may be on its way to the devices at a time.
        ahead_bytes: How much is asked for together, if its leaves are small.

    Returns:
        A tree like `layout`, of global arrays.

    Raises:
        RestoreError: If the images are of another state, or of several steps.
        LostStateError: If pieces are in none of them, naming leaves and boxes.
        DamagedError: If a piece is not what was written, naming leaf, device and image.
    """
    wanted, treedef = jax.tree.flatten(layout)
    raw = [raw_leaf(leaf) for leaf in wanted]
    _check(images, raw)
    saved = images[0].layout
    sizes = dict(zip(saved.mesh.axes, saved.mesh.shape, strict=True))
    # Along other axes devices held the same, of which one image has one.
    axes = [axis for axis in (SHARD_AXIS, *GROUP_AXES) if axis in sizes]
    shape = [sizes[axis] for axis in axes]
    grid = Places(axes, np.arange(math.prod(shape)).reshape(shape), 0, Medium.HOST)
    cuts = {leaf.path: {"dim": leaf.dim, "group": leaf.group} for leaf in saved.leaves}
    source = laid_out(
        [dataclasses.replace(leaf, **cuts[leaf.path]) for leaf in raw], grid
    )
    pieces = _Pieces(images, host)
    pieces.check(source)
    plan = plan_transfer([source], laid_out(raw, Places.of_mesh(mesh)))
    targets = (_Target(bare, mesh, plan, source[bare.path]) for bare in raw)
    made, on_the_way, held = [], [], 0
    for leaf, target in zip(
        wanted, pieces.asked_for(targets, ahead_bytes), strict=True
    ):
        array = target.fill(pieces)
        held += sum(shard.data.nbytes for shard in array.addressable_shards)
        on_the_way.append(array)
        if held > limit_bytes:
            jax.block_until_ready(on_the_way)
            on_the_way, held = [], 0
        made.append(_as_keys(array, leaf) if is_key_dtype(leaf.dtype) else array)
    # What was read is held until it is there.
    return jax.block_until_ready(treedef.unflatten(made))


def _check(images: Sequence[Image], leaves: Sequence[LeafLayout]) -> None:
    """Refuses images that are not all of one step of such a state."""
    if not images:
        raise RestoreError("restore: expected images of a snapshot, found none")
    steps = {image.head.step for image in images}
    kinds = {(image.layout.leaves, image.layout.mesh) for image in images}
    if len(steps) > 1 or len(kinds) > 1:
        raise RestoreError(
            f"restore: expected images of one step on one mesh, found steps "
            f"{sorted(steps)} and {len(kinds)} kinds of state. Choose one of them."
        )
    found = {x.path: (x.shape, x.dtype) for x in images[0].layout.leaves}
    expected = {x.path: (x.shape, np.dtype(x.dtype).name) for x in leaves}
    wrong = [
        f"{path}: expected {expected.get(path)}, found {found.get(path)}"
        for path in sorted(found.keys() | expected.keys())
        if found.get(path) != expected.get(path)
    ]
    if wrong:
        raise RestoreError(
            f"restore: the snapshot is of another state; {len(wrong)} leaves differ: "
            f"{'; '.join(wrong[:8])}{'; …' if len(wrong) > 8 else ''}"
        )


class _Pieces:
    """The pieces of some images: for each box of a leaf the image to read it from."""

    def __init__(self, images: Sequence[Image], host: str) -> None:
        self._images = images
        self._found: dict[tuple[str, Box], tuple[int, int]] = {}
        self._read: dict[tuple[int, int], np.ndarray] = {}
        spent = [0] * len(images)
        # The nearest, and of those equally far the one that has least to give.
        everything = [
            ((image.layout.leaves[piece.leaf].path, piece.box), number, index)
            for number, image in enumerate(images)
            for index, piece in enumerate(image.layout.pieces)
            if image.has(index)
        ]
        offers: dict[tuple[str, Box], list[tuple[int, int]]] = {}
        for key, number, index in everything:
            offers.setdefault(key, []).append((number, index))
        for key, some in offers.items():
            number, index = min(
                some, key=lambda x: (images[x[0]].layout.host != host, spent[x[0]])
            )
            spent[number] += images[number].layout.pieces[index].num_bytes
            self._found[key] = number, index

    def check(self, source: Mapping[str, Layout]) -> None:
        """Refuses a state of which pieces are missing."""
        missing = [
            f"{path} {list(box)}"
            for path, layout in source.items()
            for box in dict.fromkeys(map(layout.box, layout.places.slots))
            if math.prod(b - a for a, b in box) and (path, box) not in self._found
        ]
        if missing:
            hosts = sorted({image.layout.host for image in self._images})
            raise LostStateError(
                f"step {self._images[0].head.step}: {len(missing)} pieces are in no "
                f"image that is left (of {', '.join(hosts)}): {'; '.join(missing[:5])}"
                f"{'; …' if len(missing) > 5 else ''}. Choose an older step, or keep "
                "more redundancy."
            )

    def asked_for(
        self, targets: Iterable["_Target"], ahead_bytes: int
    ) -> Iterator["_Target"]:
        """Yields targets, of which the pieces were asked for, many at a time."""
        group: list[_Target] = []
        num_bytes = 0
        for target in targets:
            places = {self._found[target.leaf.path, box] for box in target.boxes}
            size = sum(self._images[n].pieces[i].num_bytes for n, i in places)
            if group and num_bytes + size > ahead_bytes:
                yield from group
                group, num_bytes = [], 0
            for number, index in sorted(places):
                self._images[number].ask(index)
            group.append(target)
            num_bytes += size
        yield from group

    def read(self, path: str, box: Box) -> np.ndarray:
        """Returns a piece, verified; it is kept until `forget`."""
        where = self._found[path, box]
        if where not in self._read:
            number, index = where
            image = self._images[number]
            try:
                self._read[where] = image.piece(index)
            except TornError as error:
                saved = image.layout
                raise DamagedError(
                    f"step {image.head.step}: {path}, the piece of device "
                    f"{saved.pieces[index].device} in the image of process "
                    f"{saved.process} on {saved.host}: {error}"
                ) from error
        return self._read[where]

    def forget(self) -> None:
        """Lets go of what was read."""
        self._read.clear()


class _Target:
    """One leaf on the new mesh.

    Attributes:
        leaf: The leaf.
        boxes: The boxes of the pieces that the devices of this process want.
    """

    def __init__(
        self, leaf: LeafLayout, mesh: Mesh, plan: TransferPlan, source: Layout
    ) -> None:
        self.leaf, self._source = leaf, source
        self._layout = layout = plan.target[leaf.path]
        self._sharding = leaf.sharding(mesh)
        self._shape = leaf.physical_shape(mesh.shape[SHARD_AXIS])
        self._devices = {
            device: layout.box(device.id)
            for device in self._sharding.addressable_devices_indices_map(self._shape)
        }
        # Devices that hold the same take it from the same pieces.
        self._parts: dict[Box, tuple[int, list[Transfer]]] = {}
        for device, box in self._devices.items():
            if box not in self._parts:
                self._parts[box] = device.id, plan.pieces(leaf.path, device.id)
        self.boxes = {
            source.box(transfer.source)
            for _, transfers in self._parts.values()
            for transfer in transfers
        }

    def fill(self, pieces: _Pieces) -> Array:
        """Makes the global array, of which this process has its part."""
        filled = {box: self._shard(box, pieces) for box in self._parts}
        shards = [
            # Memory of the device's own, which a step can use up.
            jax.device_put(filled[box], device, may_alias=False)
            for device, box in self._devices.items()
        ]
        pieces.forget()
        return jax.make_array_from_single_device_arrays(
            self._shape, self._sharding, shards
        )

    def _shard(self, box: Box, pieces: _Pieces) -> np.ndarray:
        """Puts a shard together; its padding is zero."""
        whole = np.zeros(self._layout.piece_shape, np.dtype(self.leaf.dtype))
        device, transfers = self._parts[box]
        for transfer in transfers:
            piece = pieces.read(self.leaf.path, self._source.box(transfer.source))
            part = piece[self._source.slices(transfer.source, transfer.box)]
            # As bytes, since numpy need not know numbers to copy them.
            to, given = (_bits(x) for x in (whole, part))
            to[self._layout.slices(device, transfer.box)] = given
        return whole


def _bits(x: np.ndarray) -> np.ndarray:
    return x if x.dtype.kind == "c" else x.view(f"u{x.dtype.itemsize}")


def _as_keys(words: Array, leaf: LeafLayout) -> Array:
    """Makes random keys of their words."""
    assert is_key_dtype(leaf.dtype)
    found: list[Any] = []
    # Only an array, or what stands for one, can be asked for its generator.
    jax.eval_shape(lambda x: found.append(jax.random.key_impl(x)), leaf.abstract)
    return jax.random.wrap_key_data(words, impl=found[0])
