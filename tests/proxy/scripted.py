"""A worker made of bare sockets: it does to each request what a script says, and notes when its client goes."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

REPLY = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"ok"},"finish_reason":"stop"}]}'
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n'


@dataclass
class Came:
    """A request as it came: its first line, headers by lower-case name, body."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return self.line.split(" ")[1]


Script = Callable[[Came, asyncio.StreamWriter], Awaitable[None]]


def head(kind: str = "application/json", length: int | None = len(REPLY), *more: str) -> bytes:
    """A 200's status line and headers; without a length its body is chunked."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return "\r\n".join(["HTTP/1.1 200 OK", f"Content-Type: {kind}", size, *more, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def good(came: Came, out: asyncio.StreamWriter) -> None:
    out.write(head() + REPLY)


class Scripted:
    """The server, in a thread of its own. requests: what came, but for the proxy's questions about the worker.

    gone: set when a client leaves while its request is being served, at `gone_at` monotonic seconds.
    """

    def __init__(self, script: Script = good) -> None:
        self.script = script
        self.requests: list[Came] = []
        self.came = threading.Event()
        self.gone = threading.Event()
        self.gone_at = 0.0
        self.n_connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Scripted:
        self._loop_ready = threading.Event()
        self._thread.start()
        assert self._loop_ready.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._connected, sock=self._socket)
        self._loop_ready.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.n_connections += 1
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                while not writer.is_closing():
                    await self._one(await _read(reader), reader, writer)
                    await writer.drain()
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _one(self, came: Came, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if came.path == "/v1/capabilities":
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        if came.path == "/health":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            return
        self.requests.append(came)
        self.came.set()
        serving = asyncio.ensure_future(self.script(came, writer))
        leaving = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait([serving, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                self.gone_at = time.monotonic()
                self.gone.set()
                raise ConnectionError
            await serving
        finally:
            for task in (serving, leaving):
                task.cancel()
            await asyncio.gather(serving, leaving, return_exceptions=True)


async def _read(reader: asyncio.StreamReader) -> Came:
    line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): text.strip() for name, _, text in (one.partition(":") for one in lines if one)}
    return Came(line, headers, await reader.readexactly(int(headers.get("content-length", 0))))
