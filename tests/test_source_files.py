"""Files as sources, text to tokens, and documents packed into rows."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.build import build_batches
from shardkit.config import from_dict
from shardkit.errors import ConfigError, DataError
from shardkit.sources import (
    Documents,
    JsonLines,
    Packed,
    TextFiles,
    TokenFile,
    tokenize,
)
from shardkit.sources.packing import pack_pieces

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)


def test_lines_are_found_whatever_ends_them(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b'\n{"a": 1}\r\n  \n\n{}\n{"a": "\xc3\xbc"}')
    (tmp_path / "a.ndjson").write_bytes(b'{"a": 0, "b": 5}\n')
    (tmp_path / "empty.jsonl").touch()
    lines = JsonLines(tmp_path)
    found = [lines[i] for i in range(len(lines))]
    assert found == [{"a": 0, "b": 5}, {"a": 1}, {}, {"a": "ü"}]
    assert lines[-1] == {"a": "ü"}
    with pytest.raises(IndexError):
        lines[4]
    narrow = JsonLines(tmp_path, fields=["a"])
    assert narrow[0] == {"a": 0}
    with pytest.raises(
        DataError, match=r"b.jsonl:5: expected the fields a, found none"
    ):
        narrow[2]


def test_a_bad_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n[1]\n')
    lines = JsonLines(path)
    with pytest.raises(DataError, match=r"a.jsonl:3: expected a JSON object, found b'"):
        lines[1]
    with pytest.raises(DataError, match=r"a.jsonl:4: .* found a list"):
        lines[2]
    path.write_text("\n \n")
    with pytest.raises(DataError, match="found none"):
        JsonLines(path)
    path.write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(DataError, match="gzip"):
        JsonLines(path)
    with pytest.raises(DataError, match="do not exist"):
        JsonLines(tmp_path / "*.txt")


def test_the_digest_is_of_the_contents(tmp_path):
    digests = []
    for place, text in (("x", "{}"), ("y", "{}"), ("z", "[]")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.jsonl").write_text(text)
        digests.append(JsonLines(tmp_path / place).digest)
    assert digests[0] == digests[1] != digests[2]


def test_windows_of_token_files(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(11, dtype=np.int64))
    with (tmp_path / "b.bin").open("wb") as file:
        file.write(b"header!!")
        file.write(np.arange(100, 110, dtype="<u2").tobytes())
    np.save(tmp_path / "short.npy", np.arange(5))
    options = {"sequence_length": 5, "dtype": "uint16", "header_bytes": 8}
    windows = TokenFile(tmp_path, **options)
    found = [windows[i]["tokens"].tolist() for i in range(len(windows))]
    assert found == [[*range(6)], [*range(5, 11)], [*range(100, 106)]]
    assert windows[0]["tokens"].dtype == np.int32
    one = TokenFile([tmp_path / "b.bin", tmp_path / "a.npy"], **options)
    assert one[0]["tokens"][0] == 100
    before = windows.digest
    np.save(tmp_path / "a.npy", np.arange(11, dtype=np.int64)[::-1])
    assert TokenFile(tmp_path, **options).digest != before


def test_token_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.bin"
    np.arange(9, dtype=np.uint16).tofile(path)
    with pytest.raises(DataError, match="dtype of its tokens is missing"):
        TokenFile(path, sequence_length=4)
    with pytest.raises(DataError, match="found 18 bytes"):
        TokenFile(path, sequence_length=4, dtype="uint32")
    with pytest.raises(DataError, match=r"at least 10 tokens .* found 9"):
        TokenFile(path, sequence_length=9, dtype="uint16")
    with pytest.raises(DataError, match="found 0"):
        TokenFile(path, sequence_length=0, dtype="uint16")
    np.save(tmp_path / "a.npy", np.ones((3, 3)))
    with pytest.raises(DataError, match=r"found float64\[3, 3\]"):
        TokenFile(tmp_path / "a.npy", sequence_length=4)
    np.full(9, -1, np.int32).tofile(path)
    with pytest.raises(DataError, match="found -1 to -1"):
        TokenFile(path, sequence_length=4, dtype="int32")[1]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[END]", "the", "house", "of", "bits"]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[PAD]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    # What a file of a model often asks for, and what must not happen here.
    tokenizer.enable_padding(length=9)
    tokenizer.enable_truncation(2)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_tokenizer_files(tmp_path, tokenizer_file):
    path = tmp_path / "a.jsonl"
    texts = ["the house of bits", "", "house the house"]
    lines = [{"text": text, "w": i / 2} for i, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, lines)))
    options = {"end_token": "[END]", "weight_field": "w", "cache": tmp_path / "cache"}
    documents = tokenize(JsonLines(path), tokenizer_file, **options)
    found = [documents[i]["tokens"].tolist() for i in range(3)]
    assert found == [[2, 3, 4, 5, 1], [1], [3, 2, 3, 1]]
    assert documents.weights.tolist() == [0, 0.5, 1]
    # The second time nothing is read but the cache.
    saved = JsonLines(path)
    saved.__class__ = type("Unreadable", (JsonLines,), {"__getitem__": None})
    again = tokenize(saved, str(tokenizer_file), **options)
    np.testing.assert_array_equal(again.tokens, documents.tokens)
    assert again.digest == documents.digest
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert tokenize(JsonLines(path), tokenizer_file).digest != documents.digest


def test_what_cannot_be_tokenized(tmp_path, tokenizer_file):
    with pytest.raises(
        DataError, match=r"document 1: .*'text', found a dict.*fields body"
    ):
        tokenize([{"text": "a"}, {"body": "b"}])
    with pytest.raises(DataError, match="found '<eos>', which is none"):
        tokenize(["a"], tokenizer_file, end_token="<eos>")
    with pytest.raises(DataError, match="cache needs"):
        tokenize(["a"], cache=tmp_path)
    with pytest.raises(DataError, match=r"found .*none.json: No such file"):
        tokenize(["a"], tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="expected the text of a tokenizer"):
        tokenize(["a"], tmp_path / "bad.json")
    with pytest.raises(DataError, match="found a int"):
        tokenize(["a"], 3)
    with pytest.raises(DataError, match="found None"):
        tokenize([{"text": "a"}], weight_field="w")
    with pytest.raises(DataError, match="expected 2 weights"):
        Documents.from_arrays([[1], [2]], [1.0])
    own = tokenize(["ab"], lambda text: [len(text)], end_token=7)
    assert own.tokens.tolist() == [2, 7]


def first_fit_decreasing(lengths, capacity):
    """The textbook's, row by row."""
    rows, places = [], {}
    for piece in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = (r for r, used in enumerate(rows) if used + lengths[piece] <= capacity)
        row = next(fits, len(rows))
        rows[row : row + 1] = [sum(rows[row : row + 1]) + lengths[piece]]
        places[piece] = row
    return [places[i] for i in range(len(lengths))], len(rows)


