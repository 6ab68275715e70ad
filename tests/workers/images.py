"""The images of a counter: its state, whole or in shards, and ballast.

Options: with `"shards"` each process keeps its part of the state only, else all have
all of it; `"ballast"` is how many bytes more each process has to keep.
"""

import os

import numpy as np

from shardkit.cluster.remote_images import open_images
from shardkit.errors import DamagedError, TornError
from shardkit.snapshot.assignment import Claim, assign
from shardkit.snapshot.groups import Redundancy
from shardkit.snapshot.image import ImageWriter
from shardkit.snapshot.layout import ImageLayout, MeshRecord, SnapshotLeaf


def ballast_of(step, process, num_bytes):
    numbers = np.arange(-(-num_bytes // 8), dtype=np.uint64)
    return ((numbers + np.uint64(step)) * np.uint64(process + 3)).view(np.uint8)[
        :num_bytes
    ]


class Images:
    """What one process writes."""

    def __init__(self, assignment, size, options):
        count, me = assignment.num_processes, assignment.process_index
        self._assignment, self._ballast = assignment, options.get("ballast", 0)
        host_of = dict(enumerate(assignment.hosts))
        ids, everyone = tuple(range(count)), [(i, i) for i in range(count)]
        ends = [i * size // count for i in range(count + 1)]
        claims = [Claim(0, ((0, size),), 8 * size, tuple(everyone))]
        if options.get("shards"):
            claims = [
                Claim(0, ((ends[i], ends[i + 1]),), 8 * size // count, ((i, i),))
                for i in range(count)
            ]
        if self._ballast:
            claims += [
                Claim(
                    1,
                    ((i * self._ballast, (i + 1) * self._ballast),),
                    self._ballast,
                    ((i, i),),
                )
                for i in range(count)
            ]
        num_losses = Redundancy.parse(assignment.redundancy).num_losses
        self._layout = ImageLayout.plan(
            run=os.environ["SHARDKIT_RUN"],
            host=assignment.host,
            process=me,
            num_processes=count,
            leaves=[
                SnapshotLeaf("state", (size,), "uint64", 0),
                SnapshotLeaf("ballast", (count * self._ballast,), "uint8", 0),
            ],
            mesh=MeshRecord(("fsdp",), (count,), ids, ids, assignment.hosts),
            pieces=assign(claims, host_of, num_losses)[me],
            meta_room_bytes=64,
        )
        self.num_bytes = self._layout.num_bytes

    def write(self, memory, step, state):
        assignment = self._assignment
        whole = np.array(state, np.uint64)
        writer = ImageWriter(
            memory, self._layout, step=step, generation=assignment.generation
        )
        for index, piece in enumerate(self._layout.pieces):
            ((start, stop),) = piece.box
            if piece.leaf == 0:
                writer.put(index, whole[start:stop])
            else:
                process = assignment.process_index
                writer.put(index, ballast_of(step, process, self._ballast))
        writer.commit({"step": step})


def restore(member):
    """Returns the state of the snapshot that a member goes on from."""
    resume = member.assignment.resume
    state = done = None
    opened = open_images(member, resume.images)
    for image in opened:
        for index in range(len(image.pieces)):
            image.ask(index)
    for ref, image in zip(resume.images, opened, strict=True):
        assert image.head.step == resume.step
        if state is None:
            size = image.layout.leaves[0].shape[0]
            state, done = np.zeros(size, np.uint64), np.zeros(size, bool)
        for index, piece in enumerate(image.pieces):
            if not image.has(index):
                continue
            try:
                data = image.piece(index)
            except TornError as error:
                raise DamagedError(f"step {resume.step}: {error}") from error
            if piece.leaf == 0:
                state[slice(*piece.box[0])] = data
                done[slice(*piece.box[0])] = True
            else:
                expected = ballast_of(resume.step, ref.process, data.size)
                assert np.array_equal(data, expected)
    assert done.all()
    member.restored()
    return state.tolist()
