"""What goes between processes, and who is let in."""

import asyncio
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.cluster.channel import Channel
from shardkit.cluster.wire import (
    Closed,
    Unanswered,
    WireError,
    accept,
    connect,
    decode_header,
    encode,
)
from shardkit.errors import ShardkitError


@pytest.mark.parametrize(
    "text",
    [
        *(b"{", b"[]", b"{}", b'{"type":1}', b"[" * 9999),
        *(b'{"type":"a","payload_bytes":%s}' % x for x in (b"-1", b"9", b"true")),
    ],
)
def test_headers_that_are_none_are_refused(text):
    with pytest.raises(WireError, match="a peer sent"):
        decode_header(text, "a peer", 8)


@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_be_refused(text):
    try:
        header, size = decode_header(text, "a peer", 8)
    except WireError:
        return
    assert isinstance(header["type"], str)
    assert 0 <= size <= 8


def test_a_header_that_is_too_long_is_not_sent():
    with pytest.raises(WireError, match="more than the 1048576"):
        encode({"type": "a", "text": "x" * (1 << 20)})


def spell(listener):
    return f"127.0.0.1:{listener.getsockname()[1]}"


def serve(handle, token="secret", timeout_s=1.0):
    """Serves one connection in a thread; returns its address and what came of it."""
    found, ready = {}, threading.Event()

    async def met(reader, writer):
        try:
            link = await accept(reader, writer, token, timeout_s)
            await handle(link)
            link.close()
        except (WireError, ShardkitError) as error:
            found["error"] = error
        finally:
            writer.close()
            found["over"].set()

    async def main():
        found["over"] = asyncio.Event()
        server = await asyncio.start_server(met, "127.0.0.1", 0)
        found["address"] = spell(server.sockets[0])
        ready.set()
        await asyncio.wait_for(found["over"].wait(), 10)
        server.close()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    ready.wait(10)
    return found, thread


async def echo(link):
    frame = await link.receive(max_payload_bytes=8, timeout_s=5)
    link.post({"type": "echo", "of": frame.header})


def test_threads_and_loops_understand_each_other():
    found, thread = serve(echo)
    channel = Channel(found["address"], "secret", "the server", 5)
    channel.send({"type": "hello", "x": [1, None]})
    reply = channel.receive(timeout_s=5)
    assert reply.header == {"type": "echo", "of": {"type": "hello", "x": [1, None]}}
    with pytest.raises(Closed, match="the server is gone"):
        channel.receive(timeout_s=5)
    channel.close()
    thread.join()


def test_without_the_token_nobody_gets_in():
    found, thread = serve(echo)
    with pytest.raises(WireError):
        Channel(found["address"], "wrong", "the server", 5)
    thread.join()
    assert "does not know the token" in str(found["error"])


def test_half_a_character_proves_nothing_and_breaks_nothing():
    for fields in ({"proof": "\ud800"}, {"proof": "ab", "nonce": "\ud800"}):
        found, thread = serve(echo)
        host, port = found["address"].split(":")
        with socket.create_connection((host, int(port))) as stranger:
            stranger.recv(4096)
            stranger.sendall(encode({"type": "answer", **fields}))
            stranger.settimeout(5)
            assert stranger.recv(4096) == b""
        thread.join()
        assert "does not know the token" in str(found["error"])


def test_who_does_not_know_the_token_is_not_talked_to_either():
    def pretend(listener):
        peer, _ = listener.accept()
        peer.sendall(encode({"type": "challenge", "nonce": "ab"}))
        answer = peer.recv(4096)
        assert b"secret" not in answer
        peer.sendall(encode({"type": "welcome", "proof": "0" * 64}))
        peer.recv(1)
        peer.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=pretend, args=(listener,))
        thread.start()
        address = spell(listener)
        with pytest.raises(WireError, match="the other does not know the token"):
            asyncio.run(connect(address, "secret", "the other", 5))
        thread.join()


def test_silence_ends_a_greeting_and_says_whose():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = spell(listener)
        begun_s = time.monotonic()
        with pytest.raises(
            Unanswered, match="the other did not answer with a greeting"
        ):
            Channel(address, "secret", "the other", 0.2)
        with pytest.raises(
            Unanswered, match="the other did not answer with a greeting"
        ):
            asyncio.run(connect(address, "secret", "the other", 0.2))
        assert time.monotonic() - begun_s < 5
    with pytest.raises(Closed, match=r"the other at .*: Connection refused"):
        Channel(address, "secret", "the other", 0.2)


def test_a_stranger_that_says_nothing_is_cut_off():
    found, thread = serve(echo, timeout_s=0.2)
    host, port = found["address"].split(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.settimeout(5)
        while stranger.recv(4096):
            pass
    thread.join()
    assert isinstance(found["error"], Unanswered)
