"""Where a process's snapshots are kept.

Owns `Store`, which is all that taking and reading snapshots knows of that, and
`HostMemory`, for a run of one process. Invariant: a step is listed only if everything
of it was committed; a slot that is written to anew has lost its step before. What
protects images of several processes, and where they are, is the business of other
stores.
"""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from shardkit.errors import TornError
from shardkit.snapshot.head import read_head
from shardkit.snapshot.image import Image, read_image

__all__ = ["HostMemory", "MemorySlot", "Slot", "Store"]


class Slot(Protocol):
    """Memory for one image."""

    @property
    def memory(self) -> memoryview:
        """To be written to, at least as large as was asked for."""
        ...


class Store(Protocol):
    """Keeps the images of the newest snapshots.

    Attributes:
        run: The id of the run.
        generation: The generation that takes snapshots here.
        num_losses: How many hosts may be lost at once.
    """

    run: str
    generation: int
    num_losses: int

    def host(self, process: int) -> str:
        """The name of the host that a process is on."""
        ...

    def reserve(self, num_bytes: int) -> Slot:
        """Returns a slot, of which the content is gone; it may wait for that.

        Raises:
            SaveError: If there is no room, or what it waits for does not come.
        """
        ...

    def commit(self, slot: Slot, step: int) -> None:
        """Takes an image that is complete."""
        ...

    def steps(self) -> list[int]:
        """The steps of which everything is there, oldest first."""
        ...

    def images(self, step: int) -> Sequence[Image]:
        """The images of a step, of all processes that are needed to restore it.

        Raises:
            TornError: If one of them is not whole.
        """
        ...

    def forget(self, step: int | None = None) -> None:
        """Drops a snapshot, or all of them: the run goes on from elsewhere."""
        ...


@dataclasses.dataclass
class MemorySlot:
    """One of two buffers.

    Attributes:
        memory: The buffer.
        step: Of which step it holds the image, or None.
    """

    memory: memoryview
    step: int | None = None


class HostMemory:
    """Two buffers of this process, which are gone when it ends.

    Together they take `2 * ImageLayout.num_bytes` of host memory.

    Example:
        >>> store = HostMemory()
        >>> store.steps(), len(store.reserve(100).memory)
        ([], 100)
    """

    run, generation, num_losses = "here", 0, 0

    def __init__(self) -> None:
        self._slots = [MemorySlot(memoryview(b"")) for _ in range(2)]
        self._lock = threading.Lock()

    def host(self, process: int) -> str:
        """This machine, whatever its name is."""
        return "here"

    def reserve(self, num_bytes: int) -> MemorySlot:
        """Returns the buffer with the older image, and forgets that."""
        with self._lock:
            slot = min(self._slots, key=lambda x: -1 if x.step is None else x.step)
            slot.step = None
            if len(slot.memory) != num_bytes:
                slot.memory = np.zeros(num_bytes, np.uint8).data
            return slot

    def commit(self, slot: Slot, step: int) -> None:
        """Lists an image, once its header was found right."""
        assert isinstance(slot, MemorySlot)
        found = read_head(slot.memory, f"the snapshot of step {step}").step
        if found != step:
            raise TornError(f"snapshot: expected step {step}, found {found}")
        with self._lock:
            slot.step = step

    def steps(self) -> list[int]:
        """The steps of the buffers that hold one."""
        with self._lock:
            return sorted(x.step for x in self._slots if x.step is not None)

    def images(self, step: int) -> Sequence[Image]:
        """The one image that there is of a step."""
        with self._lock:
            slots = [slot for slot in self._slots if slot.step == step]
        return [
            read_image(slot.memory, f"the snapshot of step {step}") for slot in slots
        ]

    def forget(self, step: int | None = None) -> None:
        """Lists it, or all, no more."""
        with self._lock:
            for slot in self._slots:
                if step in (None, slot.step):
                    slot.step = None
