"""A client's request on its way to the worker: the connection, what of the headers goes along, how long it may take.

Nothing is sent twice: what is tried again is connecting.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache, partial

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL

from episodes.errors import WorkerFailed, WorkerTooSlow, WorkerUnreachable
from proxy.backend import Backend, whole, why_unreachable
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
    """When to give up on a reply. A piece of it costs next to nothing: the alarm is moved when it goes off. since: from
    when on the next piece has been waited for; None while somebody else is, such as a client that is slow to take one.
    """

    def __init__(self, clock: asyncio.Timeout, timeouts: Timeouts) -> None:
        self._clock = clock
        self._timeouts = timeouts
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        self.since: float | None = None
        self._came = False
        self._alarm = self._loop.call_at(self._due()[0], self._look)

    def moved(self) -> None:
        """Another piece of the reply has come."""
        self.since = None
        if not self._came:  # from now on the time to give up only moves away
            self._came = True
            self._alarm.cancel()
            self._alarm = self._loop.call_at(self._due()[0], self._look)

    def over(self) -> None:
        self._alarm.cancel()

    def _due(self) -> tuple[float, float, str, str]:
        """When to give up as things stand, how long that is, what is waited for, and the flag that says how long."""
        timeouts = self._timeouts
        if self._came:
            since = self._loop.time() if self.since is None else self.since
            due = (since + timeouts.idle_s, timeouts.idle_s, "another byte of its reply", "idle")
        else:
            limit_s = timeouts.first_byte_s
            due = (self._begun + limit_s, limit_s, "the first byte of its reply", "first-byte")
        return min(due, (self._begun + timeouts.total_s, timeouts.total_s, "the end of its reply", "total"))

    def _look(self) -> None:
        at, *_ = self._due()
        if self._loop.time() >= at:
            self._clock.reschedule(at)
        else:
            self._alarm = self._loop.call_at(at, self._look)

    def error(self) -> WorkerTooSlow:
        _, limit_s, what, flag = self._due()
        return WorkerTooSlow(f"the worker failed: {what} did not come within {limit_s:g} s (--{flag}-timeout-s)")


class Reply:
    """The worker's, its headers read. began: when the first of its body came, in unix seconds."""

    def __init__(self, reply: aiohttp.ClientResponse, patience: Patience) -> None:
        self._content = reply.content
        self._patience = patience
        self._time = asyncio.get_running_loop().time
        self._large = False
        self.began: float | None = None
        self.status = reply.status
        self.content_type = reply.content_type
        self.content_length = reply.content_length
        self.headers = passed(reply.headers, REPLY_HEADERS)

    async def piece(self) -> bytes:
        """What has come of its body, nothing at its end. Nothing is read ahead: whoever is slow to take a piece holds
        the worker up.
        """
        if self._large:
            await asyncio.sleep(0)
        self._patience.since = self._time()
        piece = await self._content.readany()
        self._patience.moved()
        if piece and self.began is None:
            self.began = time.time()
        self._large = len(piece) > FAIR_BYTES
        return piece

    async def read(self) -> bytes:
        return await whole(self.piece)


class Upstream:
    def __init__(self, backend: Backend, session: aiohttp.ClientSession, timeouts: Timeouts) -> None:
        self.backend = backend
        self._url = lru_cache(256)(partial(_url, URL(backend.url)))
        self._session = session
        self._timeouts = timeouts

    @asynccontextmanager
    async def ask(
        self, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes
    ) -> AsyncIterator[Reply]:
        """The worker's reply to a request; WorkerFailed, also while it is read, if there is none or it breaks off.

        path: plain, as `proxy.paths` lets it through. query: as the client wrote it. headers: beside the worker's key
        """
        url = self._url(path, query)
        headers = {**headers, **self.backend.headers, "Accept-Encoding": "identity"}
        patience = None
        try:
            async with asyncio.timeout(None) as clock:
                patience = Patience(clock, self._timeouts)
                async with await self._send(method, url, headers, body) as reply:
                    yield Reply(reply, patience)
        except TimeoutError:
            assert patience is not None
            raise patience.error() from None
        except ConnectionError:  # of writing to the client: aiohttp's errors of reading are not of this kind
            raise
        except aiohttp.ClientError as error:
            raise WorkerFailed(f"the worker failed: {error or type(error).__name__}") from None
        finally:
            if patience is not None:
                patience.over()

    async def _send(self, method: str, url: URL, headers: Mapping[str, str], body: bytes) -> aiohttp.ClientResponse:
        for pause_s in (*AGAIN_S, None):
            try:
                return await self._session.request(
                    method, url, headers=headers, data=body or None, allow_redirects=False
                )
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:  # so nothing was sent
                if pause_s is None or isinstance(error, TimeoutError):
                    reason = why_unreachable(error, self._session)
                    raise WorkerUnreachable(f"the worker cannot be reached: {reason}") from None
            except ConnectionError as error:
                raise WorkerFailed(f"the worker failed: {error or type(error).__name__}") from None
            await asyncio.sleep(pause_s)
        raise AssertionError


def _url(base: URL, path: str, query: str) -> URL:
    return URL.build(scheme=base.scheme, authority=base.raw_authority, path=path, query_string=query, encoded=True)


def passed(headers: CIMultiDictProxy[str], allowed: re.Pattern[str]) -> dict[str, str]:
    """The headers that go on: the allowed ones, unless `Connection` says that they are for the next hop alone."""
    found = {name: text for name, text in headers.items() if matches(allowed, name)}
    if "Connection" in headers:
        hop = {name.strip().lower() for name in headers["Connection"].split(",")}
        return {name: text for name, text in found.items() if name.lower() not in hop}
    return found


@lru_cache(1024)
def matches(allowed: re.Pattern[str], name: str) -> bool:
    return allowed.fullmatch(name) is not None
