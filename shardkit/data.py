"""Corpora, and the global batch as a pure function of the step.

Owns the text corpus and its digest, the order in which examples are visited, the
background prefetch, and the check that a batch can be cut into microbatches.

Invariant: `batches(step)` depends on the data, the seed and the step only. Device
and process counts and earlier calls never enter, so a run's whole data cursor is one
integer. Does not place anything on devices and knows no mesh.

References:
    Black & Rogaway, Ciphers with Arbitrary Finite Domains (CT-RSA 2002): cycle walking.
    Luby & Rackoff, How to Construct Pseudorandom Permutations (SIAM J. Comput. 1988).
    Steele, Lea & Flood, Fast Splittable Pseudorandom Number Generators (OOPSLA 2014).
"""

import glob
import hashlib
import operator
import os
import platform
import sysconfig
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, SupportsIndex, TypeVar

import numpy as np
import numpy.typing as npt

from shardkit.errors import DataError

__all__ = [
    "ArrayBatches",
    "Prefetcher",
    "TextBatches",
    "TextCorpus",
    "check_batch",
    "permute",
]

T = TypeVar("T")

TEXT_SUFFIXES = frozenset(
    ".txt .md .py .rst .json .toml .csv .html .c .h .js .xml .jsonl".split()
)
NUM_ROUNDS = 8
_UINT64_MASK = 2**64 - 1


@dataclass(frozen=True, eq=False)
class TextCorpus:
    """Text held in memory as bytes, one token per byte; the vocabulary is 256.

    Attributes:
        tokens: uint8 `[num_tokens]`, read-only: the files in order, a newline between.
        digest: SHA-256 (hex) of the files' relative names and contents. It does not
            depend on where the corpus lies or on the file system's order.
        source: Where the text came from, for messages and records.
        num_files: How many files were read, empty ones included.
        num_train_tokens: Where the validation tail begins.
    """

    tokens: npt.NDArray[np.uint8] = field(repr=False)
    _: KW_ONLY
    digest: str
    source: str
    num_files: int
    num_train_tokens: int

    @classmethod
    def open(
        cls, path: str | Path | None = None, *, validation_fraction: float = 0.05
    ) -> "TextCorpus":
        """Reads a corpus into memory.

        Args:
            path: A directory (every file below it with a text suffix), a glob or one
                file (any suffix). None takes the `.py` sources of the running Python's
                standard library, without installed packages.
            validation_fraction: Share of the tokens in the validation tail. The cut
                moves to the next file boundary where one is near.

        Raises:
            DataError: If there is nothing to read, or a file cannot be read.

        Example:
            >>> corpus = TextCorpus.open()
            >>> corpus.tokens.dtype, corpus.num_files > 100
            (dtype('uint8'), True)
        """
        if not 0 <= validation_fraction < 1:
            raise DataError(
                "TextCorpus.open: validation_fraction must be at least 0 and below 1, "
                f"found {validation_fraction}. Set it to, say, 0.05."
            )
        if path is None:
            root = Path(sysconfig.get_path("stdlib"))
            source = f"Python {platform.python_version()} standard library at {root}"
            names = _list_stdlib(root)
        else:
            source = str(path)
            root, names = _find_files(Path(path).expanduser())
        contents = _read_files(root, names, skip_unreadable_tests=path is None)
        if not any(contents.values()):
            raise DataError(
                f"The corpus {source} is empty: expected text, found "
                f"{len(contents)} file(s) of 0 bytes. Name a path that holds text."
            )
        tokens = np.frombuffer(b"\n".join(contents.values()), dtype=np.uint8)
        return cls(
            tokens,
            digest=_digest_files(contents),
            source=source,
            num_files=len(contents),
            num_train_tokens=_place_cut(contents, len(tokens), validation_fraction),
        )

    def split(self, name: str) -> npt.NDArray[np.uint8]:
        """Returns the tokens of `"train"` or, the tail, of `"validation"`.

        Raises:
            DataError: If there is no such split.
        """
        if name == "train":
            return self.tokens[: self.num_train_tokens]
        if name == "validation":
            return self.tokens[self.num_train_tokens :]
        raise DataError(
            f"The corpus {self.source} has the splits 'train' and 'validation', "
            f"not {name!r}. Ask for one of the two."
        )


def _list_files(
    root: Path, suffixes: Collection[str], skip: Collection[str] = ()
) -> Iterator[str]:
    """Lists relative posix names below `root`; directories named in `skip` stay out."""

    def fail(error: OSError):
        raise DataError(
            f"The directory {error.filename} of the corpus {root} cannot be listed: "
            f"{error.strerror}. Make it readable, or name a glob that leaves it out."
        ) from error

    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if name not in skip]
        for file in map(Path(folder).joinpath, files):
            if file.suffix.lower() in suffixes and os.path.isfile(file):
                yield file.relative_to(root).as_posix()


