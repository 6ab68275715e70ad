"""Hosts that protect one another and make lost images again, within one process."""

import asyncio
import contextlib
import dataclasses
import os
import socket

import numpy as np
import pytest

from shardkit.cluster.deadlines import Deadlines
from shardkit.cluster.host_memory import HostMemory
from shardkit.cluster.records import Assignment
from shardkit.cluster.settings import Settings
from shardkit.cluster.wire import WireError, accept
from shardkit.errors import SaveError
from shardkit.snapshot.groups import Redundancy, form_groups
from shardkit.snapshot.image import ImageWriter, read_image
from shardkit.snapshot.layout import ImageLayout, MeshRecord, Piece, SnapshotLeaf
from shardkit.snapshot.protection import read_protection
from shardkit.snapshot.recovery import Report, choose
from shardkit.snapshot.segments import Segments, reclaim

HOSTS = ("host-0", "host-1", "host-2")
DEADLINES = Deadlines(request_s=0.5, connect_s=0.5)
SIZE = 3_000_001
"""Bytes of each piece: several chunks, and no multiple of anything."""


class Node:
    """One host: its memory, and what reaches it from other hosts."""

    def __init__(self, run, host):
        settings = Settings(
            run=run, token="t", argv=(), directory="", hosts=(), deadlines=DEADLINES
        )
        self.host, self.changed = host, asyncio.Event()
        self.segments = Segments(run, host)
        self.memory = HostMemory(settings, host, self.segments, self.changed.set)
        self.sent, self.writer, self.links = [], self, set()

    async def start(self):
        self.server = await asyncio.start_server(self._met, "127.0.0.1", 0)
        port = self.server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{port}"

    async def _met(self, reader, writer):
        with contextlib.suppress(WireError):
            link = await accept(reader, writer, "t", 1)
            self.links.add(link)
            while True:
                await self.memory.serve(link, (await link.receive()).header)

    def stop(self):
        self.server.close()
        for link in self.links:
            link.abort()
        self.memory.close()

    async def commit(self, step, index, size=SIZE):
        """Writes the image of a step, as a worker would."""
        assignment = Assignment(
            generation=1,
            process_index=index,
            num_processes=len(HOSTS),
            coordinator="",
            num_devices=len(HOSTS),
            num_local_devices=1,
            device_offset=index,
            host=self.host,
            hosts=HOSTS,
        )
        layout = layout_of(self.segments.run, self.host, index, size)
        reserve = {"type": "reserve", "num_bytes": layout.num_bytes}
        slot = await self.memory.answer(assignment, reserve)
        with self.segments.open(slot["name"]) as segment:
            writer = ImageWriter(segment.memory, layout, step=step, generation=1)
            writer.put(0, content(step, index, size))
            writer.commit({})
        commit = {"type": "commit", "name": slot["name"], "step": step}
        reply = await self.memory.answer(assignment, commit)
        assert reply == {"type": "committed"}, reply

    async def until(self, look):
        async with asyncio.timeout(10):
            while not (found := look(self.memory.report())):
                self.changed.clear()
                await self.changed.wait()
        return found

    # What an answer to the supervisor is sent through.

    def post(self, header, payload=b""):
        self.sent.append((header, payload))

    async def drain(self):
        pass

    async def survey(self, number, *, verify=False):
        self.sent.clear()
        header = {"type": "survey", "number": number, "verify": verify}
        self.memory.obey(header, b"", self)
        while not self.sent or self.sent[-1][0]["type"] != "surveyed":
            await asyncio.sleep(0.001)
        *found, (done, _) = self.sent
        assert done["count"] == len(found)
        reports = [Report(self.host, x["name"], payload) for x, payload in found]
        return reports, done["damaged"]


def content(step, index, size=SIZE):
    return np.random.default_rng([step, index]).integers(0, 256, size, np.uint8)


def layout_of(run, host, index, size):
    count = len(HOSTS)
    ids = tuple(range(count))
    return ImageLayout.plan(
        run=run,
        host=host,
        process=index,
        num_processes=count,
        leaves=[SnapshotLeaf("w", (count * size,), "uint8", 0)],
        mesh=MeshRecord(("fsdp",), (count,), ids, ids, HOSTS),
        pieces=[Piece(0, index, ((index * size, (index + 1) * size),))],
        meta_room_bytes=64,
    )


def protect(nodes, step, *, redundancy="parity", only=None):
    """Orders a step to be protected, as the supervisor would."""
    (group,) = form_groups(nodes, Redundancy.parse(redundancy))
    keys = ("name", "process", "head_bytes")
    images = [
        {"host": host, "address": node.address, **{key: x[key] for key in keys}}
        for host, node in nodes.items()
        for x in node.memory.report()["images"]
        if x["step"] == step
    ]
    header = {
        "type": "protect",
        "of": 1,
        "step": step,
        "group": dataclasses.asdict(group),
        "images": images,
    }
    for node in nodes.values() if only is None else [nodes[only]]:
        node.memory.obey(header, b"", node)


def run(work):
    """Runs a test with three hosts."""
    name = os.urandom(6).hex()

    async def start():
        nodes = {host: Node(name, host) for host in HOSTS}
        for node in nodes.values():
            await node.start()
        try:
            return await work(nodes)
        finally:
            for node in nodes.values():
                node.stop()
            # For those who served to find out that the others are gone.
            await asyncio.sleep(0.05)
            assert not [x for node in nodes.values() for x in node.segments.names()]

    try:
        return asyncio.run(start())
    finally:
        reclaim(name)


async def commit_all(nodes, step):
    for index, node in enumerate(nodes.values()):
        await node.commit(step, index)


