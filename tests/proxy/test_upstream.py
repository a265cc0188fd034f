"""What the proxy does to and with the worker on a client's behalf, seen from a worker made of bare sockets."""

import asyncio
import contextlib
import json
import socket
import statistics
import threading
import time
from collections import Counter
from pathlib import Path

import aiohttp
import httpx
import openai
import pytest
from aiohttp.abc import AbstractResolver

from episodes.errors import WorkerFailed
from proxy.backend import Backend
from proxy.config import Limits, Timeouts
from proxy.generation import GONE
from proxy.upstream import Upstream
from tests.conftest import proxy_to, until
from tests.proxy.scripted import EVENT, REPLY, Scripted, chunk, good, head
from tests.stub import MODEL, Running, Stub

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


async def stall(came, out):
    await asyncio.Event().wait()


async def headers_then_stall(came, out):
    out.write(head() + REPLY[:10])
    await asyncio.Event().wait()


async def whole_head_then_stall(came, out):
    out.write(head())
    await asyncio.Event().wait()


async def head_then_stall(came, out):
    out.write(head("text/event-stream", None))
    await asyncio.Event().wait()


async def event_then_stall(came, out):
    out.write(head("text/event-stream", None) + chunk(EVENT))
    await asyncio.Event().wait()


async def drip(came, out):
    out.write(head("text/event-stream", None))
    while True:
        out.write(chunk(EVENT))
        await asyncio.sleep(0.02)


async def flood(came, out):
    out.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    out.write(head("text/event-stream", None))
    piece = chunk(EVENT.replace(b"x", b"x" * 100_000))
    while True:
        out.write(piece)
        await out.drain()
        flood.n_bytes += len(piece)


@pytest.fixture
def worker():
    with Scripted() as running:
        yield running


@pytest.fixture
def scripted(worker, tmp_path):
    with proxy_to(worker.url, tmp_path / "data") as running:
        yield running


def ask(proxy, path="/v1/chat/completions", **options):
    """A request on a socket of its own, sent and not answered yet."""
    port = proxy.config.port
    out = socket.create_connection(("127.0.0.1", port))
    for name, value in options.items():
        out.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    body = json.dumps(BODY | {"stream": True}).encode()
    start = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    out.sendall(start.encode() + body)
    return out


def n_open():
    return len(list(Path("/proc/self/fd").iterdir()))


def calls(proxy, n=1):
    until(lambda: len(proxy.open().history.calls) >= n, f"{n} calls in the journal")
    return list(proxy.open().history.calls.values())


def test_a_reply_in_one_piece_that_does_not_end_is_a_502(worker, scripted, http, monkeypatch):
    """It is held in memory until it is whole, and the call's record says what became of it."""
    monkeypatch.setattr("proxy.backend.REPLY_LIMIT", 1 << 20)

    async def script(came, out):
        out.write(head("application/json", None))
        while True:
            out.write(chunk(bytes(1 << 16)))
            await out.drain()

    worker.script = script
    reply = http.post(f"{scripted.url}/v1/chat/completions", json=BODY)
    assert reply.status_code == 502 and "longer than 1,048,576 bytes" in reply.json()["error"]["message"]
    (call,) = calls(scripted)
    assert call.status == 502 and "longer than 1,048,576 bytes" in call.error


# ---- headers


def test_only_what_is_meant_for_the_worker_reaches_it(worker, scripted, http):
    """Neither the client's secrets, nor what is for this hop only, nor what `Connection` names."""
    secrets = {"Authorization": "Bearer mine", "Cookie": "a=b", "Proxy-Authorization": "x", "OpenAI-Organization": "o"}
    hop = {"Connection": "keep-alive, Accept", "TE": "trailers", "Keep-Alive": "timeout=5", "Proxy-Connection": "x"}
    ours = {"X-Tautap-Capture": '{"call": "c-1"}', "X-Forwarded-For": "1.2.3.4", "Upgrade": "h2c"}
    told = {"Accept": "text/html", "User-Agent": "me"}
    http.post(f"{scripted.url}/v1/chat/completions", json=BODY, headers=secrets | hop | ours | told)
    (came,) = worker.requests
    assert set(came.headers) <= {
        "host", "content-type", "content-length", "user-agent", "accept", "accept-encoding", "x-request-id",
    }  # fmt: skip
    assert came.headers["user-agent"] == "me" and came.headers.get("accept") != "text/html"
    assert came.headers["host"] == worker.url.removeprefix("http://")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