def _list_stdlib(root: Path) -> list[str]:
    # The directories of installed packages lie inside the library's own: left in, the
    # default corpus would be another one in every environment.
    skip = {"site-packages", "dist-packages", "__pycache__"}
    if root.is_dir() and (names := sorted(_list_files(root, {".py"}, skip))):
        return names
    raise DataError(
        f"The default corpus, the Python standard library, has no sources at {root}. "
        "Name a directory, a glob or a file of text instead."
    )


def _find_files(path: Path) -> tuple[Path, list[str]]:
    """Resolves a path to a root and the sorted names of the files relative to it."""
    # What exists is taken literally first: brackets are legal in file names.
    if os.path.isfile(path):
        return path.parent, [path.name]
    if os.path.isdir(path):
        if names := sorted(_list_files(path, TEXT_SUFFIXES)):
            return path, names
        raise DataError(
            f"The corpus directory {path} holds no text: expected files ending in "
            f"{' '.join(sorted(TEXT_SUFFIXES))}, found none. Name another directory, "
            f"or a glob such as '{path / '**' / '*.log'}' for files of other kinds."
        )
    parts = path.parts
    plain = 0
    while plain < len(parts) and not any(char in parts[plain] for char in "*?["):
        plain += 1
    found = "nothing that is a file or a directory"
    if plain < len(parts):
        root = Path(*parts[:plain])
        matches = glob.glob(str(Path(*parts[plain:])), root_dir=root, recursive=True)
        names = {
            Path(name).as_posix() for name in matches if os.path.isfile(root / name)
        }
        if names:
            return root, sorted(names)
        found = f"no file that matches ({len(matches)} matches are not files)"
    raise DataError(
        f"The corpus {path} does not exist: expected a directory, a glob or a file, "
        f"found {found}. Check the path (relative ones start at {Path.cwd()}), or name "
        "none to train on the sources of Python's standard library."
    )


def _read_files(
    root: Path, names: list[str], *, skip_unreadable_tests: bool
) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    failures: list[str] = []
    for name in names:
        try:
            contents[name] = (root / name).read_bytes()
        except OSError as error:
            # Some systems install fixtures of Python's own tests that nobody may read.
            if not (skip_unreadable_tests and "test" in Path(name).parts):
                failures.append(f"  {root / name}: {error.strerror or error}")
    if failures:
        raise DataError(
            f"{len(failures)} of the {len(names)} files of the corpus {root} cannot be "
            "read:\n"
            + "\n".join(failures)
            + "\nMake them readable, or name a glob that leaves them out."
        )
    return contents


