"""The worker, as the proxy sees it: what it offers, and the claiming of a call's activations."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, BinaryIO

import aiohttp
import msgspec

from episodes.errors import CaptureLost, NotClaimed, WorkerFailed
from episodes.handover import Recipe, check_room, take
from episodes.messages import JSON
from episodes.records import Model
from episodes.wire import CAPTURE_HEADER, Capture, Sequence
from proxy.address import Address
from proxy.config import Config

logger = logging.getLogger("tautap.proxy")

CLAIMS_AT_ONCE = 16
CLAIM_WAIT_S = 20.0
RETRY_S = 0.5
METRICS_S = 2.0
HEALTH_S = 10.0
CHUNK = 1 << 20
# Of a reply that is no stream. One with activations in it, as JSON, may have hundreds of MB.
REPLY_LIMIT = 1 << 30


async def whole(piece: Callable[[], Awaitable[bytes]]) -> bytes:
    """The body of a reply that `piece` gives bit by bit, nothing at its end. It is held in memory: WorkerFailed for one
    that is longer than any of a worker's.
    """
    pieces, n_bytes = [], 0
    while got := await piece():
        n_bytes += len(got)
        if n_bytes > REPLY_LIMIT:
            raise WorkerFailed(f"the worker failed: its reply is longer than {REPLY_LIMIT:,} bytes")
        pieces.append(got)
    return b"".join(pieces)


def why_unreachable(error: aiohttp.ClientError | TimeoutError, session: aiohttp.ClientSession) -> str:
    """Why a worker cannot be reached."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return f"no connection within {session.timeout.sock_connect:g} s (--connect-timeout-s)"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


class Refusal(msgspec.Struct, frozen=True):
    """A worker's error in OpenAI's shape; of a call without activations, its sequences and whether any may have run."""

    error: JSON
    sequences: list[Sequence] = []
    ran: bool = True


class Held(msgspec.Struct, frozen=True):
    """A call whose activations a worker holds, and the salt that its proxy gave."""

    call: str
    salt: str


class Waiting(msgspec.Struct, frozen=True):
    """What a worker lists under `/v1/activations`."""

    data: list[Held]


