"""Compiled programs kept for processes that come later.

Owns the directory that JAX's compilation cache reads and writes, and who may write
there. Invariant: what is loaded is what a process of this user has compiled, byte for
byte, since a program is code; and nothing that goes wrong here ends a run, it is only
compiled again. Which program fits is decided by JAX's own key; nothing is pickled.

JAX reaches the files through `etils.epath`, to which a kind of path is added here:
whole or absent, each with a digest, for the eyes of one user. JAX writes for process 0
only, so the other processes write theirs here; that needs one function of JAX that is
not public, and without it those processes compile again.
"""

import contextlib
import contextvars
import functools
import hashlib
import logging
import os
import stat
import threading
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from shardkit.errors import ConfigError

__all__ = ["compile_and_keep", "use_program_cache"]

_SCHEME = "shardkit-programs://"
_NUM_DIGEST_BYTES = hashlib.sha256().digest_size
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH

# What JAX looked for in vain while a program was compiled in this thread.
_missed: contextvars.ContextVar["list[_Entry] | None"] = contextvars.ContextVar(
    "missed", default=None
)


def use_program_cache(directory: str | os.PathLike[str]) -> bool:
    """Keeps what this process compiles, and loads what earlier ones kept.

    It is for the whole process, as JAX's cache is: call it once, at the beginning. Each
    process of a job has a part of the directory to itself. Programs are kept for the
    same number of visible devices, JAX version and kind of machine.

    Args:
        directory: Made if it is missing; nobody but this user may write there, and
            from now on nobody else can read there (mode 0700).

    Returns:
        Whether it can be used; a directory that cannot be made is told in the log.

    Raises:
        ConfigError: If the directory is another user's, or others may write there:
            what they put there would be run. Or if there is no name.

    Example:
        >>> import jax, shardkit as sk, tempfile
        >>> directory = tempfile.TemporaryDirectory()
        >>> sk.use_program_cache(directory.name)
        True
        >>> jax.config.update("jax_compilation_cache_dir", None)
        >>> directory.cleanup()
    """
    if not os.fspath(directory):
        raise ConfigError("use_program_cache: expected a directory, found ''")
    path = Path(directory).expanduser().absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        if not _is_own(status):
            raise ConfigError(
                f"{path}: expected a directory that this user alone may write, since "
                f"programs are loaded from it, found owner {status.st_uid} and mode "
                f"{stat.S_IMODE(status.st_mode):04o}; run chmod 700 on it if all "
                "in it is yours, or name another"
            )
        with contextlib.suppress(PermissionError):
            path.chmod(0o700)
    except OSError as error:
        _tell(f"{path}: no compiled programs can be kept: {error.strerror}")
        return False
    epath.register_path_cls(_SCHEME)(_Entry)
    options = {
        "jax_compilation_cache_dir": f"{_SCHEME}{path}",
        # A change of devices waits for compilation, so even the cheapest is kept.
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        # XLA's own caches would be written beside these checks, and on JAX 0.10 the
        # place of the directory would become a part of every key.
        "jax_persistent_cache_enable_xla_caches": "none",
    }
    for name, value in options.items():
        jax.config.update(name, value)
    # Where the cache is was settled when something was first compiled.
    compilation_cache.reset_cache()
    return True


def compile_and_keep(
    lowered: jax.stages.Lowered, options: Any = None
) -> jax.stages.Compiled:
    """Compiles, or loads what an earlier process has kept.

    Args:
        lowered: The program.
        options: Options of XLA's compiler.
    """
    missed: list[_Entry] = []
    token = _missed.set(missed)
    try:
        compiled = lowered.compile(compiler_options=options)
    finally:
        _missed.reset(token)
    # More than one, and it could not be told which is this one.
    if len(missed) == 1 and jax.process_index() > 0:
        # Any error of what is not public must only cost another compilation.
        with contextlib.suppress(Exception):
            missed[0].write_bytes(_as_jax_keeps_it(compiled))
    return compiled


def _as_jax_keeps_it(compiled: jax.stages.Compiled) -> bytes:
    from jax._src import compilation_cache as internal

    # Only of what was compiled in this process: what was loaded does not load again.
    code = compiled.runtime_executable().serialize()  # pyright: ignore
    return internal.compress_executable(internal.combine_executable_and_time(code, 0))


class _Entry:
    """What JAX takes for a path: the directory, or one program in it.

    Whatever else JAX may want of a path, the real one does.
    """

    def __init__(self, directory: str | Path, name: str = "") -> None:
        self._directory = Path(str(directory).removeprefix(_SCHEME))
        self._name = name
        self._content: bytes | None = None

    def joinpath(self, *names: str) -> "_Entry":
        """Returns a program in the directory, or with nothing the directory."""
        return _Entry(self._directory, "/".join(names))

    def __truediv__(self, name: str) -> "_Entry":
        return self.joinpath(name)

    def __fspath__(self) -> str:
        return str(self._path)

    def __str__(self) -> str:
        return str(self._path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._path, name)

    @property
    def _path(self) -> Path:
        if not self._name:
            return self._directory
        # Not before it is needed: it starts JAX's devices.
        return self._directory / f"process-{jax.process_index()}" / self._name

    def exists(self) -> bool:
        """Whether there is a whole one, which is then at hand."""
        self._content = _load(self._path)
        missed = _missed.get()
        if self._content is None and missed is not None:
            if str(self) not in map(str, missed):
                missed.append(self)
        return self._content is not None

    def read_bytes(self) -> bytes:
        """Returns what was there when it was asked for."""
        if self._content is None:
            raise FileNotFoundError(self._path)
        return self._content

    def write_bytes(self, content: bytes) -> None:
        """Writes it whole, or not at all."""
        path = self._path
        draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with open(os.open(draft, flags, 0o600), "wb") as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
            draft.replace(path)
        except OSError as error:
            _tell(f"{path.parent}: a program was not kept: {error.strerror}")
            with contextlib.suppress(OSError):
                draft.unlink()


def _load(path: Path) -> bytes | None:
    """Reads a program if it is whole and this user's; what is not is compiled anew."""
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as f:
            if not _is_own(os.fstat(f.fileno())):
                _tell(f"{path}: not used: others may have written it")
                return None
            digest, content = f.read(_NUM_DIGEST_BYTES), f.read()
    except OSError:
        return None
    if hashlib.sha256(content).digest() == digest:
        return content
    _tell(f"{path}: damaged, so it is compiled again")
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def _is_own(status: os.stat_result) -> bool:
    if not hasattr(os, "getuid"):
        return True
    return status.st_uid == os.getuid() and not status.st_mode & _WRITABLE_BY_OTHERS


@functools.lru_cache(maxsize=64)
def _tell(message: str) -> None:
    # Each once; a full disk would be told for every program.
    logging.getLogger("shardkit").warning("%s", message)
