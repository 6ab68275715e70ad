"""Hands Orbax arrays that are made box by box while they are written.

Owns the one place that reaches into Orbax: its handler of host arrays, of which one
step is replaced, so that what is written need never be in memory as a whole. A test
says for which version that holds.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from orbax.checkpoint import type_handlers

from shardkit.checkpoint.views import Box, View

__all__ = ["Streamed", "handlers"]

Listener = Callable[[Box, np.ndarray], None]


class Streamed:
    """A view as Orbax takes it for an array in host memory.

    Args:
        view: What is to be written; it has elements.
        listen: Is told of every box that has been read, from several threads.
        codec: How chunks are compressed, as Zarr spells it; None as Orbax does.
    """

    def __init__(
        self, view: View, listen: Listener, codec: Mapping[str, Any] | None = None
    ) -> None:
        self.codec = codec
        self.shape, self.dtype = view.shape, view.dtype
        self.ndim, self.nbytes = len(view.shape), view.nbytes
        self.size = self.nbytes // view.dtype.itemsize
        self.problem: Exception | None = None
        # Views are read one at a time, since each may hold on to what it reads from.
        lock = threading.Lock()

        def read(domain: Any, array: np.ndarray, _: Any) -> None:
            box = tuple(zip(domain.inclusive_min, domain.exclusive_max, strict=True))
            try:
                with lock:
                    data = view.read(box)
                listen(box, data)
                array[...] = data
            except Exception as error:
                # TensorStore keeps only the text of it.
                self.problem = self.problem or error
                raise

        self._store = ts.virtual_chunked(
            read, dtype=ts.dtype(view.dtype), shape=view.shape
        )

    def __deepcopy__(self, _: Any) -> "Streamed":
        """Stays itself: Orbax copies host arrays, since those might change."""
        return self

    async def write(self, target: Any) -> None:
        """Copies all boxes to a store, as few at once as it has threads for."""
        try:
            await target.write(self._store)
        except Exception:
            if self.problem is not None:
                raise self.problem from None
            raise


class _Handler(type_handlers.NumpyHandler):
    """Writes what is streamed as if it were in memory."""

    def __init__(self) -> None:
        super().__init__()
        # Several at a time would hold several times as much.
        self._turn: asyncio.Lock | None = None
        self._num_open, self._has_failed = 0, False

    async def _open_and_write(self, value: Any, tspec: Any, ts_context: Any) -> None:
        self._turn = self._turn or asyncio.Lock()
        self._num_open += 1
        try:
            async with self._turn:
                if self._has_failed:
                    return
                if value.codec is not None:
                    tspec["metadata"]["compressor"] = dict(value.codec)
                spec = ts.Spec(tspec)
                target = await ts.open(spec, create=True, open=True, context=ts_context)
                await value.write(target)
        except Exception:
            # Orbax hears of it when nobody writes, or waits to, any more.
            self._has_failed = True
            while self._num_open > 1:
                await asyncio.sleep(0.01)
            raise
        finally:
            self._num_open -= 1
            # The next save begins anew.
            self._has_failed = self._has_failed and self._num_open > 0


def handlers() -> Any:
    """Returns Orbax's handlers, and the one for what is streamed."""
    return type_handlers.create_type_handler_registry(
        (np.ndarray, type_handlers.NumpyHandler()),
        (jax.Array, type_handlers.ArrayHandler()),
        (Streamed, _Handler()),
    )