def test_only_what_is_meant_for_clients_reaches_them(worker, scripted, http, path):
    """Not the server's name and address, its cookies, or what is for the other hop only."""
    inner = ["Server: uvicorn", "Set-Cookie: s=1", "Location: http://10.0.0.1/", "X-Internal: 10.0.0.1"]
    hop = ["Keep-Alive: timeout=7", "Connection: X-RateLimit-Hop", "X-RateLimit-Hop: 1", "Proxy-Authenticate: Basic"]

    async def script(came, out):
        out.write(head("application/json", len(REPLY), "X-RateLimit-Left: 3", "Retry-After: 2", *inner, *hop) + REPLY)

    worker.script = script
    reply = http.post(f"{scripted.url}{path}", json=BODY)
    assert reply.content == REPLY and reply.headers["x-ratelimit-left"] == "3" and reply.headers["retry-after"] == "2"
    assert reply.headers["x-accel-buffering"] == "no"
    known = {"content-type", "content-length", "date", "retry-after", "x-accel-buffering"}
    assert set(reply.headers) == known | {"x-litellm-response-cost", "x-ratelimit-left", "x-request-id"}


def test_the_worker_is_asked_not_to_compress(worker, scripted, http):
    """Its bytes are read on their way, and are for clients that would not take that too."""
    http.post(f"{scripted.url}/v1/chat/completions", json=BODY, headers={"Accept-Encoding": "gzip"})
    assert [came.headers["accept-encoding"] for came in worker.requests] == ["identity"]


def test_a_cookie_of_the_worker_goes_to_nobody(tmp_path, http):
    """Not even back to the worker with the next client's request."""

    async def script(came, out):
        out.write(head("application/json", len(REPLY), "Set-Cookie: session=1; Path=/") + REPLY)

    with Scripted(script) as worker:
        named = worker.url.replace("127.0.0.1", "localhost")  # cookies of bare addresses are dropped anyway
        with proxy_to(named, tmp_path) as proxy:
            for _ in range(2):
                assert not http.post(f"{proxy.url}/v1/chat/completions", json=BODY).cookies
    assert not [came for came in worker.requests if "cookie" in came.headers]


def test_a_redirect_is_not_followed(worker, scripted, http):
    async def script(came, out):
        out.write(b"HTTP/1.1 307 x\r\nLocation: /v1/activations\r\nContent-Length: 0\r\n\r\n")

    worker.script = script
    reply = http.get(f"{scripted.url}/v1/models")
    assert reply.status_code == 307 and "location" not in reply.headers and len(worker.requests) == 1


def test_a_request_has_an_id_in_and_out(worker, scripted, http):
    """The client's own where it sent one, else the call's; the journal knows both."""
    url = f"{scripted.url}/v1/chat/completions"
    own = http.post(url, json=BODY, headers={"X-Request-Id": "mine-1"})
    without = http.post(url, json=BODY)
    odd = http.post(url, json=BODY, headers={"X-Request-Id": "two words"})
    assert own.headers["x-request-id"] == "mine-1"
    recorded = {call.id: call.request_id for call in calls(scripted, 3)}
    assert sorted(recorded.values()) == ["", "", "mine-1"]
    assert {without.headers["x-request-id"], odd.headers["x-request-id"]} < set(recorded)
    assert {came.headers["x-request-id"] for came in worker.requests} == set(recorded)
    for path in ("/nowhere", "/health/live"):
        assert http.get(f"{scripted.url}{path}", headers={"X-Request-Id": "mine-2"}).headers["x-request-id"] == "mine-2"


# ---- a client that leaves


@pytest.mark.parametrize("script", [stall, headers_then_stall, event_then_stall, drip])
def test_the_worker_is_told_within_a_tenth_of_a_second_that_a_client_left(worker, scripted, script):
    """Before the first byte, while a whole reply is awaited, in a stream that pauses, in one that flows."""
    worker.script = script
    took = []
    for _ in range(5):
        worker.came.clear()
        worker.gone.clear()
        out = ask(scripted)
        assert worker.came.wait(10)
        if script in (event_then_stall, drip):
            while b"data: " not in out.recv(65536):
                pass
        left = time.monotonic()
        out.close()
        assert worker.gone.wait(10)
        took.append(worker.gone_at - left)
    assert statistics.median(took) < 0.1, took
    assert {call.error for call in calls(scripted, 5)} == {GONE}


def test_a_client_that_leaves_while_its_run_is_opened_leaves_it_to_others(scripted, http):
    """The run is not locked by nobody."""
    for n in range(10):
        out, deadline = ask(scripted, path=f"/runs/run{n}/v1/chat/completions"), time.monotonic() + 10
        while not (scripted.config.data / f"run{n}").exists():
            assert time.monotonic() < deadline
        out.close()
        assert http.post(f"{scripted.url}/runs/run{n}/v1/chat/completions", json=BODY).status_code == 200


