"""A connection for threads: the same frames on a blocking socket.

Owns the worker's side of the wire. Invariant: sending is whole frames, from any
thread; receiving is for one thread. Every wait has a deadline, or ends with the peer.
"""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from shardkit.cluster.wire import (
    MAX_GREETING_BYTES,
    MAX_HEADER_BYTES,
    Closed,
    Frame,
    Unanswered,
    answer,
    check_header_size,
    check_proof,
    decode_header,
    encode,
    parse_address,
)

__all__ = ["Channel"]

_LATE_S = 0.3


class Channel:
    """One end of a connection.

    Args:
        address: `"ip:port"` of the other end.
        token: The run's secret, which both must prove to know.
        peer: What errors call the other end.
        timeout_s: To connect and greet.

    Raises:
        Closed: If nobody listens there.
        Unanswered: If the greeting takes too long.
        WireError: If the other end is not of this run.
    """

    def __init__(self, address: str, token: str, peer: str, timeout_s: float) -> None:
        self.peer = peer
        self._disturbed = ("", 0.0)
        self._sending = threading.Lock()
        try:
            self._socket = socket.create_connection(parse_address(address), timeout_s)
        except TimeoutError:
            raise Unanswered(
                f"{peer} did not answer with a connection for {timeout_s:g} s"
            ) from None
        except OSError as error:
            raise Closed(f"{peer} at {address}: {error.strerror or error}") from None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._greet(token, timeout_s)
        except BaseException:
            self._socket.close()
            raise
        self._socket.settimeout(None)
        # A peer that is stopped reads nothing; sending to it must end all the same.
        limit = struct.pack("ll", max(1, int(timeout_s)), 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def _greet(self, token: str, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        head = {"end_s": end_s, "what": "a greeting", "most": MAX_GREETING_BYTES}
        challenge = self._receive(0, **head)
        reply, expected = answer(challenge.header, token, self.peer)
        self.send(reply)
        welcome = self._receive(0, **head)
        check_proof(welcome.header, "welcome", expected, self.peer)

    def send(self, header: Mapping[str, Any]) -> None:
        """Sends a frame.

        Raises:
            Closed: If the peer is gone.
        """
        data = encode(header)
        kind, end_s = self._disturbed
        if time.monotonic() < end_s:
            if kind == "drop":
                return
            time.sleep(_LATE_S)
        with self._sending, self._broken_means_gone():
            self._socket.sendall(data)

    def disturb(self, kind: str, for_s: float) -> None:
        """Loses or delays, on purpose, what is sent from now on.

        Args:
            kind: `"drop"` or `"delay"`.
            for_s: For how long.
        """
        assert kind in ("drop", "delay"), kind
        self._disturbed = kind, time.monotonic() + for_s

    def receive(
        self,
        *,
        max_payload_bytes: int = 0,
        timeout_s: float | None = None,
        what: str = "anything",
    ) -> Frame:
        """Returns the next frame; as `Link.receive`, for a thread."""
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        return self._receive(max_payload_bytes, end_s=end_s, what=what)

    def _receive(
        self,
        max_payload_bytes: int,
        *,
        end_s: float | None,
        what: str,
        most: int = MAX_HEADER_BYTES,
    ) -> Frame:
        head = self._read(4, end_s, what)
        size = check_header_size(head, self.peer, most)
        text = self._read(size, end_s, what)
        header, size = decode_header(text, self.peer, max_payload_bytes)
        return Frame(header, self._read(size, end_s, what) if size else b"")

    def _read(self, num_bytes: int, end_s: float | None, what: str) -> bytes:
        found = bytearray(num_bytes)
        rest = memoryview(found)
        while rest:
            left_s = None if end_s is None else end_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise Unanswered(f"{self.peer} did not answer with {what} in time")
            self._socket.settimeout(left_s)
            try:
                with self._broken_means_gone():
                    count = self._socket.recv_into(rest)
            except TimeoutError as error:
                if isinstance(error, Unanswered):
                    raise
                continue
            if not count:
                raise Closed(f"{self.peer} is gone")
            rest = rest[count:]
        return bytes(found) if num_bytes < 1 << 16 else found  # pyright: ignore

    @contextlib.contextmanager
    def _broken_means_gone(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise
        except OSError as error:
            raise Closed(f"{self.peer} is gone: {error.strerror or error}") from None

    def close(self) -> None:
        """Ends it; a thread that receives gets `Closed`."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
