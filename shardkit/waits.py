"""Waits during which a signal is heard.

Owns `Waiter`: long work that does not return to Python, such as compiling, goes on in
a thread while the caller looks now and then whether it should give up. It knows
nothing of signals.
"""

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any

__all__ = ["POLL_S", "Waiter"]

POLL_S = 0.1
"""How often a wait looks up."""


class Waiter:
    """Runs work, and gives up waiting for it when asked to.

    Attributes:
        interrupted: Called now and then while work goes on; raises to give up.

    Example:
        >>> Waiter()(lambda: 6 * 7)
        42
    """

    def __init__(self) -> None:
        self.interrupted: Callable[[], None] = _go_on

    def __call__(self, work: Callable[[], Any]) -> Any:
        """Returns what `work` returns, or raises what it raises.

        What is given up goes on in its thread, unheard.
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
            self.interrupted()
        return future.result()

    def ignore(self) -> None:
        """Gives up nothing from now on."""
        self.interrupted = _go_on


def _go_on() -> None:
    """What is called when nobody can ask to give up."""
