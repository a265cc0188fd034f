"""The workers behind a proxy: which there are, which of them can be given calls, and that all of them are the same.

Their rows lie side by side in one run, where a call may refer to rows that another worker computed of the same tokens:
so all must run one model in one dtype with one spec. A worker that cannot be reached, or is not well, is passed over
until it is again, and then asked anew what it runs. One that is alone is given calls all the same, once it has been
heard of, and asked anew before them; what it runs then is held against the run's own model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from episodes.errors import CaptureLost, WorkerFailed, WorkerUnreachable, WrongModel
from episodes.records import Model
from proxy.address import session
from proxy.backend import Backend
from proxy.config import Config
from proxy.fleet import Fleet
from proxy.metrics import Seen
from proxy.upstream import Reply, Upstream

logger = logging.getLogger("tautap.proxy")

# How often to look after a worker that is down, and after one that is up.
DOWN_S, UP_S = 1.0, 5.0


class Workers:
    """`run` opens them; `lease` is a call's way to one of them."""

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self._fleet = Fleet(upstreams)
        self.model: Model | None = None  # None while no worker was heard of, and of a backend that is not ours
        self.known: dict[Backend, Model] = {}  # what those run that were heard of, and have not failed since
        self._wrong: dict[Upstream, str] = {}  # those that are never given a call, and why

    @classmethod
    @asynccontextmanager
    async def run(cls, config: Config) -> AsyncIterator[Workers]:
        """The workers of a configuration, looked after as long as this is open. WrongModel if they are not alike."""
        async with AsyncExitStack() as stack:
            upstreams = []
            for address in config.backends:
                connections = await stack.enter_async_context(session(address, config.timeouts.connect_s))
                backend = Backend(address, connections, config.backend_key, config.spool_dir, config.claim_timeout_s)
                upstreams.append(Upstream(backend, connections, config.timeouts))
            workers = cls(upstreams)
            if len(upstreams) > 1:
                await workers._meet()
            looking = asyncio.create_task(workers._look_after())
            stack.push_async_callback(_cancelled, looking)
            yield workers

    async def capabilities(self) -> Model | None:
        """What they run, as `Backend.capabilities`; asked anew if all have failed."""
        for worker in () if self.known else self._in_order:
            if not worker.backend.foreign and await self._hear(worker):
                break
        return self.model

    def lease(self, *names: str) -> Lease:
        """A call's way to a worker. names: as in `Fleet.enter`."""
        return Lease(self, names)

    @property
    def idlest(self) -> Backend:
        """The one to give work of the proxy's own."""
        worker = self._fleet.idlest(self._wrong)
        assert worker is not None, "one of them is the first, and it is like itself"
        return worker.backend

    def close(self, names: Iterable[str]) -> None:
        """These threads and episodes are over."""
        self._fleet.close(names)

    async def troubles(self) -> dict[str, str]:
        """What is the matter with each worker, by its address; nothing with one that is well."""
        workers = self._fleet.workers
        well = await asyncio.gather(*(worker.backend.ready() for worker in workers))
        return {
            worker.backend.address: self._wrong.get(worker) or ("" if ok else "the worker does not answer")
            for worker, ok in zip(workers, well, strict=True)
        }

    async def seen(self) -> list[Seen]:
        """What each is doing, and its own metrics."""
        workers = self._fleet.workers
        said = await asyncio.gather(*(worker.backend.metrics() for worker in workers))
        return [
            Seen(worker.backend.address, self._fleet.up(worker), self._fleet.n_calls(worker), metrics)
            for worker, metrics in zip(workers, said, strict=True)
        ]

    @property
    def _in_order(self) -> list[Upstream]:
        """Those that are up first."""
        return sorted(self._fleet.workers, key=lambda worker: not self._fleet.up(worker))

    # ---- what may be with any of them

    async def claim(self, call: str, into: Path, min_free_bytes: int = 0, timeout_s: float | None = None) -> None:
        """As `Backend.claim`, of a call that nobody knows the worker of: its proxy died."""
        holder = await self._holder(call)
        try:
            await holder.claim(call, into, min_free_bytes, timeout_s)
        except CaptureLost as error:
            # A worker that was started anew has forgotten what it ran, and the client may have its reply.
            error.ran = error.ran is not False
            raise

    async def forget(self, call: str) -> None:
        await asyncio.gather(*(worker.backend.forget(call) for worker in self._fleet.workers))

    async def _holder(self, call: str) -> Backend:
        """The worker that holds a call's activations; else one that does not answer, for it may be that one."""
        backends = [worker.backend for worker in self._in_order]
        if len(backends) == 1:
            return backends[0]
        held = await asyncio.gather(*(backend.holds(call) for backend in backends))
        return min(zip(backends, held, strict=True), key=lambda pair: (True, None, False).index(pair[1]))[0]

    # ---- looking after them

    async def _meet(self) -> None:
        """See who is there; WrongModel if two are not alike."""
        await asyncio.gather(*map(self._look, self._fleet.workers))
        for reason in self._wrong.values():
            raise WrongModel(reason)

    async def _look_after(self) -> None:
        n = 0
        while True:
            await asyncio.sleep(DOWN_S)
            n += 1
            all_of_them = n % round(UP_S / DOWN_S) == 0
            due = [w for w in self._fleet.workers if all_of_them or not self._fleet.up(w)]
            try:
                await asyncio.gather(*map(self._look, due))
            except Exception:  # whatever it is, the next look may find them well
                logger.exception("the workers could not be looked after")

    async def _look(self, worker: Upstream) -> None:
        """See whether a worker can be given calls."""
        try:
            if not await worker.backend.ready():
                self.pass_over(worker, "it does not answer")
            elif await self._hear(worker) and self._fleet.back(worker):
                logger.warning("worker %s is well again", worker.backend.address)
        except WorkerFailed as error:
            self.pass_over(worker, str(error))

    async def _hear(self, worker: Upstream) -> bool:
        """Ask a worker what it runs, unless that is known; whether it can be given calls. One that is alone may run
        anything: each run sees to it for itself.
        """
        backend = worker.backend
        if backend in self.known:
            return True
        model = await backend.capabilities()
        if model is None and not backend.foreign:  # gone again
            return False
        if len(self._fleet.workers) == 1:
            self.model = model
        else:
            self.model = self.model or model
            wrong = self._wrong.pop(worker, None)
            if reason := unlike(model, self.model):
                self._wrong[worker] = reason = f"--backend {backend.address}: {reason}"
                self._fleet.fail(worker)
                if reason != wrong:
                    logger.error(reason)
                return False
        if model is not None:
            self.known[backend] = model
        return True

    def pass_over(self, worker: Upstream, reason: str) -> None:
        """Give a worker no more calls while there are others."""
        self.doubt(worker)
        if self._fleet.fail(worker):
            logger.warning("worker %s is not well: %s", worker.backend.address, reason)

    def doubt(self, worker: Upstream) -> None:
        """Ask a worker anew what it runs: it may have been started again with something else."""
        self.known.pop(worker.backend, None)


