import json
import math
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.checkpoint import safetensors_files
from shardkit.checkpoint.safetensors_files import open_safetensors, write_safetensors
from shardkit.checkpoint.safetensors_header import encode_header
from shardkit.checkpoint.views import ArrayView, View
from shardkit.errors import ConfigError, RestoreError

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures" / "huggingface"
INDEX = "model.safetensors.index.json"
DTYPES = [
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32"),
    *("int64", "float16", "float32", "float64", "complex64", ml_dtypes.bfloat16),
    *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu),
]


def random_bits(shape, dtype, seed=0):
    """Any bits at all, NaNs and infinities among them."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    high = 2 if dtype == np.bool_ else 256
    bits = np.random.default_rng(seed).integers(0, high, size, np.uint8)
    return bits.view(dtype).reshape(shape)


def views(arrays):
    return {name: ArrayView(array) for name, array in arrays.items()}


def whole(view):
    return view.read(tuple((0, dim) for dim in view.shape))


def assert_same(tree, arrays):
    assert set(tree) == set(arrays)
    for name, array in arrays.items():
        assert (tree[name].dtype, tree[name].shape) == (array.dtype, array.shape)
        assert whole(tree[name]).tobytes() == array.tobytes(), name


def every_dtype():
    arrays = {str(np.dtype(d)): random_bits((3, 5), d) for d in DTYPES}
    return arrays | {
        "scalar": np.array(0.1, np.float32),
        "empty": np.zeros((0, 7), np.int16),
        "odd": random_bits((7,), np.uint8),
    }


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    arrays = every_dtype()
    path = tmp_path / "all.safetensors"
    assert write_safetensors(path, views(arrays), {"format": "pt"}) == [path]
    assert_same(open_safetensors(path), arrays)


def test_the_real_library_reads_what_is_written(tmp_path):
    # It gives NumPy no dtypes but NumPy's own, and bfloat16.
    skipped = {"float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "complex64"}
    arrays = {k: v for k, v in every_dtype().items() if k not in skipped}
    path = tmp_path / "all.safetensors"
    write_safetensors(path, views(arrays), {"format": "pt"}, limit_bytes=8)
    found = safetensors.numpy.load_file(path)
    assert_same(views(found), arrays)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_real_library_accepts_every_dtype(tmp_path):
    arrays = every_dtype()
    path = tmp_path / "all.safetensors"
    write_safetensors(path, views(arrays))
    with safetensors.safe_open(path, "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    assert shapes == {name: array.shape for name, array in arrays.items()}


def test_what_the_real_library_writes_is_read(tmp_path):
    arrays = {k: v for k, v in every_dtype().items() if not k.startswith("float8")}
    path = tmp_path / "theirs.safetensors"
    safetensors.numpy.save_file(arrays, path, {"some": "metadata"})
    assert_same(open_safetensors(path), arrays)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_box_is_what_numpy_cuts(data, tmp_path_factory):
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=4)))
    array = random_bits(shape, data.draw(st.sampled_from(DTYPES)))
    path = tmp_path_factory.mktemp("box") / "a.safetensors"
    # One byte before it, as we never write it, so that nothing is aligned.
    leaves = {"first": (np.dtype(np.uint8), (1,)), "a": (array.dtype, shape)}
    path.write_bytes(encode_header(leaves) + b"0" + array.tobytes())
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, d)] * 2))) for d in shape]
    found = open_safetensors(path)["a"].read(tuple(map(tuple, bounds)))
    wanted = array[tuple(slice(*pair) for pair in bounds)]
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert found.tobytes() == wanted.tobytes()


def test_boxes_of_large_tensors_are_mapped_in_pieces(tmp_path, monkeypatch):
    array = random_bits((50, 6), np.float32)
    write_safetensors(tmp_path / "a.safetensors", views({"a": array}))
    view = open_safetensors(tmp_path / "a.safetensors")["a"]
    monkeypatch.setattr(safetensors_files, "_MAPPED_BYTES", 100)
    wanted = array[3:41, 2:5]
    assert view.read(((3, 41), (2, 5))).tobytes() == wanted.tobytes()


def test_more_than_a_shard_gets_an_index(tmp_path):
    arrays = {f"layer.{i}": random_bits((10, 10), np.float32, i) for i in range(5)}
    out = tmp_path / "new" / "model"
    files = write_safetensors(
        out, views(arrays), max_shard_bytes=900, files={"config.json": b"{}"}
    )
    assert [file.name for file in files] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"] == {"total_size": 2000}
    assert index["weight_map"]["layer.4"] == files[2].name
    for path in (out, out / INDEX):
        assert_same(open_safetensors(path), arrays)
    for file in files:
        assert safetensors.numpy.load_file(file).keys() <= arrays.keys()
    assert (out / "config.json").read_bytes() == b"{}"
    # Nothing is left of what was being made.
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_a_tensor_larger_than_a_shard_is_not_cut(tmp_path):
    arrays = {name: random_bits((9,), np.float32) for name in "abc"}
    files = write_safetensors(tmp_path / "out", views(arrays), max_shard_bytes=1)
    assert len(files) == 3
    assert_same(open_safetensors(tmp_path / "out"), arrays)


def test_a_directory_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="expected a new or an empty directory"):
        write_safetensors(tmp_path, views({"a": np.zeros(2)}))
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


class Failing(View):
    dtype, shape = np.dtype(np.float32), (4,)

    def read(self, box):
        raise RestoreError("block 3 is damaged")


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_write_that_fails_leaves_nothing(tmp_path, name):
    with pytest.raises(RestoreError, match="block 3 is damaged"):
        write_safetensors(tmp_path / name, {"a": Failing()})
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, views({"a": np.arange(4.0)}))
    with pytest.raises(RestoreError):
        write_safetensors(path, {"a": Failing()})
    # Its own views can be written back, too.
    write_safetensors(path, open_safetensors(path) | views({"b": np.arange(2)}))
    assert_same(open_safetensors(path), {"a": np.arange(4.0), "b": np.arange(2)})


def test_all_leaves_that_cannot_be_stored_are_named(tmp_path):
    tree = {"a": np.zeros(2, ml_dtypes.int4), "b": np.zeros(2), "c": np.zeros(1, "U3")}
    with pytest.raises(ConfigError) as caught:
        write_safetensors(tmp_path / "a.safetensors", views(tree))
    for text in ("a: int4[2]", "c: <U3[1]"):
        assert text in str(caught.value)


LARGE = """
import sys
import numpy as np
from shardkit.checkpoint.safetensors_files import open_safetensors, write_safetensors
from shardkit.checkpoint.views import View

