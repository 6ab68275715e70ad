"""Which host has which block of which codeword.

Owns the cutting of the images of a group into codewords. Invariant: the blocks of a
codeword are on different hosts, so that a lost host takes at most one of each, and all
hosts keep the same share of the parity, as the disks of RAID-5 do. Pure: positions in a
group and byte ranges only.

With k hosts and M losses an image is cut into k - M stripes. Codeword c has its parity
at positions c to c + M - 1 (modulo k) and a stripe of each of the other hosts.

References:
    Patterson, Gibson, Katz: A Case for Redundant Arrays of Inexpensive Disks (SIGMOD
    1988).
"""

from collections.abc import Sequence
from typing import NamedTuple

from shardkit.snapshot.groups import Group
from shardkit.snapshot.head import align

__all__ = ["Block", "Codeword", "cut_codewords"]


class Block(NamedTuple):
    """A stripe of an image: the host's position in the group, and a byte range."""

    member: int
    offset: int
    num_bytes: int


class Codeword(NamedTuple):
    """One codeword.

    Attributes:
        index: Which of the group's.
        data: Its data blocks; shorter ones go on with zeros.
        parity: The positions of the hosts that keep its parity blocks, in their order.
        num_bytes: The length of a parity block: of the longest data block.
    """

    index: int
    data: tuple[Block, ...]
    parity: tuple[int, ...]
    num_bytes: int


def cut_codewords(group: Group, sizes: Sequence[int]) -> tuple[Codeword, ...]:
    """Cuts one image of every host into codewords.

    Args:
        group: The hosts.
        sizes: The bytes of each one's image; 0 for a host without one.

    Example:
        >>> group = Group(("a", "b", "c"), num_losses=1)
        >>> _, second, _ = cut_codewords(group, [128, 128, 100])
        >>> second.parity, second.data[1]
        ((1,), Block(member=2, offset=64, num_bytes=36))
    """
    num_hosts = len(group.hosts)
    assert len(sizes) == num_hosts
    if group.is_mirror:
        return tuple(
            Codeword(i, (Block(i, 0, size),), ((i + 1) % num_hosts,), size)
            for i, size in enumerate(sizes)
        )
    num_stripes = num_hosts - group.num_losses
    stripes = [align(-(-size // num_stripes)) for size in sizes]
    used, codewords = [0] * num_hosts, []
    for index in range(num_hosts):
        parity = tuple((index + j) % num_hosts for j in range(group.num_losses))
        data = []
        for member in range(num_hosts):
            if member not in parity:
                start = min(used[member] * stripes[member], sizes[member])
                stop = min(start + stripes[member], sizes[member])
                data.append(Block(member, start, stop - start))
                used[member] += 1
        num_bytes = max(block.num_bytes for block in data)
        codewords.append(Codeword(index, tuple(data), parity, num_bytes))
    return tuple(codewords)
