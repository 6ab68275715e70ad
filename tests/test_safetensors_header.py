import contextlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.checkpoint.safetensors_files import open_safetensors
from shardkit.checkpoint.safetensors_header import encode_header, read_header
from shardkit.errors import RestoreError

FIXTURES = Path(__file__).parent / "fixtures" / "huggingface"


def make(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


HOSTILE = {
    "empty": (b"", "expected a header of 1 to 0 bytes"),
    "short": (b"\1\0\0", "expected a header of 1 to 0 bytes"),
    "pickle": (b"\x80\x04\x95\x0f\0\0\0\0\0\0\0", "expected a header of 1 to 3"),
    "length": (make({}, length=2**63), "expected a header of 1 to"),
    "not json": (make(b"[1, 2"), "not JSON"),
    "not text": (make(b"\xff\xfe{}"), "not JSON"),
    "deep": (make(b"[" * 200_000), "not JSON"),
    "digits": (make(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    "list": (make(b"[]"), "expected a JSON object, found list"),
    "twice": (make(b'{"a": 1, "a": 2}'), "'a' is there twice"),
    "metadata": (make({"__metadata__": {"a": 1}}), "__metadata__: expected strings"),
    "no dict": (make({"a": 3}), "'a': expected the keys"),
    "key": (make({"a": tensor(code="x")}, bytes(8)), "'a': expected the keys"),
    "dtype": (make({"a": tensor(dtype="F31")}, bytes(8)), "found 'F31'"),
    "dtype kind": (make({"a": tensor(dtype=["F32"])}, bytes(8)), "expected one of"),
    "negative": (make({"a": tensor(shape=[-2])}, bytes(8)), "shape: expected sizes"),
    "true": (make({"a": tensor(shape=[True, 2])}, bytes(8)), "shape: expected sizes"),
    "vast": (
        make({"a": tensor(shape=[0, 2**40, 2**40], data_offsets=[0, 0])}),
        "shape: expected sizes",
    ),
    "dims": (make({"a": tensor(shape=[1] * 70 + [2])}, bytes(8)), "shape: expected"),
    "backwards": (
        make({"a": tensor(data_offsets=[8, 0])}, bytes(8)),
        "expected 8 byte",
    ),
    "too long": (make({"a": tensor(shape=[9])}, bytes(8)), "expected 36 bytes"),
    "outside": (make({"a": tensor(data_offsets=[8, 16])}, bytes(8)), "begin at byte"),
    "cut short": (make({"a": tensor()}, bytes(7)), "bytes of header and data"),
    "rest": (make({"a": tensor()}, bytes(9)), "bytes of header and data"),
    "overlap": (
        make({"a": tensor(), "b": tensor(data_offsets=[4, 12])}, bytes(12)),
        "'b': expected to begin at byte",
    ),
    "same": (make({"a": tensor(), "b": tensor()}, bytes(8)), "'b': expected to begin"),
    "hole": (make({"a": tensor(data_offsets=[4, 12])}, bytes(12)), "expected to begin"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_gives_one_clear_error(tmp_path, name):
    content, message = HOSTILE[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(RestoreError) as caught:
        read_header(path)
    for text in (message, str(path)):
        assert text in str(caught.value)


def test_all_bad_tensors_are_listed_but_not_without_end(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(make({f"t{i}": 0 for i in range(1000)}))
    with pytest.raises(RestoreError, match="and 980 more") as caught:
        read_header(path)
    for text in ("'t0': expected", "'t19': expected"):
        assert text in str(caught.value)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_no_change_of_a_header_is_a_traceback(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    content = bytearray(
        (FIXTURES / "llama_bfloat16" / "model.safetensors").read_bytes()
    )
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header - 1))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(RestoreError):
        tree = open_safetensors(path)
        length = 8 + int.from_bytes(content[:8], "little")
        assert sum(view.nbytes for view in tree.values()) == len(content) - length


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(RestoreError, match="expected a file"):
        read_header(tmp_path / "a.safetensors")


def test_what_is_encoded_is_read(tmp_path):
    leaves = {"b": (np.dtype(np.int16), (3, 2)), "a": (np.dtype(np.bool_), ())}
    path, metadata = tmp_path / "a.safetensors", {"format": "pt"}
    header = encode_header(leaves, metadata)
    path.write_bytes(header + bytes(13))
    entries, found = read_header(path)
    start = len(header)
    assert start % 8 == 0
    assert found == metadata
    assert entries == {
        "b": (*leaves["b"], start, start + 12),
        "a": (*leaves["a"], start + 12, start + 13),
    }
