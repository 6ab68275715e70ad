"""What snapshots cost: host memory, and bytes between hosts, before there are any.

Owns the prediction. Invariant: it is never less than what the segments take. Pure.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from shardkit.snapshot.codewords import cut_codewords
from shardkit.snapshot.groups import Group
from shardkit.snapshot.head import align

__all__ = ["Cost", "ImageSize", "predict"]

_HEADER_BYTES = 1 << 14
"""More than the header of a protection takes, but for what it says of each host."""


class ImageSize(NamedTuple):
    """The bytes of an image: all, those to be protected, its head."""

    num_bytes: int
    protected_bytes: int
    head_bytes: int = 0


class Cost(NamedTuple):
    """What snapshots cost one host.

    Attributes:
        snapshot_bytes: Host memory for images, all slots together.
        protection_bytes: Host memory for what protects other hosts' images, likewise.
        received_bytes: What comes from other hosts for every snapshot.
    """

    snapshot_bytes: int
    protection_bytes: int
    received_bytes: int

    @property
    def total_bytes(self) -> int:
        """Host memory for everything."""
        return self.snapshot_bytes + self.protection_bytes


def predict(
    images: Mapping[str, Sequence[ImageSize]],
    groups: Iterable[Group],
    num_slots: int = 2,
) -> dict[str, Cost]:
    """Predicts what snapshots cost every host.

    Args:
        images: The images of every host.
        groups: Which hosts protect one another.
        num_slots: How many snapshots are kept: the last and the one being taken.

    Example:
        >>> images = {host: [ImageSize(3 << 20, 3 << 20)] for host in "abcd"}
        >>> costs = predict(images, [Group(("a", "b", "c", "d"), num_losses=1)])
        >>> costs["a"].snapshot_bytes >> 20, costs["a"].protection_bytes >> 20
        (6, 2)
    """
    protection, received = dict.fromkeys(images, 0), dict.fromkeys(images, 0)
    for group in groups:
        columns = [images.get(host, ()) for host in group.hosts]
        names = sum(map(len, group.hosts))
        fixed = align(_HEADER_BYTES + 8 * names + 64 * sum(map(len, columns)))
        fixed += sum(align(size.head_bytes) for column in columns for size in column)
        for host in group.hosts:
            protection[host] = fixed
        for lane in range(max(map(len, columns), default=0)):
            sizes = [
                column[lane].protected_bytes if lane < len(column) else 0
                for column in columns
            ]
            for codeword in cut_codewords(group, sizes):
                for member in codeword.parity:
                    host = group.hosts[member]
                    protection[host] += align(codeword.num_bytes)
                    received[host] += sum(block.num_bytes for block in codeword.data)
    return {
        host: Cost(
            num_slots * sum(size.num_bytes for size in sizes),
            num_slots * protection[host],
            received[host],
        )
        for host, sizes in images.items()
    }
