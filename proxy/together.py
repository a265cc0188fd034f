"""Work on a thread, done once for all who wait for it: writing and syncing cost nearly the same for one as for many."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic, TypeVar

T = TypeVar("T")


class Together(Generic[T]):
    """Items in the order in which they come. What comes while the work is done for others is taken in one piece."""

    def __init__(self, work: Callable[[list[T]], object], threads: Executor) -> None:
        self._work = work
        self._threads = threads
        self._waiting: dict[asyncio.Future[Exception | None], T] = {}
        self._taken: dict[asyncio.Future[Exception | None], T] = {}

    def add(self, item: T) -> asyncio.Future[Exception | None]:
        """Done when the work is done for the item; the result is the error if it failed."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Exception | None] = loop.create_future()
        if not self._waiting and not self._taken:
            loop.call_soon(self._begin)  # with whatever else comes in this turn of the loop
        self._waiting[done] = item
        return done

    def _begin(self) -> None:
        self._taken, self._waiting = self._waiting, {}
        self._threads.submit(self._do, list(self._taken.values()), asyncio.get_running_loop())

    def _do(self, items: list[T], loop: asyncio.AbstractEventLoop) -> None:
        error = None
        try:
            self._work(items)
        except Exception as caught:
            error = caught
        loop.call_soon_threadsafe(self._end, error)

    def _end(self, error: Exception | None) -> None:
        for done in self._taken:
            if not done.done():
                done.set_result(error)
        self._taken = {}
        if self._waiting:
            self._begin()

    async def close(self) -> None:
        """Wait for the work that is under way."""
        while pending := [*self._taken, *self._waiting]:
            await asyncio.wait(pending)
