import hashlib
import itertools
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardkit.data
from shardkit.data import (
    ArrayBatches,
    Prefetcher,
    TextBatches,
    TextCorpus,
    check_batch,
    permute,
)
from shardkit.errors import DataError


def write_files(root, files):
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return root


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


def test_splits_are_disjoint_and_complete(tmp_path):
    corpus = make_corpus(tmp_path, 1000, validation_fraction=0.05)
    train, validation = corpus.split("train"), corpus.split("validation")
    assert (len(train), len(validation)) == (950, 50)
    np.testing.assert_array_equal(np.concatenate([train, validation]), corpus.tokens)
    with pytest.raises(DataError, match=r"'train' and 'validation', not 'test'"):
        corpus.split("test")


def test_cut_moves_to_a_near_file_boundary(tmp_path):
    files = {"a.txt": b"a" * 930, "b.txt": b"b" * 69}
    corpus = TextCorpus.open(write_files(tmp_path, files))
    assert len(corpus.tokens) == 1000
    assert corpus.split("train").tobytes() == b"a" * 930 + b"\n"
    assert corpus.split("validation").tobytes() == b"b" * 69
    far = TextCorpus.open(tmp_path, validation_fraction=0.3)
    assert len(far.split("validation")) == 300


def test_directory_is_joined_in_name_order_and_filtered(tmp_path):
    files = {"b.TXT": b"two", "a/z.py": b"one", "c.png": b"no", "noext": b"no"}
    corpus = TextCorpus.open(write_files(tmp_path, files))
    assert corpus.tokens.tobytes() == b"one\ntwo"
    assert corpus.tokens.dtype == np.uint8
    assert corpus.num_files == 2
    assert corpus.source == str(tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens[0] = 0


def test_digest_does_not_depend_on_place_or_directory_order(tmp_path, monkeypatch):
    files = {"x/b.txt": b"1", "x/a.txt": b"2", "a.md": b"3", "y/c.txt": b"4"}
    first = TextCorpus.open(write_files(tmp_path / "first", files))
    second_root = write_files(tmp_path / "second", dict(reversed(files.items())))
    walk = os.walk

    def walk_backwards(*args, **kwargs):
        for folder, folders, names in walk(*args, **kwargs):
            folders.sort(reverse=True)
            yield folder, folders, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", walk_backwards)
    second = TextCorpus.open(second_root)
    assert second.digest == first.digest
    assert second.tokens.tobytes() == first.tokens.tobytes()


def test_digest_changes_with_contents_and_names(tmp_path):
    variants = [
        {"a.txt": b"ab", "b.txt": b"c"},
        {"a.txt": b"a", "b.txt": b"bc"},
        {"a.txt": b"ab", "b.txt": b"d"},
        {"a.txt": b"ab", "c.txt": b"c"},
        {"a.txt": b"ab\nc"},
        {"a.txt": b"ab", "b.txt": b"c", "c.txt": b""},
        {"a.txt": b".txtab"},
        {"a.txt.txt": b"ab"},
    ]
    digests = [
        TextCorpus.open(write_files(tmp_path / str(number), files)).digest
        for number, files in enumerate(variants)
    ]
    assert len(set(digests)) == len(variants)
    assert all(len(bytes.fromhex(digest)) == 32 for digest in digests)


def test_glob_takes_any_suffix_and_an_existing_name_is_literal(tmp_path):
    files = {"a/1.log": b"1", "a/b/2.log": b"2", "3.log": b"3", "[4].log": b"4"}
    write_files(tmp_path, files)
    found = TextCorpus.open(str(tmp_path / "a" / "**" / "*.log"))
    assert found.tokens.tobytes() == b"1\n2"
    assert TextCorpus.open(tmp_path / "?.log").tokens.tobytes() == b"3"
    assert TextCorpus.open(tmp_path / "[4].log").tokens.tobytes() == b"4"


def test_relative_glob(tmp_path, monkeypatch):
    write_files(tmp_path, {"a.txt": b"a", "b.txt": b"b"})
    monkeypatch.chdir(tmp_path)
    corpus = TextCorpus.open("*.txt")
    assert corpus.digest == TextCorpus.open(tmp_path).digest


def test_default_corpus_is_the_standard_library():
    started_s = time.perf_counter()
    corpus = TextCorpus.open()
    assert time.perf_counter() - started_s < 10
    text = corpus.tokens.tobytes()
    module = hashlib.__file__
    with open(module, "rb") as file:
        assert file.read() in text
    with open(np.__file__, "rb") as file:
        assert file.read() not in text
    assert "standard library" in corpus.source
    assert 0.04 < len(corpus.split("validation")) / len(text) < 0.06


def test_default_corpus_skips_only_unreadable_tests(tmp_path, monkeypatch):
    files = {"a.py": b"a", "test/b.py": b"b", "site-packages/c.py": b"c", "d.txt": b"d"}
    write_files(tmp_path, files)
    deny_reading(monkeypatch, "b.py")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    corpus = TextCorpus.open()
    assert (corpus.tokens.tobytes(), corpus.num_files) == (b"a", 1)
    (tmp_path / "test").rename(tmp_path / "other")
    with pytest.raises(DataError, match=r"other/b\.py: denied"):
        TextCorpus.open()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"no sources at .*gone"):
        TextCorpus.open()


