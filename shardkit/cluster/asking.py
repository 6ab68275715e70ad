"""How a viewer finds a run on this machine and asks it for its status.

Owns the way from a directory to a `Status`. Invariants: every question has a deadline;
an answer that does not come ends in one sentence that says which run did not give it.
It changes nothing of the run and starts nothing.
"""

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from shardkit.cluster.channel import Channel
from shardkit.cluster.status import Status
from shardkit.cluster.wire import Closed, WireError
from shardkit.errors import ConfigError

__all__ = ["ADDRESS_FILE", "Address", "Asker", "Over", "find_address", "newest_run"]

ADDRESS_FILE = "address.json"
"""What a supervisor writes for those who want to ask it."""

MAX_STATUS_BYTES = 64 << 20
"""What is read of a status that does not fit into a header."""

RETRY_S = 0.2
"""Between two attempts to reach a supervisor."""


class Over(Closed):
    """Nobody listens for a run any more."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where a supervisor listens.

    Attributes:
        path: The file that says so.
        address: `"ip:port"`.
        token: The run's secret.
        page: The address of its web page; None if it has none.
    """

    path: Path
    address: str
    token: str = dataclasses.field(repr=False)
    page: str | None = None

    @property
    def directory(self) -> Path:
        """The directory of the run, as people name it."""
        parent = self.path.parent
        return parent.parent if parent.name == "cluster" else parent


def find_address(directory: Path) -> Address:
    """Finds out where the supervisor of a run listens.

    Args:
        directory: The run's, or the directory `cluster` in it.

    Raises:
        ConfigError: If no supervisor has written that there.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: expected the directory of a run, found none")
    for path in _places(directory):
        if path.is_file():
            return _read(path)
    raise ConfigError(
        f"{directory}: has no {ADDRESS_FILE}; expected the directory of a run that "
        "`shardkit launch` has started and that has not ended"
    )


def newest_run(root: Path) -> Path:
    """Finds the run below `root` that was started last.

    Raises:
        ConfigError: If there is none.
    """
    runs = sorted(root.iterdir()) if root.is_dir() else []
    found = [path for run in runs for path in _places(run) if path.is_file()]
    if not found:
        raise ConfigError(
            f"{root}/: no run of `shardkit launch` goes on here; name its directory"
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent


def _places(directory: Path) -> tuple[Path, ...]:
    return directory / ADDRESS_FILE, directory / "cluster" / ADDRESS_FILE


def _read(path: Path) -> Address:
    try:
        said: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error!s:.200}") from None
    fields = said if isinstance(said, dict) else {}
    address, token, page = (fields.get(name) for name in ("address", "token", "page"))
    if not (isinstance(address, str) and isinstance(token, str)):
        raise ConfigError(f"{path}: does not say the address and the token of a run")
    page = page if isinstance(page, str) and page.isprintable() else None
    return Address(path=path, address=address, token=token, page=page)


class Asker:
    """Asks one supervisor, over one connection that is made again when it breaks.

    As a context manager it closes the connection.

    Args:
        address: Where it listens.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._peer = f"the supervisor of {address.directory}"
        self._channel: Channel | None = None

    def ask(self, timeout_s: float) -> Status:
        """Asks once; what breaks off is asked again.

        A supervisor that died is started anew behind the same socket. So a connection
        that breaks says nothing, and one that is refused says that the run is over.

        Raises:
            Over: If nobody listens there any more.
            WireError: If it does not answer in time.
            ConfigError: If what it answers is no status.
        """
        end_s = time.monotonic() + timeout_s
        while True:
            try:
                return self._ask(max(RETRY_S, end_s - time.monotonic()))
            except Closed as error:
                self.close()
                if isinstance(error.__context__, ConnectionRefusedError):
                    raise Over(str(error)) from None
                if time.monotonic() + RETRY_S >= end_s:
                    raise
                time.sleep(RETRY_S)
            except WireError:
                self.close()
                raise

    def _ask(self, timeout_s: float) -> Status:
        end_s = time.monotonic() + timeout_s
        if self._channel is None:
            here = self._address
            self._channel = Channel(here.address, here.token, self._peer, timeout_s)
        self._channel.send({"type": "status", "generation": 0})
        frame = self._channel.receive(
            max_payload_bytes=MAX_STATUS_BYTES,
            timeout_s=max(RETRY_S, end_s - time.monotonic()),
            what="its status",
        )
        said = frame.header.get("status")
        if frame.payload:
            try:
                said = json.loads(bytes(frame.payload))
            except (ValueError, RecursionError):
                said = None
        return Status.from_json(said)

    def close(self) -> None:
        """Closes the connection; the next question makes another."""
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.close()
            self._channel = None

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
