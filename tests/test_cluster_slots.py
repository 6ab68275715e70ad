"""Segments: given out, kept, and cleaned up."""

import asyncio
import dataclasses
import os
import time

import numpy as np
import pytest
from clusters import ASSIGNMENT

from shardkit.cluster import ImageRef, Resume
from shardkit.cluster.desk import Desk
from shardkit.cluster.launch import open_directory
from shardkit.cluster.settings import write_private
from shardkit.cluster.slots import Image, Slots
from shardkit.errors import ConfigError, SaveError
from shardkit.snapshot.image import ImageWriter
from shardkit.snapshot.layout import ImageLayout, MeshRecord, Piece, SnapshotLeaf
from shardkit.snapshot.segments import Segments


def commit(slots, name, step, generation=1):
    """Commits what a worker of a generation has written; whether it could."""
    if slots.given_out(generation, 0, name) is None:
        return False
    slots.commit(
        Image(
            name=name,
            step=step,
            generation=generation,
            process=0,
            num_bytes=8,
            protected_bytes=8,
            head_bytes=8,
        )
    )
    return True


def reserve(slots, generation, process, num_bytes):
    """Gives out a segment, or a new one where there may be one."""
    name = slots.reserve(generation, process, num_bytes)
    if name is None and slots.may_grow(generation, process):
        made = slots.create(slots.new_name("image"), num_bytes)
        slots.add(generation, process, made)
        name = slots.reserve(generation, process, num_bytes)
    return name


def test_the_newest_whole_image_is_never_given_out(segments):
    slots = Slots(segments)
    first = reserve(slots, 1, 0, 100)
    assert reserve(slots, 1, 0, 100) == first
    assert commit(slots, first, 1)
    second = reserve(slots, 1, 0, 100)
    assert commit(slots, second, 2)
    assert reserve(slots, 1, 0, 100) is None
    slots.protect(1, 1)
    assert reserve(slots, 1, 0, 100) is None
    slots.protect(1, 2)
    assert reserve(slots, 1, 0, 100) == first
    # What is being written is no image any more.
    assert [x.step for x in slots.images()] == [2]
    assert not commit(slots, second, 9)
    # A larger one takes its place.
    third = reserve(slots, 1, 0, 1000)
    assert third not in (first, second)
    assert segments.path(third).stat().st_size == 1000
    assert not segments.path(first).exists()
    assert segments.path(third).stat().st_mode & 0o777 == 0o600


def test_generations_have_segments_of_their_own(segments):
    slots = Slots(segments)
    old = reserve(slots, 1, 0, 10)
    assert commit(slots, old, 5)
    torn = reserve(slots, 1, 0, 10)
    slots.drop_torn(1)
    assert segments.names() == [old]
    assert torn != old
    new = reserve(slots, 2, 0, 10)
    assert new not in (old, torn)
    # A worker of an old generation cannot commit what was given to a new one.
    assert not commit(slots, new, 6, generation=1)
    assert commit(slots, new, 6, generation=2)
    slots.protect(2, 6)
    assert segments.names() == [new]
    slots.clear()
    assert segments.names() == []


def ask(slots, *questions):
    """Asks the desk of a host; returns the answers."""

    async def work():
        desk = Desk(slots)
        return [await desk.answer(ASSIGNMENT, question) for question in questions]

    return asyncio.run(work())


def test_a_host_without_room_says_so(segments, monkeypatch):
    def create(self, name, num_bytes):
        raise SaveError(28, f"segment {name}: no room")

    monkeypatch.setattr(Segments, "create", create)
    (answer,) = ask(Slots(segments), {"type": "reserve", "num_bytes": 77})
    assert answer["why"].startswith("no memory for a snapshot of 77 bytes: segment")
    assert answer["why"].endswith("no room")


def test_an_agent_is_heard_while_a_large_segment_is_made(segments, monkeypatch):
    create, ticks = Segments.create, []

    def slow(self, name, num_bytes):
        time.sleep(0.3)
        return create(self, name, num_bytes)

    async def tick():
        while True:
            ticks.append(1)
            await asyncio.sleep(0.01)

    async def work(slots):
        ticking = asyncio.create_task(tick())
        question = {"type": "reserve", "num_bytes": 77}
        answer = await Desk(slots).answer(ASSIGNMENT, question)
        ticking.cancel()
        return answer

    monkeypatch.setattr(Segments, "create", slow)
    slots = Slots(segments)
    assert asyncio.run(work(slots))["type"] == "slot"
    assert len(ticks) > 5
    slots.clear()


def test_a_segment_that_is_made_for_a_worker_that_ended_is_given_back(
    segments, monkeypatch
):
    create = Segments.create

    def slow(self, name, num_bytes):
        time.sleep(0.1)
        return create(self, name, num_bytes)

    async def work(slots):
        question = {"type": "reserve", "num_bytes": 77}
        asking = asyncio.create_task(Desk(slots).answer(ASSIGNMENT, question))
        await asyncio.sleep(0.02)
        asking.cancel()
        slots.drop_torn(ASSIGNMENT.generation)
        await asyncio.sleep(0.3)

    monkeypatch.setattr(Segments, "create", slow)
    slots = Slots(segments)
    asyncio.run(work(slots))
    assert segments.names() == []
    # Nor does what it had asked for before it ended count any more.
    assert not slots.may_grow(ASSIGNMENT.generation, 0)


