"""Pieces into an image, by several threads.

Owns how many, and that few pieces wait for one: what has been written is let go of.
"""

import collections
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

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
    with ThreadPoolExecutor(num_threads) as threads:
        writing: collections.deque[Future[None]] = collections.deque()
        for index, words in pieces:
            writing.append(threads.submit(_put, writer, index, words))
            if len(writing) > num_threads:
                writing.popleft().result()
        while writing:
            writing.popleft().result()


def _put(writer: ImageWriter, index: int, words: np.ndarray) -> None:
    writer.view(index).view(words.dtype)[...] = words
    writer.put_done(index)
