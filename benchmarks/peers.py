"""What stands around the proxies that are measured, each as a process: two backends and a pass-through.

python benchmarks/peers.py replying PORT             answers at once, with fixed bytes, as fast as Python can
python benchmarks/peers.py recording PORT SPOOL      a worker's contract over an engine that pretends
python benchmarks/peers.py bare PORT BACKEND         passes everything on, and does nothing else
python benchmarks/peers.py beating FILE ARGUMENTS…   the proxy itself; how late its event loop ever was goes into FILE
"""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import cast

import aiohttp
import msgspec
import uvicorn
import uvloop
from aiohttp import web
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from episodes.records import Model
from episodes.wire import CAPTURE_HEADER, Capture
from handover import activations, fill, random_rows
from worker.ledger import Ledger
from worker.spool import prepare

MODEL, HIDDEN = "m", 4096
POINTS = ["layers.8.output", "layers.16.output", "layers.24.output"]
N_ROWS = 21  # 0.5 MB
CAPABILITIES = msgspec.json.encode(Model(MODEL, "bfloat16", HIDDEN, 32, POINTS, {}))
SAID = "I have looked at the order and can offer you the following, if you agree to it. " * 4
# Of a stream: pieces, and the pause between two of them.
PIECES, PAUSE_S = 16, 0.005
# How long the pretended engine takes for a reply, and how often a stream of it says something.
GENERATION_S, TOKEN_S, TOKENS = 0.02, 0.05, 200
TIMER_S = 0.002  # what a loop's timer may be off by: so much of a reply's time is waited for by looking at the clock
BEAT_S, TOLD_S = 0.005, 1.0


def event(text: str, reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]}
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


CHOICE = {"index": 0, "message": {"role": "assistant", "content": SAID}, "finish_reason": "stop"}
USAGE = {"prompt_tokens": 400, "completion_tokens": 80, "total_tokens": 480}
REPLY = msgspec.json.encode(
    {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [CHOICE], "usage": USAGE}
)
DONE = b"data: [DONE]\n\n"
PIECE, LAST = event("and so on "), event("", "stop") + DONE


# ---- a backend that costs next to nothing


def answer(body: bytes, kind: bytes = b"application/json", status: bytes = b"200 OK") -> bytes:
    head = b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (status, kind, len(body))
    return head + body


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
FIXED = {b"GET /health": answer(b""), b"GET /v1/capabilities": answer(CAPABILITIES)}
WHOLE, MISSING = answer(REPLY), answer(b"{}", status=b"404 Not Found")
LENGTH = re.compile(rb"content-length: *(\d+)", re.I)


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Replying(asyncio.Protocol):
    """A connection to the backend that replies at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._came = bytearray()

    def data_received(self, data: bytes) -> None:
        self._came += data
        while (end := self._came.find(b"\r\n\r\n")) >= 0:
            length = LENGTH.search(self._came, 0, end)
            stop = end + 4 + (int(length[1]) if length else 0)
            if len(self._came) < stop:
                return
            asked, body = bytes(self._came[:end]), self._came[end:stop]
            if not asked.startswith(b"POST"):
                self._transport.write(FIXED.get(asked[: asked.find(b" HTTP")], MISSING))
            elif b'"stream":true' in body:
                self._transport.write(STREAM)
                self._say(0)
            else:
                self._transport.write(WHOLE)
            del self._came[:stop]

    def _say(self, n: int) -> None:
        if self._transport.is_closing():
            return
        if n < PIECES:
            self._transport.write(chunked(PIECE))
            asyncio.get_running_loop().call_later(PAUSE_S, self._say, n + 1)
        else:
            self._transport.write(chunked(LAST) + b"0\r\n\r\n")


async def replying(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Replying, "127.0.0.1", port)
    await server.serve_forever()


# ---- a backend with activations


def recording(port: int, spool: Path) -> None:
    """Be a worker: whatever is asked takes a while, and is spooled meanwhile if a proxy wants it recorded."""
    prepare(spool)
    ledger, rows, numbers = Ledger(spool), random_rows(N_ROWS, HIDDEN, POINTS), itertools.count(1)

    def compute(request: Request) -> None:
        header = request.headers.get(CAPTURE_HEADER)
        if header is not None:
            fill(ledger, Capture.parse(header).call, [next(numbers), *range(N_ROWS - 1)], POINTS, rows)

    async def chat(request: Request) -> Response:
        until = time.perf_counter() + GENERATION_S
        body = await request.body()
        if b'"stream":true' in body:
            return StreamingResponse(stream(request), media_type="text/event-stream")
        compute(request)
        await asyncio.sleep(until - time.perf_counter() - TIMER_S)
        while time.perf_counter() < until:
            pass
        return Response(REPLY, media_type="application/json")

    async def stream(request: Request) -> AsyncIterator[bytes]:
        for _ in range(TOKENS):
            yield PIECE
            await asyncio.sleep(TOKEN_S)
        compute(request)
        yield LAST

    routes = [
        Route("/health", lambda _: Response()),
        Route("/v1/capabilities", lambda _: Response(CAPABILITIES, media_type="application/json")),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        *activations(ledger),
    ]
    uvicorn.run(Starlette(routes=routes), port=port, log_level="critical", loop="uvloop", ws="none")


# ---- the least that a proxy can do


async def bare(port: int, backend: str) -> None:
    """Pass every request on, and every reply back as it comes."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:

        async def handle(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            sent = {"Content-Type": request.content_type}
            async with session.request(request.method, backend + request.path_qs, headers=sent, data=body) as upstream:
                headers = {"Content-Type": upstream.headers["Content-Type"]}
                if upstream.content_type != "text/event-stream":
                    return web.Response(status=upstream.status, headers=headers, body=await upstream.read())
                reply = web.StreamResponse(status=upstream.status, headers=headers)
                await reply.prepare(request)
                async for chunk in upstream.content.iter_any():
                    await reply.write(chunk)
                await reply.write_eof()
                return reply

        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()


# ---- the proxy, watched from inside


def beating(file: Path, arguments: list[str]) -> None:
    """Be the proxy, with a task beside it that is due every 5 ms: each second a line of how late it was, in ms."""
    run = uvloop.run

    async def beat() -> None:
        with file.open("w", buffering=1) as told:
            while True:
                worst, until = 0.0, time.perf_counter() + TOLD_S
                while (at := time.perf_counter()) < until:
                    await asyncio.sleep(BEAT_S)
                    worst = max(worst, time.perf_counter() - at - BEAT_S)
                told.write(f"{worst * 1e3:.1f}\n")

    async def beside(main: Awaitable[object]) -> object:
        beats = asyncio.create_task(beat())
        try:
            return await main
        finally:
            beats.cancel()

    uvloop.run = lambda main: run(beside(main))  # so that nothing in the proxy is there to be measured
    from proxy.__main__ import cli

    cli(arguments, prog_name="tautap")


def main() -> None:
    name, first, *rest = sys.argv[1:]
    kinds: dict[str, Callable[[], object]] = {
        "replying": lambda: uvloop.run(replying(int(first))),
        "recording": lambda: recording(int(first), Path(rest[0])),
        "bare": lambda: uvloop.run(bare(int(first), rest[0])),
        "beating": lambda: beating(Path(first), rest),
    }
    kinds[name]()


if __name__ == "__main__":
    main()
