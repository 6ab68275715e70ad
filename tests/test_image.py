"""An image is what was written, or a `TornError`: nothing between."""

import dataclasses
import json
import re
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots import HOSTILE, places, with_changed

from shardkit.errors import ConfigError, SaveError, TornError
from shardkit.snapshot.head import (
    IMAGE,
    RECORD_BYTES,
    byte_sum,
    read_head,
    write_head,
)
from shardkit.snapshot.image import ImageWriter, read_image
from shardkit.snapshot.layout import ImageLayout, MeshRecord, Piece, SnapshotLeaf

SETTINGS = settings(max_examples=300, deadline=None)
MESH = MeshRecord(("data", "fsdp"), (1, 2), (4, 5), (0, 1), ("a", "b"))
LEAVES = [
    SnapshotLeaf("params/w", (5, 3), "float32", 0, (("tensor", 1),)),
    SnapshotLeaf("params/b", (7,), "bfloat16", 0),
    SnapshotLeaf("step", (), "int32"),
    SnapshotLeaf("empty", (0, 4), "float64"),
    SnapshotLeaf("mask", (2, 3), "int4", 1),
]
PIECES = [
    Piece(0, 5, ((3, 5), (0, 3))),
    Piece(2, 4, (), protected=False),
    Piece(1, 5, ((4, 7),)),
    Piece(3, 4, ((0, 0), (0, 4))),
    Piece(4, 4, ((0, 2), (0, 2))),
]
ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5,
    np.array(41, np.int32),
    np.array([1, np.nan, -0.0], ml_dtypes.bfloat16),
    np.zeros((0, 4)),
    np.array([[1, -2], [7, -8]], ml_dtypes.int4),
]
META = {"loss": 1.5, "é": [1, None, {"x": True}]}


def plan(**options):
    return ImageLayout.plan(
        **{
            "run": "r1",
            "host": "b",
            "process": 1,
            "num_processes": 2,
            "leaves": LEAVES,
            "mesh": MESH,
            "pieces": PIECES,
            "meta_room_bytes": 100,
            **options,
        }
    )


def fill(writer):
    for index, array in enumerate(ARRAYS):
        writer.put(index, array)


def written(step=7, extra=5):
    layout = plan()
    memory = bytearray(b"\xff" * (layout.num_bytes + extra))
    writer = ImageWriter(memoryview(memory), layout, step=step, generation=3)
    fill(writer)
    writer.commit(META)
    return memory


VALID = bytes(written())


def assert_is_what_was_written(image):
    assert (image.head.step, image.head.generation, image.head.process) == (7, 3, 1)
    assert image.layout == plan()
    assert image.meta == META
    for index, array in enumerate(ARRAYS):
        found = image.piece(index)
        assert (found.shape, found.dtype) == (array.shape, array.dtype)
        assert found.tobytes() == array.tobytes()


def test_an_image_is_what_was_put():
    image = read_image(VALID)
    assert_is_what_was_written(image)
    image.verify()
    assert not image.piece(0).flags.writeable
    assert all(piece.offset % 64 == 0 for piece in image.pieces)
    # What has copies elsewhere comes last.
    assert image.pieces[1].offset >= image.layout.protected_bytes
    assert max(p.offset + p.num_bytes for p in image.pieces if p.protected) <= (
        image.layout.protected_bytes
    )


def test_offsets_do_not_depend_on_the_step():
    assert read_image(written(step=10**15)).layout == plan()


def test_pieces_may_be_written_in_place():
    layout = plan()
    memory = memoryview(bytearray(layout.num_bytes))
    writer = ImageWriter(memory, layout, step=7, generation=3)
    for index, array in enumerate(ARRAYS):
        writer.view(index)[...] = array
        writer.put_done(index)
    writer.commit(META)
    assert_is_what_was_written(read_image(memory))


def test_it_is_torn_from_the_first_moment_to_the_last():
    memory = memoryview(written())
    writer = ImageWriter(memory, plan(), step=8, generation=3)
    for index, array in enumerate(ARRAYS):
        with pytest.raises(TornError, match="was being written"):
            read_image(memory)
        with pytest.raises(SaveError, match="are missing"):
            writer.commit({})
        writer.put(index, array)
    with pytest.raises(TornError, match="was being written"):
        read_image(memory)
    assert writer.commit({}).step == read_image(memory).head.step == 8


@SETTINGS
@given(where=st.integers(0, len(VALID) - 1), change=st.integers(1, 255))
def test_any_byte_changed(where, change):
    memory = bytearray(VALID)
    memory[where] ^= change
    try:
        image = read_image(memory)
        assert_is_what_was_written(image)
    except TornError:
        return
    used = [(0, image.head.body_start)]
    used += [(p.offset, p.offset + p.num_bytes) for p in image.pieces]
    assert not any(start <= where < stop for start, stop in used)


@SETTINGS
@given(st.integers(0, len(VALID)), st.binary(max_size=300), st.integers(0, 2**20))
def test_bytes_cut_off_put_in_or_overwritten(size, noise, at):
    for memory in (
        VALID[:size],
        VALID[: at % size if size else 0] + noise + VALID[size:],
        noise,
    ):
        try:
            assert_is_what_was_written(read_image(memory))
        except TornError:
            continue
        assert memory[: plan().num_bytes].startswith(VALID[:RECORD_BYTES])


def test_parts_of_two_images_are_no_image():
    """A crash between steps: any mixture of old and new bytes."""
    old, new = VALID, bytes(written(step=8))
    layout = plan()
    for cut in range(0, len(old), 8):
        for memory in (old[:cut] + new[cut:], new[:cut] + old[cut:]):
            try:
                image = read_image(memory)
            except TornError:
                continue
            assert image.head.step in (7, 8)
            assert memory[: layout.body_start] in (
                old[: layout.body_start],
                new[: layout.body_start],
            )


