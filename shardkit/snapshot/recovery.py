"""Which step a run goes on from after a loss.

Owns one pure choice, from what the hosts that are left say they have: the newest step
of which every bit is there or can be rebuilt. Invariant: a step is chosen only if the
boxes of every leaf, each once, add up to its volume; and what was lost, and what will
be rebuilt from where, is said. It reads and moves nothing.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Sequence

from shardkit.checkpoint.views import Box, box_shape
from shardkit.errors import TornError
from shardkit.snapshot.head import IMAGE, Buffer, as_bytes, read_head, torn
from shardkit.snapshot.image import Image, read_image
from shardkit.snapshot.protection import Protection, read_protection
from shardkit.snapshot.repairs import Rebuild, Survivor, plan_rebuild

__all__ = ["ImageSource", "Plan", "Report", "choose", "report"]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a host says of one of its segments.

    Attributes:
        host: The host that has it.
        name: Its name there.
        content: Its first bytes: all that is known of what is in it.
    """

    host: str
    name: str
    content: bytes


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """An image that is there.

    Attributes:
        host: The host that has it.
        name: The name of its segment.
        process: Whose state it is.
        num_bytes: Its size.
    """

    host: str
    name: str
    process: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to go on from.

    Attributes:
        step: The step, or None if there is none but those on disk.
        generation: The generation that took it.
        images: The images that are there.
        rebuilds: Those that have to be rebuilt first.
        words: What was lost, what is rebuilt from where, and why newer steps are not
            whole.
    """

    step: int | None
    generation: int = 0
    images: tuple[ImageSource, ...] = ()
    rebuilds: tuple[Rebuild, ...] = ()
    words: tuple[str, ...] = ()

    @property
    def rebuilt_bytes(self) -> int:
        """The bytes of the images that are rebuilt."""
        return sum(rebuild.num_bytes for rebuild in self.rebuilds)

    @property
    def read_bytes(self) -> int:
        """The bytes that are read for that."""
        return sum(rebuild.read_bytes for rebuild in self.rebuilds)


def report(host: str, name: str, memory: Buffer) -> Report:
    """Says what is in a segment; the blocks and pieces are not read.

    Args:
        host: The host that has it.
        name: Its name.
        memory: Its bytes.

    Raises:
        TornError: If nothing in it is of use.
    """
    memory, where = as_bytes(memory), f"{host}: {name}"
    head = read_head(memory, where)
    if len(memory) < head.num_bytes:
        raise torn(where, f"expected {head.num_bytes} bytes, found {len(memory)}")
    end = head.body_start if head.magic == IMAGE else head.solid_bytes
    return Report(host, name, bytes(memory[:end]))


def choose(
    reports: Iterable[Report], *, run: str | None = None, max_step: int | None = None
) -> Plan:
    """Chooses the newest step that is whole or can be made so.

    Of two generations that took the same step the later one counts.

    Args:
        reports: What every host that is left has.
        run: The run; what is of another one is left alone.
        max_step: The newest step to consider, if the run has gone back on purpose.

    Returns:
        The plan; its step is None if no step can be made whole.
    """
    found, words = _sorted_out(reports, run)
    for key in sorted(found, reverse=True):
        if max_step is not None and key[0] > max_step:
            continue
        plan, reason = _judge(key, found[key])
        words += reason
        if plan is not None:
            return dataclasses.replace(plan, words=tuple(words))
    words.append("no step is whole in memory: the newest checkpoint on disk is next")
    return Plan(None, words=tuple(words))


@dataclasses.dataclass
class _Found:
    """All that is left of one step of one generation."""

    images: dict[int, Survivor] = dataclasses.field(default_factory=dict)
    protections: list[tuple[Report, Protection]] = dataclasses.field(
        default_factory=list
    )


def _sorted_out(
    reports: Iterable[Report], run: str | None
) -> tuple[dict[tuple[int, int], _Found], list[str]]:
    found: dict[tuple[int, int], _Found] = {}
    words = []
    for one in sorted(reports, key=lambda one: (one.host, one.name)):
        where = f"{one.host}: {one.name}"
        try:
            head = read_head(one.content, where)
            if head.magic == IMAGE:
                item = read_image(one.content, where, header_only=True)
                owner = item.layout.run
            else:
                item = read_protection(one.content, where)
                owner = item.plan.run
        except TornError as error:
            words.append(str(error))
            continue
        if run is not None and owner != run:
            words.append(f"{where}: expected run {run}, found {owner}: left alone")
            continue
        at = found.setdefault((head.step, head.generation), _Found())
        if isinstance(item, Protection):
            at.protections.append((one, item))
        else:
            other = at.images.get(head.process)
            # One that was rebuilt has less in it than one that never was lost.
            if other is None or other.image.head.num_bytes < head.num_bytes:
                at.images[head.process] = Survivor(
                    one.host, one.name, item, one.content
                )
    return found, words


def _judge(key: tuple[int, int], found: _Found) -> tuple[Plan | None, list[str]]:
    """Makes the plan for one step, or says why there is none."""
    name = f"step {key[0]}"
    lost_heads = _heads_of_lost(found)
    known = [*(x.image for x in found.images.values()), *lost_heads.values()]
    if not known:
        return None, [f"{name} cannot be used: nothing says what its images held"]
    first = known[0].layout
    same = first.leaves, first.mesh, first.num_processes
    for image in known:
        layout = image.layout
        if (layout.leaves, layout.mesh, layout.num_processes) != same:
            return None, [f"{name} cannot be used: {image.where} is of another state"]
    covered = _Coverage(first.leaves)
    for survivor in found.images.values():
        covered.add(survivor.image)
    lost = sorted({*range(first.num_processes)} - found.images.keys())
    words = [
        f"{name}: the image of process {process} is lost"
        + (f" with {lost_heads[process].layout.host}" if process in lost_heads else "")
        for process in lost
    ]
    rebuilds: list[Rebuild] = []
    for process in lost:
        image = lost_heads.get(process)
        if covered.is_whole or image is None or not covered.would_gain(image):
            continue
        rebuild, problem = plan_rebuild(
            process, found.images, found.protections, tuple(rebuilds)
        )
        if rebuild is None:
            words.append(f"{name}: {problem}")
            continue
        rebuilds.append(rebuild)
        covered.add(image, protected_only=True)
        words.append(f"{name}: {rebuild.describe()}")
    if problem := covered.problem():
        return None, [*words, f"{name} is not whole: {problem}"]
    sources = tuple(
        ImageSource(x.host, x.name, process, x.image.head.num_bytes)
        for process, x in sorted(found.images.items())
    )
    if lost and not rebuilds:
        words.append(f"{name}: what was lost has copies elsewhere; nothing is rebuilt")
    return Plan(key[0], key[1], sources, tuple(rebuilds)), words


def _heads_of_lost(found: _Found) -> dict[int, Image]:
    """What the images that are gone had in them, as those that protect them know."""
    heads: dict[int, Image] = {}
    for one, protection in found.protections:
        for content in protection.plan.head_bytes:
            process = read_head(content).process
            if process not in heads and process not in found.images:
                where = f"{one.host}: {one.name}: process {process}"
                # Without it the image is lost for good, and that is said.
                with contextlib.suppress(TornError):
                    heads[process] = read_image(content, where, header_only=True)
    return heads


class _Coverage:
    """Which boxes of which leaves there are."""

    def __init__(self, leaves: Sequence) -> None:
        self._leaves = leaves
        self._boxes: list[dict[Box, int]] = [{} for _ in leaves]
        self._missing = [math.prod(leaf.shape) for leaf in leaves]

    def add(self, image: Image, *, protected_only: bool = False) -> None:
        """Counts the boxes of an image, each once."""
        for leaf, box in _boxes(image, protected_only):
            if box not in self._boxes[leaf]:
                volume = math.prod(box_shape(box))
                self._boxes[leaf][box] = volume
                self._missing[leaf] -= volume

    def would_gain(self, image: Image) -> bool:
        """Whether an image's protected pieces hold something that is missing."""
        return any(box not in self._boxes[leaf] for leaf, box in _boxes(image, True))

    @property
    def is_whole(self) -> bool:
        """Whether every leaf is there, and no part of one twice."""
        return not any(self._missing)

    def problem(self) -> str | None:
        """Says what is missing."""
        bad = [i for i, volume in enumerate(self._missing) if volume]
        if not bad:
            return None
        leaf = self._leaves[bad[0]]
        size = math.prod(leaf.shape)
        return (
            f"{len(bad)} of {len(self._leaves)} leaves are not all there; of "
            f"{leaf.path} {size - self._missing[bad[0]]} of {size} elements"
        )


def _boxes(image: Image, protected_only: bool) -> Iterable[tuple[int, Box]]:
    end = image.head.solid_bytes if protected_only else image.head.num_bytes
    for piece in image.pieces:
        if piece.num_bytes and piece.offset + piece.num_bytes <= end:
            yield piece.leaf, piece.box
