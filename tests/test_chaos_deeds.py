"""Faults that are done to memory."""

import numpy as np

from shardkit.chaos.deeds import corrupt_newest
from shardkit.snapshot.image import ImageWriter, read_image
from shardkit.snapshot.layout import ImageLayout, MeshRecord, Piece, SnapshotLeaf


def write(segment, segments, step):
    layout = ImageLayout.plan(
        run=segments.run,
        host=segments.host,
        process=0,
        num_processes=1,
        leaves=[SnapshotLeaf("w", (1 << 18,), "uint8", 0)],
        mesh=MeshRecord(("fsdp",), (1,), (0,), (0,), (segments.host,)),
        pieces=[Piece(0, 0, ((0, 1 << 18),))],
    )
    writer = ImageWriter(segment.memory, layout, step=step, generation=1)
    writer.put(0, np.zeros(1 << 18, np.uint8))
    writer.commit({})


def test_the_image_that_was_written_last_is_corrupted(segments):
    first, second = (segments.create(name, 1 << 19) for name in ("a", "b"))
    # Both are written in turn; that changes the times of their files only once.
    for step, segment in ((1, first), (2, second), (3, first)):
        write(segment, segments, step)
    segments.create("guard", 1 << 10).close()
    corrupt_newest(segments.run, segments.host)
    read_image(second.memory).verify()
    assert not read_image(second.memory).piece(0).any()
    assert np.count_nonzero(np.frombuffer(first.memory, np.uint8)[1 << 17 :]) == 1
    corrupt_newest(segments.run, "nobody")