def test_a_reply_that_is_not_recorded_and_breaks_off_does_so_for_its_client(worker, scripted, http):
    """Nobody takes it for whole."""

    async def script(came, out):
        out.write(head("application/json", None) + chunk(REPLY[:10]))
        await out.drain()
        out.transport.abort()

    worker.script = script
    with pytest.raises(httpx.RemoteProtocolError):
        http.post(f"{scripted.url}/v1/embeddings", json=BODY)


# ---- waiting


def test_what_is_waited_for_by_default_outlasts_a_client_that_waits_600_s():
    times = Timeouts()
    assert min(times.first_byte_s, times.idle_s, times.total_s) > 600 and times.connect_s <= 30


def timed(worker, tmp_path, script, **times):
    worker.script = script
    return proxy_to(worker.url, tmp_path / "data", timeouts=Timeouts(**times))


@pytest.mark.parametrize(
    ("script", "times", "flag"),
    [
        (stall, {"first_byte_s": 0.2}, "--first-byte-timeout-s"),
        (whole_head_then_stall, {"first_byte_s": 0.2}, "--first-byte-timeout-s"),
        (headers_then_stall, {"idle_s": 0.2}, "--idle-timeout-s"),
        (stall, {"total_s": 0.2}, "--total-timeout-s"),
    ],
)
def test_a_worker_that_takes_too_long_is_504_and_let_go(worker, tmp_path, http, script, times, flag):
    with timed(worker, tmp_path, script, **times) as proxy:
        reply = http.post(f"{proxy.url}/v1/chat/completions", json=BODY)
        assert reply.status_code == 504 and flag in reply.json()["error"]["message"]
        assert worker.gone.wait(10)
        (call,) = calls(proxy)
        assert call.status == 504 and flag in call.error
        assert (call.first_byte is not None) == (script is headers_then_stall)


@pytest.mark.parametrize(
    ("script", "times", "flag"),
    [
        (event_then_stall, {"idle_s": 0.2}, "--idle-timeout-s"),
        (drip, {"total_s": 0.3}, "--total-timeout-s"),
    ],
)
def test_a_stream_that_takes_too_long_breaks_off(worker, tmp_path, http, script, times, flag):
    """So that nobody takes it for whole. One that keeps coming is not idle."""
    with timed(worker, tmp_path, script, **times) as proxy:
        with pytest.raises(httpx.RemoteProtocolError):
            http.post(f"{proxy.url}/v1/chat/completions", json=BODY)
        (call,) = calls(proxy)
        assert call.status == 200 and flag in call.error and json.loads(call.reply)["choices"]


def test_a_streams_head_does_not_count_as_its_first_byte(worker, tmp_path, http):
    """A worker sends it before the engine is given the call."""
    with timed(worker, tmp_path, head_then_stall, first_byte_s=0.2) as proxy:
        with pytest.raises(httpx.RemoteProtocolError):
            http.post(f"{proxy.url}/v1/chat/completions", json=BODY)
        (call,) = calls(proxy)
        assert "--first-byte-timeout-s" in call.error and call.first_byte is None


