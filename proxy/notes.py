"""The notes of calls that have begun: what is on disk of a call before its reply ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from episodes.records import Call
from episodes.store import Store

logger = logging.getLogger("tautap.proxy")

T = TypeVar("T")


class Notes:
    """Notes calls in the order in which they begin, all that wait for the disk with one write. A note outlives this
    process as soon as it is written; it is synced behind that, to outlive the machine's power too.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # Beside the store's own, so that no reply waits for another call's rows or a seal; two, for a sync not to hold
        # up the next.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tautap-begun")
        self._written: dict[str, asyncio.Future[str | None]] = {}
        self._news: list[Call] = []
        self._writing: asyncio.Task[None] | None = None
        self._unsynced = False
        self._syncing: asyncio.Task[None] | None = None

    def begin(self, call: Call) -> None:
        """Note a call that begins."""
        self._written[call.id] = asyncio.get_running_loop().create_future()
        self._news.append(call)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())

    async def written(self, call: str) -> str | None:
        """Wait until a call is noted; returns why it is not, if it could not be. None at once for one never begun."""
        noted = self._written.get(call)
        return await asyncio.shield(noted) if noted else None

    def drop(self, call: str) -> None:
        """Forget a call that is recorded."""
        self._written.pop(call, None)

    async def close(self) -> None:
        for task in (self._writing, self._syncing):
            if task is not None:
                await task
        self._threads.shutdown()

    async def _write(self) -> None:
        while self._news:
            news, self._news = self._news, []
            self._tell(news, await self._refused(news))
            self._unsynced = True
            if self._syncing is None or self._syncing.done():
                self._syncing = asyncio.create_task(self._sync())

    async def _refused(self, news: list[Call]) -> str | None:
        """Write notes; returns why they are not, if they could not be."""
        try:
            await self._apart(self._store.begin, news)
        except OSError as error:
            return f"the call could not be noted on disk: {error.strerror}"
        return None

    def _tell(self, news: Iterable[Call], reason: str | None) -> None:
        for call in news:
            noted = self._written.get(call.id)
            if noted is not None and not noted.done():
                noted.set_result(reason)

    async def _sync(self) -> None:
        while self._unsynced:
            self._unsynced = False
            try:
                await self._apart(self._store.sync_begun)
            except OSError as error:
                logger.warning("calls that have begun could not be synced: %s", error)

    async def _apart(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
