"""The status page: who gets to see it, what it says, and what it withstands."""

import asyncio
import base64
import contextlib
import hashlib
import http.client
import json
import re
import socket
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
from hypothesis import given, settings
from prometheus_client.parser import text_string_to_metric_families
from statuses import make_status, odd_statuses

from shardkit.cluster import web
from shardkit.cluster.metrics_text import metrics_text
from shardkit.cluster.status import Status
from shardkit.cluster.web import StatusPage, derive_token

TOKEN = derive_token("the run's secret")
PAGE = Path(web.__file__).with_name("page.html").read_text(encoding="utf-8")


class Served:
    """A page in an event loop of its own thread."""

    def __init__(self, read):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.page = self.call(StatusPage.open(read, token=TOKEN))
        self.port = self.page.port

    def call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def close(self):
        self.call(self.page.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def get(self, target, method="GET", **headers):
        """Returns the code, the headers and the body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, target, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()

    def send(self, data):
        """Sends bytes as they are; returns all that comes back."""
        with socket.create_connection(("127.0.0.1", self.port), 10) as connection:
            connection.sendall(data)
            found = b""
            while part := connection.recv(1 << 16):
                found += part
            return found


@pytest.fixture
def serve():
    made = []

    def serve(read=make_status):
        made.append(Served(read))
        return made[-1]

    yield serve
    for each in made:
        each.close()


def with_token(path):
    return f"{path}?token={TOKEN}"


def test_the_address_that_is_told_shows_the_page(serve):
    served = serve()
    address = urllib.parse.urlsplit(served.page.url)
    assert address.hostname == "127.0.0.1"
    code, headers, body = served.get(f"{address.path}?{address.query}")
    assert code == 200
    assert headers["Content-Type"].startswith("text/html")
    assert body == PAGE


def test_the_status_is_told(serve):
    code, _, body = serve().get(with_token("/status.json"))
    assert code == 200
    assert json.loads(body) == json.loads(json.dumps(make_status()))


def test_the_status_is_strict_json_whatever_the_loss_is(serve):
    served = serve(lambda: make_status(loss=float("nan")))
    _, _, body = served.get(with_token("/status.json"))

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(body, parse_constant=refuse)["loss"] == "nan"


@pytest.mark.parametrize("path", ["/", "/status.json", "/metrics", "/elsewhere"])
@pytest.mark.parametrize(
    "query", ["", "?token=", "?token=wrong", f"?token={TOKEN[:-1]}", "?token=%C3%A9"]
)
def test_nothing_is_told_without_the_token(serve, path, query):
    code, headers, body = serve().get(f"{path}{query}")
    assert code == 403
    assert "host-0" not in body
    assert "tiny" not in body
    assert headers["Cache-Control"] == "no-store"


def test_a_bearer_counts_and_only_the_right_one(serve):
    served = serve()
    assert served.get("/metrics", Authorization=f"Bearer {TOKEN}")[0] == 200
    assert served.get("/metrics", Authorization="Bearer wrong")[0] == 403
    assert served.get("/metrics", Authorization=f"Basic {TOKEN}")[0] == 403


def test_the_token_of_the_page_does_not_give_the_runs_away():
    assert "secret" not in TOKEN
    assert len(TOKEN) >= 32
    with pytest.raises(ValueError, match="token"):
        StatusPage(make_status, "")


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "evil.example:80", "10.0.0.1", "[::2]"],
)
def test_a_name_that_somebody_points_here_gets_nothing(serve, host):
    code, _, body = serve().get(with_token("/status.json"), Host=host)
    assert code == 421
    assert "host-0" not in body


@pytest.mark.parametrize("host", ["localhost", "localhost:9", "[::1]:8080"])
def test_a_forwarded_port_is_served(serve, host):
    assert serve().get(with_token("/status.json"), Host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "HEAD", "PUT", "DELETE", "OPTIONS"])
def test_only_get_is_served(serve, method):
    code, headers, _ = serve().get(with_token("/"), method)
    assert code == 405
    assert headers["Allow"] == "GET"
    assert "Access-Control-Allow-Origin" not in headers


def test_other_paths_are_not_found(serve):
    for path in ("/page.html", "/../web.py", "/status.json/", "//"):
        assert serve().get(with_token(path))[0] == 404


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/2\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n folded: x\r\n\r\n",
        b"\xff\xfe\x00\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(serve, data):
    assert serve().send(data).startswith(b"HTTP/1.1 400 ")


def test_a_request_without_a_host_is_refused(serve):
    target = with_token("/status.json").encode()
    found = serve().send(b"GET " + target + b" HTTP/1.1\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 421 ")


def test_a_request_without_end_is_refused(serve):
    data = b"GET / HTTP/1.1\r\nx: " + b"x" * (web.MAX_HEAD_BYTES + 1)
    assert serve().send(data).startswith(b"HTTP/1.1 431 ")


def test_who_says_nothing_is_cut_off(serve, monkeypatch):
    monkeypatch.setattr(web, "REQUEST_S", 0.2)
    begin = time.monotonic()
    assert serve().send(b"GET / HT") == b""
    assert time.monotonic() - begin < 5


def test_so_many_are_served_at_once_and_no_more(serve, monkeypatch):
    monkeypatch.setattr(web, "MAX_CONNECTIONS", 2)
    served = serve()
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            address = ("127.0.0.1", served.port)
            stack.enter_context(socket.create_connection(address, 10))
        time.sleep(0.2)
        with pytest.raises(OSError):  # noqa: PT011
            served.get(with_token("/"))
    time.sleep(0.2)
    assert served.get(with_token("/"))[0] == 200


def test_closing_ends_what_is_open_and_frees_the_port():
    served = Served(make_status)
    with socket.create_connection(("127.0.0.1", served.port), 10) as waiting:
        waiting.sendall(b"GET / HT")
        time.sleep(0.2)
        served.close()
        with contextlib.suppress(ConnectionResetError):
            assert waiting.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", served.port), 10)


def test_a_status_that_cannot_be_told_is_an_error_and_not_the_end(serve, caplog):
    answers = iter([{}, None, {}])
    served = serve(lambda: next(answers))
    codes = [served.get(with_token("/status.json"))[0] for _ in range(3)]
    assert codes == [200, 500, 200]
    assert "could not answer" in caplog.text


def test_the_page_needs_nothing_from_elsewhere():
    links = set(re.findall(r"https?://[^\s\"'`<>)]+", PAGE))
    # The name of a namespace is no place.
    assert links == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(", PAGE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write", PAGE)


def test_the_policy_lets_the_page_run_and_nothing_else(serve):
    _, headers, body = serve().get(with_token("/"))
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    # Hashes allow neither of these.
    markup = re.sub(r"<(script|style)>.*?</\1>", "", body, flags=re.DOTALL)
    assert not re.search(r"<[^>]* (on\w+|style)=", markup)
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Frame-Options"] == "DENY"


def read_metrics(text):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_reads_the_metrics(serve):
    code, headers, body = serve().get(with_token("/metrics"))
    assert code == 200
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = read_metrics(body)
    expected = {
        ("shardkit_run_info", ("redundancy", "parity"), ("run", "tiny-001")): 1,
        ("shardkit_state", ("state", "running")): 1,
        ("shardkit_state", ("state", "ended")): 0,
        ("shardkit_step",): 120,
        ("shardkit_loss",): 2.1034,
        ("shardkit_snapshot_age_seconds",): 0.2,
        ("shardkit_protection_bytes",): 41_000_000,
        ("shardkit_host_up", ("host", "host-3")): 0,
        ("shardkit_host_flaps_total", ("host", "host-3")): 3,
        ("shardkit_host_image_bytes", ("host", "host-0")): 82_000_000,
        ("shardkit_host_protection_bytes", ("host", "host-0")): 27_300_000,
        ("shardkit_host_predicted_bytes", ("host", "host-0")): 109_500_000,
        ("shardkit_host_image_bytes", ("host", "host-3")): None,
        ("shardkit_worker_speed_ratio", ("host", "host-1"), ("process", "1")): 0.62,
        ("shardkit_recoveries_total",): 2,
        ("shardkit_lost_steps_total",): 2,
        ("shardkit_last_recovery_phase_seconds", ("phase", "form")): 0.8,
    }
    assert {key: found.get(key) for key in expected} == expected
    kinds = {f.name: f.type for f in text_string_to_metric_families(body)}
    assert kinds["shardkit_recoveries"] == "counter"
    assert kinds["shardkit_step"] == "gauge"
    assert "unknown" not in kinds.values()


@settings(deadline=None)
@given(odd_statuses())
def test_prometheus_reads_the_metrics_of_any_status(said):
    text = metrics_text(Status.from_json(said))
    names = [line.rpartition(" ")[0] for line in text.splitlines() if line[0] != "#"]
    assert len(names) == len(set(names))
    found = read_metrics(text)
    assert len(found) == len(names)


def test_what_is_not_known_has_no_sample():
    found = read_metrics(metrics_text(Status(run='a"b\\c')))
    assert ("shardkit_run_info", ("redundancy", ""), ("run", 'a"b\\c')) in found
    assert not [key for key in found if key[0] in ("shardkit_step", "shardkit_loss")]


def test_the_documented_metrics_are_those_that_are_told():
    text = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text("utf-8")
    documented = set(re.findall(r"`(shardkit_\w+)", text))
    told = {
        key[0] for key in read_metrics(metrics_text(Status.from_json(make_status())))
    }
    assert documented == told - {"shardkit_run_info"}