@PROPERTY
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_pieces_are_packed_first_fit_decreasing(lengths):
    expected = []
    for start in range(0, len(lengths), 16):
        rows, _ = first_fit_decreasing(lengths[start : start + 16], 12)
        first = 1 + max(expected, default=-1)
        expected += [first + row for row in rows]
    assert pack_pieces(np.array(lengths), 12, 16).tolist() == expected


@PROPERTY
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=30).filter(any),
    sequence_length=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_every_token_is_predicted_once_and_within_its_document(
    lengths, sequence_length, seed
):
    offsets = np.cumsum([0, *lengths])
    # Each token says which it is.
    arrays = [np.arange(a, b) for a, b in itertools.pairwise(offsets)]
    weights = np.arange(1, len(lengths) + 1)
    packed = Packed(
        Documents.from_arrays(arrays, weights),
        sequence_length=sequence_length,
        seed=seed,
        pad_token=-1,
        block_size=8,
    )
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    predicted, inputs = [], set()
    for number in range(len(packed)):
        row = packed[number]
        tokens, segments = row["tokens"], row["segments"]
        assert (tokens == -1).tolist() == (segments == 0).tolist()
        inputs.update(tokens[segments > 0].tolist())
        for t in range(sequence_length):
            same = segments[t] == segments[t + 1] != 0
            assert (row["weights"][t] > 0) == same
            if same:
                assert tokens[t + 1] == tokens[t] + 1
                assert row["positions"][t + 1] == row["positions"][t] + 1
                document = document_of[tokens[t]]
                assert document == document_of[tokens[t + 1]]
                assert row["weights"][t] == weights[document]
                predicted.append(int(tokens[t + 1]))
        starts = np.flatnonzero(np.diff(segments, prepend=0))
        assert not row["positions"][starts[segments[starts] > 0]].any()
    assert sorted(predicted) == sorted(set(range(offsets[-1])) - set(offsets.tolist()))
    assert inputs == set(range(offsets[-1]))


