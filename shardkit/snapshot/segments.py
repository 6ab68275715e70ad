"""Named memory that outlives the process that made it.

Owns files that are mapped into memory, in `/dev/shm` where there is one. Invariant: a
segment has all its memory before anyone writes to it, belongs to this user alone, and
stays until it is unlinked; whoever maps it holds a shared lock, which the kernel drops
with the process. It does not know what a segment holds.

`multiprocessing.shared_memory` would do, but until Python 3.13 it unlinks what other
processes still use when the one that opened it ends.
"""

import contextlib
import errno
import fcntl
import math
import mmap
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from shardkit.errors import ConfigError, RestoreError, SaveError

__all__ = ["Segment", "Segments", "default_directory", "list_runs", "reclaim"]

_PREFIX = "shardkit-"
# A run and a name are without "-", so that a file's name can be taken apart again.
_FIELD = re.compile(r"[A-Za-z0-9_.]{1,64}")
_HOST = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_FILE = re.compile(rf"{_PREFIX}({_FIELD.pattern})-({_HOST.pattern})-({_FIELD.pattern})")
_OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_ZEROS_BYTES = 1 << 20


class Segment:
    """One segment, mapped.

    Attributes:
        name: Its name among those of its host.
        num_bytes: Its size.
        memory: Its bytes; released by `close`. Arrays made of it keep it mapped.
    """

    name: str
    num_bytes: int
    memory: memoryview

    def __init__(self, name: str, fd: int) -> None:
        self.name, self.num_bytes = name, os.fstat(fd).st_size
        self._map = mmap.mmap(fd, self.num_bytes)
        self.memory = memoryview(self._map)

    def close(self) -> None:
        """Takes this mapping back; the segment stays. May be called again."""
        # Arrays that are still in use keep the mapping, which ends with the last one.
        with contextlib.suppress(BufferError):
            self.memory.release()
            self._map.close()

    def __enter__(self) -> "Segment":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Segments:
    """The segments of one host in one run.

    Args:
        run: The run's id: letters, digits, "_" and ".".
        host: The host's name: the same, and "-".
        directory: Where the files are; `default_directory()` by default.

    Raises:
        ConfigError: If a name cannot be used.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     segments = Segments("r1", "host-0", Path(directory))
        ...     with segments.create("slot0", 64) as made:
        ...         made.memory[:2] = b"hi"
        ...     with segments.open("slot0") as found:
        ...         print(bytes(found.memory[:2]), found.num_bytes, segments.names())
        ...     segments.unlink("slot0")
        b'hi' 64 ['slot0']
    """

    def __init__(self, run: str, host: str, directory: Path | None = None) -> None:
        self.run = _checked(run, _FIELD, "run")
        self.host = _checked(host, _HOST, "host")
        self.directory = directory or default_directory()

    def create(self, name: str, num_bytes: int) -> Segment:
        """Makes a segment of zeros, all of whose memory is there.

        Raises:
            SaveError: If there is no room, or one of that name exists.
        """
        path, where = self.path(name), self._where(name)
        if num_bytes < 1:
            raise ConfigError(f"{where}: expected 1 byte or more, found {num_bytes}.")
        free = free_bytes(self.directory)
        if num_bytes > free:
            raise _no_room(where, self.directory, num_bytes, free)
        try:
            fd = os.open(path, _OPEN | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise SaveError(
                f"{where}: {path} is there already. Unlink it first, or reclaim the "
                "run's segments if they are of an earlier start."
            ) from None
        try:
            os.fchmod(fd, 0o600)  # Whatever the umask is.
            fcntl.flock(fd, fcntl.LOCK_SH)
            _allocate(fd, num_bytes)
            return Segment(name, fd)
        except OSError as error:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT):
                raise _no_room(where, self.directory, num_bytes, free) from error
            raise SaveError(f"{where}: {path}: {error.strerror}") from error
        finally:
            os.close(fd)  # The mapping has a descriptor, and so the lock, of its own.

    def open(self, name: str) -> Segment:
        """Maps a segment that is there.

        Raises:
            RestoreError: If it is not there, or not what `create` makes: a file of this
                user with mode 0600 and one name.
        """
        path, where = self.path(name), self._where(name)
        try:
            fd = os.open(path, _OPEN | os.O_NONBLOCK)
        except OSError as error:
            raise RestoreError(f"{where}: {path}: {error.strerror}.") from error
        try:
            if problem := _refusal(os.fstat(fd)):
                raise RestoreError(
                    f"{where}: {path}: expected a file of this user alone (mode 0600), "
                    f"found {problem}. Someone else made it: remove it."
                )
            fcntl.flock(fd, fcntl.LOCK_SH)
            return Segment(name, fd)
        except (OSError, ValueError) as error:
            if isinstance(error, RestoreError):
                raise
            raise RestoreError(f"{where}: {path}: {error}") from error
        finally:
            os.close(fd)

    def path(self, name: str) -> Path:
        """The file of a segment, for those who are told of it to map."""
        return self.directory / (
            f"{_PREFIX}{self.run}-{self.host}-{_checked(name, _FIELD, 'segment')}"
        )

    def unlink(self, name: str) -> None:
        """Removes a segment; those that map it keep their memory. No error if gone."""
        self.path(name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """The names of this host's segments, sorted."""
        return sorted(
            name
            for _, run, host, name in _files(self.directory)
            if (run, host) == (self.run, self.host)
        )

    def unlink_all(self) -> list[str]:
        """Removes every segment of this host: what losing the host would do."""
        names = self.names()
        for name in names:
            self.unlink(name)
        return names

    def _where(self, name: str) -> str:
        return f"segment {name} of {self.host}"


def reclaim(
    run: str | None = None, directory: Path | None = None, *, idle_s: float = 0.0
) -> list[str]:
    """Removes what earlier processes left behind.

    Args:
        run: Whose segments to remove, of all its hosts on this machine; by default
            those of every run of which no process maps a segment any more.
        directory: Where to look; `default_directory()` by default.
        idle_s: What is younger counts as mapped, unless it is of that one run: who has
            just made it may not have come to that.

    Returns:
        The names of the files that are gone. Other users' are left alone.
    """
    directory = directory or default_directory()
    found = [(path, owner) for path, owner, _, _ in _files(directory)]
    if run is None:
        alive = {
            owner for path, owner in found if _is_mapped(path) or _age_s(path) < idle_s
        }
        found = [(path, owner) for path, owner in found if owner not in alive]
    else:
        found = [(path, owner) for path, owner in found if owner == run]
    for path, _ in found:
        path.unlink(missing_ok=True)
    return sorted(path.name for path, _ in found)


def list_runs(directory: Path | None = None) -> dict[str, int]:
    """The runs of this user that have segments, and how many bytes each holds."""
    runs: dict[str, int] = {}
    for path, run, _, _ in _files(directory or default_directory()):
        with contextlib.suppress(FileNotFoundError):
            runs[run] = runs.get(run, 0) + path.lstat().st_size
    return runs


def default_directory() -> Path:
    """Where segments are: memory if the system shows it as files, else temporary."""
    shared = Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK | os.X_OK):
        return shared
    return Path(tempfile.gettempdir())


