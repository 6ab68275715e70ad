"""From what a user asks for to a cluster that runs.

Owns the cluster's directory. Invariants: a directory is one cluster's at a time; what
an earlier one left in memory is gone before another begins; without `--out-dir`
nothing is left behind by a run that ends well.
"""

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from shardkit.cluster.guardian import Guardian
from shardkit.cluster.local import LocalEngine
from shardkit.cluster.ray_engine import run_on_ray
from shardkit.cluster.settings import Settings, read_private
from shardkit.errors import ConfigError
from shardkit.snapshot.segments import reclaim

__all__ = ["ENGINES", "check_command", "launch", "new_run", "open_directory"]

ENGINES = ("local", "ray")
_IDLE_S = 60.0


def check_command(argv: Sequence[str]) -> tuple[str, ...]:
    """Returns a command that can be started.

    Raises:
        ConfigError: If it cannot.
    """
    if not argv:
        raise ConfigError(
            "shardkit launch: expected a command after --, such as "
            "-- python train.py configs/tiny.toml"
        )
    if shutil.which(argv[0]) is None:
        raise ConfigError(
            f"shardkit launch: {argv[0]!r} is no command that can be found; write it "
            "as in a shell, after --"
        )
    return tuple(argv)


@contextlib.contextmanager
def open_directory(
    path: Path, *, is_temporary: bool = False
) -> Iterator[tuple[Path, list[int]]]:
    """Takes a directory for one cluster, and cleans up after the one before.

    Yields it, and a list for the exit code: a temporary directory goes if that is 0.

    Raises:
        ConfigError: If another cluster is using it, or it cannot be used.
    """
    codes: list[int] = []
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise ConfigError(
            f"--out-dir {path}: cannot be used: {error.strerror}"
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"--out-dir {path}: another cluster is using it; wait for it to end, "
                "or name another directory"
            ) from None
        # The lock is a process's own, so that who wrote this is dead.
        before = read_private(path / "address.json")
        if before is not None:
            reclaim(str(before.get("run")))
        # Where all of a run was killed at once, nobody gave its memory back.
        reclaim(idle_s=_IDLE_S)
        for name in ("address.json", "state.json", "out"):
            (path / name).unlink(missing_ok=True)
        for record in path.glob("generation-*-process-*"):
            shutil.rmtree(record, ignore_errors=True)
        yield path, codes
    finally:
        os.close(lock)
        if is_temporary and codes == [0]:
            shutil.rmtree(path, ignore_errors=True)


def launch(
    settings: Settings, *, engine: str = "local", says_where: bool = True
) -> int:
    """Runs a cluster and returns the exit code of the run.

    Args:
        settings: What to run; its directory must be this cluster's.
        engine: Where hosts come from.
        says_where: Whether to say where the cluster keeps its state.

    Raises:
        ConfigError: If there is no such engine, or it cannot be used.
    """
    if engine not in ENGINES:
        known = ", ".join(ENGINES)
        raise ConfigError(f"--engine {engine}: is not there; known: {known}")

    async def run() -> int:
        if engine == "ray":
            return await run_on_ray(settings)
        return await Guardian(settings, LocalEngine).run()

    if says_where:
        print(
            f"shardkit: run {settings.run} in {settings.directory}",
            file=sys.stderr,
            flush=True,
        )
    return asyncio.run(run())


def new_run() -> tuple[str, str]:
    """Returns the id and the token of a new run."""
    return secrets.token_hex(6), secrets.token_hex(32)
