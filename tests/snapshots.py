"""Emulated hosts with images, and what protects them, in plain memory."""

import dataclasses
import itertools
import random

import numpy as np

from shardkit.errors import TornError
from shardkit.snapshot.groups import Redundancy, form_groups
from shardkit.snapshot.head import read_head
from shardkit.snapshot.image import ImageWriter, read_image
from shardkit.snapshot.layout import ImageLayout, MeshRecord, Piece, SnapshotLeaf
from shardkit.snapshot.protection import ProtectionWriter
from shardkit.snapshot.protection_plan import ProtectionPlan
from shardkit.snapshot.rebuild import rebuild
from shardkit.snapshot.recovery import choose, report

RUN = "r1"
HOSTILE = [
    *(None, True, -1, 0, 1, 2**31, 2**48, 2**49, 2**63, 2**64, 1.5, float("nan")),
    *("", "float32", "object", "\ud800", "é" * 300, [], {}, [[]], [1, 2, 3], {"a": 1}),
]


def places(value, path=()):
    """Every place in a header that could say something else."""
    yield path
    if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield from places(value[key], (*path, key))


def with_changed(value, path, new):
    if not path:
        return new
    value = dict(value) if isinstance(value, dict) else list(value)
    value[path[0]] = with_changed(value[path[0]], path[1:], new)
    return value


def host_names(num):
    return [f"host-{i}" for i in range(num)]


@dataclasses.dataclass
class Cluster:
    """Segments by host and name; `expected` is what every process put by piece."""

    segments: dict = dataclasses.field(default_factory=dict)
    expected: dict = dataclasses.field(default_factory=dict)
    groups: tuple = ()

    def reports(self, lost=()):
        found = []
        for (host, name), memory in self.segments.items():
            if host not in lost:
                try:
                    found.append(report(host, name, memory))
                except TornError:
                    pass
        return found

    def read(self, host, name, offset, num_bytes):
        return memoryview(self.segments[host, name])[offset : offset + num_bytes]


def state(sizes_by_host, *, shared=0, num_sharing=99):
    """A uint8 leaf cut over all processes, and `shared` bytes that the first keep."""
    sizes = list(itertools.chain(*sizes_by_host))
    hosts = host_names(len(sizes_by_host))
    owners = [host for host, row in zip(hosts, sizes_by_host, strict=True) for _ in row]
    leaves = [
        SnapshotLeaf("w", (sum(sizes),), "uint8", 0),
        SnapshotLeaf("shared", (shared,), "uint8"),
    ]
    ids = tuple(range(len(sizes)))
    mesh = MeshRecord(("fsdp",), (len(sizes),), ids, ids, tuple(owners))
    starts = [0, *itertools.accumulate(sizes)]
    layouts = [
        ImageLayout.plan(
            run=RUN,
            host=owners[i],
            process=i,
            num_processes=len(sizes),
            leaves=leaves,
            mesh=mesh,
            pieces=[
                Piece(1, i, ((0, shared),), protected=False),
                Piece(0, i, ((starts[i], starts[i + 1]),)),
            ][0 if shared and i < num_sharing else 1 :],
            meta_room_bytes=32,
        )
        for i in range(len(sizes))
    ]
    return layouts


def write(memory, layout, *, step, generation=0, seed=0):
    """Writes random pieces; returns them by leaf and box."""
    expected = {}
    writer = ImageWriter(memoryview(memory), layout, step=step, generation=generation)
    for index, piece in enumerate(layout.pieces):
        rng = np.random.default_rng([seed, step, piece.leaf, piece.box[0][0]])
        data = rng.integers(0, 256, piece.num_bytes, np.uint8)
        writer.put(index, data)
        expected[piece.leaf, piece.box] = data
    writer.commit({"step": step})
    return expected


def feed(writer, cluster, step, rng, limit=1 << 30):
    """Gives a protection what it wants, in pieces of random lengths, in any order."""
    left = {want: 0 for want in writer.plan.wants}
    while left:
        want = rng.choice(sorted(left))
        num = min(want.num_bytes - left[want], rng.randint(1, limit))
        name = f"image{want.process}.{step}"
        offset = want.offset + left[want]
        writer.add(want, left[want], cluster.read(want.host, name, offset, num))
        left[want] += num
        if left[want] == want.num_bytes:
            del left[want]


def make(
    sizes_by_host,
    redundancy,
    *,
    group_size=8,
    steps=(5,),
    shared=0,
    num_sharing=99,
    seed=0,
    limit=1 << 30,
    protect=lambda step, host: True,
):
    """Images of all hosts for every step, protected."""
    cluster, rng = Cluster(), random.Random(seed)
    redundancy = Redundancy.parse(redundancy)
    hosts = host_names(len(sizes_by_host))
    cluster.groups = form_groups(hosts, redundancy, group_size)
    layouts = state(sizes_by_host, shared=shared, num_sharing=num_sharing)
    for step in steps:
        cluster.expected[step] = {}
        for layout in layouts:
            memory = bytearray(layout.num_bytes + rng.randrange(3))
            cluster.segments[layout.host, f"image{layout.process}.{step}"] = memory
            found = write(memory, layout, step=step, seed=seed)
            cluster.expected[step].update(found)
        for group in cluster.groups:
            heads = {host: [] for host in group.hosts}
            for layout in layouts:
                if layout.host in heads:
                    name = f"image{layout.process}.{step}"
                    memory = cluster.segments[layout.host, name]
                    heads[layout.host].append(memory[: read_head(memory).body_start])
            if not any(heads.values()):
                continue
            for host in group.hosts:
                if protect(step, host):
                    plan = ProtectionPlan.of(RUN, group, host, heads)
                    memory = bytearray(rng.randbytes(plan.num_bytes))
                    writer = ProtectionWriter(memoryview(memory), plan)
                    feed(writer, cluster, step, rng, limit)
                    writer.commit()
                    cluster.segments[host, f"guard.{step}"] = memory
    return cluster


def carry_out(cluster, plan, *, chunk_bytes=1 << 20):
    """Does what a plan says; returns all pieces by leaf and box."""
    found = {}
    images = [
        read_image(cluster.segments[source.host, source.name]) for source in plan.images
    ]
    for job in plan.rebuilds:
        memory = memoryview(bytearray(job.num_bytes))
        images.append(rebuild(job, cluster.read, memory, chunk_bytes=chunk_bytes))
    for image in images:
        for index, piece in enumerate(image.pieces):
            if image.has(index):
                found[piece.leaf, piece.box] = image.piece(index).copy()
    return found


def check(cluster, plan, **options):
    """Every bit of the step is there again."""
    found = carry_out(cluster, plan, **options)
    expected = cluster.expected[plan.step]
    assert {key for key, data in expected.items() if data.size} <= found.keys()
    for key, data in found.items():
        np.testing.assert_array_equal(data, expected[key])


def recover(cluster, lost):
    return choose(cluster.reports(lost), run=RUN)
