"""Frames between the processes of a cluster, and the proof that they belong to it.

Owns the format (4 bytes of header length, a JSON header, as many raw bytes as it says)
and the handshake. Invariants: nothing received is ever executed or unpickled; nothing
is taken from a peer that has not proved to know the run's token, which itself never
goes over the wire; sizes are capped by the receiver; every wait has a deadline, and
its error names who did not answer. What the messages mean is others' business.
"""

import asyncio
import hashlib
import hmac
import json
import secrets
from collections.abc import Awaitable, Mapping
from typing import Any, NamedTuple

from shardkit.errors import ShardkitError

__all__ = [
    "MAX_HEADER_BYTES",
    "Closed",
    "Frame",
    "Link",
    "Unanswered",
    "WireError",
    "accept",
    "connect",
    "decode_header",
    "encode",
    "parse_address",
    "prove",
]

MAX_HEADER_BYTES = 1 << 20
MAX_GREETING_BYTES = 4096
"""What is read of somebody who has not proved anything yet."""
_MAX_UNSENT_BYTES = 64 << 20
_NONCE_BYTES = 32


class WireError(ShardkitError, ConnectionError):
    """A peer that sent what no peer sends."""


class Closed(WireError):
    """A peer that is gone."""


class Unanswered(WireError, TimeoutError):
    """A peer that did not answer in time."""


class Frame(NamedTuple):
    """One message.

    Attributes:
        header: What it says; `"type"` names its kind.
        payload: Its raw bytes.
    """

    header: dict[str, Any]
    payload: bytes


def encode(header: Mapping[str, Any], payload_bytes: int = 0) -> bytes:
    r"""Returns what goes before the payload.

    Example:
        >>> encode({"type": "go"})
        b'\x00\x00\x00\r{"type":"go"}'
    """
    if payload_bytes:
        header = {**header, "payload_bytes": payload_bytes}
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise WireError(
            f"a message of type {header.get('type')!r} has {len(text)} bytes, more "
            f"than the {MAX_HEADER_BYTES} that are read"
        )
    return len(text).to_bytes(4, "big") + text


def decode_header(
    text: bytes, peer: str, max_payload_bytes: int
) -> tuple[dict[str, Any], int]:
    """Reads a header; returns it and the size of the payload after it.

    Raises:
        WireError: If it is none, or announces more than is wanted.
    """
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise WireError(f"{peer} sent a header that is not JSON") from None
    if not isinstance(header, dict) or not isinstance(header.get("type"), str):
        raise WireError(f"{peer} sent a header without a type")
    size = header.pop("payload_bytes", 0)
    if type(size) is not int or not 0 <= size <= max_payload_bytes:
        raise WireError(
            f"{peer} sent {size!r} bytes with {header['type']!r:.40}, where at most "
            f"{max_payload_bytes} are read"
        )
    return header, size


def check_header_size(head: bytes, peer: str, most: int) -> int:
    """Returns the size of a header from the four bytes before it."""
    size = int.from_bytes(head, "big")
    if not 0 < size <= most:
        raise WireError(
            f"{peer} sent a header of {size} bytes; at most {most} are read"
        )
    return size


def prove(token: str, role: str, first: str, second: str) -> str:
    """Returns what only those can compute who know the token.

    Args:
        token: The run's secret.
        role: Who proves: `"client"` or `"server"`, so that none can be echoed.
        first: The server's nonce.
        second: The client's nonce.
    """
    # Half a character is no reason to fail: it proves nothing.
    text = f"{role}:{first}:{second}".encode(errors="replace")
    return hmac.new(token.encode(), text, hashlib.sha256).hexdigest()


def new_nonce() -> str:
    """Returns what was never said before."""
    return secrets.token_hex(_NONCE_BYTES)


def check_proof(header: Mapping[str, Any], kind: str, expected: str, peer: str) -> None:
    """Raises `WireError` if a frame of the handshake proves nothing."""
    proof = header.get("proof")
    if header["type"] != kind or not isinstance(proof, str):
        raise WireError(f"{peer} does not greet as a process of this run does")
    given = proof.encode(errors="replace")
    if not hmac.compare_digest(given, expected.encode()):
        raise WireError(f"{peer} does not know the token of this run")


def answer(challenge: Mapping[str, Any], token: str, peer: str) -> tuple[dict, str]:
    """Answers a challenge; returns the answer and the proof to expect in return."""
    first, second = challenge.get("nonce"), new_nonce()
    if challenge["type"] != "challenge" or not isinstance(first, str):
        raise WireError(f"{peer} does not greet as a process of this run does")
    proof = prove(token, "client", first, second)
    reply = {"type": "answer", "nonce": second, "proof": proof}
    return reply, prove(token, "server", first, second)