def deny_reading(monkeypatch, *names):
    path_class = shardkit.data.Path
    read_bytes = path_class.read_bytes

    def read(self):
        if self.name in names:
            raise PermissionError(13, "denied", str(self))
        return read_bytes(self)

    monkeypatch.setattr(path_class, "read_bytes", read)


def test_all_unreadable_files_are_named_at_once(tmp_path, monkeypatch):
    write_files(tmp_path, {"a.txt": b"a", "b.txt": b"b", "test/c.txt": b"c"})
    deny_reading(monkeypatch, "a.txt", "c.txt")
    with pytest.raises(DataError, match="2 of the 3 files") as caught:
        TextCorpus.open(tmp_path)
    assert "a.txt: denied" in str(caught.value)
    assert "c.txt: denied" in str(caught.value)
    assert "b.txt" not in str(caught.value)


def test_unlistable_directory_is_named(tmp_path, monkeypatch):
    write_files(tmp_path, {"a.txt": b"a"})

    def scandir(path):
        raise PermissionError(13, "denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match="cannot be listed: denied"):
        TextCorpus.open(tmp_path)


@pytest.mark.parametrize(
    ("path", "files", "message"),
    [
        ("missing", {}, "missing does not exist: expected a directory, a glob"),
        ("*.txt", {"a.md": b"a"}, r"no file that matches \(0 matches"),
        ("d*", {"dir/a.md": b"a"}, r"no file that matches \(1 matches"),
        ("none/*.txt", {}, "no file that matches"),
        ("dir", {"dir/a.png": b"a"}, "holds no text: expected files ending in"),
        ("dir", {"dir/a.txt": b"", "dir/b.txt": b""}, r"2 file\(s\) of 0 bytes"),
        ("a.txt", {"a.txt": b""}, "is empty"),
    ],
)
def test_bad_places_are_named(tmp_path, path, files, message):
    write_files(tmp_path, files)
    with pytest.raises(DataError, match=message) as caught:
        TextCorpus.open(tmp_path / path)
    assert str(tmp_path / path) in str(caught.value)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_bad_validation_fraction(tmp_path, fraction):
    with pytest.raises(DataError, match="validation_fraction must be"):
        TextCorpus.open(tmp_path, validation_fraction=fraction)


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


def test_prefetch_computes_each_coming_step_once_and_no_further_than_depth():
    calls, ran_ahead = [], threading.Event()

    def fn(step):
        calls.append(step)
        if step == 3:
            ran_ahead.set()
        return step * 10

    with Prefetcher(fn, depth=3) as prefetcher:
        assert not calls
        assert prefetcher.get(0) == 0
        assert ran_ahead.wait(10)
        time.sleep(0.05)
        assert calls == [0, 1, 2, 3]
        assert [prefetcher.get(step) for step in range(1, 20)] == [
            step * 10 for step in range(1, 20)
        ]
    assert calls == list(range(len(calls)))


def test_prefetch_runs_in_one_background_thread():
    with Prefetcher(lambda step: threading.current_thread()) as prefetcher:
        threads = {prefetcher.get(step) for step in (0, 1, 2, 9)}
    (thread,) = threads
    assert thread is not threading.current_thread()
    assert thread.daemon
    assert not thread.is_alive()


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.integers(0, 6), max_size=15),
    depth=st.integers(1, 4),
    delay_ms=st.integers(0, 1),
)
def test_prefetch_seeks(steps, depth, delay_ms):
    def fn(step):
        time.sleep(delay_ms / 1000)
        return step

    with Prefetcher(fn, depth=depth) as prefetcher:
        assert [prefetcher.get(step) for step in steps] == steps


def test_prefetch_seek_discards_what_was_computed_ahead():
    step_one_is_stored = threading.Event()

    def fn(step):
        if step == 2:
            step_one_is_stored.set()
        return step

    with Prefetcher(fn, depth=2) as prefetcher:
        assert prefetcher.get(0) == 0
        assert step_one_is_stored.wait(10)
        assert [prefetcher.get(step) for step in (7, 8, 1)] == [7, 8, 1]


def test_prefetch_seek_discards_the_step_under_way():
    release, started = threading.Event(), threading.Event()

    def fn(step):
        if step == 1:
            started.set()
            assert release.wait(10)
        return step

    with Prefetcher(fn) as prefetcher:
        assert prefetcher.get(0) == 0
        assert started.wait(10)
        threading.Timer(0.05, release.set).start()
        assert prefetcher.get(7) == 7
        assert prefetcher.get(8) == 8


