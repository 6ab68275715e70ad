"""A small web page for one run: its status, and metrics for Prometheus.

Owns a read-only HTTP server on loopback, in the event loop of the supervisor.
Invariants: nothing is told without the token, compared in constant time; a name that
somebody's DNS points at this machine gets nothing; no request changes anything, and
none holds the supervisor up, since each has a deadline and a bounded size. It keeps no
state.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import http
import ipaddress
import json
import logging
import re
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from shardkit.cluster.metrics_text import CONTENT_TYPE, metrics_text
from shardkit.cluster.status import Status

__all__ = ["StatusPage", "derive_token"]

logger = logging.getLogger(__name__)

REQUEST_S = 10.0
"""How long a request and its answer may take."""

MAX_HEAD_BYTES = 16 * 1024
"""How long a request may be."""

MAX_CONNECTIONS = 64
"""How many are served at once; more are turned away."""

_PAGE = Path(__file__).with_name("page.html")


def derive_token(secret: str) -> str:
    """Makes the page's token of the run's.

    A token in a URL is seen in histories and logs; the run's own does not follow from
    it. A supervisor that is started again comes to the same one.

    >>> len(derive_token("secret")), derive_token("other") == derive_token("secret")
    (32, False)
    """
    made = hmac.new(secret.encode(), b"shardkit status page", hashlib.sha256)
    return made.hexdigest()[:32]


class _Refused(Exception):
    """An answer other than 200."""

    def __init__(self, code: http.HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.code = code


class StatusPage:
    """Serves the status of a run until it is closed.

    Endpoints, for GET only: `/` is the page, `/status.json` the status, `/metrics` the
    text that Prometheus scrapes. The token comes as `?token=…` or as a bearer.

    Args:
        read: Returns the status as JSON fields; called in the event loop.
        token: What a request must know.
    """

    def __init__(self, read: Callable[[], Mapping[str, Any]], token: str) -> None:
        if not token:
            raise ValueError("StatusPage: expected a token, found none")
        self._read, self._token = read, token.encode()
        self._page = _PAGE.read_bytes()
        self._policy = _content_policy(self._page.decode())
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls,
        read: Callable[[], Mapping[str, Any]],
        *,
        token: str,
        port: int = 0,
    ) -> Self:
        """Begins to listen on 127.0.0.1.

        Args:
            read: Returns the status as JSON fields; called in this event loop.
            token: What a request must know.
            port: Where to listen; 0 for any free port.

        Raises:
            OSError: If the port is taken.
        """
        page = cls(read, token)
        page._server = await asyncio.start_server(
            page._serve, "127.0.0.1", port, limit=MAX_HEAD_BYTES
        )
        return page

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        return self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        """The page's address with its token: whoever has it may look."""
        return f"http://127.0.0.1:{self.port}/?token={self._token.decode()}"

    async def close(self) -> None:
        """Ends listening and what is being answered."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._tasks) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._tasks.add(task)
        try:
            # Who is gone, or too slow, misses the answer.
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(REQUEST_S):
                    writer.write(await self._answer(reader))
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                return b""
            except asyncio.LimitOverrunError:
                code = http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
                raise _Refused(code, "the request is too long") from None
            kind, body = self._look_up(head)
            return self._response(http.HTTPStatus.OK, kind, body)
        except _Refused as refused:
            code, text = refused.code, str(refused)
        except Exception:
            # What is wrong with the page must not be taken for a run that hangs.
            logger.exception("the status page could not answer")
            code, text = http.HTTPStatus.INTERNAL_SERVER_ERROR, "no status; see the log"
        return self._response(code, "text/plain; charset=utf-8", f"{text}\n".encode())

    def _look_up(self, head: bytes) -> tuple[str, bytes]:
        method, target, headers = _parse(head)
        if not _is_loopback(headers.get("host", "")):
            raise _Refused(
                http.HTTPStatus.MISDIRECTED_REQUEST,
                "ask for 127.0.0.1 or localhost, not for another name",
            )
        if method != "GET":
            raise _Refused(http.HTTPStatus.METHOD_NOT_ALLOWED, "only GET is served")
        path, _, query = target.partition("?")
        self._check_token(query, headers)
        if path == "/":
            return "text/html; charset=utf-8", self._page
        if path == "/status.json":
            text = json.dumps(self._status().to_json(), allow_nan=False)
            return "application/json", text.encode()
        if path == "/metrics":
            return CONTENT_TYPE, metrics_text(self._status()).encode()
        raise _Refused(
            http.HTTPStatus.NOT_FOUND, "there are /, /status.json and /metrics"
        )

    def _status(self) -> Status:
        return Status.from_json(self._read())

    def _check_token(self, query: str, headers: Mapping[str, str]) -> None:
        fields = urllib.parse.parse_qs(query, max_num_fields=20)
        given = fields.get("token", [""])[-1]
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given = bearer.strip()
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self._token):
            raise _Refused(
                http.HTTPStatus.FORBIDDEN,
                "the token is missing or wrong; the run's first lines tell the address",
            )

    def _response(self, code: http.HTTPStatus, kind: str, body: bytes) -> bytes:
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Connection": "close",
            "Cache-Control": "no-store",
            "Content-Security-Policy": self._policy,
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            # The token is in the address.
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        if code is http.HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET"
        lines = [f"HTTP/1.1 {code.value} {code.phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + body


def _parse(head: bytes) -> tuple[str, str, dict[str, str]]:
    """Takes a request apart; header names are in lower case."""
    bad = _Refused(http.HTTPStatus.BAD_REQUEST, "this is no HTTP/1.1 request")
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or not parts[1].startswith("/"):
        raise bad
    if parts[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise bad
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        # Two hosts, or a name that ends in a blank, are read by others in another way.
        if not colon or not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
            raise bad
        if name.lower() in headers and name.lower() in ("host", "authorization"):
            raise bad
        headers[name.lower()] = value.strip()
    return parts[0], parts[1], headers


def _is_loopback(host: str) -> bool:
    """Whether a Host header names this machine; the port may be a forwarded one.

    >>> [_is_loopback(x) for x in ("127.0.0.1:80", "localhost", "[::1]:8080")]
    [True, True, True]
    >>> [_is_loopback(x) for x in ("127.0.0.1.evil.example", "evil.example:80", "")]
    [False, False, False]
    """
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(:\d{1,5})?", host, re.ASCII)
    if found is None:
        return False
    name = found[1].strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _content_policy(page: str) -> str:
    """Allows the page its own script and style, by their hashes, and nothing else."""

    def sources(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in texts)
        return " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests)

    return (
        f"default-src 'none'; script-src {sources('script')}; "
        f"style-src {sources('style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
