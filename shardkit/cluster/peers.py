"""Bytes of segments of other hosts, read from their agents.

Owns connections to agents, and how much is asked for ahead. Invariants: no more than a
bounded amount is on its way; every wait has a deadline; a connection on which something
was left unread is not used again. For one thread at a time.
"""

import collections
import dataclasses
from collections.abc import Generator, Iterable, Iterator

from shardkit.cluster.channel import Channel
from shardkit.cluster.deadlines import Deadlines
from shardkit.errors import ClusterError
from shardkit.snapshot.head import Buffer, as_bytes

__all__ = ["Part", "Peers", "interleave"]

_CHUNK_BYTES = 1 << 20
_WINDOW_BYTES = 8 << 20
"""What may be on its way at once, over all peers."""
_MOST_WAITING = 64
"""So many requests at most: a peer that cannot answer reads no more of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A part of a segment.

    Attributes:
        host: The host that has it.
        address: `"ip:port"` of that host's agent.
        name: The segment.
        offset: Where the part begins.
        num_bytes: How long it is.
        key: Whatever the caller wants to know it by.
    """

    host: str
    address: str
    name: str
    offset: int
    num_bytes: int
    key: int = 0


class Peers:
    """Reads from other agents; connections are kept until `close`.

    Args:
        token: The run's secret.
        deadlines: How long things may take.
    """

    def __init__(self, token: str, deadlines: Deadlines) -> None:
        self._token, self._deadlines = token, deadlines
        self._channels: dict[str, Channel] = {}

    def read(self, parts: Iterable[Part]) -> Generator[tuple[Part, Buffer], None, None]:
        """Yields the chunks of some parts, in their order, as they come.

        Raises:
            ClusterError: If a segment is not there any more, or not so long.
            WireError: If its host does not answer.
        """
        waiting: collections.deque[Part] = collections.deque()
        num_bytes = 0
        try:
            for part in _chunks(parts):
                while waiting and (
                    num_bytes + part.num_bytes > _WINDOW_BYTES
                    or len(waiting) >= _MOST_WAITING
                ):
                    num_bytes -= waiting[0].num_bytes
                    yield self._take(waiting)
                waiting.append(part)
                num_bytes += part.num_bytes
                self._ask(part)
            while waiting:
                yield self._take(waiting)
        finally:
            for part in waiting:
                self._drop(part.address)

    def read_all(self, part: Part) -> bytearray:
        """Returns all of a part; see `read`."""
        found = bytearray(part.num_bytes)
        for chunk, data in self.read([part]):
            start = chunk.offset - part.offset
            found[start : start + chunk.num_bytes] = as_bytes(data)
        return found

    def keep_only(self, addresses: Iterable[str]) -> None:
        """Ends connections to others."""
        for address in self._channels.keys() - set(addresses):
            self._drop(address)

    def close(self) -> None:
        """Ends all connections."""
        self.keep_only(())

    def _drop(self, address: str) -> None:
        if address in self._channels:
            self._channels.pop(address).close()

    def _ask(self, part: Part) -> None:
        if part.address not in self._channels:
            peer, limit_s = f"the agent of {part.host}", self._deadlines.connect_s
            channel = Channel(part.address, self._token, peer, limit_s)
            self._channels[part.address] = channel
        self._channels[part.address].send(
            {
                "type": "fetch",
                "name": part.name,
                "offset": part.offset,
                "num_bytes": part.num_bytes,
            }
        )

    def _take(self, waiting: collections.deque[Part]) -> tuple[Part, Buffer]:
        part = waiting[0]
        channel = self._channels[part.address]
        header, payload = channel.receive(
            max_payload_bytes=part.num_bytes,
            timeout_s=self._deadlines.request_s,
            what=f"{part.num_bytes} bytes of segment {part.name}",
        )
        if header["type"] != "bytes" or len(payload) != part.num_bytes:
            why = header.get("why", "it sent less than that")
            raise ClusterError(f"{channel.peer}: segment {part.name}: {why}")
        waiting.popleft()
        return part, payload


def interleave(parts: Iterable[Part]) -> Iterator[Part]:
    """Yields the chunks of parts, each peer's in turn: all of them send at once.

    >>> a, b = (Part(x, x, "image", 0, 2 << 20) for x in "ab")
    >>> [(part.host, part.offset >> 20) for part in interleave([a, b])]
    [('a', 0), ('b', 0), ('a', 1), ('b', 1)]
    """
    of_peers: dict[str, list[Part]] = {}
    for part in parts:
        of_peers.setdefault(part.address, []).append(part)
    queues = {address: _chunks(found) for address, found in of_peers.items()}
    while queues:
        for address, queue in list(queues.items()):
            if (chunk := next(queue, None)) is None:
                del queues[address]
            else:
                yield chunk


def _chunks(parts: Iterable[Part]) -> Iterator[Part]:
    for part in parts:
        for start in range(0, part.num_bytes, _CHUNK_BYTES):
            yield dataclasses.replace(
                part,
                offset=part.offset + start,
                num_bytes=min(_CHUNK_BYTES, part.num_bytes - start),
            )
