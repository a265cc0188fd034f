"""Backfill: what a run lacks is run through the worker again, as a prompt, and its rows are stored."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from episodes.errors import BadInput, BadRun, CaptureLost, NotClaimed, TautapError
from episodes.holes import Hole, holes, unfillable
from episodes.layout import Layout
from episodes.records import Call
from episodes.recovery import STOPPED
from episodes.store import Store, family
from episodes.taubench import DIALECT
from episodes.wire import Capture
from proxy.config import Config
from proxy.workers import Workers

logger = logging.getLogger("tautap.proxy")


@dataclass
class Filled:
    """What a backfill did. n_rows: stored, for n_calls calls. left: calls that still lack rows, and why."""

    n_rows: int = 0
    n_calls: int = 0
    left: dict[str, str] = field(default_factory=dict)


class Backfill:
    """Fills the holes of a run, one at a time. on_disk: runs work of the store where the store's work is done. salt:
    what those of its captures begin with, for the next proxy to know them should this process die. min_free_bytes: as
    in a Config.
    """

    def __init__(
        self, store: Store, workers: Workers, on_disk: Callable[..., Awaitable[Any]], salt: str, min_free_bytes: int = 0
    ) -> None:
        self._store = store
        self._workers = workers
        self._on_disk = on_disk
        self._salt = salt
        self._min_free_bytes = min_free_bytes

    async def fill(self, calls: Iterable[Call]) -> Filled:
        """Fill the holes of these calls; what cannot be filled is left, and said."""
        done = Filled()
        asked = iter(calls)
        while (call := await self._on_disk(next, asked, None)) is not None:
            try:
                n_rows = await self._mend(call)
            except (TautapError, OSError) as error:
                done.left[call.id] = str(error)
                logger.warning("call %s could not be filled: %s", call.id, error)
            else:
                done.n_rows += n_rows
                done.n_calls += n_rows > 0
        return done

    async def _mend(self, call: Call) -> int:
        """Fill a call's holes; returns the rows stored. BadRun, with the reason, for what no re-run can give."""
        history, model, n_rows = self._store.history, self._store.run.recorded, 0
        edit = model.edit if model else ""
        if reason := await self._on_disk(unfillable, call, history, edit):
            raise BadRun(reason)
        found = holes([call], history)
        while (hole := await self._on_disk(next, found, None)) is not None:
            n_rows += await self._run_again(hole, edit)
        return n_rows

    async def _run_again(self, hole: Hole, edit: str) -> int:
        call, salt = f"c-{uuid.uuid4().hex[:16]}", f"{self._salt}{uuid.uuid4().hex}"
        capture = Capture(call, salt, tuple(hole.call.points), hole.tokens)
        draft = self._store.draft(capture.call)
        backend = self._workers.idlest
        started = time.time()
        try:
            await backend.compute(hole.call.model, hole.prompt(edit), capture)
            await backend.claim(capture.call, draft, self._min_free_bytes)
            filler = hole.filler(capture.call, started, time.time())
            stored: Call = await self._on_disk(self._store.fill, filler, draft)
        finally:
            await self._on_disk(draft.unlink, True)  # whether it is missing or not
            await backend.forget(capture.call)
        return stored.n_kept


async def backfill(layout: Layout, config: Config) -> Filled:
    """Fill every hole of a run that no proxy writes, seal it and write its index.

    BadInput if no worker of ours answers; BadRun if it is being written, or if the worker runs another model
    """
    async with Workers.run(config) as workers:
        model = await workers.capabilities()
        if model is None:
            raise BadInput(f"--backend {', '.join(config.backends)}: no worker of tautap's answers there")
        # One thread: what is under way when this is cancelled goes on there, and the store is closed behind it.
        with ThreadPoolExecutor(1, thread_name_prefix="tautap-store") as disk:
            on_disk = partial(asyncio.get_running_loop().run_in_executor, disk)
            store = await on_disk(Store, layout)
            try:
                await on_disk(store.describe, model)
                await _finish_left(store, workers, on_disk, config.min_free_bytes)
                done = await Backfill(store, workers, on_disk, family(layout, store.run)).fill(store.calls())
                await on_disk(store.finish, DIALECT)
            finally:
                await on_disk(store.close)
    return done


async def _finish_left(
    store: Store, workers: Workers, on_disk: Callable[..., Awaitable[Any]], min_free_bytes: int
) -> None:
    """Record what a proxy that died left, with the rows that a worker still holds. NotClaimed, and nothing is recorded,
    if a worker does not answer, OSError if the disk takes none.
    """

    async def claim(call: Call) -> Call:
        logger.warning("call %s: %s", call.id, STOPPED)
        draft = store.draft(call.id)
        try:
            if call.points and not await on_disk(draft.exists):
                await workers.claim(call.id, draft, min_free_bytes)
        except NotClaimed:
            raise
        except CaptureLost as error:
            if not error.ran and not call.answered:
                return msgspec.structs.replace(call, points=[])
            return msgspec.structs.replace(call, sequences=error.sequences, lost=str(error))
        return call

    store.left = await asyncio.gather(*map(claim, store.left))
    left = [call.id for call in store.left]
    await on_disk(store.finish_left)
    await asyncio.gather(*map(workers.forget, left))
