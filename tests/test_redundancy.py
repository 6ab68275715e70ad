"""Whatever may be lost comes back bit for bit; what cannot is said, never guessed."""

import itertools
import json
import random
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import zfec
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots import (
    HOSTILE,
    carry_out,
    check,
    host_names,
    make,
    places,
    recover,
    with_changed,
)

from shardkit.errors import ConfigError, SaveError, TornError
from shardkit.snapshot.codewords import cut_codewords
from shardkit.snapshot.cost import ImageSize, predict
from shardkit.snapshot.groups import Group, Redundancy, describe_limits, form_groups
from shardkit.snapshot.head import header_fields, read_head, write_head
from shardkit.snapshot.parity import ParitySum, coefficient_tables, decode
from shardkit.snapshot.protection import ProtectionWriter, read_protection
from shardkit.snapshot.protection_plan import ProtectionPlan
from shardkit.snapshot.rebuild import rebuild
from shardkit.snapshot.repairs import Rebuild

SETTINGS = settings(max_examples=60, deadline=None)
REDUNDANCIES = ["mirror", "parity", "parity:2", "parity:3"]


def is_protected(cluster, lost):
    """Whether a loss is one of those that must come back, or one that cannot."""
    for group in cluster.groups:
        gone = [i for i, host in enumerate(group.hosts) if host in lost]
        if group.is_mirror:
            if any((i + 1) % len(group.hosts) in gone for i in gone):
                return False
        elif len(gone) > group.num_losses:
            return False
    return bool(cluster.groups) or not lost


@pytest.mark.parametrize("redundancy", REDUNDANCIES)
@pytest.mark.parametrize("num_hosts", [2, 3, 4, 5])
def test_every_loss_of_so_many_hosts_is_rebuilt_and_no_other_is(redundancy, num_hosts):
    sizes = [[size] for size in (1000, 1, 777, 64, 129)[:num_hosts]]
    cluster = make(sizes, redundancy, group_size=5, limit=300)
    for num in range(num_hosts + 1):
        for lost in itertools.combinations(host_names(num_hosts), num):
            plan = recover(cluster, lost)
            assert (plan.step == 5) == is_protected(cluster, lost), plan.words
            if plan.step is not None:
                assert len(plan.rebuilds) == num
                check(cluster, plan, chunk_bytes=100)


@SETTINGS
@given(
    sizes=st.lists(
        st.lists(st.sampled_from([0, 1, 63, 64, 65, 500, 1999]), max_size=2),
        min_size=1,
        max_size=9,
    ).filter(lambda sizes: any(map(len, sizes))),
    redundancy=st.sampled_from(REDUNDANCIES),
    group_size=st.integers(4, 6),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_any_hosts_and_images(sizes, redundancy, group_size, seed, data):
    cluster = make(
        sizes, redundancy, group_size=group_size, shared=7, seed=seed, limit=900
    )
    lost = data.draw(st.sets(st.sampled_from(host_names(len(sizes)))))
    plan = recover(cluster, lost)
    if is_protected(cluster, lost) and any(
        sizes[int(host[5:])] for host in set(host_names(len(sizes))) - lost
    ):
        assert plan.step == 5, plan.words
    if plan.step is not None:
        check(cluster, plan, chunk_bytes=333)
    else:
        assert any("not whole" in line or "disk" in line for line in plan.words)


@SETTINGS
@given(
    redundancy=st.sampled_from(REDUNDANCIES),
    where=st.integers(0, 1 << 30),
    change=st.integers(1, 255),
    lost=st.integers(0, 3),
)
def test_a_changed_byte_is_found_and_never_becomes_a_wrong_bit(
    redundancy, where, change, lost
):
    cluster = make([[300], [5], [401], [64]], redundancy, group_size=4)
    lost = f"host-{lost}"
    keys = [key for key in cluster.segments if key[0] != lost]
    at = where % sum(len(cluster.segments[key]) for key in keys)
    for key in keys:
        if at < len(cluster.segments[key]):
            cluster.segments[key][at] ^= change
            break
        at -= len(cluster.segments[key])
    plan = recover(cluster, {lost})
    if plan.step is None:
        return
    try:
        carry_out(cluster, plan)
    except TornError:
        return
    check(cluster, plan)


@pytest.mark.parametrize(("num_data", "num_parity"), [(1, 3), (2, 2), (5, 3), (4, 1)])
def test_sums_that_come_in_any_order_are_those_of_zfec(num_data, num_parity):
    rng = np.random.default_rng(0)
    data = [rng.bytes(1000) for _ in range(num_data)]
    encoder = zfec.Encoder(num_data, num_data + num_parity)
    parity = []
    for index in range(num_parity):
        memory = bytearray(rng.bytes(1000))
        block = ParitySum(memory, num_data, num_parity, index)
        for start, i in itertools.product(
            (0, 300), random.sample(range(num_data), num_data)
        ):
            block.add(i, start, data[i][start : 300 if start == 0 else 1000])
        parity.append(bytes(memory))
    if num_parity > 1:
        assert parity == [bytes(x) for x in encoder.encode(data)[num_data:]]
    blocks = dict(enumerate([*data, *parity]))
    for chosen in itertools.combinations(blocks, num_data):
        for index in range(num_data):
            found = decode(num_data, num_parity, {i: blocks[i] for i in chosen}, index)
            assert bytes(found) == data[index]


def test_without_zfec_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "zfec", None)
    for needs_none in ((1, 3), (7, 1)):
        coefficient_tables.__wrapped__(*needs_none)
    with pytest.raises(ConfigError, match=r"pip install 'shardkit\[parity\]'"):
        coefficient_tables.__wrapped__(7, 3)