def unlike(model: Model | None, others: Model | None) -> str:
    """Why a worker cannot record beside others; nothing if it can."""
    if model is None or others is None:
        return "no worker of tautap's: several backends must all be"
    differs = [f"{name} {has}, not {had}" for name, has, had in model.differences(others, "points", "tokens")]
    return f"it has {'; '.join(differs)} as another has: all must be alike" if differs else ""


class Lease:
    """A call's way to a worker. backend: where it went, None until it has."""

    def __init__(self, workers: Workers, names: Sequence[str]) -> None:
        self._workers = workers
        self._names = names
        self._model = workers.model
        self.backend: Backend | None = None

    @asynccontextmanager
    async def ask(
        self, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes
    ) -> AsyncIterator[Reply]:
        """As `Upstream.ask`; a worker that cannot be reached leaves the call to the next."""
        fleet, tried = self._workers._fleet, [*self._workers._wrong]
        unreachable = WorkerUnreachable("the worker cannot be reached: there is none")
        while (worker := fleet.enter(self._names, tried)) is not None:
            self.backend = worker.backend
            try:
                await self._check(worker)
                async with worker.ask(method, path, query, headers, body) as reply:
                    yield reply
                return
            except WorkerUnreachable as error:
                self._workers.pass_over(worker, str(error))
                unreachable = error
                tried.append(worker)
            except WorkerFailed:
                self._workers.doubt(worker)
                raise
            finally:
                fleet.leave(worker)
        raise unreachable

    async def _check(self, worker: Upstream) -> None:
        """WorkerUnreachable for a worker that nobody has heard of and that cannot be asked, or, of a call in a
        conversation, that runs something else than there was when it began: its capture is not for that.
        """
        workers, backend = self._workers, worker.backend
        try:
            heard = backend.foreign or await workers._hear(worker)
        except WorkerFailed as error:
            raise WorkerUnreachable(str(error)) from None
        if not heard and (reason := workers._wrong.get(worker) or ("" if self._model else backend.trouble)):
            raise WorkerUnreachable(f"the worker cannot be reached: {reason}")
        model = workers.known.get(backend)
        if not heard or not self._names or model == self._model:
            return
        if self._model is None:
            raise WorkerUnreachable("the worker has come up since the call began: send it again")
        if reason := unlike(model, self._model):
            raise WorkerUnreachable(f"the worker was started anew since the call began: {reason}")


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
