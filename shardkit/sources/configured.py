"""The data that a config names by a word: token files, and documents packed into rows.

Owns what the options are called and the cut between training and validation: a tail
of the windows or of the documents.
"""

from typing import Any

from shardkit.errors import DataError
from shardkit.ramp import BatchRamp
from shardkit.sources.documents import Documents
from shardkit.sources.examples import Examples
from shardkit.sources.files import TextFiles
from shardkit.sources.jsonl import JsonLines
from shardkit.sources.packing import Packed
from shardkit.sources.part import Part, split_tail
from shardkit.sources.token_files import TokenFile
from shardkit.sources.tokenizing import tokenize

__all__ = ["documents", "tokens"]


def tokens(
    *,
    path: str,
    sequence_length: int,
    validation_fraction: float | None = None,
    global_batch_size: int | BatchRamp,
    seed: int = 0,
    split: str = "train",
    dtype: str | None = None,
    header_bytes: int = 0,
) -> Examples:
    """Makes batches of windows of `.bin` or `.npy` files of token ids.

    Args:
        path: A file, a directory or a glob.
        sequence_length: Tokens per row.
        validation_fraction: The part of the windows kept for evaluation; 0.05 if None.
        global_batch_size: Rows over all devices together; or a ramp of them.
        seed: Chooses the order; validation is read in order.
        split: `"train"` or `"validation"`.
        dtype: Of `.bin` files, such as `"uint16"`.
        header_bytes: Left out at the beginning of every `.bin` file.

    Raises:
        DataError: If there is no such data.
    """
    windows = TokenFile(
        path, sequence_length=sequence_length, dtype=dtype, header_bytes=header_bytes
    )
    cut = _cut(len(windows), validation_fraction, "windows")
    chosen = range(cut) if split == "train" else range(cut, len(windows))
    return _batches(Part(windows, _found(chosen)), global_batch_size, seed, split)


def documents(
    *,
    path: str,
    sequence_length: int,
    validation_fraction: float | None = None,
    global_batch_size: int | BatchRamp,
    seed: int = 0,
    split: str = "train",
    tokenizer: str | None = None,
    field: str = "text",
    weight_field: str | None = None,
    end_token: str | int | None = None,
    cache: str | None = None,
) -> Examples:
    """Makes batches of documents packed into rows: see `sk.sources.Packed`.

    Args:
        path: JSON Lines (`.jsonl`, `.ndjson`, `.json`), or else text files with one
            document each; a file, a directory or a glob.
        sequence_length: Tokens per row.
        validation_fraction: The part of the documents kept for evaluation; 0.05 if
            None.
        global_batch_size: Rows over all devices together; or a ramp of them.
        seed: Chooses what is packed together and the order; validation is read in
            order.
        split: `"train"` or `"validation"`.
        tokenizer: A file of the package `tokenizers`; None for bytes.
        field: The field of a JSON object that holds the text.
        weight_field: The field that says how much a document counts.
        end_token: Put after every document: an id, or a token of the vocabulary.
        cache: A directory where the token ids are kept for later runs.

    Raises:
        DataError: If there is no such data.
    """
    is_json = not path.lower().endswith((".txt", ".md", ".py"))
    source: Any = JsonLines(path) if is_json else TextFiles(path)
    found = tokenize(
        source,
        tokenizer,
        field=field,
        weight_field=weight_field,
        end_token=end_token,
        cache=cache,
    )
    packed = Packed(
        _split_documents(found, validation_fraction, split),
        sequence_length=sequence_length,
        seed=seed,
    )
    return _batches(packed, global_batch_size, seed, split)


def _split_documents(found: Documents, fraction: float | None, split: str) -> Documents:
    cut = _cut(len(found), fraction, "documents")
    chosen = _found(range(cut) if split == "train" else range(cut, len(found)))
    return found.part(chosen.start, chosen.stop)


def _cut(num_examples: int, fraction: float | None, what: str) -> int:
    return split_tail(num_examples, 0.05 if fraction is None else fraction, what=what)


def _found(chosen: range) -> range:
    if not chosen:
        raise DataError(
            "The validation data are empty: expected a validation_fraction above 0, "
            "found 0. Set it, or eval_batches = 0."
        )
    return chosen


def _batches(
    source: Any, global_batch_size: int | BatchRamp, seed: int, split: str
) -> Examples:
    order = seed if split == "train" else None
    return Examples(source, global_batch_size=global_batch_size, seed=order)