def test_a_connection_that_does_not_come_about_is_502(tmp_path, http):
    """A listener whose queue is full: the kernel answers nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as waiting:
        for _ in range(4):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        times = Timeouts(connect_s=0.3)
        with proxy_to(f"http://127.0.0.1:{full.getsockname()[1]}", tmp_path, timeouts=times) as proxy:
            reply = http.post(f"{proxy.url}/v1/chat/completions", json=BODY)
            assert reply.status_code == 502 and "--connect-timeout-s" in reply.json()["error"]["message"]


# ---- trying again


class Wandering(AbstractResolver):
    """A name that is at one port after the other."""

    def __init__(self, *ports):
        self.ports = list(ports)

    async def resolve(self, host, port=0, family=0):
        found = {"hostname": host, "host": "127.0.0.1", "port": self.ports.pop(0), "family": socket.AF_INET}
        return [found | {"proto": 0, "flags": 0}]

    async def close(self):
        pass


def attempts(worker, *ports):
    """What becomes of a POST to a worker that is at these ports, one after the other."""

    async def asking():
        connector = aiohttp.TCPConnector(resolver=Wandering(*ports), use_dns_cache=False)
        async with aiohttp.ClientSession(connector=connector) as session:
            upstream = Upstream(Backend("http://worker", session), session, Timeouts())
            async with upstream.ask("POST", "/v1/completions", "", {}, b"{}") as reply:
                return await reply.read()

    return asyncio.run(asking())


def test_connecting_is_tried_again(worker):
    """A worker that restarts is met at the second or third attempt; nothing was sent before."""
    here = int(worker.url.rpartition(":")[2])
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = closed.getsockname()[1]
        assert attempts(worker, nobody, nobody, here) == REPLY
        with pytest.raises(WorkerFailed, match="cannot be reached"):
            attempts(worker, nobody, nobody, nobody, here)
    assert len(worker.requests) == 1


def test_a_request_that_was_sent_is_not_sent_again(worker, scripted, http):
    """Also not on a connection that served before, which could have been closed in between: the worker may run it."""

    async def script(came, out):
        if len(worker.requests) % 2:
            out.write(head() + REPLY)
        else:
            out.transport.abort()

    worker.script = script
    seen = [http.post(f"{scripted.url}/v1/chat/completions", json=BODY).status_code for _ in range(4)]
    assert seen == [200, 502, 200, 502] and len(worker.requests) == 4


def test_connections_may_come_and_go(worker, scripted):
    """Clients and a worker that close, or keep, or say that they close: every request is answered, nothing leaks. By a
    502 where a connection was taken just when the worker closed it without a word.
    """
    said = Counter()

    async def script(came, out):
        n = len(worker.requests) % 3
        out.write(head("application/json", len(REPLY), *(["Connection: close"] if n == 1 else [])) + REPLY)
        if n:
            await out.drain()
            out.close()

    worker.script = script
    url, n_before = f"{scripted.url}/v1/chat/completions", n_open()

    async def client(kept):
        connector = aiohttp.TCPConnector(force_close=not kept)
        async with aiohttp.ClientSession(connector=connector) as session:
            for _ in range(20):
                async with session.post(url, json=BODY) as reply:
                    said[reply.status] += 1
                    assert await reply.read() == REPLY or reply.status == 502

    async def clients():
        await asyncio.gather(*(client(i % 2) for i in range(6)))

    asyncio.run(clients())
    assert said[200] + said[502] == 120 and said[502] < 5 and worker.n_connections > 60
    until(lambda: n_open() <= n_before + 10, "the connections' end")


# ---- limits


def test_more_than_may_be_in_flight_are_429(worker, tmp_path):
    """The OpenAI client sees a rate limit, and gets through when it tries again as it is told."""
    free = asyncio.Event()

    async def script(came, out):
        script.loop = asyncio.get_running_loop()
        await free.wait()
        await good(came, out)

    worker.script = script
    limits = Limits(in_flight=2)
    with proxy_to(worker.url, tmp_path / "data", limits=limits) as proxy, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(proxy.client()) for _ in range(3)]
        first = [threading.Thread(target=client.chat.completions.create, kwargs=BODY) for client in clients[:2]]
        for thread in first:
            thread.start()
        until(lambda: len(worker.requests) == 2, "two requests at the worker")
        with pytest.raises(openai.RateLimitError) as refused:
            clients[2].chat.completions.create(**BODY)
        assert refused.value.response.headers["retry-after"] == "1" and "--max-in-flight" in refused.value.message
        assert httpx.get(f"{proxy.url}/health/live").status_code == 200
        script.loop.call_soon_threadsafe(free.set)
        patient = stack.enter_context(openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="x", max_retries=3))
        assert patient.chat.completions.create(**BODY).choices
        for thread in first:
            thread.join()
        assert len(calls(proxy, 3)) == 3, "what was refused is not in the journal"


def test_a_slow_reader_holds_the_worker_up_and_fills_no_memory(worker, tmp_path):
    """What is under way to a client that reads nothing is a few buffers, most of them the kernel's, which
    may give one end of a socket 32 MiB; when it reads, the rest comes. The worker is not blamed for the time.
    """
    flood.n_bytes = 0
    with timed(worker, tmp_path, flood, idle_s=1) as scripted, ask(scripted, SO_RCVBUF=1 << 16) as out:
        seen = [-1.0, 0.0]  # bytes, and since when it has been so many

        def stands():
            if flood.n_bytes != seen[0]:
                seen[:] = [flood.n_bytes, time.monotonic()]
            return seen[0] > 0 and time.monotonic() - seen[1] > 1.5

        until(stands, "a flood that stands still")
        stood = flood.n_bytes
        assert stood < 48 << 20
        left = stood + (16 << 20)
        while left > 0:
            left -= len(out.recv(1 << 20))
        out.close()
        assert flood.n_bytes > stood + (8 << 20) and [call.error for call in calls(scripted)] == [GONE]


def test_a_worker_on_a_socket_of_the_file_system_serves_and_is_claimed_from(tmp_path):
    path = tmp_path / "worker.sock"
    with Running(Stub(tmp_path / "spool"), uds=path), proxy_to(f"unix:{path}", tmp_path / "data") as proxy:
        assert proxy.client().chat.completions.create(**BODY).choices
        assert httpx.get(f"{proxy.url}/health/ready").status_code == 200
        (call,) = calls(proxy)
    assert call.n_kept == call.n_positions > 0