def parse_address(address: str) -> tuple[str, int]:
    """Reads `"ip:port"`.

    Example:
        >>> parse_address("127.0.0.1:80")
        ('127.0.0.1', 80)
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise WireError(f"expected an address ip:port, found {address!r:.80}")
    return host, int(port)


class Link:
    """One end of a connection, for asyncio.

    Args:
        reader: Where frames come from.
        writer: Where they go.
        peer: What errors call the other end.

    Attributes:
        peer: The same; may be set once more is known.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str
    ) -> None:
        self.reader, self.writer, self.peer = reader, writer, peer

    def post(self, header: Mapping[str, Any], payload: bytes = b"") -> None:
        """Sends without waiting; a peer that reads nothing any more is cut off."""
        if self.writer.is_closing():
            return
        self.writer.write(encode(header, len(payload)))
        if payload:
            self.writer.write(payload)
        if self.writer.transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            self.writer.transport.abort()

    async def receive(
        self,
        *,
        max_payload_bytes: int = 0,
        timeout_s: float | None = None,
        what: str = "anything",
        most: int = MAX_HEADER_BYTES,
    ) -> Frame:
        """Returns the next frame.

        Args:
            max_payload_bytes: How many raw bytes it may have.
            timeout_s: How long to wait; None where the caller's own deadline holds.
            what: What is waited for, for the error.
            most: How long its header may be.

        Raises:
            Closed: If the peer is gone.
            Unanswered: If it did not come in time.
            WireError: If it is none.
        """
        return await within(
            self._receive(max_payload_bytes, most), timeout_s, self.peer, what
        )

    async def _receive(self, max_payload_bytes: int, most: int) -> Frame:
        try:
            head = await self.reader.readexactly(4)
            size = check_header_size(head, self.peer, most)
            text = await self.reader.readexactly(size)
            header, size = decode_header(text, self.peer, max_payload_bytes)
            payload = await self.reader.readexactly(size) if size else b""
        except (asyncio.IncompleteReadError, OSError) as error:
            if isinstance(error, WireError):
                raise
            raise Closed(f"{self.peer} is gone") from None
        return Frame(header, payload)

    def close(self) -> None:
        """Ends it, without waiting."""
        self.writer.close()

    def abort(self) -> None:
        """Ends it at once; what was not sent yet is lost."""
        self.writer.transport.abort()


async def within(
    work: Awaitable[Any], timeout_s: float | None, peer: str, what: str
) -> Any:
    """Waits for work, and says who did not do it in time."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError as error:
        if isinstance(error, Unanswered):
            raise
        raise Unanswered(
            f"{peer} did not answer with {what} for {timeout_s:g} s"
        ) from None


async def connect(address: str, token: str, peer: str, timeout_s: float) -> Link:
    """Connects, and proves to know the token, as the other end must.

    Args:
        address: `"ip:port"`.
        token: The run's secret.
        peer: What errors call the other end.
        timeout_s: For all of it.

    Raises:
        Closed: If nobody listens there.
        Unanswered: If the greeting takes too long.
        WireError: If the other end is not of this run.
    """
    host, port = parse_address(address)
    try:
        reader, writer = await within(
            asyncio.open_connection(host, port), timeout_s, peer, "a connection"
        )
    except WireError:
        raise
    except OSError as error:
        raise Closed(f"{peer} at {address}: {error.strerror or error}") from None
    link = Link(reader, writer, peer)
    try:
        await within(_greet(link, token), timeout_s, peer, "a greeting")
    except BaseException:
        link.abort()
        raise
    return link


async def _greet(link: Link, token: str) -> None:
    challenge = await link.receive(most=MAX_GREETING_BYTES)
    reply, expected = answer(challenge.header, token, link.peer)
    link.post(reply)
    welcome = await link.receive(most=MAX_GREETING_BYTES)
    check_proof(welcome.header, "welcome", expected, link.peer)


async def accept(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    token: str,
    timeout_s: float,
) -> Link:
    """Lets somebody in who has connected and knows the token.

    Raises:
        WireError: If it does not, or does not say so in time.
    """
    link = Link(reader, writer, "somebody who connected")
    try:
        await within(_challenge(link, token), timeout_s, link.peer, "a greeting")
    except BaseException:
        link.abort()
        raise
    return link


async def _challenge(link: Link, token: str) -> None:
    first = new_nonce()
    link.post({"type": "challenge", "nonce": first})
    reply = (await link.receive(most=MAX_GREETING_BYTES)).header
    second = str(reply.get("nonce"))
    check_proof(reply, "answer", prove(token, "client", first, second), link.peer)
    link.post({"type": "welcome", "proof": prove(token, "server", first, second)})
