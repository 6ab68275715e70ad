"""Pieces into an image, by several threads.

Owns how many, and that few pieces wait for one: what has been written is let go of.
"""

import os
import queue
import threading
from collections.abc import Iterable

import numpy as np

from shardkit.snapshot.image import ImageWriter

__all__ = ["count_writers", "write_pieces"]

_MOST = 8


def count_writers(*, is_on_host: bool) -> int:
    """How many threads are to write.

    Args:
        is_on_host: Whether the host computes the steps too: then few.

    Example:
        >>> count_writers(is_on_host=True)
        1
    """
    return 1 if is_on_host else max(1, min(_MOST, (os.cpu_count() or 1) // 4))


def write_pieces(
    writer: ImageWriter, pieces: Iterable[tuple[int, np.ndarray]], num_threads: int
) -> None:
    """Copies pieces in and sums them up.

    Args:
        writer: Of the image.
        pieces: Which piece, and its words, of the piece's shape.
        num_threads: How many pieces are written at once.
    """
    if num_threads == 1:
        for index, words in pieces:
            _put(writer, index, words)
        return
    todo: queue.Queue[tuple[int, np.ndarray] | None] = queue.Queue(num_threads)
    errors: list[BaseException] = []

    def work() -> None:
        while (piece := todo.get()) is not None:
            try:
                if not errors:
                    _put(writer, *piece)
            except BaseException as error:
                errors.append(error)

    # Plain threads: a pool takes nothing more when the program is about to end.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    try:
        for piece in pieces:
            if errors:
                break
            todo.put(piece)
            del piece
    finally:
        for _ in threads:
            todo.put(None)
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def _put(writer: ImageWriter, index: int, words: np.ndarray) -> None:
    writer.view(index).view(words.dtype)[...] = words
    writer.put_done(index)