def test_the_extra_has_what_is_said_to_be_in_it():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert [x.partition(">")[0] for x in extras["parity"]] == ["zfec"]


def test_bytes_are_taken_once_and_in_order():
    block = ParitySum(bytearray(10), 2, 1, 0)
    block.add(0, 0, b"abc")
    for offset, chunk in ((0, b"abc"), (4, b"x"), (3, b"12345678")):
        with pytest.raises(ValueError, match="expected bytes from 3"):
            block.add(0, offset, chunk)
    with pytest.raises(ValueError, match="of one length"):
        decode(2, 1, {1: b"ab", 2: b"a"}, 0)


@SETTINGS
@given(
    num_hosts=st.integers(2, 9),
    num_losses=st.integers(1, 4),
    sizes=st.lists(st.integers(0, 5000), min_size=9, max_size=9),
)
def test_codewords_cover_every_byte_once_on_different_hosts(
    num_hosts, num_losses, sizes
):
    group = Group(tuple(host_names(num_hosts)), min(num_losses, num_hosts - 1))
    codewords = cut_codewords(group, sizes[:num_hosts])
    for codeword in codewords:
        members = [*(block.member for block in codeword.data), *codeword.parity]
        assert sorted(members) == list(range(num_hosts))
    for member in range(num_hosts):
        blocks = sorted(
            (offset, num)
            for codeword in codewords
            for who, offset, num in codeword.data
            if who == member and num
        )
        end = 0
        for offset, num in blocks:
            assert offset == end
            end += num
        assert end == sizes[member]
        assert sum(member in x.parity for x in codewords) == group.num_losses