def test_packing_fills_the_rows_and_mixes_documents():
    rng = np.random.default_rng(0)
    arrays = [np.arange(n) for n in rng.integers(2, 60, size=1500)]
    documents = Documents.from_arrays(arrays, digest="d")
    packed = Packed(documents, sequence_length=63, seed=1)
    assert packed.fill > 0.97
    other = Packed(documents, sequence_length=63, seed=2)
    assert packed.digest != other.digest
    assert any(
        not np.array_equal(packed[i]["tokens"], other[i]["tokens"]) for i in range(3)
    )
    with pytest.raises(DataError, match="sequence_length = 0, block_size = -1"):
        Packed(documents, sequence_length=0, block_size=-1)
    with pytest.raises(DataError, match="without any"):
        Packed(Documents.from_arrays([[]]), sequence_length=1)


def test_text_files_are_documents(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.md").write_bytes(b"\xff one")
    (tmp_path / "c.png").write_bytes(b"no")
    texts = TextFiles(tmp_path)
    assert [texts[i]["text"] for i in range(len(texts))] == ["\ufffd one", "two"]
    assert tokenize(texts).lengths.tolist() == [7, 3]


def config_of(**data):
    return from_dict(
        {
            "model": {"factory": "models.gpt:build"},
            "data": {"global_batch_size": 4, "num_microbatches": 2, **data},
            "optimizer": {"learning_rate": 1e-3},
            "train": {"steps": 1, "seed": 3},
        }
    )


def test_a_config_names_token_files_and_documents(tmp_path, tokenizer_file):
    np.save(tmp_path / "tokens.npy", np.arange(101, dtype=np.uint16))
    common = {"sequence_length": 5, "validation_fraction": 0.2}
    train, valid, digest = build_batches(
        config_of(factory="tokens", path=str(tmp_path), **common)
    )
    assert (train.num_examples, valid.num_examples) == (16, 4)
    assert digest
    assert valid(0)["tokens"][0].tolist() == [*range(80, 86)]

    lines = [json.dumps({"body": "the house of bits"})] * 20
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    options = {"tokenizer": str(tokenizer_file), "field": "body", "end_token": "[END]"}
    config = config_of(
        factory="documents",
        path=str(tmp_path / "*.jsonl"),
        options=options,
        **common,
    )
    train, valid, digest = build_batches(config)
    assert (train.num_examples, valid.num_examples) == (16, 4)
    assert valid(0)["tokens"][0].tolist() == [2, 3, 4, 5, 1, 0]
    assert train(0)["segments"].shape == (4, 6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"factory": "tokens", "sequence_length": 4}, "path is missing"),
        ({"factory": "documents", "path": "x"}, "sequence_length is missing"),
        ({"sequence_length": 4, "options": {"a": 1}}, "options are of no use"),
        ({"factory": "a:b", "path": "x"}, "path is for text, tokens, documents alone"),
    ],
)
def test_what_a_config_may_not_say(data, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**data)


def test_an_unknown_option_is_named(tmp_path):
    config = config_of(
        factory="tokens", path=str(tmp_path), sequence_length=4, options={"dtyp": "u2"}
    )
    with pytest.raises(ConfigError, match="did you mean 'dtype'"):
        build_batches(config)


def test_tokens_that_a_model_has_no_row_for_are_refused(tmp_path):
    np.save(tmp_path / "tokens.npy", np.full(101, 300, dtype=np.uint16))
    config = config_of(factory="tokens", path=str(tmp_path), sequence_length=4)

    def with_vocabulary(size):
        options = {"vocab_size": size}
        model = dataclasses.replace(config.model, options=options)
        return dataclasses.replace(config, model=model)

    build_batches(with_vocabulary(301))
    with pytest.raises(ConfigError, match=r"token 300, .* 301, found 256"):
        build_batches(with_vocabulary(256))
