"""Corpora: text in memory as bytes, found, read and digested.

Owns which files make up a corpus, their order, the cut between training and
validation, and the digest by which a later run knows the same text.

Invariant: the digest depends on the files' names and contents only, not on where they
lie or in which order the file system lists them. Knows nothing of steps or batches.
"""

import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Collection, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shardkit.errors import DataError

__all__ = ["TextCorpus"]

TEXT_SUFFIXES = frozenset(
    ".txt .md .py .rst .json .toml .csv .html .c .h .js .xml .jsonl".split()
)


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
    plain = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), None)
    found = "nothing that is a file or a directory"
    if plain is not None:
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
