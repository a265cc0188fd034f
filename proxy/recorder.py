"""The recorder: what happens to a call after its reply, off the client's path.

Claim its activations, write them, append the call to the journal (the commit), tell the worker to forget them; seal
episodes that have been quiet, and everything at the end. Before its reply ends a call is noted as begun
(`proxy.notes`): what a proxy that died had not recorded, the next one claims. A disk that takes nothing keeps calls
waiting, here and at the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, TypeVar

import msgspec

from episodes.cast import WARMUPS, Cast, Group, Part
from episodes.errors import BadRun, CaptureLost, CorruptFile, NotStored, TautapError
from episodes.layout import Layout, check_name
from episodes.messages import JSON
from episodes.outline import Outline
from episodes.records import Call, Model
from episodes.recovery import STOPPED as LEFT
from episodes.store import Store, family
from episodes.tables import Totals, totals
from episodes.taubench import DIALECT, Links, Result, find_links
from episodes.threads import Place
from episodes.wire import DTYPE_CODES, DTYPES
from proxy import logs
from proxy.backend import Backend
from proxy.backfill import Backfill
from proxy.config import Config
from proxy.exchange import Exchange
from proxy.metrics import Metrics
from proxy.notes import Notes
from proxy.together import Together
from proxy.workers import Workers

logger = logging.getLogger("tautap.proxy")

PENDING_LIMIT = 4096
SETTLE_S = 30.0
AGAIN_S = 1.0
FREE_AGE_S = 0.25
# How long to ask for rows of a call that the worker answered with an error: it mostly has none.
REFUSED_S = 10.0
LATE_S = 0.05
# A client often sends its next call as soon as it has a reply: that one goes first, the work behind the last after it,
# at every so many seconds, for calls that end soon after each other to be put on disk with one sync.
BEHIND_S = 0.005
STOPPED = "the proxy had to stop before its activations were claimed"

T = TypeVar("T")
# How many positions of a call are stored, shared with an earlier call, or missing.
Rows = Counter[str]
# Who has a call's activations: the worker that served it, or any of them.
Holder = Backend | Workers


class Stopped(Exception):
    """There is no time left to record a call in."""


class Deadline:
    """When to be done with everything, on the event loop's clock; never, until it is set."""

    def __init__(self) -> None:
        self.at: float | None = None

    def set(self, after_s: float) -> None:
        self.at = asyncio.get_running_loop().time() + after_s

    @property
    def left_s(self) -> float:
        return math.inf if self.at is None else self.at - asyncio.get_running_loop().time()

    @property
    def over(self) -> bool:
        return self.left_s <= 0


class UnderWay:
    """Calls that are placed and not recorded, and the thread of each."""

    def __init__(self) -> None:
        self._calls: dict[str, asyncio.Future[None]] = {}
        self._of_thread: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, thread: str) -> bool:
        return thread in self._of_thread

    @property
    def calls(self) -> set[str]:
        return set(self._calls)

    def begin(self, call: str, thread: str) -> None:
        """A call is placed."""
        self._calls[call] = asyncio.get_running_loop().create_future()
        self._of_thread[thread] += 1

    def end(self, call: str, thread: str) -> None:
        """It is recorded."""
        self._calls.pop(call).set_result(None)
        self._of_thread[thread] -= 1
        if not self._of_thread[thread]:
            del self._of_thread[thread]

    async def over(self) -> None:
        """Wait until all that are under way now are recorded."""
        if self._calls:
            await asyncio.wait(self._calls.values())


