"""Text to token ids, once per corpus.

Owns which tokenizers there are (the bytes of the text, a `tokenizers` file, a function
of the user's) and where the result is kept.

Invariant: the ids depend on the texts and the tokenizer only; padding and truncation
that a tokenizer file asks for are switched off.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardkit.errors import DataError
from shardkit.sources.documents import Documents
from shardkit.sources.readers import open_reader

__all__ = ["tokenize"]

_DOCUMENTS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class _Encoder:
    """From texts to ids; the digest is None where nobody knows what it does."""

    encode: Callable[[list[str]], list[Any]]
    digest: str | None
    find: Callable[[str], int | None]
    """From the text of a special token to its id."""


def tokenize(
    source: Any,
    tokenizer: Any = None,
    *,
    field: str = "text",
    weight_field: str | None = None,
    end_token: str | int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Documents:
    """Turns the texts of a source into documents of token ids.

    Args:
        source: Texts, or dicts with one, by index: `JsonLines`, `TextFiles`, a list, a
            Hugging Face `Dataset`.
        tokenizer: None for the UTF-8 bytes, a vocabulary of 256; the path of a file of
            the `tokenizers` package (`tokenizer.json`), or such a `Tokenizer`; or a
            function from a text to a list of ids.
        field: Which field holds the text.
        weight_field: Which field says how much a document counts; None: all alike.
        end_token: Put after every document: an id, or a token of the vocabulary.
        cache: A directory where the ids are kept for later runs and other processes.
            Known by the digests of the source and of the tokenizer.

    Raises:
        DataError: If a text or the token is missing, a package is not installed, or
            there is a cache and no digest.

    Example:
        >>> tokenize(["ab", "c"], end_token=0)[0]["tokens"].tolist()
        [97, 98, 0]
    """
    encoder = _open_encoder(tokenizer)
    end = _find_end(encoder, end_token)
    texts = getattr(source, "digest", None)
    digest = None
    if texts is not None and encoder.digest is not None:
        key = f"1 {texts} {encoder.digest} {field} {weight_field} {end}"
        digest = hashlib.sha256(key.encode()).hexdigest()
    if cache is None:
        return _encode_all(source, encoder, field, weight_field, end, digest)
    if digest is None:
        raise DataError(
            "tokenize: a cache needs a source and a tokenizer that can be known again, "
            f"found {type(source).__name__} and {type(tokenizer).__name__}. Take "
            "JsonLines or TextFiles with a tokenizer file, or no cache."
        )
    path = Path(cache).expanduser() / digest[:32]
    if not path.is_dir():
        _encode_all(source, encoder, field, weight_field, end, digest).save(path)
    return Documents.load(path, digest=digest)


def _encode_all(
    source: Any,
    encoder: _Encoder,
    field: str,
    weight_field: str | None,
    end: int | None,
    digest: str | None,
) -> Documents:
    arrays: list[np.ndarray] = []
    weights: list[float] = []
    for examples in _read_in_order(source):
        texts = [_text_of(x, field, len(arrays) + n) for n, x in enumerate(examples)]
        if weight_field is not None:
            weights += [_weight_of(x, weight_field) for x in examples]
        for ids in encoder.encode(texts):
            array = np.asarray(ids, np.int32)
            arrays.append(array if end is None else np.append(array, np.int32(end)))
    return Documents.from_arrays(
        arrays, weights if weight_field is not None else None, digest=digest
    )


def _read_in_order(source: Any) -> Iterator[Sequence[Any]]:
    reader = open_reader(source, where="tokenize")
    if reader.num_examples is None:
        raise DataError("tokenize: expected a source of some length, found none.")
    for start in range(0, reader.num_examples, _DOCUMENTS_AT_ONCE):
        stop = min(start + _DOCUMENTS_AT_ONCE, reader.num_examples)
        yield reader.read(range(start, stop))


def _text_of(example: Any, field: str, number: int) -> str:
    is_dict = isinstance(example, Mapping)
    text = example.get(field) if is_dict else example
    if not isinstance(text, str):
        fields = f" with the fields {', '.join(example)}" if is_dict else ""
        raise DataError(
            f"tokenize: document {number}: expected text in the field {field!r}, found "
            f"a {type(example).__name__}{fields}. Name the field that holds the text."
        )
    return text


def _weight_of(example: Any, field: str) -> float:
    weight = example.get(field) if isinstance(example, Mapping) else None
    if not isinstance(weight, int | float) or not weight >= 0:
        raise DataError(
            f"tokenize: expected a weight of at least 0 in the field {field!r} of "
            f"every document, found {weight!r}."
        )
    return float(weight)


def _open_encoder(tokenizer: Any) -> _Encoder:
    if tokenizer is None:

        def encode(texts: list[str]) -> list[Any]:
            return [np.frombuffer(text.encode(), np.uint8) for text in texts]

        return _Encoder(encode, "bytes", lambda token: None)
    if isinstance(tokenizer, str | os.PathLike):
        path = Path(tokenizer).expanduser()
        try:
            return _open_tokenizers(path.read_text())
        except OSError as error:
            raise DataError(
                f"tokenize: expected a tokenizer file, found {path}: {error.strerror}. "
                "Name the tokenizer.json of a model."
            ) from error
    if hasattr(tokenizer, "encode_batch") and hasattr(tokenizer, "to_str"):
        return _open_tokenizers(tokenizer.to_str())
    if callable(tokenizer):
        return _Encoder(
            lambda texts: [tokenizer(x) for x in texts], None, lambda _: None
        )
    raise DataError(
        "tokenize: expected a tokenizer file, a tokenizers.Tokenizer or a function, "
        f"found a {type(tokenizer).__name__}."
    )


def _open_tokenizers(text: str) -> _Encoder:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise DataError(
            "tokenize: tokenizer files need the package tokenizers; "
            "pip install 'shardkit[tokenizers]'"
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:
        # The package raises bare exceptions.
        raise DataError(
            f"tokenize: expected the text of a tokenizer.json, found {text[:40]!r}: "
            f"{error}"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def encode(texts: list[str]) -> list[Any]:
        found = tokenizer.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    digest = hashlib.sha256(text.encode()).hexdigest()
    return _Encoder(encode, digest, tokenizer.token_to_id)


def _find_end(encoder: _Encoder, end_token: str | int | None) -> int | None:
    if not isinstance(end_token, str):
        return end_token
    number = encoder.find(end_token)
    if number is None:
        raise DataError(
            f"tokenize: expected end_token to be a token of the vocabulary, found "
            f"{end_token!r}, which is none. Give its id, or another token."
        )
    return number
