"""A TCP proxy that resets a connection at the byte that it is told."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST and drops what was not sent

Side = Literal["request", "reply"]


@dataclass(frozen=True)
class Cut:
    """Where an exchange is cut: of its request or its reply nothing passes beyond `more` bytes after `behind`.

    of: how the request begins.
    """

    of: bytes
    side: Side
    behind: bytes = b""
    more: int = 0

    def limit(self, passed: bytes) -> int | None:
        """How many bytes of this side may pass, None while `behind` has not come."""
        at = passed.find(self.behind)
        return None if at < 0 else at + len(self.behind) + self.more


@dataclass
class Exchange:
    """Where a connection is to be cut, and what of that side has passed."""

    cut: Cut | None = None
    passed: bytes = b""


class Wire:
    """Passes everything on from its own port to another, but for one exchange for each of `cuts`, which it cuts.

    Leaving the block cuts every connection.
    """

    def __init__(self, to_port: int) -> None:
        self.cuts: list[Cut] = []
        self.n_cut = 0
        self._to_port = to_port
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._carry, "127.0.0.1", 0))
        self.port = int(self._server.sockets[0].getsockname()[1])
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Wire:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        carrying = asyncio.all_tasks() - {asyncio.current_task()}
        for task in carrying:
            task.cancel()
        await asyncio.gather(*carrying, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either end closes it or it is cut: then both ends see a reset."""
        writers, ways = [writer], []
        try:
            there, to = await asyncio.open_connection("127.0.0.1", self._to_port)
            writers.append(to)
            exchange = Exchange()
            ways = [
                asyncio.create_task(self._pass(reader, to, "request", exchange)),
                asyncio.create_task(self._pass(there, writer, "reply", exchange)),
            ]
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            if any(way.result() for way in done):
                self.n_cut += 1
                for each in writers:
                    each.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        except OSError:  # one end is not there, or no more
            pass
        finally:
            for way in ways:
                way.cancel()
            for each in writers:
                each.close()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, side: Side, exchange: Exchange
    ) -> bool:
        """Pass one direction on; True when it is time to cut."""
        while chunk := await reader.read(1 << 16):
            if side == "request" and exchange.cut is None:
                exchange.cut = next((cut for cut in self.cuts if chunk.startswith(cut.of)), None)
                if exchange.cut is not None:
                    self.cuts.remove(exchange.cut)
            cut = exchange.cut
            if cut is not None and cut.side == side:
                before = len(exchange.passed)
                exchange.passed += chunk
                limit = cut.limit(exchange.passed)
                if limit is not None and limit <= len(exchange.passed):
                    writer.write(exchange.passed[before:limit])
                    with suppress(ConnectionError):
                        await writer.drain()
                    return True
            writer.write(chunk)
            await writer.drain()
        return False
