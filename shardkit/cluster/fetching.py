"""Images read from where they are: this host's memory, or another host's agent.

Owns what a worker reads of images, and how an agent answers. Invariant: only what an
agent has committed is ever read, within its bounds. Whether the bytes are whole is for
who reads them.
"""

import asyncio
import mmap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shardkit.cluster.deadlines import Deadlines
from shardkit.cluster.peers import Part, Peers, interleave
from shardkit.cluster.records import ImageRef
from shardkit.cluster.wire import Link, WireError, encode
from shardkit.errors import ClusterError
from shardkit.snapshot.head import as_bytes
from shardkit.snapshot.segments import Segment

__all__ = ["Fetcher", "Span", "serve_fetch"]

_MOST_BYTES = 64 << 20
_FEW_BYTES = 1 << 16
"""Less than this is sent with its header."""


class Span(NamedTuple):
    """Some bytes of an image.

    Attributes:
        ref: Where the image is.
        offset: Where they begin in it.
        num_bytes: How many they are.
    """

    ref: ImageRef
    offset: int
    num_bytes: int


class Fetcher:
    """Reads images for a worker; connections and maps are kept until `close`.

    Args:
        token: The run's secret.
        deadlines: How long things may take.
        host: The host of the worker.
        locate: Returns the file of an image of this host.

    Attributes:
        num_bytes: What has come from other hosts so far.
    """

    def __init__(
        self,
        token: str,
        deadlines: Deadlines,
        host: str,
        locate: Callable[[str], str],
    ) -> None:
        self._host, self._locate = host, locate
        self._lock = threading.Lock()
        self._peers = Peers(token, deadlines)
        self._maps: dict[str, memoryview] = {}
        self.num_bytes = 0

    def fetch_all(self, spans: Sequence[Span]) -> list[memoryview]:
        """Returns bytes of images; see `Member.fetch_all`."""
        for ref, offset, num_bytes in spans:
            end = offset + num_bytes
            if not (0 <= offset and 0 <= num_bytes and end <= ref.num_bytes):
                raise ClusterError(
                    f"image {ref.name}: bytes {offset} to {end} were asked for, it has "
                    f"{ref.num_bytes}"
                )
        with self._lock:
            found, parts = [], []
            for ref, offset, num_bytes in spans:
                if ref.host == self._host:
                    found.append(self._map(ref)[offset : offset + num_bytes])
                    continue
                place = ref.host, ref.address, ref.name, offset, num_bytes
                parts.append(Part(*place, key=len(found)))
                found.append(np.empty(num_bytes, np.uint8).data)
            for chunk, data in self._peers.read(interleave(parts)):
                start = chunk.offset - spans[chunk.key].offset
                found[chunk.key][start : start + chunk.num_bytes] = as_bytes(data)
                self.num_bytes += chunk.num_bytes
            return found

    def _map(self, ref: ImageRef) -> memoryview:
        if ref.name not in self._maps:
            with open(self._locate(ref.name), "rb") as file:
                found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[ref.name] = memoryview(found)
        return self._maps[ref.name]

    def close(self) -> None:
        """Ends all connections; maps end with those who look at them."""
        self._peers.close()
        self._maps.clear()


async def serve_fetch(
    link: Link,
    header: dict[str, Any],
    find: Callable[[str], Segment | None],
    path: Callable[[str], Path],
    timeout_s: float,
) -> None:
    """Answers one `fetch` of a peer.

    Args:
        link: The peer.
        header: What it asks for.
        find: Returns a segment of this host that others may read.
        path: Returns the file of one.
        timeout_s: For how long the peer may take to read it.
    """
    name, offset, size = (header.get(key) for key in ("name", "offset", "num_bytes"))
    segment = find(name) if isinstance(name, str) else None
    if segment is None:
        link.post({"type": "refused", "why": "it is not there any more"})
        return
    if not (type(offset) is int and type(size) is int):
        raise WireError(f"{link.peer} asks for what is no part of a segment")
    is_inside = offset >= 0 and 0 < size <= _MOST_BYTES
    if not is_inside or offset + size > segment.num_bytes:
        link.post({"type": "refused", "why": "it is not so long"})
        return
    head = encode({"type": "bytes"}, size)
    async with asyncio.timeout(timeout_s):
        if size <= _FEW_BYTES:
            link.writer.write(head + bytes(segment.memory[offset : offset + size]))
            await link.writer.drain()
            return
        with open(path(segment.name), "rb") as file:
            link.writer.write(head)
            loop = asyncio.get_running_loop()
            await loop.sendfile(link.writer.transport, file, offset, size)