class Recording:
    """One run being written. Store calls run one at a time on a thread of its own, never on the event loop."""

    def __init__(self, store: Store, workers: Workers, config: Config, metrics: Metrics, deadline: Deadline) -> None:
        self._config = config
        self._deadline = deadline
        self._metrics = metrics
        self._cast = Cast(DIALECT)
        self._store = store
        self._workers = workers
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="tautap-store")
        self._plain = Together(store.append, self._disk)
        self._notes = Notes(store)
        # Nothing that an earlier process had cached is relied upon: its rows may not have been stored.
        self._family = family(store.layout, store.run)
        self._start = f"{self._family}{uuid.uuid4().hex[:8]}."
        self._n_lost = 0
        self._backfill: Backfill | None = None
        if config.backfill:
            self._backfill = Backfill(store, workers, self._on_disk, self._start, config.min_free_bytes)
        # Those whose model is the run's, and who were asked what they hold for proxies before this one.
        self._greeted: dict[Backend, Model] = {}
        self._under_way = UnderWay()
        self._sealing = asyncio.Lock()
        self._touched: dict[str, float] = {}
        self._ending: set[str] = set()
        self._tasks: dict[str, asyncio.Task[str | None]] = {}
        # Calls that the disk did not take, and why: they are tried again.
        self._refused: dict[str, str] = {}
        self._claims: set[asyncio.Task[None]] = set()
        # Calls of a proxy that died, until a worker of the run's model is there, which may still have their rows.
        self._left: list[Call] = []
        self._n_left = 0  # calls that this proxy leaves to the next one
        # What is left to do about calls that are recorded; nothing waits for it before the end.
        self._chores: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()
        self._free_bytes = 0
        self._looked_at = 0.0

    @classmethod
    async def open(
        cls, layout: Layout, config: Config, workers: Workers, metrics: Metrics, deadline: Deadline
    ) -> Recording:
        store = await asyncio.to_thread(Store, layout, config.compression)
        try:
            recording = cls(store, workers, config, metrics, deadline)
            live = await asyncio.to_thread(store.history.unsealed)
            recording._cast.replay([*live, *store.left])
            await recording._look()
        except BaseException:  # else it would stay locked
            store.close()
            raise
        recording._touched = dict.fromkeys((call.thread for call in live), time.monotonic())
        recording._recover()
        return recording

    def _recover(self) -> None:
        """Take up what a proxy that died left, but for calls whose rows one of the workers may still hold."""
        for line in self._store.recovered:
            logger.warning("%s: %s", self._store.layout.root, line)
        left, self._store.left = self._store.left, []
        for call in left:
            logger.warning("call %s: %s", call.id, LEFT, extra=logs.about(call))
            self._under_way.begin(call.id, call.thread)
            if call.points and not self._store.draft(call.id).exists():
                self._left.append(call)
            else:
                self.record(call, self._workers if call.points else None, {})

    def _take_up(self) -> None:
        """Claim what a proxy that died had not claimed."""
        left, self._left = self._left, []
        for call in left:
            self.record(call, self._workers, {})

    @property
    def described(self) -> bool:
        """Whether `describe` has nothing to do."""
        known = self._workers.known
        return bool(known) and known.items() <= self._greeted.items()

    async def describe(self) -> None:
        """Note the workers' model as soon as it is known; WrongModel if the run was recorded with another."""
        await self._workers.capabilities()
        for backend, model in list(self._workers.known.items()):
            if self._greeted.get(backend) != model:
                await self._on_disk(self._store.describe, model)
                self._greeted[backend] = model
                self._take_up()
                await self._forget_left(backend)

    async def take_up(self) -> None:
        """See whether a worker is there that may have what a proxy that died left."""
        if self._left:
            try:
                await self.describe()
            except Exception as error:  # whoever sends a call is told
                logger.debug("%s: what was left still waits: %s", self._store.layout.root, error)

    async def _forget_left(self, backend: Backend) -> None:
        """Let a worker forget what it holds for proxies that died on this run: of calls that are recorded, and of
        calls so young that nothing was noted of them.
        """
        for held in await backend.waiting():
            ours = held.salt.startswith(self._family) and not held.salt.startswith(self._start)
            if ours and held.call not in self._tasks:
                await backend.forget(held.call)

    @property
    def salt(self) -> str:
        """What calls of this run may share cached blocks under: a lost row begins a new epoch, at all workers."""
        return f"{self._start}{self._n_lost}"

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
        return len(self._under_way) - self.n_queued

    @property
    def n_queued(self) -> int:
        """Calls whose reply is over and that are not on disk yet."""
        return len(self._tasks) + len(self._left)

    @property
    def n_live(self) -> int:
        """Episodes with a call that no shard holds."""
        # A list, for the disk's thread may add an episode meanwhile. One without an agent is a user's conversation that
        # is not yet known to belong to an agent's.
        episodes = list(self._store.history.episodes.values())
        return sum(any(call.role == "agent" for call in episode.calls) for episode in episodes)

    async def room(self) -> None:
        """Wait until one more call can be taken; NotStored, with the reason, if that is not soon."""
        deadline = time.monotonic() + self._config.room_wait_s
        while reason := await self._no_room():
            if time.monotonic() >= deadline:
                raise NotStored(reason)
            await asyncio.sleep(FREE_AGE_S)

    async def _no_room(self) -> str | None:
        if self.n_queued >= PENDING_LIMIT:
            return "too many calls wait to be written to disk"
        if self._refused:
            return f"{len(self._refused)} calls wait for the disk: {next(iter(self._refused.values()))}"
        least = self._config.min_free_bytes
        if least and time.monotonic() - self._looked_at > FREE_AGE_S:
            await self._look()
        if least and self._free_bytes < least:
            return f"the disk has {self._free_bytes:,} bytes free, and --min-free-bytes is {least:,}"
        return None

    async def _look(self) -> None:
        """See how much of the disk is free; who asks meanwhile is told what it was before."""
        self._looked_at = time.monotonic()
        self._free_bytes = (await asyncio.to_thread(shutil.disk_usage, self._store.layout.root)).free

    def part(self, messages: list[JSON] | None) -> Part:
        """Who speaks in a call with these messages."""
        return self._cast.dialect.part(messages or [])

    def place(
        self, call: str, messages: list[JSON] | None, part: Part, episode: str | None, retried: bool | None
    ) -> Place:
        """Where a call that begins now belongs; its episode is not sealed until the call is recorded."""
        place = self._cast.place(call, messages, part, episode, retried)
        self._under_way.begin(call, place.thread)
        return place

    def begin(self, call: Call) -> None:
        """Note on disk that a call has begun."""
        self._notes.begin(call)

    async def noted(self, call: str) -> None:
        """Wait until a call is known of on disk; NotStored, with the reason, if it cannot be."""
        if reason := await self._notes.written(call):
            raise NotStored(reason)

    async def recorded(self, call: str) -> None:
        """Wait until a call that was given to `record` just now is recorded; NotStored, with the reason, if it cannot
        be.
        """
        if reason := await asyncio.shield(self._tasks[call]):
            raise NotStored(reason)

    def replied(self, place: Place, replies: list[JSON]) -> None:
        """The call at `place` is over, for its conversation to go on; no replies if it failed."""
        self._cast.replied(place, replies)

    def ended(self, call: Exchange) -> None:
        """The client has what it gets of a call."""
        self._metrics.ended(call)

    def record(self, call: Call, holder: Holder | None, foreign: JSON) -> None:
        """Take a finished call, whatever became of it. holder: who may have activations of it."""
        self._tasks[call.id] = asyncio.create_task(self._record(call, holder, foreign))

    async def _record(self, call: Call, holder: Holder | None, foreign: JSON) -> str | None:
        """Record a call; returns why it is not, if it could not be."""
        over = time.perf_counter()
        try:
            if self._config.durability == "async":
                await asyncio.sleep(-asyncio.get_running_loop().time() % BEHIND_S)
            await self._notes.written(call.id)
            call, rows = await self._stored(call, holder, msgspec.json.encode(foreign) if foreign else None, over)
            awaited = rows.pop("missing", 0) if len(self._under_way) > 1 else 0
            if awaited:
                # Its texts are long, and not needed any more.
                self._later(self._count_awaited(msgspec.structs.replace(call, request="", reply=""), rows))
            self._metrics.recorded(call, rows, call.n_kept * len(call.points) * self._vector_bytes)
            logs.recorded(self._store.run.run, call, rows + Counter(awaited=awaited))
            if holder is not None:
                self._later(holder.forget(call.id))
            return None
        except Stopped:
            await self._leave(call)
            return STOPPED
        except Exception as error:
            logger.exception("call %s could not be recorded", call.id, extra=logs.about(call))
            self._n_lost += 1
            return f"the call could not be recorded: {error}"
        finally:
            self._notes.drop(call.id)
            self._refused.pop(call.id, None)
            del self._tasks[call.id]
            self._under_way.end(call.id, call.thread)
            self._touched[call.thread] = time.monotonic()

    async def _leave(self, call: Call) -> None:
        """Leave a call whose reply is over to the next proxy: the worker keeps its rows."""
        self._n_left += 1
        logger.warning("call %s: %s: left for the next proxy", call.id, STOPPED, extra=logs.about(call))
        try:
            await self._on_disk(self._store.begin, [call])
            await self._on_disk(self._store.sync_begun)
        except OSError as error:  # it is known of all the same, but for its reply
            logger.warning("call %s: its reply could not be noted: %s", call.id, error, extra=logs.about(call))

    def _later(self, chore: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def _count_awaited(self, call: Call, before: Rows) -> None:
        """Count the rows that a call lacked once the calls that were under way beside it are recorded."""
        await self._under_way.over()
        rows = await self._on_disk(self._rows, call)
        self._metrics.came(rows - before)

    async def _stored(self, call: Call, holder: Holder | None, foreign: bytes | None, over: float) -> tuple[Call, Rows]:
        """Put a call on disk, as `_commit` does. While the disk does not take it, the worker keeps its rows and it is
        tried again; once more when the proxy stops, then OSError. over: when its reply was, as `time.perf_counter`.
        """
        unclaimed, here = holder, over
        while True:
            last = self._closing.is_set()
            try:
                # What is kept free is for this: the calls that are left when the proxy stops.
                least = 0 if last else self._config.min_free_bytes
                if unclaimed is not None:
                    call = await self._claim(call, unclaimed, least, over)
                    unclaimed, here = None, time.perf_counter()
                recorded = await self._put(call, foreign)
                self._metrics.commit.observe(time.perf_counter() - here)
                return recorded
            except CorruptFile as error:
                call = self._lost(call, str(error))
            except OSError as error:
                if last:
                    raise
                logger.log(
                    logging.DEBUG if call.id in self._refused else logging.WARNING,
                    "call %s waits for the disk: %s", call.id, error, extra=logs.about(call),
                )  # fmt: skip
                self._refused[call.id] = str(error.strerror or error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), AGAIN_S)

    async def _claim(self, call: Call, holder: Holder, min_free_bytes: int, over: float) -> Call:
        """Fetch a call's activations, unless a proxy before this one has. over: as in `_stored`."""
        draft = self._store.draft(call.id)
        refused = call.status != 200 and call.error is None  # mostly before the engine was given anything
        try:
            if not await asyncio.to_thread(draft.exists):
                claim = holder.claim(call.id, draft, min_free_bytes, REFUSED_S if refused else None)
                await self._fetch(claim)
                self._metrics.claim.observe(time.perf_counter() - over)
        except CaptureLost as error:
            if not error.ran and not call.answered:
                return call
            return self._lost(msgspec.structs.replace(call, sequences=error.sequences), str(error))
        except TautapError as error:
            return self._lost(call, str(error))
        except BaseException:
            await asyncio.to_thread(draft.unlink, missing_ok=True)
            raise
        return call

    async def _fetch(self, claiming: Coroutine[Any, Any, None]) -> None:
        """The claim itself; Stopped if the proxy has no time left for it."""
        claim = asyncio.create_task(claiming)
        self._claims.add(claim)
        try:
            await asyncio.wait([claim])
        finally:
            self._claims.discard(claim)
            claim.cancel()
        if claim.cancelled():
            raise Stopped
        claim.result()

    def _lost(self, call: Call, reason: str) -> Call:
        """The call without its activations. What it computed may be cached, so a new epoch begins."""
        logger.warning("call %s: no activations: %s", call.id, reason, extra=logs.about(call))
        self._metrics.failed(reason)
        self._n_lost += 1
        return msgspec.structs.replace(call, lost=reason)

    async def _put(self, call: Call, foreign: bytes | None) -> tuple[Call, Rows]:
        """Commit a call as `_commit` does, one without activations together with others."""
        if call.points or foreign is not None:
            return await self._on_disk(self._commit, call, foreign)
        if error := await self._plain.add(call):
            raise error
        return call, Counter()

    def _commit(self, call: Call, foreign: bytes | None) -> tuple[Call, Rows]:
        """On the disk's thread: commit a call with what was claimed of it; CorruptFile if that is not sound. With it
        comes how many of its positions it stored, shares with an earlier call, or lacks.
        """
        draft = self._store.draft(call.id)
        if call.lost is not None:
            draft.unlink(missing_ok=True)
        call = self._store.commit(call, draft if draft.exists() else None, foreign)
        return call, self._rows(call)

    def _rows(self, call: Call) -> Rows:
        """On the disk's thread: who has the rows of a call that is committed."""
        rows: Rows = Counter()
        for span in chain.from_iterable(self._store.history.spans(call).values()):
            kind = "missing" if span.owner is None else "stored" if span.owner.call == call.id else "shared"
            rows[kind] += span.stop - span.start
        return rows

    async def seal(self, idle_s: float) -> None:
        """Note which threads make up which episode, and seal those where none has a call under way or had one for
        `idle_s`. One that fails is tried again later.
        """
        async with self._sealing:
            await self._seal(time.monotonic() - idle_s)

    async def _seal(self, since: float) -> None:
        groups = self._cast.groups()
        failed = await self._on_disk(self._pair, groups)
        for group in groups:
            if group.episode in failed:
                continue
            # Not by a worker that runs something else by now.
            if self._backfill is not None and self.described and not self._deadline.over and self._quiet(group, since):
                await self._fill(self._backfill, group.episode)
            if self._quiet(group, since):
                self._close(group)
            elif group.episode == WARMUPS:
                # Every task that begins adds one, and they look alike, so that each costs the next ones something.
                self._close_threads([thread for thread in group.threads if self._idle(thread, since)])
        for episode in sorted(self._ending & self._store.history.episodes.keys()):
            if self._deadline.over:
                break
            try:
                again = self._store.history.episodes[episode].sealed or episode == WARMUPS
                sealed = await self._on_disk(self._store.seal, episode)
                self._metrics.sealed.inc(sealed is not None and not again)
                self._ending.discard(episode)
            except Exception:
                logger.exception("episode %s could not be sealed", episode)

    def _pair(self, groups: list[Group]) -> set[str]:
        """On the disk's thread: note which threads make up each episode; returns those that could not be noted."""
        failed = set()
        for group in groups:
            try:
                self._store.pair(group, self._cast.dialect.name)
            except Exception:
                logger.exception("the threads of episode %s could not be noted", group.episode)
                failed.add(group.episode)
        return failed

    async def _fill(self, backfill: Backfill, episode: str) -> None:
        try:
            async with asyncio.timeout_at(self._deadline.at):
                await backfill.fill(self._store.history.episodes[episode].unsealed)
        except Exception:
            logger.exception("episode %s could not be filled", episode)

    def _quiet(self, group: Group, since: float) -> bool:
        """Whether nobody in the group says anything; who could stand in it as well may yet tell them apart."""
        return all(self._idle(thread, since) for thread in (*group.threads, *group.tied))

    def _idle(self, thread: str, since: float) -> bool:
        return thread not in self._under_way and self._touched.get(thread, since) <= since

    def _close(self, group: Group) -> None:
        """Let nothing continue an episode's threads any more: it is to be sealed."""
        self._close_threads(group.threads)
        self._workers.close([group.episode])
        self._ending.add(group.episode)

    def _close_threads(self, threads: list[str]) -> None:
        self._cast.close(threads)
        self._workers.close(threads)
        for thread in threads:
            self._touched.pop(thread, None)

    async def finish(self) -> Totals:
        """Wait a while for the calls that are under way; seal every episode that is quiet then, and roll the index. The
        run goes on. Returns what it holds, and how many calls it does not yet.
        """
        await self.take_up()
        if len(self._under_way) > len(self._left):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._under_way.over(), SETTLE_S)
        await self.seal(0)
        before = self._under_way.calls
        await self._on_disk(self._store.roll)
        n_waiting = len(before & self._under_way.calls)
        found = await asyncio.to_thread(totals, self._store.layout)
        return msgspec.structs.replace(found, n_waiting=n_waiting)

    async def link(
        self, results: list[Result], env: str | None, split: str | None, tasks: Mapping[int, str]
    ) -> tuple[Links, int]:
        """Join a benchmark's results to the run's episodes; returns what was found and how much of it is new.

        tasks: task id → instruction, as far as they are known
        """
        outline = await asyncio.to_thread(Outline, self._store.layout)
        found = await asyncio.to_thread(find_links, outline, results, env, split, tasks)
        n_new = await self._on_disk(self._store.link, found.links)
        await self._on_disk(self._store.roll)
        return found, n_new

    async def close(self) -> None:
        """Record what is under way, seal everything, roll the index. From the deadline on nothing is claimed any more,
        and what is not recorded or sealed is left: the next proxy, or `tautap seal`, takes it up.
        """
        self._closing.set()
        try:
            await self._finish_calls()
            await self.seal(0)
            n_left = len(self._left) + self._n_left
            if n_left or (self._deadline.over and self.n_live):
                logger.warning(
                    "%s: %d calls are not recorded and %d episodes not sealed: start a proxy on the run, or "
                    "`tautap seal` it, without rows that only a worker has",
                    self._store.layout.root, n_left, self.n_live,
                )  # fmt: skip
            try:
                await self._on_disk(self._store.roll)
            except Exception:
                logger.exception("the index of %s could not be written", self._store.layout.root)
            if self._chores:
                _, late = await asyncio.wait(self._chores, timeout=max(self._deadline.left_s, LATE_S))
                for chore in late:
                    chore.cancel()
        finally:
            await self._notes.close()
            await self._on_disk(self._store.close)
            self._disk.shutdown()

    async def _finish_calls(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=max(self._deadline.left_s, LATE_S))
            if self._deadline.over:
                for claim in self._claims:
                    claim.cancel()

    async def _on_disk(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, *args)


