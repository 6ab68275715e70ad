"""What a checkpoint says of itself is checked before it is believed."""

import ast
import contextlib
import copy
import hashlib
import json
import math
import re
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shardkit as sk
from shardkit.blocks import Blocks
from shardkit.checkpoint.manager import check_run
from shardkit.checkpoint.manifest import (
    FILE_NAME,
    LeafRecord,
    Manifest,
    is_path,
    numpy_dtype,
    sealed,
    unsealed,
)
from shardkit.checkpoint.reader import Saved, open_checkpoint
from shardkit.checkpoint.stored import METADATA_NAME, stored_name, tree_names
from shardkit.checkpoint.sums import SUMS_NAME, check_sums, write_sums

ROOT = Path(__file__).parents[1]
LANES = "0123456789abcdef" * 2
VALID = Manifest(
    step=3,
    digest="d" * 32,
    leaves={
        "params/kernel": LeafRecord((5, 3), "float32", (LANES,), ("in", None)),
        "params/layers/0": LeafRecord((1500, 1024), "bfloat16", (LANES,)),
        "keys": LeafRecord((2,), "key<fry>", (LANES,)),
        "none": LeafRecord((0, 3), "int4", (LANES,)),
    },
    run={"seed": 0, "config": {"steps": [1, 2]}},
    data={"next_step": 3},
    metrics={"loss": 0.5},
)
SETTINGS = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

HOSTILE = [
    *(None, True, -1, 0, 1, 2**31, 2**47, 2**48, 2**49, 2**63, 2**64, 10**4000),
    *(1.5, 1e308, math.nan, math.inf, -math.inf, "", ".", "..", "../../etc/passwd"),
    *("/etc/passwd", "a\0b", "\ud800", "a//b", "C:\\x", "%s{0}", "\n", "x" * 5000),
    *("object", "O", "str", "V8", "void", "S5", "M8", "finfo", "float128", "key<rbg>"),
    *("__class__", "float32,float32", "float32", LANES, LANES.upper(), {}, []),
    *([[]], [-1], [2**48] * 40, [2**40, 2**40], [1.0], ["3"], [None] * 9, [LANES] * 2),
    *({"": 0}, {"..": {}}, {"shape": [1]}, {"a": {"b": {"c": [{}]}}}),
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(["shape"]), inner)
    ),
    max_leaves=12,
)
hostile_values = st.sampled_from(HOSTILE) | json_values


def seal(text):
    """Seals any text that ends as a table does, as its author could."""
    text = text.rstrip().removesuffix("}").rstrip().encode("utf-8", "surrogatepass")
    seal = hashlib.sha256(text).hexdigest()
    return text + b',\n "sha256": "' + seal.encode() + b'"\n}'


def places_in(value, place=()):
    """Yields the way to everything inside a JSON value."""
    yield place
    if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield from places_in(value[key], (*place, key))


@st.composite
def edited(draw, base):
    """A table with some of what is in it replaced, removed, renamed or added to."""
    table = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        places = [place for place in places_in(table) if place]
        if not places:
            break
        place = draw(st.sampled_from(places))
        inner = table
        for key in place[:-1]:
            inner = inner[key]
        key, action = place[-1], draw(st.sampled_from("replace remove rename".split()))
        if action == "replace":
            inner[key] = copy.deepcopy(draw(hostile_values))
        elif action == "remove":
            del inner[key]
        elif isinstance(inner, dict):
            name = draw(st.sampled_from([x for x in HOSTILE if isinstance(x, str)]))
            inner[name] = inner.pop(key)
    return table


def table_of(data):
    table = json.loads(data)
    del table["sha256"]
    return table


