import hashlib
import os
import time

import numpy as np
import pytest

import shardkit.corpus
from shardkit.corpus import TextCorpus
from shardkit.errors import DataError


def write_files(root, files):
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return root


def test_splits_are_disjoint_and_complete(tmp_path):
    corpus = TextCorpus.open(write_files(tmp_path, {"a.txt": bytes(range(250)) * 4}))
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


def deny_reading(monkeypatch, *names):
    path_class = shardkit.corpus.Path
    read_bytes = path_class.read_bytes

    def read(self):
        if self.name in names:
            raise PermissionError(13, "denied", str(self))
        return read_bytes(self)

    monkeypatch.setattr(path_class, "read_bytes", read)


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