class Recorder:
    """The runs that a proxy writes, opened as they are named, and the task that seals what has gone quiet."""

    def __init__(self, config: Config, workers: Workers, metrics: Metrics) -> None:
        self.config = config
        self._workers = workers
        self._metrics = metrics
        self._runs: dict[str, Recording] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._sealing: asyncio.Task[None] | None = None
        self.deadline = Deadline()
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
        """The run of that name, the default one for None; BadName or BadRun if it cannot be, or is too many."""
        name = name or self.config.run
        if name not in self._runs:
            check_name("run", name)
            if name not in self._opening:
                n_open = len(self._runs) + len(self._opening)
                if n_open >= self.config.limits.runs:
                    raise BadRun(f"run {name}: {n_open} runs are open, which is all that may be (--max-runs): use one")
                self._opening[name] = asyncio.create_task(self._open(name))
            # Goes on without a client that leaves: a run that is half opened would be locked for good.
            await asyncio.shield(self._opening[name])
        recording = self._runs[name]
        if not recording.described:
            await recording.describe()
        return recording

    async def _open(self, name: str) -> None:
        try:
            layout = Layout(self.config.data / name)
            self._runs[name] = await Recording.open(layout, self.config, self._workers, self._metrics, self.deadline)
        finally:
            del self._opening[name]

    def opened(self, name: str) -> Recording | None:
        """The run of that name if it is being written."""
        return self._runs.get(name)

    async def _seal_when_quiet(self) -> None:
        idle_s = self.config.episode_idle_s
        while True:
            await asyncio.sleep(min(max(idle_s / 4, 0.1), 15.0))
            for recording in list(self._runs.values()):
                await recording.take_up()
            for name, recording in list(self._runs.items()):
                try:
                    await recording.seal(idle_s)
                except Exception:
                    logger.exception("run %s could not be sealed", name)

    def drain(self) -> None:
        """From now on there are `drain_s` for all that is under way."""
        self.deadline.set(self.config.drain_s)

    async def close(self) -> None:
        """Close all runs, side by side: neither one that must wait for its worker nor one that fails is the others'
        trouble. The first error is raised when all are closed.
        """
        if self._sealing is not None:
            self._sealing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sealing
        await asyncio.gather(*self._opening.values(), return_exceptions=True)
        if self.deadline.at is None:
            self.drain()
        closing = (recording.close() for recording in self._runs.values())
        closed = await asyncio.gather(*closing, return_exceptions=True)
        errors = [error for error in closed if error is not None]
        for error in errors[1:]:
            logger.error("another run could not be closed", exc_info=error)
        if errors:
            raise errors[0]
