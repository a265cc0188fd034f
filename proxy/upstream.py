"""A client's request on its way to the worker: the connection, what of the headers goes along, how long it may take.

Nothing is sent twice: what is tried again is connecting.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL

from episodes.errors import WorkerFailed, WorkerTooSlow, WorkerUnreachable
from proxy.backend import Backend
from proxy.config import Timeouts

REQUEST_HEADERS = re.compile(r"content-type|accept|user-agent", re.I)
REPLY_HEADERS = re.compile(
    r"content-type|content-encoding|retry-after|cache-control|openai-.*|x-ratelimit-.*|x-should-retry", re.I
)
# Pauses between attempts to connect.
AGAIN_S = (0.1, 0.3)
# Whoever has chunks of this size one after the other, and a client who takes them, would never let the others in.
FAIR_BYTES = 16 << 10


class Patience:
    """When to give up on a reply. waiting_for: what, in words."""

    def __init__(self, clock: asyncio.Timeout, timeouts: Timeouts) -> None:
        self._clock = clock
        self._timeouts = timeouts
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + timeouts.total_s
        self._wait(timeouts.first_byte_s, "the first byte of its reply", "first-byte")

    def moved(self) -> None:
        """Another piece of the reply has come."""
        self._wait(self._timeouts.idle_s, "another byte of its reply", "idle")

    def _wait(self, limit_s: float, what: str, flag: str) -> None:
        deadline = self._loop.time() + limit_s
        if deadline > self._end:
            deadline, limit_s, what, flag = self._end, self._timeouts.total_s, "the end of its reply", "total"
        self.reason = (limit_s, what, flag)
        self._clock.reschedule(deadline)

    def error(self) -> WorkerTooSlow:
        limit_s, what, flag = self.reason
        return WorkerTooSlow(f"the worker failed: {what} did not come within {limit_s:g} s (--{flag}-timeout-s)")


class Reply:
    """The worker's, its headers read."""

    def __init__(self, reply: aiohttp.ClientResponse, patience: Patience) -> None:
        self._reply = reply
        self._patience = patience
        self.status = reply.status
        self.content_type = reply.content_type
        self.content_length = reply.content_length
        self.headers = passed(reply.headers, REPLY_HEADERS)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Its body as it comes. Nothing is read ahead: whoever is slow to take a chunk holds the worker up."""
        async for chunk in self._reply.content.iter_any():
            yield chunk
            self._patience.moved()
            if len(chunk) > FAIR_BYTES:
                await asyncio.sleep(0)

    async def read(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])


class Upstream:
    def __init__(self, backend: Backend, session: aiohttp.ClientSession, timeouts: Timeouts) -> None:
        self.backend = backend
        self._base = URL(backend.url)
        self._session = session
        self._timeouts = timeouts

    @asynccontextmanager
    async def ask(
        self, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes
    ) -> AsyncIterator[Reply]:
        """The worker's reply to a request; WorkerFailed, also while it is read, if there is none or it breaks off.

        path: plain, as `proxy.paths` lets it through. query: as the client wrote it. headers: beside the worker's key
        """
        url = URL.build(
            scheme=self._base.scheme, authority=self._base.raw_authority, path=path, query_string=query, encoded=True
        )
        headers = {**headers, **self.backend.headers, "Accept-Encoding": "identity"}
        patience = None
        try:
            async with asyncio.timeout(None) as clock:
                patience = Patience(clock, self._timeouts)
                async with await self._send(method, url, headers, body) as reply:
                    patience.moved()
                    yield Reply(reply, patience)
        except TimeoutError:
            assert patience is not None
            raise patience.error() from None
        except ConnectionError:  # of writing to the client: aiohttp's errors of reading are not of this kind
            raise
        except aiohttp.ClientError as error:
            raise WorkerFailed(f"the worker failed: {error or type(error).__name__}") from None

    async def _send(self, method: str, url: URL, headers: Mapping[str, str], body: bytes) -> aiohttp.ClientResponse:
        for pause_s in (*AGAIN_S, None):
            try:
                return await self._session.request(
                    method, url, headers=headers, data=body or None, allow_redirects=False
                )
            except aiohttp.ClientConnectorError as error:  # so nothing was sent
                if pause_s is None:
                    raise WorkerUnreachable(f"the worker cannot be reached: {error.strerror or error}") from None
            except aiohttp.ConnectionTimeoutError:
                limit_s = self._timeouts.connect_s
                message = f"the worker cannot be reached: no connection within {limit_s:g} s (--connect-timeout-s)"
                raise WorkerUnreachable(message) from None
            except ConnectionError as error:
                raise WorkerFailed(f"the worker failed: {error or type(error).__name__}") from None
            await asyncio.sleep(pause_s)
        raise AssertionError


def passed(headers: CIMultiDictProxy[str], allowed: re.Pattern[str]) -> dict[str, str]:
    """The headers that go on: the allowed ones, unless `Connection` says that they are for the next hop alone."""
    hop = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return {name: text for name, text in headers.items() if allowed.fullmatch(name) and name.lower() not in hop}
