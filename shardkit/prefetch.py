"""Prefetch: results for the coming steps, computed in one background thread.

Owns the thread, the few results that wait, and what happens when a caller seeks,
fails, waits too long or leaves.

Invariant: `get(step)` is `fn(step)`, whatever was asked for before. Does not know what
the results are.
"""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from shardkit.errors import DataError
from shardkit.waits import POLL_S

__all__ = ["Prefetcher"]

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Computes `fn(step)` for the coming steps in one background thread.

    For one consumer. The thread is a daemon, started by the first `get`, so a stuck
    `fn` cannot keep the interpreter from ending. Asking for any step but the next one
    is right too, it only discards what was computed ahead.

    Args:
        fn: A pure function of the step; called in the thread, one step at a time, also
            for steps beyond the last one wanted (errors of those stay unseen).
        depth: How many results may wait, at least 1.

    Raises:
        DataError: If `depth` is below 1.

    Example:
        >>> with Prefetcher(lambda step: step * step) as squares:
        ...     [squares.get(step) for step in (0, 1, 2, 9)]
        [0, 1, 4, 81]
    """

    def __init__(self, fn: Callable[[int], T], *, depth: int = 2):
        if depth < 1:
            raise DataError(
                "Prefetcher: at least one result must be able to wait, found "
                f"depth = {depth}. Raise it to 1 or more."
            )
        self._fn = fn
        self._depth = depth
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        # The results are those of steps _expected, _expected + 1, … in this order.
        self._expected: int | None = None
        self._results: list[tuple[T | None, BaseException | None]] = []
        self._num_seeks = 0

    def get(
        self,
        step: int,
        *,
        timeout_s: float = 600.0,
        check: Callable[[], None] = lambda: None,
    ) -> T:
        """Returns `fn(step)`, waiting for it if need be, or raises what it raised.

        Args:
            step: Which.
            timeout_s: How long to wait.
            check: Called first, and now and then while waiting; raises to give up.

        Raises:
            DataError: If nothing came within `timeout_s`, or the prefetcher is closed.
                After a timeout the same step can be asked for again.
        """
        deadline_s = time.monotonic() + timeout_s
        self._seek(step)
        while True:
            check()
            left_s = deadline_s - time.monotonic()
            with self._changed:
                self._changed.wait_for(
                    lambda: self._results or self._closed, min(POLL_S, max(left_s, 0))
                )
                if self._closed:
                    raise DataError(
                        f"Prefetcher: step {step} was asked for, but the prefetcher is "
                        "closed. Make a new one to go on."
                    )
                if self._results:
                    value, error = self._results.pop(0)
                    self._expected = step + 1
                    self._changed.notify_all()
                    break
            if left_s <= 0:
                raise DataError(
                    f"Prefetcher: the batch of step {step} is missing: expected within "
                    f"{timeout_s:g} s, found nothing yet. See what its function waits "
                    "for (a slow or lost file system?), or raise timeout_s."
                )
        if error is not None:
            # A second attempt is then a seek, and calls fn anew.
            raise error
        return value  # pyright: ignore[reportReturnType]

    def _seek(self, step: int) -> None:
        """Makes `step` the next result, and sees that the thread runs."""
        with self._changed:
            if step != self._expected:
                self._expected = step
                self._results.clear()
                self._num_seeks += 1
                self._changed.notify_all()
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(
                    target=self._work, name="shardkit-prefetch", daemon=True
                )
                self._thread.start()

    def close(self, *, timeout_s: float = 5.0):
        """Discards the results and ends the thread; a second call does nothing.

        A call of `fn` that is under way gets `timeout_s` to finish and is then left to
        the daemon thread.
        """
        with self._changed:
            self._closed = True
            self._results.clear()
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, *_: object):
        self.close()

    def _work(self):
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or len(self._results) < self._depth
                )
                if self._closed:
                    return
                assert self._expected is not None
                step, num_seeks = self._expected + len(self._results), self._num_seeks
            value, error = None, None
            try:
                value = self._fn(step)
            except BaseException as caught:
                # Whatever it is belongs to the caller: here it would only end the
                # thread and leave `get` waiting for its deadline.
                error = caught
            with self._changed:
                if num_seeks == self._num_seeks and not self._closed:
                    self._results.append((value, error))
                    self._changed.notify_all()
            # Held across the wait these would keep one more batch in memory.
            del value, error
