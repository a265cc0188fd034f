"""The recorder: what happens to a call after its reply, off the client's path.

Claim its activations, write them, append the call to the journal (the commit), tell the worker to forget them; seal
episodes that have been quiet, and everything at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, TypeVar

import msgspec

from episodes.cast import Cast, Group, Part
from episodes.errors import CaptureLost, CorruptFile, TautapError
from episodes.layout import Layout, check_name
from episodes.messages import JSON
from episodes.records import Call
from episodes.run import open_run
from episodes.store import Store
from episodes.tables import Totals, totals
from episodes.taubench import DIALECT, Links, Result, find_links
from episodes.threads import Place
from episodes.wire import DTYPE_CODES, DTYPES
from proxy import logs
from proxy.backend import Backend
from proxy.backfill import Backfill
from proxy.config import Config
from proxy.metrics import Metrics

logger = logging.getLogger("tautap.proxy")

CLAIMS_AT_ONCE = 16
PENDING_LIMIT = 4096
SETTLE_S = 30.0
LATE_S = 0.05
STOPPED = "the proxy had to stop before they were claimed"

T = TypeVar("T")


class Recording:
    """One run being written. Store calls run one at a time on a thread of its own, never on the event loop."""

    def __init__(
        self, store: Store, backend: Backend, slots: asyncio.Semaphore, metrics: Metrics, backfill: bool = False
    ) -> None:
        """backfill: run again what calls of an episode lack before it is sealed."""
        self._cast = Cast(DIALECT)
        self._store = store
        self._backend = backend
        self._slots = slots
        self._metrics = metrics
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="tautap-store")
        # Nothing that an earlier process had cached is relied upon: its rows may not have been stored.
        self._start = uuid.uuid4().hex[:8]
        self._n_lost = 0
        self._backfill = Backfill(store, backend, self._on_disk) if backfill else None
        self._described = False
        self._pending: Counter[str] = Counter()
        self._settled = asyncio.Event()
        self._settled.set()
        self._sealing = asyncio.Lock()
        self._touched: dict[str, float] = {}
        self._ending: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._claims: set[asyncio.Task[None]] = set()
        # When to be done with everything, on the loop's clock.
        self._deadline: float | None = None

    @classmethod
    async def open(
        cls, layout: Layout, config: Config, backend: Backend, slots: asyncio.Semaphore, metrics: Metrics
    ) -> Recording:
        store = await asyncio.to_thread(Store, layout, config.compression)
        recording = cls(store, backend, slots, metrics, config.backfill)
        left = await asyncio.to_thread(store.history.unsealed)
        recording._cast.replay(left)
        recording._touched = dict.fromkeys((call.thread for call in left), time.monotonic())
        return recording

    async def describe(self) -> None:
        """Note the worker's model as soon as it is known; WrongModel if the run was recorded with another."""
        if self._described:
            return
        model = await self._backend.capabilities()
        if model is not None:
            await self._on_disk(self._store.describe, model)
            self._described = True

    @property
    def salt(self) -> str:
        """What calls of this run may share cached blocks under: when a row is lost, a new epoch begins."""
        return f"{self._store.run.run}/{self._start}.{self._n_lost}"

    @property
    def counts(self) -> dict[str, int]:
        """What the run holds so far: calls, tokens, rows, and bytes of vectors as they came."""
        counts = self._store.history.counts
        held = {name: counts[name] for name in ("calls", "tokens", "rows")}
        return held | {"bytes": counts["vectors"] * self._vector_bytes}

    @property
    def _vector_bytes(self) -> int:
        model = self._store.run.recorded
        return model.hidden_size * DTYPES[DTYPE_CODES[model.dtype]].itemsize if model else 0

    @property
    def n_in_flight(self) -> int:
        """Calls whose reply is not over."""
        return sum(self._pending.values()) - self.n_queued

    @property
    def n_queued(self) -> int:
        """Calls whose reply is over and that are not on disk yet."""
        return len(self._tasks)

    @property
    def n_live(self) -> int:
        """Episodes with a call that no shard holds."""
        return sum(bool(episode.calls) for episode in self._store.history.episodes.values())

    @property
    def full(self) -> bool:
        """Whether so many calls wait to be committed that no more should be taken."""
        return self.n_queued >= PENDING_LIMIT

    def part(self, messages: list[JSON] | None) -> Part:
        """Who speaks in a call with these messages."""
        return self._cast.dialect.part(messages or [])

    def place(
        self, call: str, messages: list[JSON] | None, part: Part, episode: str | None, retried: bool | None
    ) -> Place:
        """Where a call that begins now belongs; its episode is not sealed until the call is recorded."""
        place = self._cast.place(call, messages, part, episode, retried)
        self._pending[place.thread] += 1
        self._settled.clear()
        return place

    def replied(self, place: Place, replies: list[JSON]) -> None:
        """The call at `place` is over, for its conversation to go on; no replies if it failed."""
        self._cast.replied(place, replies)

    def record(self, call: Call, claim: bool, foreign: JSON, added_s: float) -> None:
        """Take a finished call, whatever became of it. claim: the worker may have activations of it. added_s: how long
        the proxy itself was at it.
        """
        task = asyncio.create_task(self._record(call, claim, foreign, added_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _record(self, call: Call, claim: bool, foreign: JSON, added_s: float) -> None:
        self._metrics.ended(call, added_s)
        try:
            if claim:
                with self._metrics.claim.time():
                    call = await self._claim(call)
            with self._metrics.commit.time():
                call, rows = await self._on_disk(self._commit, call, msgspec.json.encode(foreign) if foreign else None)
            self._metrics.recorded(call, rows, call.n_kept * len(call.points) * self._vector_bytes)
            logs.recorded(self._store.run.run, call, rows)
            if claim:
                await self._backend.forget(call.id)
        except Exception as error:
            logger.exception("call %s could not be recorded", call.id, extra=logs.about(call))
            self._lost(call, str(error))
        finally:
            self._pending[call.thread] -= 1
            self._touched[call.thread] = time.monotonic()
            if not any(self._pending.values()):
                self._settled.set()

    async def _claim(self, call: Call) -> Call:
        async with self._slots:
            claim = asyncio.create_task(self._backend.claim(call.id, self._store.draft(call.id)))
            self._claims.add(claim)
            claim.add_done_callback(self._claims.discard)
            try:
                await asyncio.wait([claim])
                claim.result()
            except asyncio.CancelledError:
                return self._lost(call, STOPPED)
            except CaptureLost as error:
                return self._lost(msgspec.structs.replace(call, sequences=error.sequences), str(error))
            except (TautapError, OSError) as error:
                return self._lost(call, str(error))
        return call

    def _lost(self, call: Call, reason: str) -> Call:
        """The call without its activations. What it computed may be cached, so a new epoch begins."""
        logger.warning("call %s: no activations: %s", call.id, reason, extra=logs.about(call))
        self._metrics.failed(reason)
        self._n_lost += 1
        return msgspec.structs.replace(call, lost=reason)

    def _commit(self, call: Call, foreign: bytes | None) -> tuple[Call, Counter[str]]:
        """On the disk's thread: commit a call with what was claimed of it, or without it if that is not sound. With it
        comes how many of its positions it stored, shares with an earlier call, or lacks.
        """
        draft = self._store.draft(call.id)
        try:
            call = self._store.commit(call, draft if draft.exists() and call.lost is None else None, foreign)
        except CorruptFile as error:
            call = self._store.commit(self._lost(call, str(error)), None, foreign)
        finally:
            draft.unlink(missing_ok=True)
        rows: Counter[str] = Counter()
        for span in chain.from_iterable(self._store.history.spans(call).values()):
            kind = "missing" if span.owner is None else "stored" if span.owner.call == call.id else "shared"
            rows[kind] += span.stop - span.start
        return call, rows

    async def seal(self, idle_s: float) -> None:
        """Note which threads make up which episode, and seal those where none has a call under way or had one for
        `idle_s`. One that fails is tried again later.
        """
        async with self._sealing:
            await self._seal(time.monotonic() - idle_s)

    async def _seal(self, since: float) -> None:
        for group in self._cast.groups():
            try:
                await self._on_disk(self._store.pair, group, self._cast.dialect.name)
            except Exception:
                logger.exception("the threads of episode %s could not be noted", group.episode)
                continue
            if self._backfill is not None and not self._late and self._quiet(group, since):
                await self._fill(self._backfill, group.episode)
            if self._quiet(group, since):
                self._close(group)
        for episode in sorted(self._ending & self._store.history.episodes.keys()):
            if self._late:
                break
            try:
                sealed = await self._on_disk(self._store.seal, episode)
                self._metrics.sealed.inc(sealed is not None)
                self._ending.discard(episode)
            except Exception:
                logger.exception("episode %s could not be sealed", episode)

    async def _fill(self, backfill: Backfill, episode: str) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                await backfill.fill(self._store.history.episodes[episode].unsealed)
        except Exception:
            logger.exception("episode %s could not be filled", episode)

    def _quiet(self, group: Group, since: float) -> bool:
        """Whether nobody in the group says anything; who could stand in it as well may yet tell them apart."""
        return all(
            not self._pending[thread] and self._touched.get(thread, since) <= since
            for thread in (*group.threads, *group.tied)
        )

    def _close(self, group: Group) -> None:
        """Let nothing continue an episode's threads any more: it is to be sealed."""
        self._cast.close(group.threads)
        self._ending.add(group.episode)
        for thread in group.threads:
            self._touched.pop(thread, None)
            del self._pending[thread]

    async def finish(self) -> Totals:
        """Wait for the calls that are under way, a while for those that have no reply yet; seal every episode that is
        quiet then, and roll the index. The run goes on. Returns what it holds.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), SETTLE_S)
        await self.seal(0)
        await self._on_disk(self._store.roll)
        return await asyncio.to_thread(totals, self._store.layout)

    async def link(self, results: list[Result], env: str | None, split: str | None) -> tuple[Links, int]:
        """Join a benchmark's results to the run's episodes; returns what was found and how much of it is new."""
        run = await asyncio.to_thread(open_run, self._store.layout.root)
        found = await asyncio.to_thread(find_links, run.history, results, env, split)
        n_new = await self._on_disk(self._store.link, found.links)
        await self._on_disk(self._store.roll)
        return found, n_new

    @property
    def _late(self) -> bool:
        return self._deadline is not None and asyncio.get_running_loop().time() >= self._deadline

    async def close(self, deadline: float) -> None:
        """Record what is under way, seal everything, roll the index. By the deadline, on the loop's clock: then what
        is not claimed is lost, and what is not sealed is left live.
        """
        self._deadline = deadline
        while self._tasks:
            left_s = deadline - asyncio.get_running_loop().time()
            await asyncio.wait(self._tasks, timeout=max(left_s, LATE_S))
            if self._late:
                for claim in self._claims:
                    claim.cancel()
        await self.seal(0)
        if self._late and self.n_live:
            logger.warning("%d episodes are not sealed: tautap seal %s", self.n_live, self._store.layout.root)
        await self._on_disk(self._store.roll)
        await self._on_disk(self._store.close)
        self._disk.shutdown()

    async def _on_disk(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, *args)


class Recorder:
    """The runs that a proxy writes, opened as they are named, and the task that seals what has gone quiet."""

    def __init__(self, config: Config, backend: Backend, metrics: Metrics) -> None:
        self.config = config
        self._backend = backend
        self._metrics = metrics
        self._slots = asyncio.Semaphore(CLAIMS_AT_ONCE)
        self._runs: dict[str, Recording] = {}
        self._opening = asyncio.Lock()
        self._sealing: asyncio.Task[None] | None = None
        self._deadline: float | None = None
        runs, data = self._runs, config.data
        metrics.look_up("runs", "Runs that are open.", lambda: len(runs))
        metrics.look_up("in_flight", "Calls under way.", lambda: sum(r.n_in_flight for r in runs.values()))
        metrics.look_up("queue", "Calls waiting to be on disk.", lambda: sum(r.n_queued for r in runs.values()))
        metrics.look_up("episodes_live", "Episodes not sealed.", lambda: sum(r.n_live for r in runs.values()))
        metrics.look_up("disk_free_bytes", "Room where the runs lie.", lambda: shutil.disk_usage(data).free)

    async def start(self) -> None:
        """Open the default run, so that a directory that cannot be used stops the proxy here."""
        await self.run(None)
        self._sealing = asyncio.create_task(self._seal_when_quiet())

    async def run(self, name: str | None) -> Recording:
        """The run of that name, the default one for None; BadName or BadRun if it cannot be."""
        name = check_name("run", name or self.config.run)
        if name not in self._runs:
            async with self._opening:
                if name not in self._runs:
                    layout = Layout(self.config.data / name)
                    opened = await Recording.open(layout, self.config, self._backend, self._slots, self._metrics)
                    self._runs[name] = opened
        recording = self._runs[name]
        await recording.describe()
        return recording

    def opened(self, name: str) -> Recording | None:
        """The run of that name if it is being written."""
        return self._runs.get(name)

    async def _seal_when_quiet(self) -> None:
        idle_s = self.config.episode_idle_s
        while True:
            await asyncio.sleep(min(max(idle_s / 4, 0.1), 15.0))
            for recording in list(self._runs.values()):
                await recording.seal(idle_s)

    def drain(self) -> float:
        """From now on there are `drain_s` for all that is under way; returns when they are over."""
        self._deadline = asyncio.get_running_loop().time() + self.config.drain_s
        return self._deadline

    async def close(self) -> None:
        if self._sealing is not None:
            self._sealing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sealing
        deadline = self._deadline or self.drain()
        for recording in self._runs.values():
            await recording.close(deadline)