class Backend:
    """Requests of the proxy's own to the worker at an address, one of the configuration's `backends`. `url` is the base
    of requests, `headers` what it wants to see.
    """

    def __init__(
        self,
        address: str,
        session: aiohttp.ClientSession,
        key: str | None = None,
        spool_dir: Path | None = None,
        claim_timeout_s: float = Config.claim_timeout_s,
    ) -> None:
        """key, spool_dir, claim_timeout_s: as in a Config."""
        self.address = address
        self.url = Address.parse(address).url
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session = session
        # For what a worker that is well answers at once, and for what it waits with.
        connect_s = session.timeout.sock_connect
        self._soon = aiohttp.ClientTimeout(total=HEALTH_S, sock_connect=connect_s)
        self._patient = aiohttp.ClientTimeout(sock_read=CLAIM_WAIT_S + HEALTH_S, sock_connect=connect_s)
        self._timeout_s = claim_timeout_s
        self._spool_dir = spool_dir
        self._in_sight = True
        # Its own: claims that wait for a worker that is gone must not keep those of another waiting.
        self._slots = asyncio.Semaphore(CLAIMS_AT_ONCE)
        self._unheard: set[str] = set()  # calls that it could not be told to forget
        self.trouble = ""  # why it could not be asked what it runs
        self.foreign = False  # no worker of ours, as far as is known

    async def capabilities(self) -> Model | None:
        """What the worker records; None while it cannot be reached and for a backend that is not ours. WorkerFailed if
        it does not know us: it would record nothing, and say so to every client.
        """
        try:
            async with self._ask("GET", "/v1/capabilities") as reply:
                body = await whole(reply.content.readany)
        except (aiohttp.ClientError, TimeoutError) as error:
            self.trouble = why_unreachable(error, self._session)
            return None
        self.trouble = ""
        if reply.status in (401, 403):
            said = _error(body).error.get("message") or "without a word"
            refused = f"the worker refuses the proxy (HTTP {reply.status}, {said})"
            raise WorkerFailed(f"{refused}: give --backend-key-file, or another --backend")
        try:
            model = msgspec.json.decode(body, type=Model) if reply.status == 200 else None
        except msgspec.MsgspecError:
            model = None
        was, self.foreign = self.foreign, model is None and reply.status < 500
        if self.foreign and not was:
            logger.warning(
                "%s is no worker of tautap's (/v1/capabilities there: HTTP %d): no activations are recorded of its "
                "calls but those that come in its replies", self.address, reply.status,
            )  # fmt: skip
        return model

    async def ready(self) -> bool:
        """Whether it is well; of one that is not ours, and may have no such route, that it answers is enough."""
        try:
            async with self._ask("GET", "/health") as reply:
                return reply.status < 500
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def metrics(self) -> bytes:
        """The worker's own metrics; nothing if it does not answer at once."""
        timeout = aiohttp.ClientTimeout(total=METRICS_S)
        try:
            async with self._ask("GET", "/metrics", timeout=timeout) as reply:
                return await whole(reply.content.readany) if reply.status == 200 else b""
        except (aiohttp.ClientError, TimeoutError, WorkerFailed):
            return b""

    async def claim(self, call: str, into: Path, min_free_bytes: int = 0, timeout_s: float | None = None) -> None:
        """Make a file of a call's activations; CaptureLost, with the reason, if they cannot be had. OSError if the disk
        does not take them, or would have less than min_free_bytes left: the worker keeps them.

        timeout_s: another than the Config's
        """
        timeout_s, trouble = timeout_s or self._timeout_s, "the worker did not answer"
        try:
            async with self._slots, asyncio.timeout(timeout_s) as clock:
                deadline = clock.when()
                while True:
                    clock.reschedule(deadline)
                    try:
                        if await self._fetch(call, into, min_free_bytes, clock):
                            return
                        trouble = "the worker had not finished it"
                    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                        trouble = f"the worker could not be reached: {error or type(error).__name__}"
                        await asyncio.sleep(RETRY_S)
        except TimeoutError:
            raise NotClaimed(f"not claimed in {timeout_s:g} s: {trouble}") from None

    async def holds(self, call: str) -> bool | None:
        """Whether the worker knows of a call; None if it does not answer."""
        try:
            async with self._ask("GET", f"/v1/activations/{call}", params={"as": "recipe"}) as reply:
                return reply.status in (200, 202, 410)
        except (aiohttp.ClientError, TimeoutError):
            return None

    async def compute(self, model: str, prompt: list[int], capture: Capture) -> None:
        """Run a prompt of token ids for its rows alone; CaptureLost, with the reason, if the worker does not."""
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        headers = {CAPTURE_HEADER: capture.header()}
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        try:
            async with self._ask("POST", "/v1/completions", json=body, headers=headers, timeout=timeout) as reply:
                if reply.status != 200:
                    raise await _refused(reply)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise CaptureLost(f"the worker could not be reached: {error or type(error).__name__}") from None

    async def _fetch(self, call: str, into: Path, min_free_bytes: int, clock: asyncio.Timeout) -> bool:
        headers, path = {"Accept-Encoding": "identity"}, f"/v1/activations/{call}"
        params = {"wait_s": str(CLAIM_WAIT_S)} | ({"as": "recipe"} if self._in_sight else {})
        async with self._ask("GET", path, params=params, headers=headers, timeout=self._patient) as reply:
            if reply.status == 202:
                return False
            if reply.status in (404, 410):
                raise await _refused(reply)
            reply.raise_for_status()
            clock.reschedule(None)  # a transfer takes as long as it takes; one that stalls, `_patient` ends
            if reply.content_type == "application/json":
                recipe = msgspec.json.decode(await whole(reply.content.readany), type=Recipe)
                return await self._take(recipe, into, min_free_bytes)
            with into.open("wb") as file:
                await asyncio.to_thread(check_room, into, reply.content_length or 0, min_free_bytes)
                async for chunk in reply.content.iter_chunked(CHUNK):
                    await asyncio.to_thread(_write, file, chunk, into, min_free_bytes)
        return True

    async def _take(self, recipe: Recipe, into: Path, min_free_bytes: int) -> bool:
        """Make the file out of the worker's spool; False, and never tried again, if that is not in sight from here."""
        directory = Path(recipe.directory)
        if self._spool_dir is not None:
            directory = self._spool_dir / directory.name
        self._in_sight = await asyncio.to_thread(take, recipe, directory, into, min_free_bytes)
        if not self._in_sight:
            level = logging.INFO if self._spool_dir is None else logging.WARNING
            logger.log(level, "%s is not the worker's spool as seen from here: activations come over HTTP", directory)
        return self._in_sight

    async def waiting(self) -> list[Held]:
        """The calls whose activations the worker holds, anybody's; none, and a warning, if it does not say."""
        try:
            async with self._ask("GET", "/v1/activations") as reply:
                reply.raise_for_status()
                return msgspec.json.decode(await whole(reply.content.readany), type=Waiting).data
        except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError, WorkerFailed) as error:
            logger.warning("the worker does not say what it still holds: %s", error or type(error).__name__)
            return []

    async def forget(self, call: str) -> None:
        """Tell the worker that a call's activations are stored, or not wanted. What it does not hear several times, it
        is told with the next that it does.
        """
        for pause_s in (RETRY_S, RETRY_S, 0):
            if await self._delete(call):
                break
            await asyncio.sleep(pause_s)
        else:
            self._unheard.add(call)
            return
        while self._unheard:
            late = self._unheard.pop()
            if not await self._delete(late):
                self._unheard.add(late)
                return

    async def _delete(self, call: str) -> bool:
        try:
            async with self._ask("DELETE", f"/v1/activations/{call}"):
                return True
        except (aiohttp.ClientError, TimeoutError, ConnectionError):
            return False

    def _ask(self, method: str, path: str, **options: Any) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """The worker's reply to a request. options: aiohttp's; without a timeout, it has to answer at once"""
        options = {"timeout": self._soon} | options | {"headers": self.headers | options.get("headers", {})}
        return self._session.request(method, f"{self.url}{path}", **options)


def _write(file: BinaryIO, chunk: bytes, into: Path, min_free_bytes: int) -> None:
    check_room(into, len(chunk), min_free_bytes)
    file.write(chunk)


async def _refused(reply: aiohttp.ClientResponse) -> CaptureLost:
    """Why a worker gives no activations, and of which tokens."""
    refusal = _error(await whole(reply.content.readany))
    said = refusal.error.get("message") or f"HTTP {reply.status}"
    return CaptureLost(str(said), refusal.sequences, None if reply.status == 404 else refusal.ran)


def _error(body: bytes) -> Refusal:
    try:
        return msgspec.json.decode(body, type=Refusal)
    except msgspec.MsgspecError:
        return Refusal({})
