"""The launcher's terminal, which may be stopped or slow.

Owns a thread that writes to it. Invariant: whoever speaks never waits for who reads;
what is too much is dropped, a line at a time.
"""

import contextlib
import os
import queue
import threading

__all__ = ["Terminal"]

_MOST_WAITING = 1000


class Terminal:
    """Standard error, for processes that must never wait.

    Args:
        descriptor: Where to write.
    """

    def __init__(self, descriptor: int = 2) -> None:
        self._descriptor = descriptor
        self._waiting: queue.Queue[bytes | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None

    def write(self, data: bytes) -> None:
        """Shows data, unless too much is waiting to be shown already."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(data)

    def line(self, text: str) -> None:
        """Shows lines."""
        self.write(f"{text}\n".encode(errors="backslashreplace"))

    def close(self, timeout_s: float) -> None:
        """Shows what is waiting, unless that takes too long."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._waiting.put(None, timeout=timeout_s)
            self._thread.join(timeout_s)

    def _work(self) -> None:
        while (data := self._waiting.get()) is not None:
            with contextlib.suppress(OSError):
                os.write(self._descriptor, data)