def test_room_for_two_snapshots_is_enough_after_a_recovery(segments, monkeypatch):
    """As docs/failures.md promises; else no step would be protected ever again."""
    create, limit_bytes = Segments.create, 2 * 100

    def full(self, name, num_bytes):
        taken = sum(self.path(x).stat().st_size for x in self.names())
        if taken + num_bytes > limit_bytes:
            raise SaveError(28, "no room")
        return create(self, name, num_bytes)

    async def work(slots):
        desk, question = Desk(slots), {"type": "reserve", "num_bytes": 100}
        used = ImageRef(host="host-0", address="", name=old, process=0, num_bytes=100)
        resume = Resume(step=5, images=(used,))
        assignment = dataclasses.replace(ASSIGNMENT, resume=resume)
        first = await desk.answer(assignment, question)
        # What is gone on from stays until something newer is whole.
        assert sorted(segments.names()) == sorted([old, first["name"]])
        assert commit(slots, first["name"], 5, generation=3)
        asking = asyncio.create_task(desk.answer(assignment, question))
        await asyncio.sleep(0.05)
        assert not asking.done()
        slots.protect(3, 5)
        desk.freed()
        second = await asking
        assert sorted(segments.names()) == sorted([first["name"], second["name"]])

    monkeypatch.setattr(Segments, "create", full)
    slots = Slots(segments)
    old = reserve(slots, 2, 0, 100)
    assert commit(slots, old, 5, generation=2)
    older = reserve(slots, 2, 0, 100)
    assert commit(slots, older, 4, generation=2)
    asyncio.run(work(slots))
    slots.clear()


def write(memory, step):
    layout = ImageLayout.plan(
        run="r",
        host="host-0",
        process=0,
        num_processes=1,
        leaves=[SnapshotLeaf("w", (4,), "uint8")],
        mesh=MeshRecord(("fsdp",), (1,), (0,), (0,), ("host-0",)),
        pieces=[Piece(0, 0, ((0, 4),))],
    )
    writer = ImageWriter(memory, layout, step=step, generation=3)
    writer.put(0, np.arange(4, dtype=np.uint8))
    return writer.commit({})


def test_an_image_counts_if_it_is_what_it_is_said_to_be(segments):
    slots = Slots(segments)
    (slot,) = ask(slots, {"type": "reserve", "num_bytes": 1 << 16})
    question = {"type": "commit", "step": 7, "name": slot["name"]}
    (torn,) = ask(slots, question)
    assert "it was being written" in torn["why"]
    with segments.open(slot["name"]) as segment:
        write(segment.memory, 6)
        (other,) = ask(slots, question)
        assert (
            "expected the image of step, generation and process (7, 3, 0)"
            in (other["why"])
        )
        assert slots.images() == []
        head = write(segment.memory, 7)
    assert ask(slots, question) == [{"type": "committed"}]
    (image,) = slots.images()
    assert (image.step, image.num_bytes) == (7, head.num_bytes)
    assert (image.protected_bytes, image.head_bytes) == (
        head.solid_bytes,
        head.body_start,
    )
    (again, where) = ask(slots, question, {"type": "where", "name": slot["name"]})
    assert "was not given out" in again["why"]
    assert where == {"type": "file", "path": str(segments.path(slot["name"]))}
    slots.drop(slot["name"])
    (gone,) = ask(slots, {"type": "where", "name": slot["name"]})
    assert gone["why"] == "there is no such image any more"


def test_what_a_run_left_is_gone_when_the_next_one_begins_elsewhere(tmp_path):
    """As if all of its processes had been killed at once."""
    segments = Segments(f"left{os.getpid()}", "host-0")
    segments.create("image.1", 8).close()
    os.utime(segments.path("image.1"), (0, 0))
    with open_directory(tmp_path):
        assert segments.names() == []


def test_a_directory_is_cleaned_of_a_cluster_that_died(tmp_path, segments):
    segments.create("image.1", 8).close()
    write_private(tmp_path / "address.json", {"run": segments.run, "token": "t"})
    (tmp_path / "out").write_text("of another run")
    (tmp_path / "generation-1-process-1" / "of another run").mkdir(parents=True)
    with open_directory(tmp_path) as (path, _):
        assert [x.name for x in path.iterdir()] == ["lock"]
        assert path == tmp_path
        assert not segments.path("image.1").exists()
        assert not (tmp_path / "address.json").exists()
        with pytest.raises(ConfigError, match="another cluster is using it"):
            with open_directory(tmp_path):
                pass
    with open_directory(tmp_path / "new", is_temporary=True) as (path, codes):
        codes.append(0)
    assert not path.exists()
