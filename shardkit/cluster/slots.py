"""The segments of a host: where its workers write snapshots, and which are kept.

Owns the two slots of every worker and the images in them. Invariants: the newest image
that is protected on all hosts is never given out to be overwritten; what was not
committed is never offered as an image; a worker of a new generation writes into new
segments, so that one of an old generation cannot reach them; one that has ended gets
none. Nothing but `create` takes long.
"""

import dataclasses
import os
import threading
from collections.abc import Container
from pathlib import Path
from typing import Any

from shardkit.snapshot.segments import Segment, Segments

__all__ = ["Image", "Slots"]


@dataclasses.dataclass(kw_only=True, slots=True)
class Image:
    """A committed snapshot of one process.

    Attributes:
        name: Its segment.
        step: How many steps are in it.
        generation: Who wrote it.
        process: Which process of that generation.
        num_bytes: Its size.
        protected_bytes: How many of these have to be protected.
        head_bytes: The bytes that say what is in it.
    """

    name: str
    step: int
    generation: int
    process: int
    num_bytes: int
    protected_bytes: int
    head_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(slots=True)
class _Slot:
    segment: Segment
    image: Image | None = None


class Slots:
    """The slots of all workers of a host.

    Args:
        segments: Where they are.

    Attributes:
        protected: The newest step known to be whole and protected, and of which
            generation: `(generation, step)`.
    """

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self._slots: dict[tuple[int, int], list[_Slot]] = {}
        self._num_made = self._ended = 0
        self._leaving: list[threading.Thread] = []
        self.protected: tuple[int, int] = (0, -1)

    def new_name(self, kind: str) -> str:
        """Returns a name that no segment of this host has had."""
        self._num_made += 1
        return f"{kind}.{os.getpid()}.{self._num_made}"

    def create(self, name: str, num_bytes: int) -> Segment:
        """Makes a segment, of which the caller is the owner; in a thread of its own.

        Raises:
            SaveError: If there is no room for it.
        """
        for thread in self._leaving:
            thread.join()
        return self._segments.create(name, num_bytes)

    def remove(self, segment: Segment) -> None:
        """Removes a segment; who reads it still may go on."""
        self._segments.unlink(segment.name)
        # To give gigabytes back takes longer than an agent may be silent.
        thread = threading.Thread(target=segment.close, daemon=True)
        thread.start()
        self._leaving = [x for x in self._leaving if x.is_alive()] + [thread]

    def reserve(self, generation: int, process: int, num_bytes: int) -> str | None:
        """Gives out a segment to write into; None if none is there that is free."""
        slots = self._slots.get((generation, process), [])
        free = next((slot for slot in slots if self._is_free(slot)), None)
        if free is None:
            return None
        if free.segment.num_bytes < num_bytes:
            slots.remove(free)
            self.remove(free.segment)
            return None
        free.image = None
        return free.segment.name

    def count(self, generation: int, process: int) -> int:
        """Counts the segments of a worker."""
        return len(self._slots.get((generation, process), []))

    def may_grow(self, generation: int, process: int) -> bool:
        """Whether a worker may have one more: it lives, and has not two."""
        return generation > self._ended and self.count(generation, process) < 2

    def add(self, generation: int, process: int, segment: Segment) -> None:
        """Takes a segment for a worker, unless that has ended meanwhile."""
        if self.may_grow(generation, process):
            slots = self._slots.setdefault((generation, process), [])
            slots.append(_Slot(segment))
        else:
            self.remove(segment)

    def has_older(self, generation: int) -> bool:
        """Whether there are images of generations before this one."""
        return any(slots for key, slots in self._slots.items() if key[0] < generation)

    def drop_older(self, generation: int, keep: Container[str]) -> bool:
        """Removes the images of older generations but some; whether there were any."""
        found = [
            slot.segment.name
            for key, slots in self._slots.items()
            for slot in slots
            if key[0] < generation and slot.segment.name not in keep
        ]
        for name in found:
            self.drop(name)
        return bool(found)

    def _is_free(self, slot: _Slot) -> bool:
        image = slot.image
        return image is None or (image.generation, image.step) < self.protected

    def given_out(self, generation: int, process: int, name: str) -> Segment | None:
        """Returns a segment that a worker is writing into; None if it is none."""
        for slot in self._slots.get((generation, process), []):
            if slot.segment.name == name and slot.image is None:
                return slot.segment
        return None

    def commit(self, image: Image) -> None:
        """Takes what was written as an image; the segment must be `given_out`."""
        for slot in self._slots[image.generation, image.process]:
            if slot.segment.name == image.name:
                slot.image = image

    def adopt(self, segment: Segment, image: Image) -> None:
        """Takes an image that was made again here, of a process of another host."""
        slots = self._slots.setdefault((image.generation, image.process), [])
        slots.append(_Slot(segment, image))

    def images(self) -> list[Image]:
        """Returns all images that are there."""
        return [slot.image for slot in self._committed() if slot.image is not None]

    def _committed(self) -> list[_Slot]:
        slots = [slot for slots in self._slots.values() for slot in slots]
        return [slot for slot in slots if slot.image is not None]

    def find(self, name: str) -> Segment | None:
        """Returns the segment of an image; None if there is no such image."""
        found = (slot.segment for slot in self._committed())
        return next((segment for segment in found if segment.name == name), None)

    def path(self, name: str) -> Path:
        """Returns the file of a segment."""
        return self._segments.path(name)

    def drop(self, name: str) -> None:
        """Removes an image that is of no use."""
        for slots in self._slots.values():
            for slot in [x for x in slots if x.segment.name == name]:
                slots.remove(slot)
                self.remove(slot.segment)

    def drop_torn(self, up_to_generation: int) -> None:
        """Removes what workers that are gone have not committed."""
        self._ended = max(self._ended, up_to_generation)
        for key, slots in self._slots.items():
            if key[0] <= up_to_generation:
                for slot in [slot for slot in slots if slot.image is None]:
                    slots.remove(slot)
                    self.remove(slot.segment)

    def protect(self, generation: int, step: int) -> None:
        """Learns what is whole; older generations' images are not needed then."""
        self.protected = max(self.protected, (generation, step))
        for key in [key for key in self._slots if key[0] < generation]:
            for slot in self._slots.pop(key):
                self.remove(slot.segment)

    def clear(self) -> None:
        """Removes everything, also what others have made here."""
        for slots in self._slots.values():
            for slot in slots:
                slot.segment.close()
        self._slots.clear()
        self._segments.unlink_all()
