"""Images of a snapshot, of which only what is wanted is fetched from other hosts.

Owns which bytes those are: of every image those that say what is in it, and of the
pieces those that somebody asks for. Invariants: what is asked for before any of it is
read goes over the wire together, from all hosts at once, and is held until it is read;
each piece is verified as one of an image in memory is. How bytes are fetched is
`fetching`'s; which pieces are wanted, and how many at a time, who reads them says.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from shardkit.cluster.fetching import Span
from shardkit.cluster.records import Assignment, ImageRef
from shardkit.snapshot.head import RECORD_BYTES, read_record, torn
from shardkit.snapshot.image import Image, read_image

__all__ = ["Reader", "RemoteImage", "open_images"]

_FIRST_BYTES = 1 << 16
"""What is fetched before it is known how long the header is."""
_GAP_BYTES = 1 << 12
"""What is fetched for nothing rather than to ask twice."""

FetchAll = Callable[[Sequence[Span]], list[memoryview]]


class Reader(Protocol):
    """What a `Member` is to images."""

    @property
    def assignment(self) -> Assignment:
        """Which host this is."""
        ...

    def fetch_all(self, spans: Sequence[Span]) -> list[memoryview]:
        """Returns bytes of images."""
        ...


def open_images(reader: Reader, refs: Sequence[ImageRef]) -> list[Image]:
    """Opens the images of a step, wherever they are.

    Args:
        reader: How bytes of them are read.
        refs: Where they are.

    Returns:
        An image for each. Of those of other hosts the pieces that are read soon should
        be asked for first, many at a time, by `Image.ask`.

    Raises:
        TornError: If one of them is not whole, as far as its header says.
        ClusterError: If one is not there any more.
        WireError: If its host does not answer.
    """
    here = reader.assignment.host
    remote = [ref for ref in refs if ref.host != here]
    heads = dict(zip(remote, _read_heads(reader.fetch_all, remote), strict=True))
    together = _Together(reader.fetch_all)
    found = []
    for ref in refs:
        where = f"the image of process {ref.process} on {ref.host}"
        if ref in heads:
            found.append(_open_remote(ref, heads[ref], where, together))
        else:
            (memory,) = reader.fetch_all([Span(ref, 0, ref.num_bytes)])
            found.append(read_image(memory, where))
    return found


def _read_heads(fetch_all: FetchAll, refs: Sequence[ImageRef]) -> list[memoryview]:
    """Returns the first bytes of images, their headers among them."""
    sizes = [min(_FIRST_BYTES, ref.num_bytes) for ref in refs]
    heads = fetch_all([Span(ref, 0, n) for ref, n in zip(refs, sizes, strict=True)])
    more = {}
    for index, (ref, head) in enumerate(zip(refs, heads, strict=True)):
        where = f"the image of process {ref.process} on {ref.host}"
        end = min(read_record(head[:RECORD_BYTES], where).body_start, ref.num_bytes)
        if end > len(head):
            more[index] = Span(ref, len(head), end - len(head))
    for index, rest in zip(more, fetch_all(list(more.values())), strict=True):
        heads[index] = memoryview(bytes(heads[index]) + rest)
    return heads


def _open_remote(
    ref: ImageRef, head: memoryview, where: str, together: "_Together"
) -> "RemoteImage":
    found = read_image(head, where, header_only=True)
    if found.head.num_bytes > ref.num_bytes:
        expected = found.head.num_bytes
        raise torn(where, f"expected {expected} bytes, found {ref.num_bytes}")
    fields = {x.name: getattr(found, x.name) for x in dataclasses.fields(Image)}
    return RemoteImage(**fields, ref=ref, together=together)


@dataclasses.dataclass(frozen=True)
class RemoteImage(Image):
    """An image of another host.

    Attributes:
        memory: What was fetched to see what is in it.
        ref: Where it is.
        together: What is asked for of all remote images.
    """

    ref: ImageRef
    together: "_Together"

    def has(self, index: int) -> bool:
        """Whether a piece is there; see `Image.has`."""
        piece = self.layout.pieces[index]
        return piece.offset + piece.num_bytes <= self.head.num_bytes

    def ask(self, index: int) -> None:
        """Says that a piece will be read soon, and once."""
        if self.has(index) and not super().has(index):
            self.together.ask(self._span(index))

    def _data(self, index: int) -> memoryview:
        if super().has(index):
            return super()._data(index)
        return self.together.take(self._span(index))

    def _span(self, index: int) -> Span:
        piece = self.layout.pieces[index]
        return Span(self.ref, piece.offset, piece.num_bytes)


class _Together:
    """What was asked for and not read yet."""

    def __init__(self, fetch_all: FetchAll) -> None:
        self._fetch_all = fetch_all
        self._asked: set[Span] = set()
        self._there: dict[Span, memoryview] = {}

    def ask(self, span: Span) -> None:
        if span not in self._there:
            self._asked.add(span)

    def take(self, span: Span) -> memoryview:
        """Returns what was asked for, which is not held any longer then."""
        if span not in self._there:
            self._asked.add(span)
            runs = list(_runs(self._asked))
            self._asked = set()
            wholes = [Span(*run[0][:2], _end(run) - run[0].offset) for run in runs]
            for run, data in zip(runs, self._fetch_all(wholes), strict=True):
                for part in run:
                    start = part.offset - run[0].offset
                    self._there[part] = data[start : start + part.num_bytes]
        return self._there.pop(span)


def _runs(spans: set[Span]) -> Iterator[list[Span]]:
    """Puts together what lies side by side."""
    run: list[Span] = []
    for span in sorted(spans, key=lambda x: (x.ref.host, x.ref.name, x.offset)):
        if run and (span.ref != run[0].ref or span.offset - _end(run) > _GAP_BYTES):
            yield run
            run = []
        run.append(span)
    if run:
        yield run


def _end(run: Sequence[Span]) -> int:
    return run[-1].offset + run[-1].num_bytes