async def protect_all(nodes, step, redundancy="parity"):
    protect(nodes, step, redundancy=redundancy)
    for node in nodes.values():
        await node.until(lambda report: [1, step] in report["guards"])


@pytest.mark.parametrize("redundancy", ["mirror", "parity", "parity:2"])
def test_a_lost_image_is_made_again_from_the_others(redundancy):
    async def work(nodes):
        await commit_all(nodes, 5)
        await protect_all(nodes, 5, redundancy)
        for node in nodes.values():
            for name in node.segments.names():
                if name.startswith("guard"):
                    with node.segments.open(name) as segment:
                        read_protection(segment.memory).verify()
        nodes.pop("host-1").stop()
        found = [await node.survey(1) for node in nodes.values()]
        plan = choose([report for reports, _ in found for report in reports])
        (job,) = plan.rebuilds
        node = nodes[job.host]
        header = {
            "type": "rebuild",
            "number": 1,
            "rebuild": job.to_fields(),
            "addresses": {host: node.address for host, node in nodes.items()},
        }
        # Said twice, done once.
        for _ in range(2):
            node.memory.obey(header, job.head, node)
        (done,) = await node.until(
            lambda report: [x for x in report["rebuilds"] if x["state"] == "done"]
        )
        with node.segments.open(done["name"]) as segment:
            image = read_image(segment.memory)
            np.testing.assert_array_equal(image.piece(0), content(5, 1))
            del image
        assert len([x for x in node.segments.names() if x.startswith("rebuilt")]) == 1
        after = [await node.survey(2) for node in nodes.values()]
        plan = choose([report for reports, _ in after for report in reports])
        assert (plan.step, plan.rebuilds) == (5, ())

    run(work)


def test_two_are_kept_at_most_and_their_memory_is_used_again():
    async def work(nodes):
        names = set()
        for step in range(1, 7):
            await commit_all(nodes, step)
            await protect_all(nodes, step)
            for node in nodes.values():
                names |= {f"{node.host} {x}" for x in node.segments.names()}
                guards = [x for x in node.segments.names() if x.startswith("guard")]
                assert len(guards) <= 2
                report = node.memory.report()
                assert len(report["guards"]) <= 2
                node.memory.protected(1, step)
                assert node.memory.report()["guards"] == [[1, step]]
        assert len([x for x in names if "guard" in x]) == 2 * len(nodes)

    run(work)


def test_a_peer_that_is_gone_is_told_and_may_be_tried_again():
    async def work(nodes):
        await commit_all(nodes, 1)
        first = nodes["host-0"]
        address, nodes["host-1"].address = nodes["host-1"].address, "127.0.0.1:1"
        for count in (1, 2):
            protect(nodes, 1, only="host-0")
            failed = await first.until(
                lambda report, count=count: (
                    (report["guard_failed"] or {}).get("count") == count
                    and report["guard_failed"]
                )
            )
        assert "the agent of host-1 at 127.0.0.1:1" in failed["why"]
        assert (failed["of"], failed["step"], failed["is_final"]) == (1, 1, False)
        nodes["host-1"].address = address
        protect(nodes, 1, only="host-0")
        await first.until(lambda report: report["guards"] == [[1, 1]])
        assert first.memory.report()["guard_failed"] is None

    run(work)


def test_a_peer_that_is_silent_is_given_up_in_time():
    async def work(nodes):
        await commit_all(nodes, 1)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            nodes["host-1"].address = f"127.0.0.1:{silent.getsockname()[1]}"
            protect(nodes, 1, only="host-0")
            failed = await nodes["host-0"].until(lambda report: report["guard_failed"])
        assert "the agent of host-1 did not answer with a greeting" in failed["why"]

    run(work)


def test_a_host_without_room_says_so_for_good(monkeypatch):
    create = Segments.create

    def full(self, name, num_bytes):
        if name.startswith("guard"):
            raise SaveError(28, "no room")
        return create(self, name, num_bytes)

    async def work(nodes):
        await commit_all(nodes, 1)
        monkeypatch.setattr(Segments, "create", full)
        protect(nodes, 1, only="host-0")
        failed = await nodes["host-0"].until(lambda report: report["guard_failed"])
        assert failed["is_final"]
        assert "no room" in failed["why"]

    run(work)


def test_what_was_begun_for_a_generation_that_ended_is_given_up():
    async def work(nodes):
        await commit_all(nodes, 1)
        protect(nodes, 1)
        for node in nodes.values():
            node.memory.ending(1)
        for node in nodes.values():
            failed = await node.until(lambda report: report["guard_failed"])
            assert failed["why"] == "it is not wanted any more"
            assert node.memory.report()["guards"] == []

    run(work)


def test_damage_is_found_when_all_is_read_and_not_offered_any_more():
    async def work(nodes):
        await commit_all(nodes, 1)
        await protect_all(nodes, 1)
        node = nodes["host-2"]
        for name in node.segments.names():
            with node.segments.open(name) as segment:
                segment.memory[segment.num_bytes // 2] ^= 1
        reports, damaged = await node.survey(1)
        assert (len(reports), damaged) == (2, [])
        reports, damaged = await node.survey(2, verify=True)
        assert reports == []
        assert damaged[0].startswith("the image of process 2, step 1, on host-2: torn")
        assert damaged[1].startswith("what protects step 1 on host-2: torn or damaged")
        assert node.segments.names() == []
        found = [await other.survey(3) for other in nodes.values()]
        plan = choose([report for reports, _ in found for report in reports])
        assert [job.process for job in plan.rebuilds] == [2]

    run(work)