def _digest_files(contents: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in contents.items():
        raw_name = os.fsencode(name)
        # Lengths first, or moving a byte from a name to its content would go unseen.
        digest.update(f"{len(raw_name)} {len(content)}\n".encode())
        digest.update(raw_name)
        digest.update(content)
    return digest.hexdigest()


def _place_cut(
    contents: Mapping[str, bytes], num_tokens: int, validation_fraction: float
) -> int:
    """Returns where validation begins, at a file's start if one is near enough."""
    wanted = num_tokens - round(num_tokens * validation_fraction)
    starts = np.cumsum([len(content) + 1 for content in contents.values()])[:-1]
    if starts.size:
        nearest = int(starts[np.argmin(np.abs(starts - wanted))])
        if 2 * abs(nearest - wanted) <= min(wanted, num_tokens - wanted):
            return nearest
    return wanted


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Applies one SplitMix64 step, a bijection of 64 bits, to an array."""
    # Never to a scalar: NumPy wraps integer arrays silently but warns about scalars.
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> np.uint64(30))) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> np.uint64(27))) * 0x94D049BB133111EB
    return x ^ (x >> np.uint64(31))


def _encrypt(
    value: npt.NDArray[np.uint64], round_keys: npt.NDArray[np.uint64], num_bits: int
) -> npt.NDArray[np.uint64]:
    """Permutes `[0, 2**num_bits)` by an alternating, possibly unequal, Feistel net.

    Args:
        value: `[n]`, below `2**num_bits`.
        round_keys: `[NUM_ROUNDS, n]`.
        num_bits: Width of the domain.
    """
    low_bits = num_bits // 2
    low_mask = 2**low_bits - 1
    high_mask = 2 ** (num_bits - low_bits) - 1
    high, low = value >> low_bits, value & low_mask
    for number, round_key in enumerate(round_keys):
        if number % 2:
            low = low ^ (_mix(high ^ round_key) & low_mask)
        else:
            high = high ^ (_mix(low ^ round_key) & high_mask)
    return (high << low_bits) | low


def permute(
    index: npt.ArrayLike, *, size: int, seed: int, epoch: npt.ArrayLike
) -> npt.NDArray[np.int64]:
    """Maps indices through the pseudorandom permutation of one epoch.

    A Feistel network permutes the smallest power of two that holds `size`; whatever
    lands outside goes through again until it is inside (cycle walking). So any
    position costs the same, without its predecessors and without a table.

    Args:
        index: Positions in the epoch, `0 <= index < size`; any shape.
        size: Number of examples in an epoch.
        seed: Any integer, taken modulo 2⁶⁴.
        epoch: Epoch of each position, not negative; broadcast against `index`.

    Returns:
        int64 of the broadcast shape: for each epoch a bijection of `[0, size)`.

    Raises:
        DataError: If an index is outside `[0, size)`.

    Example:
        >>> sorted(permute(np.arange(5), size=5, seed=0, epoch=3).tolist())
        [0, 1, 2, 3, 4]
    """
    positions, epochs = np.broadcast_arrays(index, epoch)
    if positions.size and not 0 <= positions.min() <= positions.max() < size:
        raise DataError(
            f"permute: indices must lie in [0, {size}), found "
            f"{positions.min()}…{positions.max()}. Reduce them modulo the size first."
        )
    value = positions.ravel().astype(np.uint64)
    seed_key = _mix(np.array([operator.index(seed) & _UINT64_MASK], np.uint64))
    epoch_key = _mix(seed_key ^ epochs.ravel().astype(np.uint64))
    round_keys = np.stack([_mix(epoch_key + number) for number in range(NUM_ROUNDS)])
    # Six bits at least: on fewer the network visibly favours some orders.
    num_bits = max(6, (size - 1).bit_length())
    # An index inside comes back inside at the latest when its cycle closes, so this
    # ends; above 32 the domain is under twice the size, so it ends soon.
    outside = np.arange(value.size)
    while outside.size:
        value[outside] = _encrypt(value[outside], round_keys[:, outside], num_bits)
        outside = outside[value[outside] >= size]
    return value.astype(np.int64).reshape(positions.shape)


def _pick_examples(
    step: SupportsIndex, *, num_examples: int, global_batch_size: int, seed: int | None
) -> npt.NDArray[np.int64]:
    """Returns the examples `[global_batch_size]` of a step; in order if seed is None.

    Raises:
        DataError: If the step is negative.
    """
    if (number := operator.index(step)) < 0:
        raise DataError(f"Batches are numbered from step 0, found step {number}.")
    # Python's integers, so that no step overflows before the remainder is small.
    first = number * operator.index(global_batch_size)
    epoch, offset = divmod(first, num_examples)
    index = offset + np.arange(global_batch_size)
    position = index % num_examples
    if seed is None:
        return position
    epochs = (index // num_examples).astype(np.uint64) + (epoch & _UINT64_MASK)
    return permute(position, size=num_examples, seed=seed, epoch=epochs)


def _check_sizes(where: str, **sizes: int):
    bad = [f"{name} = {size}" for name, size in sizes.items() if size < 1]
    if bad:
        raise DataError(
            f"{where}: sizes must be at least 1, found {', '.join(bad)}. "
            "Raise them to 1 or more."
        )


@dataclass(frozen=True)
class TextBatches:
    """Batches of windows over one split of a corpus, in a new order each epoch.

    The split is cut into windows of `sequence_length` tokens that do not overlap, each
    with the one token after it as its last target; what is left at the end is dropped.
    Example `step * global_batch_size + row` belongs to epoch `example // num_windows`,
    so batches run over epoch borders and no window of an epoch is skipped or repeated.

    Attributes:
        corpus: Where the tokens come from.
        sequence_length: Tokens the model sees at once.
        global_batch_size: Rows over all devices together.
        seed: Chooses the orders; `"validation"` is always read in order.
        split: `"train"` or `"validation"`.

    Raises:
        DataError: If a size is below 1 or the split is shorter than one window.

    Example:
        >>> corpus = TextCorpus.open()
        >>> batches = TextBatches(corpus, sequence_length=64, global_batch_size=8)
        >>> batches(step=1000)["tokens"].shape
        (8, 65)
    """

    corpus: TextCorpus
    _: KW_ONLY
    sequence_length: int
    global_batch_size: int
    seed: int = 0
    split: str = "train"

    def __post_init__(self):
        _check_sizes(
            "TextBatches",
            sequence_length=self.sequence_length,
            global_batch_size=self.global_batch_size,
        )
        num_tokens = len(self.corpus.split(self.split))
        if num_tokens <= self.sequence_length:
            raise DataError(
                f"The {self.split} split of the corpus {self.corpus.source} is shorter "
                f"than one window: expected at least {self.sequence_length + 1} tokens "
                f"(sequence_length + 1), found {num_tokens} of the corpus's "
                f"{len(self.corpus.tokens)}. Take more text, a smaller sequence_length "
                "or another validation_fraction."
            )

    @cached_property
    def _windows(self) -> npt.NDArray[np.uint8]:
        tokens = self.corpus.split(self.split)
        width = self.sequence_length + 1
        every = np.lib.stride_tricks.sliding_window_view(tokens, width)
        return every[:: self.sequence_length]

    @property
    def num_windows(self) -> int:
        """Examples in one epoch."""
        return len(self._windows)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step trains on."""
        return self.global_batch_size * self.sequence_length

    def __call__(self, step: SupportsIndex) -> dict[str, npt.NDArray[np.int32]]:
        """Returns `{"tokens": int32 [global_batch_size, sequence_length + 1]}`."""
        windows = _pick_examples(
            step,
            num_examples=self.num_windows,
            global_batch_size=self.global_batch_size,
            seed=None if self.split == "validation" else self.seed,
        )
        return {"tokens": self._windows[windows].astype(np.int32)}


@dataclass(frozen=True, eq=False)
class ArrayBatches:
    """Batches of rows of arrays in memory, in a new order each epoch.

    The same contract as `TextBatches`, with a row in place of a window.

    Attributes:
        arrays: Arrays `[num_rows, ...]`, not to be changed afterwards.
        global_batch_size: Rows over all devices together.
        seed: Chooses the orders.

    Raises:
        DataError: If the arrays have no rows or differ in how many they have.

    Example:
        >>> batches = ArrayBatches({"x": np.arange(6.0)}, global_batch_size=6)
        >>> sorted(batches(step=7)["x"].tolist())
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """

    arrays: Mapping[str, np.ndarray] = field(repr=False)
    _: KW_ONLY
    global_batch_size: int
    seed: int = 0

    def __post_init__(self):
        check_batch(self.arrays, num_microbatches=1, where="ArrayBatches")
        _check_sizes("ArrayBatches", global_batch_size=self.global_batch_size)

    @property
    def num_rows(self) -> int:
        """Examples in one epoch."""
        return len(next(iter(self.arrays.values())))

    def __call__(self, step: SupportsIndex) -> dict[str, np.ndarray]:
        """Returns `global_batch_size` rows of every array, as copies."""
        rows = _pick_examples(
            step,
            num_examples=self.num_rows,
            global_batch_size=self.global_batch_size,
            seed=self.seed,
        )
        return {name: array[rows] for name, array in self.arrays.items()}


class Prefetcher(Generic[T]):
    """Computes `fn(step)` for the coming steps in one background thread.

    For one consumer. The thread is a daemon, started by the first `get`, so a stuck
    `fn` cannot keep the interpreter from ending. Asking for any step but the next one
    is right too, it only discards what was computed ahead.

    Args:
        fn: A pure function of the step; called in the thread, one step at a time, also
            for steps beyond the last one wanted (errors of those stay unseen).
        depth: How many results may wait, at least 1.

    Raises:
        DataError: If `depth` is below 1.

    Example:
        >>> with Prefetcher(lambda step: step * step) as squares:
        ...     [squares.get(step) for step in (0, 1, 2, 9)]
        [0, 1, 4, 81]
    """

    def __init__(self, fn: Callable[[int], T], *, depth: int = 2):
        _check_sizes("Prefetcher", depth=depth)
        self._fn = fn
        self._depth = depth
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        # The results are those of steps _expected, _expected + 1, … in this order.
        self._expected: int | None = None
        self._results: list[tuple[T | None, BaseException | None]] = []
        self._num_seeks = 0

    def get(self, step: int, *, timeout_s: float = 600.0) -> T:
        """Returns `fn(step)`, waiting for it if need be, or raises what it raised.

        Raises:
            DataError: If nothing came within `timeout_s`, or the prefetcher is closed.
                After a timeout the same step can be asked for again.
        """
        with self._changed:
            if step != self._expected:
                self._expected = step
                self._results.clear()
                self._num_seeks += 1
                self._changed.notify_all()
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(
                    target=self._work, name="shardkit-prefetch", daemon=True
                )
                self._thread.start()
            ready = self._changed.wait_for(
                lambda: self._results or self._closed, timeout_s
            )
            if self._closed:
                raise DataError(
                    f"Prefetcher: step {step} was asked for, but the prefetcher is "
                    "closed. Make a new one to go on."
                )
            if not ready:
                raise DataError(
                    f"Prefetcher: the batch of step {step} is missing: expected within "
                    f"{timeout_s:g} s, found nothing yet. See what its function waits "
                    "for (a slow or lost file system?), or raise timeout_s."
                )
            value, error = self._results.pop(0)
            self._expected = step + 1
            self._changed.notify_all()
        if error is not None:
            # A second attempt is then a seek, and calls fn anew.
            raise error
        return value  # pyright: ignore[reportReturnType]

    def close(self, *, timeout_s: float = 5.0):
        """Discards the results and ends the thread; a second call does nothing.

        A call of `fn` that is under way gets `timeout_s` to finish and is then left to
        the daemon thread.
        """
        with self._changed:
            self._closed = True
            self._results.clear()
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, *_: object):
        self.close()

    def _work(self):
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or len(self._results) < self._depth
                )
                if self._closed:
                    return
                assert self._expected is not None
                step, num_seeks = self._expected + len(self._results), self._num_seeks
            value, error = None, None
            try:
                value = self._fn(step)
            except BaseException as caught:
                # Whatever it is belongs to the caller: here it would only end the
                # thread and leave `get` waiting for its deadline.
                error = caught
            with self._changed:
                if num_seeks == self._num_seeks and not self._closed:
                    self._results.append((value, error))
                    self._changed.notify_all()
            # Held across the wait these would keep one more batch in memory.
            del value, error