@contextlib.contextmanager
def at_most(num_bytes):
    """Asserts that Python never holds more at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] <= num_bytes
    finally:
        tracemalloc.stop()


def use(directory):
    """All that is done with a manifest; the author of it may know the seal.

    Returns:
        Whether it was believed.
    """
    try:
        manifest = Manifest.read(directory)
    except sk.DamagedError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert str(directory / FILE_NAME) in refusal
        assert len(refusal.encode()) < 8000
        return False
    for path, leaf in manifest.leaves.items():
        name = stored_name(path)
        assert Path(directory, name).parent == directory
        assert name not in (".", "..")
        assert leaf.stored_dtype.kind in "biufcV"
        assert not leaf.stored_dtype.hasobject
        assert 0 <= leaf.nbytes < 2**53
        assert leaf.lanes().shape in ((0, 4), (len(leaf.grid), 4))
        assert leaf.layers is None or leaf.layers >= 0
    assert Manifest.read(directory) == manifest
    with contextlib.suppress(sk.RestoreError):
        check_run(Saved(directory, manifest, {}), {"seed": 0})
    saved = open_checkpoint(directory)
    for view in saved.views.values():
        with pytest.raises(sk.DamagedError, match="cannot be read"):
            view.read(tuple((0, 1) for _ in view.shape))
    return True


@pytest.fixture
def item(tmp_path):
    """A directory of arrays of which only the manifest is there."""
    (tmp_path / "item").mkdir()
    yield tmp_path / "item"
    # Nothing is made anywhere else.
    assert [path.name for path in tmp_path.iterdir()] == ["item"]
    assert {path.name for path in (tmp_path / "item").iterdir()} <= {
        *(FILE_NAME, SUMS_NAME, METADATA_NAME, "d")
    }


def test_what_is_written_is_read(item):
    (item / FILE_NAME).write_bytes(VALID.to_bytes())
    assert Manifest.read(item) == VALID
    assert use(item)


@SETTINGS
@given(table=edited(table_of(VALID.to_bytes())))
def test_no_edit_of_a_manifest_does_harm(item, table):
    (item / FILE_NAME).write_bytes(sealed(table))
    with at_most(8 << 20):
        use(item)


@settings(SETTINGS, max_examples=50)
@given(table=st.dictionaries(st.text(max_size=8), json_values))
def test_no_json_is_taken_for_a_manifest(item, table):
    (item / FILE_NAME).write_bytes(sealed({"format": 2, **table}))
    assert not use(item)


@SETTINGS
@given(text=st.text() | st.binary().map(lambda data: data.decode("latin1")))
def test_no_text_is_taken_for_a_manifest(item, text):
    for data in (text.encode("utf-8", "surrogatepass"), seal(text)):
        (item / FILE_NAME).write_bytes(data)
        assert not use(item)


def test_every_single_bit_of_a_manifest_counts(item):
    data = VALID.to_bytes()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << (at % 8)
        (item / FILE_NAME).write_bytes(changed)
        assert not use(item)


VALID_TEXT = VALID.to_bytes().decode().rpartition(",\n")[0]
TEXTS = {
    "twice": VALID_TEXT + ', "step": 3}',
    "leaf twice": VALID_TEXT.replace('"keys": {', '"keys": {}, "keys": {') + "}",
    "deep list": VALID_TEXT + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep table": VALID_TEXT + ', "x": ' + '{"a":' * 90_000 + "1" + "}" * 90_001,
    "nested run": VALID_TEXT.replace(
        '"run": {', '"run": {"a":' + "[" * 300 + "]" * 300 + ","
    )
    + "}",
    "digits": VALID_TEXT.replace('"step": 3', '"step": ' + "9" * 100_000) + "}",
    "exponent": VALID_TEXT.replace('"step": 3', '"step": 1e999999999') + "}",
    "utf-16": VALID_TEXT.encode("utf-16").decode("latin1") + "}",
    "list": "[]}",
    "format": VALID_TEXT.replace('"format": 2', '"format": true') + "}",
    "huge metric": VALID_TEXT.replace('"loss": 0.5', '"loss": ' + "9" * 400) + "}",
}


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_texts_are_refused(item, name):
    (item / FILE_NAME).write_bytes(seal(TEXTS[name]))
    with at_most(64 << 20):
        assert not use(item)


LEAF = {"shape": [2], "dtype": "float32", "axes": None, "blocks": [LANES]}


@pytest.mark.parametrize(
    ("part", "entry", "num"),
    [
        ("run", 0, 50_000),
        ("leaves", LEAF, 5_000),
        pytest.param("run", 0, 1_000_000, marks=pytest.mark.slow),
        pytest.param("leaves", LEAF, 100_000, marks=pytest.mark.slow),
    ],
)
def test_many_keys_cost_no_more_than_their_text(item, part, entry, num):
    table = table_of(VALID.to_bytes())
    table[part] = dict.fromkeys(map(str, range(num)), entry)
    data = seal(json.dumps(table))
    (item / FILE_NAME).write_bytes(data)
    with at_most(25 * len(data)):
        manifest = Manifest.read(item)
    with pytest.raises(sk.RestoreError, match="of another run") as caught:
        check_run(Saved(item, manifest, {}), {"seed": 1})
    assert len(str(caught.value)) < 100_000


@pytest.mark.parametrize("kind", ["float32", "int4", "bfloat16", "bool", "complex64"])
def test_names_of_dtypes(kind):
    assert numpy_dtype(kind).name == kind


@pytest.mark.parametrize(
    "kind",
    [
        *("object", "O", "object_", "str", "str_", "bytes", "void", "V8", "S3", "U1"),
        *("datetime64", "timedelta64", "finfo", "iinfo", "float", "double", "i4", "a5"),
        *("generic", "number", "void8", "record", "", "np", "f4,f4", "float32 "),
    ],
)
def test_names_that_are_no_dtypes(kind):
    with pytest.raises(ValueError, match=r"no dtype|not saved"):
        numpy_dtype(kind)


@SETTINGS
@given(path=st.text(alphabet="a./\\\0~ \ud800", max_size=8))
def test_paths_stay_where_they_are_put(path):
    if is_path(path):
        assert Path("/x", path).resolve().is_relative_to("/x/")
        assert Path("/x", stored_name(path)).resolve().parent == Path("/x")
        path.encode()


def test_the_wrong_number_of_blocks_is_refused(item):
    leaf = LeafRecord((1 << 24, 2), "float32", (LANES,))
    assert len(leaf.grid) == 32
    for num in (1, 31, 33):
        wrong = LeafRecord(leaf.shape, leaf.dtype, (LANES,) * num)
        manifest = Manifest(step=1, digest="d", leaves={"w": wrong})
        (item / FILE_NAME).write_bytes(manifest.to_bytes())
        with pytest.raises(sk.DamagedError, match=f"expected 32 digests, found {num}"):
            Manifest.read(item)
    assert Blocks.of((1 << 24, 2), 4).grid == (32,)


@pytest.fixture
def listed(item):
    """An item with a list of two files."""
    (item / "d").mkdir()
    for name in ("d/a", METADATA_NAME):
        (item / name).write_bytes(name.encode())
    write_sums(item)
    assert check_sums(item) == []
    return item


@SETTINGS
@given(data=st.data())
def test_no_edit_of_a_list_of_files_does_harm(listed, data):
    opened = []
    sums = listed / SUMS_NAME
    before = sums.read_bytes()
    valid = table_of(before)
    table = data.draw(edited(valid))
    sums.write_bytes(sealed(table))
    try:
        with watched(opened), at_most(64 << 20):
            bad = check_sums(listed)
    finally:
        sums.write_bytes(before)
    assert bad or table["files"] == valid["files"]
    assert all(text.encode() for text in bad)
    assert all(Path(path).is_relative_to(listed) for path in opened)


_WATCHERS = []


def _audit(event, args):
    if event == "open" and _WATCHERS and isinstance(args[0], str):
        _WATCHERS[-1].append(args[0])


@contextlib.contextmanager
def watched(opened):
    """Notes the paths that Python opens; a hook, once added, stays."""
    if not getattr(sys, "_shardkit_audit", False):
        sys.addaudithook(_audit)
        sys._shardkit_audit = True
    _WATCHERS.append(opened)
    yield
    _WATCHERS.pop()


@SETTINGS
@given(data=st.data())
def test_no_edit_of_orbaxs_metadata_does_harm(item, data):
    entry = {
        "key_metadata": [{"key": "a", "key_type": 2}, {"key": "b", "key_type": 2}],
        "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
    }
    table = data.draw(edited({"tree_metadata": {"('a', 'b')": entry}}))
    (item / METADATA_NAME).write_text(json.dumps(table))
    with contextlib.suppress(sk.DamagedError):
        for name in tree_names(item):
            assert is_path(name)
    with contextlib.suppress(sk.DamagedError):
        open_checkpoint(item)


def test_a_seal_is_of_the_text_itself(tmp_path):
    path = tmp_path / "file"
    data = sealed({"format": 1, "a": [1, 2]})
    for changed in (data, data.replace(b"\n", b"\r\n"), data + b"\n", b" " + data):
        path.write_bytes(changed)
        if changed == data:
            assert unsealed(path, 1)["a"] == [1, 2]
            continue
        with pytest.raises(sk.DamagedError, match="file: damaged"):
            unsealed(path, 1)


def test_nothing_is_pickled_anywhere():
    banned = {*"pickle cloudpickle dill joblib shelve marshal torch".split()}
    for path in (*ROOT.glob("shardkit/**/*.py"), *ROOT.glob("models/**/*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not banned & {name.split(".")[0] for name in names}, path
        # Numpy's own files may hold pickles: memory maps and text do without.
        assert "allow_pickle" not in text, path
        assert not re.search(r"\bj?np\.load\(|\bnumpy\.load\(", text), path