@SETTINGS
@given(
    num_hosts=st.integers(1, 40),
    text=st.sampled_from(REDUNDANCIES),
    size=st.integers(4, 9),
)
def test_no_host_is_left_alone(num_hosts, text, size):
    hosts, redundancy = host_names(num_hosts), Redundancy.parse(text)
    groups = form_groups(hosts, redundancy, size)
    limits = describe_limits(hosts, redundancy, groups)
    if num_hosts == 1:
        assert not groups
        assert "nothing can be protected" in limits[0]
        return
    assert sorted(host for group in groups for host in group.hosts) == sorted(hosts)
    sizes = [len(group.hosts) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2
    if num_hosts > redundancy.num_losses:
        assert {group.num_losses for group in groups} == {redundancy.num_losses}
        assert not limits
    else:
        assert "only" in limits[0]
        assert {group.num_losses for group in groups} == {num_hosts - 1}


def test_two_hosts_with_parity_are_mirrors():
    cluster = make([[100], [40]], "parity")
    guard = read_protection(cluster.segments["host-0", "guard.5"])
    (block,) = guard.plan.blocks
    copy = cluster.read("host-0", "guard.5", block.offset, block.codeword.num_bytes)
    assert copy == cluster.segments["host-1", "image1.5"][: len(copy)]


@pytest.mark.parametrize("text", ["", "parity:0", "mirror:2", "parity:x", "raid", None])
def test_redundancy_that_is_none(text):
    with pytest.raises(ConfigError, match="expected none, mirror, parity"):
        Redundancy.parse(text)


def test_groups_too_small_for_the_losses():
    with pytest.raises(ConfigError, match="expected groups of 4 to 256"):
        form_groups("abcdef", Redundancy.parse("parity:3"), 3)


@pytest.mark.parametrize("redundancy", REDUNDANCIES)
def test_memory_is_what_was_predicted(redundancy):
    sizes = [[9000, 700], [400_000], [0, 123_457], [64], [300_000]]
    cluster = make(sizes, redundancy, group_size=4)
    images = {host: [] for host in host_names(len(sizes))}
    taken = dict.fromkeys(images, 0)
    for (host, name), memory in cluster.segments.items():
        head = read_head(memory)
        if name.startswith("image"):
            images[host].append(
                ImageSize(head.num_bytes, head.solid_bytes, head.body_start)
            )
        else:
            taken[host] = head.num_bytes
    costs = predict(images, cluster.groups, num_slots=1)
    for host, cost in costs.items():
        assert 0 <= cost.protection_bytes - taken[host] < 20_000
        assert cost.snapshot_bytes == sum(size.num_bytes for size in images[host])
    wanted = {
        host: sum(
            want.num_bytes
            for want in read_protection(cluster.segments[host, "guard.5"]).plan.wants
        )
        for host in images
    }
    assert wanted == {host: cost.received_bytes for host, cost in costs.items()}


def parts_of(cluster):
    heads = {
        host: [bytes(memory[: read_head(memory).body_start])]
        for (host, name), memory in cluster.segments.items()
        if name.startswith("image")
    }
    return cluster.groups[0], heads


def test_a_protection_is_committed_only_when_all_is_there():
    cluster = make([[100], [200], [300]], "parity")
    plan = ProtectionPlan.of("r1", parts_of(cluster)[0], "host-1", parts_of(cluster)[1])
    memory = memoryview(bytearray(plan.num_bytes))
    writer = ProtectionWriter(memory, plan)
    with pytest.raises(SaveError, match="missing are some of"):
        writer.commit()
    with pytest.raises(TornError, match="being written"):
        read_protection(memory)
    want = plan.wants[0]
    with pytest.raises(ValueError, match="bytes at most"):
        writer.add(want, 0, bytes(want.num_bytes + 1))
    with pytest.raises(SaveError, match="Reserve a larger one"):
        ProtectionWriter(memory[:-1], plan)


def test_images_of_different_steps_are_not_protected_together():
    group, heads = parts_of(make([[10], [20]], "parity"))
    _, later = parts_of(make([[10], [20]], "parity", steps=(6,)))
    with pytest.raises(ConfigError, match="one step and generation"):
        ProtectionPlan.of("r1", group, "host-0", heads | {"host-1": later["host-1"]})
    with pytest.raises(ConfigError, match="heads of the images of"):
        ProtectionPlan.of("r1", group, "host-0", {"host-0": heads["host-0"]})


@SETTINGS
@given(where=st.integers(0, 1 << 20), change=st.integers(1, 255))
def test_a_changed_byte_of_a_protection_is_found(where, change):
    cluster = make([[100], [200], [300]], "parity")
    memory = cluster.segments["host-1", "guard.5"]
    before = read_protection(memory)
    where %= len(memory)
    memory[where] ^= change
    try:
        found = read_protection(memory)
        found.verify()
    except TornError:
        return
    # Between the parts there is nothing.
    assert (found.plan, found.sums) == (before.plan, before.sums)


GUARD = make([[100], [200], [300]], "parity:2").segments["host-1", "guard.5"]
GUARD_FIELDS = header_fields(GUARD, read_head(GUARD), "")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(places(GUARD_FIELDS))), st.sampled_from(HOSTILE))
def test_headers_of_protections_that_lie_with_the_right_checksum(path, new):
    memory = memoryview(bytearray(GUARD))
    head = read_head(memory)
    text = json.dumps(with_changed(GUARD_FIELDS, path, new)).encode()
    text = text[: head.header_bytes].ljust(head.header_bytes)
    write_head(memory, head, text)
    try:
        read_protection(memory).verify()
    except TornError:
        pass


def test_a_rebuild_goes_through_json_and_needs_bounded_memory():
    cluster = make([[10_000], [20_000], [30_000]], "parity")
    (job,) = recover(cluster, {"host-2"}).rebuilds
    again = Rebuild.of_fields(json.loads(json.dumps(job.to_fields())), job.head)
    assert again == job
    asked = []

    def read(host, name, offset, num_bytes):
        asked.append(num_bytes)
        return cluster.read(host, name, offset, num_bytes)

    rebuild(again, read, memoryview(bytearray(job.num_bytes)), chunk_bytes=999)
    assert max(asked) == 999
    assert sum(asked) == job.read_bytes
    with pytest.raises(SaveError, match="expected a segment"):
        rebuild(job, read, memoryview(bytearray(job.num_bytes - 1)))
    with pytest.raises(TornError, match="expected 999 bytes"):
        rebuild(
            job,
            lambda *where: read(*where)[:-1],
            memoryview(bytearray(job.num_bytes)),
            chunk_bytes=999,
        )