def test_prefetch_raises_at_the_step_that_failed_and_goes_on():
    attempts = itertools.count()

    def fn(step):
        if step == 2 and next(attempts) == 0:
            raise KeyError("step two")
        return step

    with Prefetcher(fn, depth=4) as prefetcher:
        assert [prefetcher.get(0), prefetcher.get(1)] == [0, 1]
        with pytest.raises(KeyError, match="step two"):
            prefetcher.get(2)
        assert prefetcher.get(3) == 3
        assert prefetcher.get(2) == 2


def test_prefetch_hands_over_even_system_exit():
    def fn(step):
        raise SystemExit(4)

    with Prefetcher(fn) as prefetcher, pytest.raises(SystemExit):
        prefetcher.get(0, timeout_s=10)


def test_prefetch_deadline_names_the_step_and_can_be_retried():
    release = threading.Event()

    def fn(step):
        assert release.wait(10)
        return step

    with Prefetcher(fn) as prefetcher:
        with pytest.raises(DataError, match=r"step 5 is missing: .* within 0\.05 s"):
            prefetcher.get(5, timeout_s=0.05)
        release.set()
        assert prefetcher.get(5) == 5


def test_prefetch_close_is_idempotent_and_final():
    prefetcher = Prefetcher(lambda step: step)
    prefetcher.close()
    prefetcher = Prefetcher(lambda step: step)
    assert prefetcher.get(3) == 3
    prefetcher.close()
    prefetcher.close()
    with pytest.raises(DataError, match=r"step 4 .* closed"):
        prefetcher.get(4)


def test_prefetch_close_frees_a_waiting_get():
    release = threading.Event()
    prefetcher = Prefetcher(lambda step: release.wait(10))
    timer = threading.Timer(0.05, prefetcher.close, kwargs={"timeout_s": 0})
    timer.start()
    with pytest.raises(DataError, match="closed"):
        prefetcher.get(0)
    release.set()
    timer.join()


def test_prefetch_refuses_a_depth_of_zero():
    with pytest.raises(DataError, match="depth = 0"):
        Prefetcher(lambda step: step, depth=0)


def test_interpreter_ends_with_a_stuck_prefetch_and_without_jax():
    program = (
        "import sys, time\n"
        "from shardkit.data import Prefetcher\n"
        "assert 'jax' not in sys.modules\n"
        "p = Prefetcher(lambda step: time.sleep(600 * step))\n"
        "p.get(0)\n"
        "print('end')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, "end\n"), result.stderr


def test_check_batch_returns_the_global_batch_size():
    batch = {"x": np.ones((24, 3)), "inner": {"y": np.ones(24)}}
    for num_microbatches in (1, 8, 24):
        found = check_batch(batch, num_microbatches=num_microbatches, where="here")
        assert found == 24


def test_check_batch_names_every_bad_leaf():
    batch = {
        "x": np.ones((24, 3)),
        "y": np.ones(24),
        "inner": {"short": np.ones((12, 2)), "scalar": np.float32(1)},
    }
    with pytest.raises(DataError) as caught:
        check_batch(batch, num_microbatches=8, where="train batch of step 3")
    message = str(caught.value)
    assert message.startswith("train batch of step 3: 2 of 4 leaves")
    assert "inner/short: expected 24 rows, found 12 (shape (12, 2))" in message
    assert "inner/scalar: expected 24 rows, found none (no leading dim)" in message
    assert "\n  x:" not in message


@pytest.mark.parametrize(
    ("num_rows", "num_microbatches", "advice"),
    [
        (24, 16, r"to 12 or 24, .* multiple of 16 such as 16\."),
        (24, 5, r"to 4 or 6, .* multiple of 5 such as 20\."),
        (24, 30, r"to 24, .* multiple of 30 such as 30\."),
    ],
)
def test_check_batch_offers_counts_that_divide(num_rows, num_microbatches, advice):
    batch = {"x": np.ones(num_rows), "y": np.ones(num_rows)}
    with pytest.raises(DataError, match=f"found 24 rows in x, y.*{advice}"):
        check_batch(batch, num_microbatches=num_microbatches, where="here")


@pytest.mark.parametrize("batch", [{}, {"x": 1.0}, {"a": {}}, [1, 2]])
def test_check_batch_refuses_what_holds_no_examples(batch):
    with pytest.raises(DataError, match="expected a dict of arrays"):
        check_batch(batch, num_microbatches=1, where="here")


def test_check_batch_refuses_bad_counts_and_no_rows():
    with pytest.raises(DataError, match=r"here: .*num_microbatches = 0"):
        check_batch({"x": np.ones(4)}, num_microbatches=0, where="here")
    with pytest.raises(DataError, match="found none in x"):
        check_batch({"x": np.ones((0, 2))}, num_microbatches=1, where="here")
    assert check_batch(np.ones((4, 2)), num_microbatches=2, where="here") == 4
