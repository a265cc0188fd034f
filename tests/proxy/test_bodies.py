"""Request bodies: packed, too large, damaged, too deep."""

import gzip
import json
import socket
import zlib
from contextlib import suppress

import pytest
import zstandard
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from episodes.errors import BadInput
from episodes.messages import DEPTH_LIMIT
from proxy.bodies import unpacked
from proxy.config import Limits, Timeouts
from tests.conftest import proxy_to
from tests.proxy.test_server import check_rows, committed
from tests.stub import MODEL

BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hi " * 100}]}).encode()


def raw_deflate(data):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKERS = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "DEFLATE": raw_deflate,
    "zstd": zstandard.compress,
}


def post(proxy, http, content, **headers):
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
    return http.post(f"{proxy.url}/v1/chat/completions", content=content, headers=headers)


@pytest.mark.parametrize("encoding", PACKERS)
def test_the_worker_and_the_journal_get_a_packed_body_unpacked(stub, proxy, http, encoding):
    reply = post(proxy, http, PACKERS[encoding](BODY), Content_Encoding=encoding)
    assert reply.status_code == 200
    assert "content-encoding" not in stub.stub.headers[-1] and stub.stub.bodies[-1]["messages"]
    run = committed(proxy, 1)
    (call,) = run.history.calls.values()
    assert call.request.encode() == BODY
    check_rows(run)


def test_what_is_unpacked_has_the_limit_that_what_comes_has(stub, tmp_path, http):
    """A few bytes that would fill the memory are 413, and so is a body that is too large as it is."""
    with proxy_to(stub.url, tmp_path, limits=Limits(body_bytes=100_000)) as proxy:
        bomb = b" " * (16 << 20)
        for encoding, pack in PACKERS.items():
            assert len(pack(bomb)) < 100_000
            assert post(proxy, http, pack(bomb), Content_Encoding=encoding).status_code == 413
        for content in (b" " * 100_001, (b" " * 1000 for _ in range(101))):
            reply = post(proxy, http, content)
            assert reply.status_code == 413 and "100,000 bytes" in reply.json()["error"]["message"]
        assert post(proxy, http, BODY + b" " * (100_000 - len(BODY))).status_code == 200
        assert http.post(f"{proxy.url}/tautap/runs/r/link", content=b" " * 100_001).status_code == 413


@pytest.mark.parametrize(
    ("encoding", "content", "status", "says"),
    [
        ("br", b"x", 415, "gzip, deflate, zstd"),
        ("gzip, gzip", b"x", 415, "gzip, deflate, zstd"),
        ("gzip", BODY, 400, "not what Content-Encoding gzip says"),
        ("gzip", gzip.compress(BODY)[:-9], 400, "cut short"),
        ("zstd", zstandard.compress(BODY)[:-1], 400, "cut short"),
        ("zstd", zstandard.compress(BODY) * 2, 400, "behind its end"),
        ("deflate", b"", 400, "cut short"),
    ],
)
def test_a_body_that_cannot_be_unpacked_is_refused_with_the_reason(proxy, http, encoding, content, status, says):
    reply = post(proxy, http, content, Content_Encoding=encoding)
    assert reply.status_code == status and says in reply.json()["error"]["message"]


@given(st.sampled_from(["gzip", "deflate", "zstd"]), st.binary(max_size=2000), st.data())
def test_a_damaged_body_never_raises_anything_else(encoding, body, data):
    packed = bytearray(PACKERS[encoding](body))
    assert unpacked(bytes(packed), encoding, 2000) == body
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with suppress(BadInput, web.HTTPRequestEntityTooLarge):
        assert len(unpacked(bytes(packed), encoding, 2000)) <= 2000


@pytest.mark.parametrize("depth", [DEPTH_LIMIT + 1, 500, 100_000])
def test_json_that_is_too_deep_is_refused_before_the_worker_sees_it(stub, proxy, http, depth):
    deep = b'{"model":"stub","messages":[],"x":' + b"[" * depth + b"]" * depth + b"}"
    reply = post(proxy, http, deep)
    assert reply.status_code == 400 and f"{DEPTH_LIMIT} deep" in reply.json()["error"]["message"]
    assert not stub.stub.bodies


def test_json_may_be_as_deep_as_it_is_wide_where_that_is_not_deep(stub, proxy, http):
    """A conversation with many brackets is not nested."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "[[[["}]} for _ in range(2 * DEPTH_LIMIT)]
    assert post(proxy, http, json.dumps({"model": MODEL, "messages": messages}).encode()).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/tautap/runs/r/link"])
def test_a_body_that_does_not_come_is_given_up(stub, tmp_path, path):
    with (
        proxy_to(stub.url, tmp_path, timeouts=Timeouts(idle_s=0.2)) as proxy,
        socket.create_connection(("127.0.0.1", proxy.config.port)) as out,
    ):
        out.sendall(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\n{{".encode())
        out.settimeout(10)
        assert out.recv(1000).startswith(b"HTTP/1.1 408 ")
