"""A thread that lives as long as there is work for it.

Owns `Background`, which standby programs and announced changes share. Invariant: one
piece of work at a time, and none that fails ends the thread. What there is to do, and
in which order, its owner decides.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Background"]


class Background:
    """Does what its owner has, in a thread of its own.

    Args:
        name: What the thread is called.
        take: Returns the next piece of work, or None; called with `changed` held.
        niceness: How far the thread stands back, on Linux.

    Attributes:
        changed: To be held by the owner while it changes what `take` looks at.

    Example:
        >>> work = [lambda: print("first"), lambda: print("second")]
        >>> background = Background("example", lambda: work.pop(0) if work else None)
        >>> with background.changed:
        ...     background.begin()
        >>> background.wait(timeout_s=5)
        first
        second
        True
    """

    def __init__(
        self,
        name: str,
        take: Callable[[], Callable[[], Any] | None],
        *,
        niceness: int = 0,
    ) -> None:
        self.changed = threading.Condition()
        self._name, self._take, self._niceness = name, take, niceness
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Sees that the thread runs; called with `changed` held."""
        if self._thread is None:
            # Not a daemon: an interpreter that ends while XLA compiles would crash.
            self._thread = threading.Thread(target=self._work, name=self._name)
            self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Waits until there is nothing left to do; whether that was so in time."""
        with self.changed:
            return self.changed.wait_for(lambda: self._thread is None, timeout_s)

    def _work(self) -> None:
        if self._niceness:
            # Of this thread alone, on Linux; elsewhere there is no such thing.
            with contextlib.suppress(OSError, AttributeError):
                id = threading.get_native_id()
                os.setpriority(os.PRIO_PROCESS, id, self._niceness)
        while True:
            with self.changed:
                work = self._take()
                if work is None:
                    self._thread = None
                    self.changed.notify_all()
                    return
            # What fails here fails again, and is told, when it is asked for.
            with contextlib.suppress(BaseException):
                work()
