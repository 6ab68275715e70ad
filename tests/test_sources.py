"""The cursor of every kind of source; examples, mixtures and iterables."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardkit as sk
from shardkit.errors import DataError
from shardkit.sources.collate import stack_examples

NUM = 13
PROPERTY = settings(max_examples=15, deadline=None, derandomize=True)


def numbered(num=NUM, first=0):
    """Examples that say which they are."""
    return [{"id": first + i, "in": {"x": np.full(2, i, "f4")}} for i in range(num)]


def token_windows(folder):
    np.save(folder / "a.npy", np.arange(20, dtype=np.uint16))
    np.arange(100, 137, dtype=np.uint16).tofile(folder / "b.bin")
    return sk.sources.TokenFile(folder, sequence_length=4, dtype="uint16")


def json_lines(folder):
    lines = [json.dumps({"id": i, "x": [i, -i]}) for i in range(NUM)]
    (folder / "a.jsonl").write_text("\n\n".join(lines[:5]) + "\n")
    (folder / "b.jsonl").write_bytes("\r\n".join(lines[5:]).encode())
    return sk.sources.JsonLines(folder)


def packed_rows(folder):
    arrays = [np.arange(i * 30, i * 30 + i) for i in range(20)]
    documents = sk.sources.Documents.from_arrays(arrays)
    return sk.sources.Packed(documents, sequence_length=7, block_size=6)


def structured(folder):
    records = np.zeros(NUM, dtype=[("id", "i4"), ("x", "f4", (3,))])
    records["id"] = np.arange(NUM)
    return records


def grain_maps(folder):
    grain = pytest.importorskip("grain")
    data = grain.MapDataset.source(numbered()).seed(3)
    return data.random_map(lambda x, rng: {**x, "noise": rng.normal(size=2)})


def hugging_face(folder):
    datasets = pytest.importorskip("datasets")
    table = {"id": list(range(NUM)), "x": [[i, 2 * i] for i in range(NUM)]}
    return datasets.Dataset.from_dict(table)


SOURCES = {
    "list": lambda folder: numbered(),
    "structured": structured,
    "tokens": token_windows,
    "jsonl": json_lines,
    "packed": packed_rows,
    "part": lambda folder: sk.sources.Part(numbered(20), range(5, 18)),
    "grain": grain_maps,
    "datasets": hugging_face,
}


def to_bytes(batch):
    """Everything of a batch, row by row."""
    if isinstance(batch, dict):
        columns = [to_bytes(batch[name]) for name in sorted(batch)]
        return [b"".join(row) for row in zip(*columns, strict=True)]
    return [row.tobytes() for row in batch]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tmp_path_factory.mktemp(name) for name in SOURCES}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_cursor(folders, kind):
    """Whatever is asked for, in any order, of new objects, in other batch sizes."""

    def make(size, seed):
        source = SOURCES[kind](folders[kind])
        return sk.Examples(source, global_batch_size=size, seed=seed)

    streams = {}
    for seed in (0, 1, None):
        batches = make(3, seed)
        num = batches.num_examples
        rows = [row for step in range(num) for row in to_bytes(batches(step))]
        streams[seed] = rows
        # Noise differs between epochs; what an example is does not.
        which = [row[:4] if kind == "grain" else row for row in rows]
        epochs = [which[start : start + num] for start in range(0, 3 * num, num)]
        for epoch in epochs:
            assert sorted(epoch) == sorted(epochs[0])
            assert len(set(epoch)) == num
        assert (epochs[0] == epochs[1]) == (seed is None)
    assert streams[0] != streams[1]

    rng = np.random.default_rng(0)
    for _ in range(8):
        size, seed = int(rng.integers(1, 8)), [0, 1, None][rng.integers(3)]
        # A resume: another object, which begins anywhere and goes back and forth.
        batches = make(size, seed)
        for step in rng.integers(0, len(streams[seed]) // size, size=4).tolist():
            expected = streams[seed][step * size : (step + 1) * size]
            assert to_bytes(batches(step)) == expected


def test_far_steps_do_not_overflow():
    batches = sk.Examples(numbered(), global_batch_size=5)
    mixed = sk.Mixture([(numbered(), 1), (numbered(7, first=50), 3)])
    for far in (2**62, 2**70 * NUM):
        ids = [batches(far + n)["id"] for n in range(NUM)]
        start = -far * 5 % NUM
        epoch = np.concatenate(ids)[start : start + NUM]
        assert sorted(epoch.tolist()) == list(range(NUM))
        found = sk.Examples(mixed, global_batch_size=8)(far)["id"]
        assert np.sum(found >= 50) == 6


def test_an_epoch_of_grain_draws_its_own_noise():
    noise = sk.Examples(grain_maps(None), global_batch_size=NUM, seed=None)
    assert not np.array_equal(noise(0)["noise"], noise(1)["noise"])


def test_a_batched_getter_is_called_once_a_batch():
    calls = []

    class Rows(list):
        def __getitems__(self, indices):
            calls.append(indices)
            return [self[i] for i in indices]

    batches = sk.Examples(Rows(numbered()), global_batch_size=4, seed=None)
    assert batches(3)["id"].tolist() == [12, 0, 1, 2]
    assert calls == [[12, 0, 1, 2]]
    Rows.__getitems__ = lambda self, indices: []
    with pytest.raises(DataError, match="expected 4 examples, found 0"):
        batches(0)


def test_collate_gets_the_examples():
    batches = sk.Examples(
        ["a", "bcd"],
        global_batch_size=2,
        seed=None,
        collate=lambda texts: {"length": np.array([len(text) for text in texts])},
    )
    assert batches(0)["length"].tolist() == [1, 3]


def test_dtypes_follow_types_and_not_values():
    example = {
        "int": 3,
        "float": 3.0,
        "bool": True,
        "list": [1, 2],
        "floats": [[1.0], [2.0]],
        "own": np.float64(3),
        "array": np.ones(2, "u1"),
    }
    batch = stack_examples([example] * 2, ["", ""])
    assert {name: str(array.dtype) for name, array in batch.items()} == {
        "int": "int32",
        "float": "float32",
        "bool": "bool",
        "list": "int32",
        "floats": "float32",
        "own": "float64",
        "array": "uint8",
    }
    assert batch["floats"].shape == (2, 2, 1)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"x": [1, 2, 3]}, r"example 1, leaf x: expected int32\[2\], found int32\[3\]"),
        ({"x": [1.0, 2]}, r"leaf x: expected int32\[2\], found float32\[2\]"),
        ({"x": [[1], [1, 2]]}, "lists that differ in length"),
        ({"x": "text"}, r"leaf x: expected int32\[2\], found a str"),
        ({"x": None}, "found None"),
        ({"x": (1, 2)}, "found a tuple"),
        ({"x": [2**40, 0]}, "do not fit into int32"),
        ({"x": np.array(["a", "b"])}, "found values of dtype <U1"),
        (
            {"y": [1, 2]},
            r"(?s)leaf x: .*found nothing.*1, leaf y: expected nothing, found int32",
        ),
    ],
)
def test_an_odd_example_is_named(odd, message):
    examples = [{"x": [1, 2]}, odd, {"x": [3, 4]}]
    with pytest.raises(DataError, match=message):
        sk.Examples(examples, global_batch_size=3, seed=None)(0)


def test_nothing_to_stack_is_named():
    with pytest.raises(DataError, match="found no leaves"):
        sk.Examples([{}], global_batch_size=1)(0)
    with pytest.raises(DataError, match=r"example 0, leaf \(the example itself\)"):
        sk.Examples(["text"], global_batch_size=1)(0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"x": np.ones(3)}, "ArrayBatches"),
        ("file.jsonl", "JsonLines"),
        (iter([1]), "from_iterable"),
        ({1, 2}, "from_iterable"),
        ([], "length 0"),
    ],
    ids=["dict", "path", "iterator", "set", "empty"],
)
def test_what_is_no_source_is_refused_at_once(source, message):
    with pytest.raises(DataError, match=message):
        sk.Examples(source, global_batch_size=1)


def test_bad_sizes_and_steps():
    with pytest.raises(DataError, match="found 0"):
        sk.Examples(numbered(), global_batch_size=0)
    with pytest.raises(DataError, match="found step -1"):
        sk.Examples(numbered(), global_batch_size=1)(-1)
    with pytest.raises(DataError, match="length 13, found 3 to 13"):
        sk.sources.Part(numbered(), range(3, 14))


def test_an_error_of_a_source_says_which_example():
    class Broken(list):
        def __getitem__(self, index):
            raise OSError("lost")

    with pytest.raises(OSError, match="lost") as caught:
        sk.Examples(Broken([1, 2]), global_batch_size=1, seed=None)(1)
    assert "example 1" in caught.value.__notes__[0]


WEIGHTS = st.lists(
    st.one_of(st.integers(1, 9), st.sampled_from([0.1, 0.7, 1e-3, 0.3333333])),
    min_size=1,
    max_size=6,
)


@PROPERTY
@given(weights=WEIGHTS)
def test_a_mixture_keeps_every_share_and_skips_nothing(weights):
    mixture = sk.Mixture([(numbered(), weight) for weight in weights])
    assert sum(mixture.weights) == 1
    counts = [0] * len(weights)
    limit = max(1, (len(weights) - 1).bit_length()) / 2
    for index in range(300):
        number, place = mixture.locate(index)
        # The n-th of a source follows its (n - 1)-th: none is skipped or repeated.
        assert place == counts[number]
        counts[number] += 1
        for count, share in zip(counts, mixture.weights, strict=True):
            assert abs(count - share * (index + 1)) <= limit


def test_a_mixture_is_exact_where_a_period_ends():
    mixture = sk.Mixture([([0], 0.1), ([0], 0.2), ([0], 0.7)])
    assert mixture.weights == (Fraction(1, 10), Fraction(2, 10), Fraction(7, 10))
    far = 10**30
    found = [mixture.locate(far + i)[0] for i in range(10)]
    assert [found.count(number) for number in range(3)] == [1, 2, 7]
    assert mixture.locate(far)[1] == far // 10 * [1, 2, 7][found[0]]


def test_sources_of_a_mixture_have_epochs_and_orders_of_their_own():
    inner = sk.Mixture([(numbered(8, first=100), 1), (numbered(8, first=200), 1)])
    mixture = sk.Mixture([(numbered(8), 1), (inner, 2)])
    batches = sk.Examples(mixture, global_batch_size=6)
    ids = np.concatenate([batches(step)["id"] for step in range(8)])
    orders = []
    for hundred in range(3):
        own = ids[ids // 100 == hundred] % 100
        assert len(own) == 16
        assert sorted(own[:8]) == sorted(own[8:]) == list(range(8))
        orders.append(own.tolist())
    assert len({tuple(order) for order in orders}) == 3
    again = sk.Examples(mixture, global_batch_size=12)(3)["id"]
    np.testing.assert_array_equal(again, ids[36:48])
    in_order = sk.Examples(mixture, global_batch_size=3, seed=None)
    assert in_order(1)["id"].tolist() == [101, 1, 201]


def test_a_mixture_names_the_source_of_an_odd_example():
    mixture = sk.Mixture([(numbered(), 1), ([{"id": 1.5, "in": {"x": np.ones(2)}}], 1)])
    with pytest.raises(DataError, match=r"source 1, example 0, leaf in/x"):
        sk.Examples(mixture, global_batch_size=5)(0)
    with pytest.raises(DataError, match="Examples, source 0: expected a source read"):
        sk.Examples(sk.Mixture([({}, 1)]), global_batch_size=1)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "much", None])
def test_weights_are_above_zero(weight):
    with pytest.raises(DataError, match="source 1: expected a weight above 0"):
        sk.Mixture([(numbered(), 1), (numbered(), weight)])


def test_a_mixture_needs_pairs():
    with pytest.raises(DataError, match="found no sources"):
        sk.Mixture([])
    with pytest.raises(DataError, match=r"source 0: expected \(source, weight\)"):
        sk.Mixture([numbered()])


def counting():
    return ({"x": np.full((4, 2), i), "n": np.arange(4) + i} for i in range(40))


@PROPERTY
@given(steps=st.lists(st.integers(0, 39), max_size=12), keep=st.integers(1, 5))
def test_an_iterable_goes_anywhere(steps, keep):
    batches = sk.from_iterable(counting, keep=keep)
    for step in steps:
        found = batches(step)
        expected = next(itertools.islice(counting(), step, None))
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_an_iterable_begins_anew_only_where_it_must():
    made = []

    def make():
        made.append(1)
        return counting()

    batches = sk.from_iterable(make, keep=3)
    for step in (0, 9, 7, 8, 9, 10):
        batches(step)
    assert len(made) == 1
    batches(6)
    assert len(made) == 2
    assert sk.from_iterable(list(counting()))(3)["x"][0, 0] == 3


def test_a_plain_iterator_cannot_go_back():
    batches = sk.from_iterable(counting())
    digest = batches.digest
    assert batches(20)["x"][0, 0] == 20
    assert batches(13)["x"][0, 0] == 13
    with pytest.raises(DataError, match=r"step 12 .* only steps 13 to 20 are kept"):
        batches(12)
    assert batches(21)["x"][0, 0] == 21
    assert digest == sk.from_iterable(counting).digest


def test_an_iterator_that_changes_is_caught():
    drawn = itertools.count()
    batches = sk.from_iterable(
        lambda: ({"x": np.array([next(drawn)])} for _ in range(9))
    )
    batches(8)
    for _ in range(2):
        with pytest.raises(DataError, match="another batch for step 0"):
            batches(0)


def test_an_iterator_may_reuse_its_arrays():
    def reusing():
        x = np.zeros(2)
        for i in range(9):
            x[:] = i
            yield {"x": x}

    batches = sk.from_iterable(reusing)
    first = batches(0)
    assert batches(8)["x"][0] == 8
    assert first["x"][0] == 0


def test_the_end_of_an_iterator_and_its_errors():
    batches = sk.from_iterable(counting, keep=1)
    for _ in range(2):
        with pytest.raises(DataError, match="ended after 40 batches, and step 45"):
            batches(45)
    assert batches(39)["x"][0, 0] == 39
    with pytest.raises(DataError, match="keep of at least 1"):
        sk.from_iterable(counting, keep=0)
    with pytest.raises(DataError, match="found a int"):
        sk.from_iterable(3)
    with pytest.raises(DataError, match="found step -1"):
        batches(-1)
