"""The notes of calls that have begun: what is on disk of a call before its reply ends."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from episodes.records import Call
from episodes.store import Store
from proxy.together import Together

logger = logging.getLogger("tautap.proxy")

# How long a note waits for others to be synced with it; a call that is in the journal by then needs no sync.
SYNC_S = 0.01


class Notes:
    """A note outlives this process as soon as it is written; a sync follows, for it to outlive the machine's power."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # Beside the store's own, so that no reply waits for another call's rows or a seal; two, for a sync not to hold
        # up the next note.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tautap-begun")
        self._notes = Together(store.begin, self._threads)
        self._syncs: Together[None] = Together(self._sync, self._threads)
        self._due: asyncio.TimerHandle | None = None
        self._written: dict[str, asyncio.Future[Exception | None]] = {}

    def begin(self, call: Call) -> None:
        """Note a call that begins."""
        self._written[call.id] = noted = self._notes.add(call)
        noted.add_done_callback(self._sync_later)

    async def written(self, call: str) -> str | None:
        """Wait until a call is noted; returns why it is not, if it could not be. None at once for one never begun."""
        noted = self._written.get(call)
        if noted is None:
            return None
        error = noted.result() if noted.done() else await asyncio.shield(noted)
        return None if error is None else f"the call could not be noted on disk: {getattr(error, 'strerror', error)}"

    def drop(self, call: str) -> None:
        """Forget a call that is recorded."""
        self._written.pop(call, None)

    async def close(self) -> None:
        await self._notes.close()
        if self._due is not None:
            self._due.cancel()
        await self._syncs.close()
        self._threads.shutdown()

    def _sync_later(self, _: object) -> None:
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(SYNC_S, self._sync_now)

    def _sync_now(self) -> None:
        self._due = None
        self._syncs.add(None)

    def _sync(self, _: object) -> None:
        try:
            self._store.sync_begun()
        except OSError as error:
            logger.warning("calls that have begun could not be synced: %s", error)
