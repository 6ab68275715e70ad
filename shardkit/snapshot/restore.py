"""From images of a snapshot to a live state on any mesh.

Owns which image gives which piece, and the way of boxes from there to this process's
devices. Invariant: no byte reaches a device before the checksum of its piece was found
right, once; host memory holds one leaf's pieces and `limit_bytes` of what is on its
way, no more. What a target takes from where is `transfer`'s decision; how an image is
read, and whether it is whole, that of the images.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from shardkit.errors import DamagedError, LostStateError, RestoreError, TornError
from shardkit.keys import is_key_dtype
from shardkit.layout import SHARD_AXIS, Box, Layout, LeafLayout
from shardkit.places import Medium, Places
from shardkit.snapshot.image import Image
from shardkit.state_moves import laid_out, raw_leaf
from shardkit.transfer import TransferPlan, plan_transfer

__all__ = ["restore"]

LIMIT_BYTES = 256 << 20


def restore(
    images: Sequence[Image],
    layout: Any,
    mesh: Mesh,
    *,
    host: str = "",
    limit_bytes: int = LIMIT_BYTES,
) -> Any:
    """Makes a state of the images of one step, on devices of any number.

    Args:
        images: What survives: of any processes, in any order, also more than needed.
        layout: A tree of `LeafLayout`; what the state is like.
        mesh: Where it goes; of its devices, those of this process are filled.
        host: The host that this is; its own images are read first.
        limit_bytes: How much may be on its way to the devices at a time.

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
    count = dict(zip(saved.mesh.axes, saved.mesh.shape, strict=True))[SHARD_AXIS]
    # Along other axes devices held the same, of which one image has one.
    grid = Places((SHARD_AXIS,), range(count), 0, Medium.HOST)
    dims = {leaf.path: leaf.dim for leaf in saved.leaves}
    source = laid_out(
        [dataclasses.replace(leaf, dim=dims[leaf.path]) for leaf in raw], grid
    )
    pieces = _Pieces(images, host)
    pieces.check(source)
    plan = plan_transfer([source], laid_out(raw, Places.of_mesh(mesh)))
    made, on_the_way, held = [], [], 0
    for leaf, bare in zip(wanted, raw, strict=True):
        array = _Target(bare, mesh, plan, source[bare.path]).fill(pieces)
        held += sum(shard.data.nbytes for shard in array.addressable_shards)
        on_the_way.append(array)
        if held > limit_bytes:
            jax.block_until_ready(on_the_way)
            on_the_way, held = [], 0
        made.append(_as_keys(array, leaf) if leaf is not bare else array)
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


@dataclasses.dataclass(frozen=True)
class _Target:
    """One leaf on the new mesh."""

    leaf: LeafLayout
    mesh: Mesh
    plan: TransferPlan
    source: Layout

    def fill(self, pieces: _Pieces) -> Array:
        """Makes the global array, of which this process has its part."""
        sharding = self.leaf.sharding(self.mesh)
        shape = self.leaf.physical_shape(self.mesh.shape[SHARD_AXIS])
        layout = self.plan.target[self.leaf.path]
        filled: dict[Box, np.ndarray] = {}
        shards = []
        for device in sharding.addressable_devices_indices_map(shape):
            box = layout.box(device.id)
            if box not in filled:
                filled[box] = self._shard(device.id, pieces)
            # Memory of the device's own, which a step can use up.
            shards.append(jax.device_put(filled[box], device, may_alias=False))
        pieces.forget()
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    def _shard(self, device: int, pieces: _Pieces) -> np.ndarray:
        """Puts a device's shard together; its padding is zero."""
        layout = self.plan.target[self.leaf.path]
        dtype = np.dtype(self.leaf.dtype)
        whole = np.zeros(layout.piece_shape, dtype)
        for box, part in self._parts(device, pieces):
            # As bytes, since numpy need not know numbers to copy them.
            to, given = (_bits(x) for x in (whole, part))
            to[layout.slices(device, box)] = given
        return whole

    def _parts(self, device: int, pieces: _Pieces) -> Iterator[tuple[Box, np.ndarray]]:
        for transfer in self.plan.pieces(self.leaf.path, device):
            piece = pieces.read(self.leaf.path, self.source.box(transfer.source))
            slices = self.source.slices(transfer.source, transfer.box)
            yield transfer.box, piece[slices]


def _bits(x: np.ndarray) -> np.ndarray:
    return x if x.dtype.kind == "c" else x.view(f"u{x.dtype.itemsize}")


def _as_keys(words: Array, leaf: LeafLayout) -> Array:
    """Makes random keys of their words."""
    assert is_key_dtype(leaf.dtype)
    found: list[Any] = []
    # Only an array, or what stands for one, can be asked for its generator.
    jax.eval_shape(lambda x: found.append(jax.random.key_impl(x)), leaf.abstract)
    return jax.random.wrap_key_data(words, impl=found[0])
