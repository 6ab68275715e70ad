import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.data import ArrayBatches, TextBatches, TextCorpus, permute
from shardkit.errors import DataError


def make_corpus(tmp_path, num_bytes, *, validation_fraction=0.0):
    """A corpus of the little-endian uint16 numbers 0, 1, …: every window differs."""
    content = np.arange(num_bytes // 2 + 1, dtype="<u2").tobytes()[:num_bytes]
    path = tmp_path / f"corpus{num_bytes}.bin"
    path.write_bytes(content)
    return TextCorpus.open(path, validation_fraction=validation_fraction)


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 5000),
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 2**63),
)
def test_permute_is_a_bijection(size, seed, epoch):
    order = permute(np.arange(size), size=size, seed=seed, epoch=epoch)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


@pytest.mark.parametrize("size", range(1, 34))
def test_permute_is_a_bijection_around_every_small_power_of_two(size):
    for epoch in range(8):
        order = permute(np.arange(size), size=size, seed=0, epoch=epoch)
        assert sorted(order.tolist()) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(50, 5000),
    seed=st.integers(0, 2**32),
    epochs=st.tuples(st.integers(0, 1000), st.integers(0, 1000)),
)
def test_orders_differ_between_epochs_and_seeds(size, seed, epochs):
    index = np.arange(size)
    order = permute(index, size=size, seed=seed, epoch=epochs[0])
    if epochs[0] != epochs[1]:
        other = permute(index, size=size, seed=seed, epoch=epochs[1])
        assert np.mean(order == other) < 0.5
    assert np.mean(order == index) < 0.5
    reseeded = permute(index, size=size, seed=seed + 1, epoch=epochs[0])
    assert np.mean(order == reseeded) < 0.5


def test_permute_spreads_evenly_over_epochs():
    size, num_epochs = 20, 4000
    epochs = np.arange(num_epochs)
    for position in (0, 1, 10, 19):
        order = permute(np.full(num_epochs, position), size=size, seed=1, epoch=epochs)
        counts = np.bincount(order, minlength=size)
        chi_squared = np.sum((counts - num_epochs / size) ** 2) / (num_epochs / size)
        # 19 degrees of freedom: 50 is exceeded once in 8000 honest draws.
        assert chi_squared < 50


def test_permute_favours_no_order_of_five():
    num_epochs = 24_000
    epochs = np.arange(num_epochs)[:, None]
    orders = permute(np.arange(5)[None, :], size=5, seed=0, epoch=epochs)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 120
    chi_squared = np.sum((counts - num_epochs / 120) ** 2) / (num_epochs / 120)
    # 119 degrees of freedom: 180 is exceeded about once in 4000 honest draws.
    assert chi_squared < 180


def test_permute_is_pinned():
    # Another order here is another order in every run that is resumed.
    order = permute(np.arange(10), size=10, seed=7, epoch=3)
    assert order.tolist() == [4, 8, 7, 6, 2, 0, 9, 3, 1, 5]
    large = permute(np.arange(4), size=2**40, seed=-1, epoch=2**63)
    assert large.tolist() == [
        1078131345640,
        299873004492,
        649703629324,
        1983905248,
    ]


def test_permute_refuses_indices_outside():
    with pytest.raises(DataError, match=r"\[0, 10\), found 0…10"):
        permute(np.arange(11), size=10, seed=0, epoch=0)
    with pytest.raises(DataError, match="found -1"):
        permute(-1, size=10, seed=0, epoch=0)