def free_bytes(directory: Path) -> int:
    """The bytes that could still be written under a directory."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def _checked(value: str, pattern: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ConfigError(
            f"segments: expected the name of a {what}, {pattern.pattern}, found "
            f"{value!r:.80}."
        )
    return value


def _allocate(fd: int, num_bytes: int) -> None:
    """Takes all memory now: a page that is missing later would be a SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, num_bytes)
        return
    for start in range(0, num_bytes, _ZEROS_BYTES):
        os.write(fd, bytes(min(_ZEROS_BYTES, num_bytes - start)))


def _no_room(where: str, directory: Path, num_bytes: int, free: int) -> SaveError:
    return SaveError(
        errno.ENOSPC,
        f"{where}: expected room for {num_bytes} bytes, found {free} free in "
        f"{directory}. Make it larger (in a container: --shm-size), reclaim what ended "
        "runs left there, or choose a redundancy that takes less.",
    )


def _refusal(found: os.stat_result) -> str | None:
    """Says why a file is not a segment of this user, or None."""
    if not stat.S_ISREG(found.st_mode):
        return "something that is no file"
    if found.st_uid != os.geteuid():
        return f"one of user {found.st_uid}"
    if (mode := stat.S_IMODE(found.st_mode)) != 0o600:
        return f"mode {mode:04o}"
    if found.st_nlink > 1:
        return "a second name of it"
    if found.st_size < 1:
        return "an empty one"
    return None


def _files(directory: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Yields path, run, host and name of all segments of this user."""
    for entry in sorted(os.listdir(directory)):
        if match := _FILE.fullmatch(entry):
            path = directory / entry
            with contextlib.suppress(FileNotFoundError):
                found = path.lstat()
                if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                    yield path, match[1], match[2], match[3]


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return math.inf


def _is_mapped(path: Path) -> bool:
    """Whether any process has a segment mapped, and so a lock on it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