def _iterate_leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from _iterate_leaves(child, f"{path}/{name}" if path else str(name))
    else:
        yield path or "(the batch itself)", node


def check_batch(batch: Any, *, num_microbatches: int, where: str) -> int:
    """Checks that every leaf of a batch can be cut into equal microbatches.

    Args:
        batch: Arrays `[global_batch_size, ...]` in a dict, nested or not.
        num_microbatches: The number of equal runs of rows to cut it into.
        where: What the batch is, for the message, such as `"train batch of step 3"`.

    Returns:
        The global batch size.

    Raises:
        DataError: Naming every leaf whose leading size is not that of the others, or
            the microbatch counts next to one that does not divide.

    Example:
        >>> check_batch({"x": np.ones((6, 2))}, num_microbatches=3, where="batch")
        6
    """
    _check_sizes(where, num_microbatches=num_microbatches)
    shapes = {
        path: tuple(getattr(leaf, "shape", ())) for path, leaf in _iterate_leaves(batch)
    }
    sizes = Counter(shape[0] for shape in shapes.values() if shape)
    if not sizes:
        raise DataError(
            f"{where}: expected a dict of arrays with a leading batch dim, found "
            f"{len(shapes)} leaves, none of them with one. Return arrays of examples."
        )
    size = sizes.most_common(1)[0][0]
    bad = {path: shape for path, shape in shapes.items() if shape[:1] != (size,)}
    if bad:
        raise DataError(
            f"{where}: {len(bad)} of {len(shapes)} leaves differ in their leading dim:"
            + "".join(
                f"\n  {path}: expected {size} rows, found "
                + (f"{shape[0]} (shape {shape})" if shape else "none (no leading dim)")
                for path, shape in bad.items()
            )
            + "\nGive every leaf one row per example, repeating constants if need be."
        )
    if size == 0 or size % num_microbatches:
        raise DataError(
            _explain_indivisible(where, list(shapes), size, num_microbatches)
        )
    return size


def _explain_indivisible(
    where: str, paths: list[str], size: int, num_microbatches: int
) -> str:
    if size == 0:
        return f"{where}: expected rows, found none in {', '.join(paths)}. Add some."
    divisors = [count for count in range(1, size + 1) if size % count == 0]
    below = [count for count in divisors if count < num_microbatches][-1:]
    above = [count for count in divisors if count > num_microbatches][:1]
    counts = " or ".join(map(str, below + above))
    rows = num_microbatches * max(1, size // num_microbatches)
    return (
        f"{where}: expected a leading dim that {num_microbatches} microbatches divide, "
        f"found {size} rows in {', '.join(paths)}. Set num_microbatches to {counts}, "
        f"or the global batch size to a multiple of {num_microbatches} such as {rows}."
    )
