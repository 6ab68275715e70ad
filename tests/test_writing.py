"""Pieces into an image, by several threads."""

import threading

import numpy as np
import pytest

from shardkit.snapshot.writing import write_pieces


@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_piece_that_cannot_be_written_ends_all_threads(num_threads):
    class Writer:
        def __init__(self):
            self.room, self.done = np.zeros((40, 2), np.uint32), []

        def view(self, index):
            return self.room[index]

        def put_done(self, index):
            if index == 9:
                raise ValueError("no room")
            self.done.append(index)

    pieces = [(i, np.full(2, i, np.uint32)) for i in range(40)]
    writer, before = Writer(), threading.active_count()
    with pytest.raises(ValueError, match="no room"):
        write_pieces(writer, pieces, num_threads)
    assert threading.active_count() == before
    writer = Writer()
    write_pieces(writer, pieces[:9], num_threads)
    assert sorted(writer.done) == list(range(9))
    assert (writer.room[:9] == np.arange(9)[:, None]).all()
