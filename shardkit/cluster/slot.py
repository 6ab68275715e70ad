"""Memory that an agent lends a worker for one image.

Owns the mapping. Invariant: it is unmapped when nobody looks at it any more. Whose
turn a segment is, the agent's `slots` know.
"""

import contextlib
import mmap

__all__ = ["Slot"]


class Slot:
    """A segment to write one image into.

    Attributes:
        name: Its name.
        memory: All of it.
    """

    def __init__(self, name: str, path: str, num_bytes: int) -> None:
        self.name = name
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), num_bytes)
        self.memory = memoryview(self._map)

    def close(self) -> None:
        """Unmaps it, unless somebody still looks at it."""
        with contextlib.suppress(BufferError):
            self.memory.release()
            self._map.close()