@settings(max_examples=40, deadline=None)
@given(
    num_windows=st.integers(1, 40),
    global_batch_size=st.integers(1, 50),
    seed=st.integers(0, 10),
)
def test_every_epoch_visits_each_window_once(
    tmp_path_factory, num_windows, global_batch_size, seed
):
    length = 6
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"), num_windows * length + 3)
    batches = TextBatches(
        corpus,
        sequence_length=length,
        global_batch_size=global_batch_size,
        seed=seed,
    )
    assert batches.num_windows == num_windows
    num_epochs = 3
    num_steps = -(-num_windows * num_epochs // global_batch_size)
    rows = np.concatenate([batches(step)["tokens"] for step in range(num_steps)])
    windows = {
        corpus.tokens[start : start + length + 1].tobytes()
        for start in range(0, num_windows * length, length)
    }
    for epoch in range(num_epochs):
        visited = rows[epoch * num_windows : (epoch + 1) * num_windows]
        seen = [row.astype(np.uint8).tobytes() for row in visited]
        assert set(seen) == windows
        assert len(seen) == len(windows)


def test_examples_do_not_depend_on_the_batch_size(tmp_path):
    corpus = make_corpus(tmp_path, 1000)
    streams = []
    for global_batch_size in (1, 4, 12, 60):
        batches = TextBatches(
            corpus, sequence_length=16, global_batch_size=global_batch_size, seed=5
        )
        steps = range(120 // global_batch_size)
        streams.append(np.concatenate([batches(step)["tokens"] for step in steps]))
    for stream in streams[1:]:
        np.testing.assert_array_equal(stream, streams[0])


def test_a_step_needs_no_predecessor(tmp_path):
    corpus = make_corpus(tmp_path, 4000)

    def make():
        return TextBatches(corpus, sequence_length=32, global_batch_size=7, seed=2)

    batches = make()
    sequential = [batches(step)["tokens"] for step in range(60)]
    for step in (59, 0, 17, 18, 17):
        found = make()(step)["tokens"]
        assert found.dtype == np.int32
        assert found.shape == (7, 33)
        np.testing.assert_array_equal(found, sequential[step])
    assert batches.tokens_per_step == 7 * 32


def test_far_steps_do_not_overflow(tmp_path):
    batches = TextBatches(
        make_corpus(tmp_path, 1001), sequence_length=10, global_batch_size=2**12
    )
    assert batches.num_windows == 100
    for step in (2**40, np.int64(2**40), 2**70):
        rows = batches(step)["tokens"]
        first = -(int(step) * 2**12) % 100
        epoch = rows[first : first + 100]
        assert len(np.unique(epoch, axis=0)) == 100
    assert not np.array_equal(batches(2**40)["tokens"], batches(2**40 + 25)["tokens"])


def test_look_ahead_token_is_the_next_windows_first(tmp_path):
    corpus = make_corpus(tmp_path, 1000, validation_fraction=0.5)
    batches = TextBatches(
        corpus, sequence_length=20, global_batch_size=24, split="validation"
    )
    rows = batches(0)["tokens"]
    assert batches.num_windows == 24
    np.testing.assert_array_equal(rows[:-1, -1], rows[1:, 0])
    np.testing.assert_array_equal(rows[:, :-1].ravel(), corpus.tokens[500:980])
    # The end of the split runs on into its beginning.
    np.testing.assert_array_equal(batches(1)["tokens"], rows)


def test_corpus_shorter_than_one_window(tmp_path):
    corpus = make_corpus(tmp_path, 100)
    kwargs = {"global_batch_size": 2}
    assert TextBatches(corpus, sequence_length=99, **kwargs).num_windows == 1
    with pytest.raises(DataError, match=r"at least 101 tokens .* found 100"):
        TextBatches(corpus, sequence_length=100, **kwargs)
    with pytest.raises(DataError, match=r"validation split .* found 0 of the corpus's"):
        TextBatches(corpus, sequence_length=9, split="validation", **kwargs)


def test_bad_sizes_and_steps(tmp_path):
    corpus = make_corpus(tmp_path, 100)
    with pytest.raises(DataError, match="sequence_length = 0, global_batch_size = -1"):
        TextBatches(corpus, sequence_length=0, global_batch_size=-1)
    batches = TextBatches(corpus, sequence_length=9, global_batch_size=2)
    with pytest.raises(DataError, match="found step -1"):
        batches(-1)
    with pytest.raises(TypeError):
        batches(1.5)


def test_array_batches_keep_rows_together_and_visit_each_once():
    arrays = {"x": np.arange(20.0).reshape(10, 2), "label": np.arange(10, dtype="i1")}
    batches = ArrayBatches(arrays, global_batch_size=4, seed=1)
    rows = [batches(step) for step in range(5)]
    labels = np.concatenate([row["label"] for row in rows])
    assert batches.num_rows == 10
    assert labels.dtype == np.int8
    for epoch in (labels[:10], labels[10:]):
        assert sorted(epoch.tolist()) == list(range(10))
    assert labels[:10].tolist() != labels[10:].tolist()
    for row in rows:
        np.testing.assert_array_equal(row["x"], arrays["x"][row["label"]])


def test_array_batches_refuse_unequal_and_empty_arrays():
    with pytest.raises(DataError, match="y: expected 4 rows, found 3"):
        ArrayBatches(
            {"x": np.ones(4), "y": np.ones(3), "z": np.ones(4)}, global_batch_size=1
        )
    with pytest.raises(DataError, match="expected rows, found none in x"):
        ArrayBatches({"x": np.ones((0, 3))}, global_batch_size=1)
    with pytest.raises(DataError, match="global_batch_size = 0"):
        ArrayBatches({"x": np.ones(4)}, global_batch_size=0)
