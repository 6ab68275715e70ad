"""Images of other hosts: what of them travels, and what is made of it."""

import argparse
import asyncio
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshotted import DTYPES, mesh_of, random_state, same_words, split
from test_cluster_guards import DEADLINES, HOSTS, SIZE, commit_all, content, run

import shardkit as sk
from shardkit.cluster import ImageRef, remote_images
from shardkit.cluster.fetching import Fetcher, Span
from shardkit.cluster.remote_images import open_images
from shardkit.errors import ClusterError, TornError
from shardkit.snapshot.restore import restore

MESHES = [(8, 1), (8, 2), (6, 3), (5, 1), (4, 1), (3, 1), (2, 1), (1, 1)]
LEAVES = [((8, 3), "float32", 0), ((700, 9), "bfloat16", 0), ((40, 300), "int32", 0)]


class Peers:
    """Images in memory of several hosts, read by one of them; counts what travels."""

    def __init__(self, images, hosts, here):
        self.assignment = argparse.Namespace(host=here)
        self._images = images
        self.refs = [
            ImageRef(
                host=hosts[i], address="", name=f"i{i}", process=i, num_bytes=len(x)
            )
            for i, x in images.items()
        ]
        self.batches = []

    def fetch_all(self, spans):
        remote = [x for x in spans if x.ref.host != self.assignment.host]
        if remote:
            self.batches.append(remote)
        found = []
        for ref, start, size in spans:
            assert size > 0
            assert start + size <= ref.num_bytes
            found.append(memoryview(self._images[ref.process])[start : start + size])
        return found

    def open(self):
        """The images, and from where on in each there are pieces."""
        found = open_images(self, self.refs)
        return found, {image.head.process: image.layout.body_start for image in found}

    def pieces(self, starts):
        """The batches without what says what is in the images."""
        found = [
            [x for x in batch if x.offset >= starts[x.ref.process]]
            for batch in self.batches
        ]
        return [batch for batch in found if batch]


@pytest.fixture(autouse=True)
def small():
    """Little is fetched at first, and nothing to save a request."""
    limits = {"_FIRST_BYTES": 200, "_GAP_BYTES": 63}
    with mock.patch.multiple(remote_images, **limits):
        yield


@st.composite
def leaves(draw):
    shape = tuple(draw(st.lists(st.integers(0, 30), max_size=3)))
    dim = draw(st.integers(-1, len(shape) - 1))
    return shape, draw(st.sampled_from(DTYPES)), dim


def wanted_of_others(images, here):
    """The bytes of the pieces that another host has and this one has not."""
    boxes, own = {}, set()
    for image in images:
        for piece in image.pieces:
            key = piece.leaf, piece.box
            boxes[key] = piece.num_bytes
            if image.layout.host == here:
                own.add(key)
    return [size for key, size in boxes.items() if key not in own]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shapes=st.lists(leaves(), min_size=1, max_size=6),
    old=st.sampled_from(MESHES),
    new=st.sampled_from(MESHES),
    num_hosts=st.integers(1, 4),
    num_losses=st.integers(0, 1),
    ahead=st.sampled_from([1, 1000, 1 << 26]),
    here=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_every_bit_comes_back_and_only_what_is_wanted_travels(
    shapes, old, new, num_hosts, num_losses, ahead, here, seed
):
    state = random_state(shapes, seed)
    hosts = [f"host-{i % num_hosts}" for i in range(min(old[0], 4))]
    memory = split(state, mesh_of(*old), hosts, num_losses)
    # Also a host that has nothing of its own yet.
    peers = Peers(memory, hosts, f"host-{here}")
    images, starts = peers.open()
    mesh = mesh_of(*new)
    found = restore(images, state.layout, mesh, host=f"host-{here}", ahead_bytes=ahead)
    same_words(found, state, mesh.shape["fsdp"])
    spans = [span for batch in peers.pieces(starts) for span in batch]
    wanted = wanted_of_others(images, f"host-{here}")
    travelled = sum(span.num_bytes for span in spans)
    assert sum(wanted) <= travelled <= sum(wanted) + 63 * len(wanted)
    # None twice.
    seen = np.zeros((len(memory), max(map(len, memory.values()))), bool)
    for ref, start, size in spans:
        assert not seen[ref.process, start : start + size].any()
        seen[ref.process, start : start + size] = True


