"""Work that would hold up an event loop, done beside it.

Owns one thread for each piece of work. Invariant: a process never waits for one at its
end; executors do, and a thread that waits for a host that is frozen waits long.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["in_thread"]

T = TypeVar("T")


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Returns what some work returns, or raises what it raises.

    Args:
        work: Is called in a thread of its own, and goes on if nobody waits any more.
        *args: What it is called with.

    Example:
        >>> asyncio.run(in_thread(divmod, 7, 2))
        (3, 1)
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # pyright: ignore[reportArgumentType]

    def run() -> None:
        result, error = None, None
        try:
            result = work(*args)
        except BaseException as found:
            error = found
        # The loop may have ended meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="shardkit-beside", daemon=True).start()
    return await done