class Large(View):
    dtype, shape = np.dtype(np.float32), (2**16, 1024)

    def read(self, box):
        (first, last), (start, stop) = box
        return np.full((last - first, stop - start), first, np.float32)

def peak_bytes():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

before = peak_bytes()
write_safetensors(sys.argv[1], {"large": Large()}, limit_bytes=2**22)
view = open_safetensors(sys.argv[1])["large"]
for start in range(0, 2**16, 2**10):
    assert view.read(((start, start + 2**10), (0, 1024)))[0, 0] == start
# A narrow column lies on every page.
assert view.read(((0, 2**16), (5, 6))).shape == (2**16, 1)
print(peak_bytes() - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    command = [sys.executable, "-c", LARGE, str(tmp_path / "large.safetensors")]
    done = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    )
    # The file is of 256 MiB, 64 of which are mapped at a time.
    assert int(done.stdout) < 100 * 2**20


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, views({"a": np.arange(4096.0)}))
    view = open_safetensors(path)["a"]
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(RestoreError, match="changed since it was opened"):
        whole(view)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.safetensors", "expected a file"),
        ("nowhere.index.json", "expected a file"),
        ("", "found neither"),
    ],
)
def test_what_is_missing_is_named(tmp_path, name, message):
    with pytest.raises(RestoreError, match=message):
        open_safetensors(tmp_path / name)


def sharded(tmp_path):
    arrays = {name: random_bits((9,), np.float32) for name in "abc"}
    write_safetensors(tmp_path / "out", views(arrays), max_shard_bytes=1)
    return tmp_path / "out", json.loads((tmp_path / "out" / INDEX).read_text())


@pytest.mark.parametrize(
    "shard",
    [
        "../a.safetensors",
        "/etc/passwd",
        "..",
        "",
        ".",
        "sub/a",
        "a\\b",
        "a\0b",
        3,
        None,
    ],
)
def test_an_index_cannot_name_other_places(tmp_path, shard):
    out, index = sharded(tmp_path)
    index["weight_map"]["b"] = shard
    (out / INDEX).write_text(json.dumps(index))
    with pytest.raises(RestoreError, match="expected a file beside it"):
        open_safetensors(out)


def test_an_index_and_its_shards_must_agree(tmp_path):
    out, index = sharded(tmp_path)
    places = index["weight_map"]
    places["a"], places["d"] = places["b"], places["c"]
    (out / INDEX).write_text(json.dumps(index))
    with pytest.raises(RestoreError) as caught:
        open_safetensors(out)
    for text in ("'a': expected in model-00002", "'d': expected in model-00003"):
        assert text in str(caught.value)
    del places["a"], places["d"], places["b"]
    places["e"] = "model-00001-of-00003.safetensors"
    (out / INDEX).write_text(json.dumps(index))
    with pytest.raises(RestoreError, match="'a': is in model-00001"):
        open_safetensors(out)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', "[" * 99_999])
def test_a_damaged_index_is_refused(tmp_path, text):
    out, _ = sharded(tmp_path)
    (out / INDEX).write_text(text)
    with pytest.raises(RestoreError, match=INDEX):
        open_safetensors(out)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama_tied", "llama_bfloat16"])
def test_files_of_transformers_are_read_as_the_real_library_does(name):
    tree = open_safetensors(FIXTURES / name)
    for file in sorted((FIXTURES / name).glob("*.safetensors")):
        for path, array in safetensors.numpy.load_file(file).items():
            assert whole(tree[path]).tobytes() == array.tobytes()
            assert tree[path].shape == array.shape