def sealed(fields, **changes):
    """An image with a header that has the right checksum, whatever it says."""
    memory = memoryview(bytearray(VALID))
    head = read_head(memory)
    text = json.dumps(fields).encode().ljust(head.header_bytes)
    if len(text) > head.header_bytes:
        memory = memoryview(bytearray(VALID.ljust(len(text) + 10_000)))
        changes = {"header_bytes": len(text), "solid_bytes": len(memory)} | changes
        changes = {"num_bytes": len(memory)} | changes
    values = {name: getattr(head, name) for name in head.__dataclass_fields__}
    values |= changes
    if 0 <= values["header_bytes"] <= len(text):
        text = text[: values["header_bytes"]]
    else:
        text = text[:0]
    record = struct.pack("<8s8Q", *(values | {"header_sum": byte_sum(text)}).values())
    record += struct.pack("<Q", byte_sum(record))
    memory[: len(record)] = record
    memory[RECORD_BYTES : RECORD_BYTES + len(text)] = text
    return memory


def fields_of(memory):
    head = read_head(memory)
    return json.loads(memory[RECORD_BYTES : RECORD_BYTES + head.header_bytes])


PLACES = list(places(fields_of(VALID)))


@SETTINGS
@given(st.sampled_from(PLACES), st.sampled_from(HOSTILE))
def test_headers_that_lie_with_the_right_checksum(path, new):
    try:
        image = read_image(sealed(with_changed(fields_of(VALID), path, new)))
        for index in range(len(image.pieces)):
            image.piece(index)
    except TornError:
        pass


@pytest.mark.parametrize(
    "group",
    [
        [["tensor", -1]],
        [["tensor", 2]],
        [["tensor", 0]],
        [["fsdp", 1]],
        [["tensor", 1], ["tensor", 1]],
        [["tensor", 1], ["expert", 1]],
        ["t1"],
        [1],
    ],
)
def test_leaves_that_are_cut_as_none_can_be_are_refused(group):
    fields = fields_of(VALID)
    assert fields["leaves"][0][4] == [["tensor", 1]]
    fields["leaves"][0][4] = group
    with pytest.raises(TornError, match="its header"):
        read_image(sealed(fields))


def test_a_mesh_with_an_axis_twice_is_refused():
    fields = fields_of(VALID)
    fields["mesh"]["axes"] = ["fsdp", "fsdp"]
    with pytest.raises(TornError, match="the mesh does not fit together"):
        read_image(sealed(fields))


@SETTINGS
@given(
    st.sampled_from(
        "step generation process num_processes num_bytes solid_bytes "
        "header_bytes".split()
    ),
    st.sampled_from([0, 1, 2, 127, 128, 4096, 2**31, 2**40, 2**63, 2**64 - 1]),
)
def test_records_that_lie_with_the_right_checksum(name, value):
    tracemalloc.start()
    try:
        image = read_image(sealed(fields_of(VALID), **{name: value}))
        image.verify()
    except TornError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


def test_headers_that_are_no_header():
    for text in ("[" * 100_000, "[]", "7", '{"run": ', "{}", "\x00", "1" * 5000):
        memory = memoryview(bytearray(200_000))
        head = read_head(VALID)
        text = text.encode()
        num = len(memory)
        head = dataclasses.replace(
            head, header_bytes=len(text), solid_bytes=num, num_bytes=num
        )
        write_head(memory, head, text)
        with pytest.raises(TornError):
            read_image(memory)


def test_what_does_not_fit_is_refused_before_it_is_written():
    layout = plan()
    with pytest.raises(SaveError, match="Reserve a larger one"):
        ImageWriter(memoryview(bytearray(9)), layout, step=0, generation=0)
    memory = memoryview(bytearray(layout.num_bytes))
    writer = ImageWriter(memory, layout, step=0, generation=0)
    expected = re.escape("params/w: expected float32[2, 3], found float64[2, 3]")
    with pytest.raises(ConfigError, match=expected):
        writer.put(0, np.zeros((2, 3)))
    with pytest.raises(ConfigError, match="Cut the padding off"):
        writer.put(0, np.zeros((3, 3), np.float32))
    fill(writer)
    with pytest.raises(SaveError, match="larger meta_room_bytes"):
        writer.commit({"x": "y" * 200})


def test_all_pieces_outside_their_leaves_are_named():
    bad = [Piece(9, 0, ()), Piece(0, 0, ((0, 6), (0, 3))), Piece(2, 0, ((0, 1),))]
    with pytest.raises(ConfigError) as found:
        plan(pieces=[*PIECES, *bad])
    assert [f"piece {i}" in str(found.value) for i in (4, 5, 6, 7)] == [
        *(False, True, True, True)
    ]


def test_a_process_with_nothing_to_keep():
    layout = plan(pieces=[])
    memory = memoryview(bytearray(layout.num_bytes))
    ImageWriter(memory, layout, step=1, generation=0).commit({})
    assert read_image(memory).pieces == ()


def test_nothing_is_copied_to_read():
    layout = plan(
        leaves=[SnapshotLeaf("w", (1 << 24,), "uint8")],
        pieces=[Piece(0, 4, ((0, 1 << 24),))],
    )
    memory = memoryview(bytearray(layout.num_bytes))
    writer = ImageWriter(memory, layout, step=1, generation=0)
    writer.put(0, np.ones(1 << 24, np.uint8))
    writer.commit({})
    tracemalloc.start()
    assert read_image(memory).piece(0)[-1] == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_protection_is_no_image():
    assert VALID.startswith(IMAGE)
    with pytest.raises(TornError):
        read_image(b"SKGUARD1" + VALID[8:])