def test_all_hosts_are_asked_at_once_and_what_is_held_is_bounded():
    state, mesh = random_state(LEAVES * 3), mesh_of(4)
    hosts = ["a", "b", "c", "d"]
    memory = split(state, mesh, hosts)
    sizes = {}
    for ahead in (1, 1 << 20):
        peers = Peers(memory, hosts, "a")
        images, starts = peers.open()
        restore(images, state.layout, mesh, host="a", ahead_bytes=ahead)
        batches = peers.pieces(starts)
        sizes[ahead] = [sum(x.num_bytes for x in batch) for batch in batches]
        assert {x.ref.host for x in batches[0]} == {"b", "c", "d"}
    assert len(sizes[1]) == len(LEAVES) * 3
    # What lies side by side is asked for as one.
    assert len(sizes[1 << 20]) == 1
    assert len(batches[0]) == 3
    largest = max(np.asarray(x).nbytes for x in state.words.values())
    assert max(sizes[1]) <= largest < sizes[1 << 20][0]


def test_a_damaged_piece_is_noticed_by_who_wants_it_and_by_nobody_else():
    state, mesh = random_state(LEAVES), mesh_of(3)
    hosts = ["a", "a", "b", "b"]
    memory = split(state, mesh_of(4, 2), hosts, num_losses=1)
    peers = Peers(memory, hosts, "c")
    images, _ = peers.open()
    piece = next(x for x in images[2].pieces if x.num_bytes > 1000)
    memory[2][piece.offset] ^= 1
    # All that b has is in the memory of a, too.
    near = Peers(memory, hosts, "a")
    found = restore(near.open()[0], state.layout, mesh, host="a")
    same_words(found, state, 3)
    left = Peers({i: memory[i] for i in (2, 3)}, hosts, "c")
    with pytest.raises(sk.DamagedError, match=r"step 3: .* of process 2 on b: .*torn"):
        restore(left.open()[0], state.layout, mesh, host="c")


def test_a_torn_head_is_noticed_when_it_is_opened():
    state, hosts = random_state(LEAVES), ["a", "b"]
    memory = split(state, mesh_of(2), hosts)
    for place in (20, 150, 600):
        memory[1][place] ^= 1
        with pytest.raises(TornError, match="process 1 on b"):
            Peers(memory, hosts, "a").open()
        memory[1][place] ^= 1
    memory[1] = memory[1][:-64]
    with pytest.raises(
        TornError, match=r"process 1 on b: .* expected \d+ bytes, found"
    ):
        Peers(memory, hosts, "a").open()


def test_what_came_with_the_head_is_not_fetched_again():
    state, hosts = random_state(LEAVES), ["a", "b"]
    memory = split(state, mesh_of(2), hosts)
    with mock.patch.object(remote_images, "_FIRST_BYTES", 1 << 20):
        peers = Peers(memory, hosts, "a")
        images, _ = peers.open()
        found = restore(images, state.layout, mesh_of(3), host="a")
    same_words(found, state, 3)
    assert [len(batch) for batch in peers.batches] == [1]


def test_spans_of_several_hosts_over_real_connections():
    async def work(nodes):
        await commit_all(nodes, 5)
        refs = {
            host: ImageRef(
                host=host,
                address=node.address,
                **{key: image[key] for key in ("name", "process", "num_bytes")},
            )
            for host, node in nodes.items()
            for image in node.memory.report()["images"]
        }
        own = nodes["host-0"].segments
        fetcher = Fetcher("t", DEADLINES, "host-0", lambda name: str(own.path(name)))
        wanted, start = [], {}
        for i, host in enumerate(HOSTS):
            start[host] = refs[host].num_bytes - -(-SIZE // 64) * 64
            # One that takes several chunks, and more small ones than may be waited for.
            wanted += [Span(refs[host], start[host] + i, SIZE - 10)]
            wanted += [Span(refs[host], start[host] + 9 * j, 7) for j in range(300)]
        try:
            found = await asyncio.to_thread(fetcher.fetch_all, wanted)
            for span, data in zip(wanted, found, strict=True):
                host = span.ref.host
                offset = span.offset - start[host]
                expected = content(5, HOSTS.index(host))[offset:][: span.num_bytes]
                np.testing.assert_array_equal(np.frombuffer(data, np.uint8), expected)
            away = sum(x.num_bytes for x in wanted if x.ref.host != "host-0")
            assert fetcher.num_bytes == away
            nodes["host-2"].memory.close()
            with pytest.raises(ClusterError, match=r"agent of host-2: .* not there"):
                await asyncio.to_thread(fetcher.fetch_all, wanted)
        finally:
            fetcher.close()

    run(work)
