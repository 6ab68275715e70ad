"""Waits during which a request to leave is heard.

Owns `Waiter`: long work that does not return to Python, such as compiling, goes on in
a thread while the caller looks now and then whether to give up. Invariant: giving up
only ever raises `GivenUp`; what to do then is decided where it is caught.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any

__all__ = ["POLL_S", "GivenUp", "Waiter"]

POLL_S = 0.1
"""How often a wait looks up."""


class GivenUp(Exception):
    """A wait was given up, since somebody asked to leave."""


class Waiter:
    """Runs work, and gives up waiting for it when asked to.

    Example:
        >>> waiter = Waiter()
        >>> waiter(lambda: 6 * 7)
        42
        >>> with waiter.listening(lambda: True):
        ...     waiter.check()
        Traceback (most recent call last):
        ...
        shardkit.waits.GivenUp
    """

    def __init__(self) -> None:
        self._is_asked: Callable[[], bool] | None = None

    def __call__(self, work: Callable[[], Any]) -> Any:
        """Returns what `work` returns, or raises what it raises.

        What is given up goes on in its thread, unheard.

        Raises:
            GivenUp: If asked to.
        """
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        # Not a daemon: an interpreter that ends while XLA compiles would crash.
        Thread(target=run).start()
        while not wait([future], timeout=POLL_S).done:
            self.check()
        return future.result()

    def check(self) -> None:
        """Raises `GivenUp` if asked to; called now and then by whoever waits."""
        if self._is_asked is not None and self._is_asked():
            raise GivenUp

    @contextlib.contextmanager
    def listening(self, is_asked: Callable[[], bool]) -> Iterator[None]:
        """Gives up when `is_asked`, within the block."""
        before, self._is_asked = self._is_asked, is_asked
        try:
            yield
        finally:
            self._is_asked = before

    @contextlib.contextmanager
    def ignoring(self) -> Iterator[None]:
        """Gives up nothing, within the block, which must be done whole."""
        before, self._is_asked = self._is_asked, None
        try:
            yield
        finally:
            self._is_asked = before
