"""Which process keeps which pieces.

Owns one pure choice: of the processes that hold the same piece, who copies it to host
memory. Invariant: it depends on its arguments alone, so that every process finds the
same without asking; a piece whose copies survive any loss that is protected against is
protected by nothing else, and every other one is kept once.
"""

import dataclasses
import heapq
from collections.abc import Iterable, Mapping, Sequence

from shardkit.checkpoint.views import Box
from shardkit.errors import ConfigError
from shardkit.snapshot.layout import Piece

__all__ = ["Claim", "assign"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A piece of a leaf, and all who hold it.

    Attributes:
        leaf: The index of the leaf.
        box: Which part of it.
        num_bytes: Its bytes, without padding.
        holders: `(process, device)` of every copy.
    """

    leaf: int
    box: Box
    num_bytes: int
    holders: tuple[tuple[int, int], ...]


def assign(
    claims: Iterable[Claim], host_of: Mapping[int, str], num_losses: int
) -> dict[int, tuple[Piece, ...]]:
    """Chooses who keeps what.

    A piece that is on more hosts than can be lost at once (at least on two) is kept on
    as few of them as outlive that, unprotected. Any other is kept by one process, and
    has to be protected. Large pieces are given out first, each to the hosts that keep
    the least so far.

    Args:
        claims: All distinct pieces of the state; empty ones are kept by nobody.
        host_of: The host of every process.
        num_losses: How many hosts may be lost at once.

    Returns:
        For every process in `host_of` its pieces, in the order of leaves and boxes.

    Raises:
        ConfigError: If a holder has no host.

    Example:
        >>> claims = [Claim(0, ((0, 2),), 8, ((0, 0), (1, 1))),
        ...           Claim(1, ((0, 2),), 8, ((1, 1),))]
        >>> kept = assign(claims, {0: "a", 1: "b"}, num_losses=1)
        >>> [(piece.leaf, piece.protected) for piece in kept[1]]
        [(0, False), (1, True)]
    """
    ordered = sorted(
        claims, key=lambda claim: (-claim.num_bytes, claim.leaf, claim.box)
    )
    unknown = {p for claim in ordered for p, _ in claim.holders} - host_of.keys()
    if unknown:
        raise ConfigError(
            f"snapshot: expected a host for every process, found none for processes "
            f"{sorted(unknown)[:20]}."
        )
    num_hosts = len(set(host_of.values()))
    num_copies = max(2, 1 + min(num_losses, num_hosts - 1))
    loads = _Loads(host_of)
    kept: dict[int, list[Piece]] = {process: [] for process in sorted(host_of)}
    for claim in ordered:
        if not claim.num_bytes:
            continue
        devices: dict[int, int] = {}
        for process, device in sorted(claim.holders):
            devices.setdefault(process, device)
        hosts = {host_of[process] for process in devices}
        is_safe = len(hosts) >= num_copies
        for process in loads.take(
            tuple(devices), claim.num_bytes, num_copies if is_safe else 1
        ):
            kept[process].append(
                Piece(
                    leaf=claim.leaf,
                    device=devices[process],
                    box=claim.box,
                    num_bytes=claim.num_bytes,
                    protected=not is_safe,
                )
            )
    return {
        process: tuple(sorted(pieces, key=lambda piece: (piece.leaf, piece.box)))
        for process, pieces in kept.items()
    }


class _Loads:
    """How much every host and process keeps, and which keep the least."""

    def __init__(self, host_of: Mapping[int, str]) -> None:
        self._host_of = host_of
        self._hosts = dict.fromkeys(host_of.values(), 0)
        self._processes = dict.fromkeys(host_of, 0)
        self._heaps: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}

    def take(
        self, processes: Sequence[int], num_bytes: int, num_copies: int
    ) -> list[int]:
        """Gives so many bytes to processes on different hosts, to the idlest ones."""
        key = tuple(processes)
        if key not in self._heaps:
            self._heaps[key] = [self._entry(process) for process in key]
            heapq.heapify(self._heaps[key])
        heap, chosen, passed = self._heaps[key], [], []
        hosts: set[str] = set()
        while len(chosen) < num_copies:
            entry = heapq.heappop(heap)
            process = entry[-1]
            # Loads only grow, so an entry that is still true is the least.
            if entry != (now := self._entry(process)):
                heapq.heappush(heap, now)
            elif self._host_of[process] in hosts:
                passed.append(process)
            else:
                hosts.add(self._host_of[process])
                chosen.append(process)
        for process in chosen:
            self._hosts[self._host_of[process]] += num_bytes
            self._processes[process] += num_bytes
        for process in (*chosen, *passed):
            heapq.heappush(heap, self._entry(process))
        return sorted(chosen)

    def _entry(self, process: int) -> tuple[int, int, int]:
        host = self._host_of[process]
        return self._hosts[host], self._processes[process], process
