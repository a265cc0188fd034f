"""The recorder: which rows of a step belong to which call, and the way from the step to the spool.

The step thread plans, stages and hands over; it waits only when `buffer_bytes` of rows are on their way. A writer
thread does everything slow. An error ends the captures it touches, with its reason, and never the engine.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from episodes.wire import bounds
from worker.edit import Rows
from worker.metrics import Metrics
from worker.orders import XARG, Config, Order
from worker.spool import PART, SpoolFile, refuse, spooled, used_bytes
from worker.tap import Stream

logger = logging.getLogger("tautap.recorder")

CHILD = re.compile(r"(\d+)_")
NOT_RUN = "the model did not come by it"

# (request, first position, rows) in the order of the batch's rows.
Batch = list[tuple[str, int, int]]


class Source(Protocol):
    """Where the values at the points of a model come from."""

    def watch(self, point: str) -> None:
        """UnknownPoint if there is no such point."""

    def run(self, step: Step | None, forward: Callable[[], Any]) -> Any:
        """What `forward`, one pass of the model, returns; the step receives the values at its points."""


class Captured(NamedTuple):
    """A sequence being captured."""

    call: str
    choice: int
    points: tuple[str, ...]
    prompt: list[int]
    first: int  # the positions to record: from here
    stop: int  # to here, exclusive


class Span(NamedTuple):
    """Rows of one sequence in one step: positions start, start + 1, … are slab rows `at`, `at + 1`, …"""

    request: str
    start: int
    n_rows: int
    at: int


class Step(NamedTuple):
    """What one forward pass will leave: its spans, the batch stretches they lie in, and the staging slab.

    n_rows: the batch's. slab: [rows, points, hidden], the engine's dtype and device. stretches: (batch start, batch
    stop, slab start). errors: point → why the slab has no value of it, at first all.
    """

    n_rows: int
    spans: list[Span]
    stretches: list[tuple[int, int, int]]
    points: tuple[str, ...]
    slab: Tensor
    errors: dict[str, str]

    def receive(self, i: int, read: Callable[[], Stream]) -> None:
        """The tap's hand-over: copy the captured rows of point i into the slab."""
        try:
            stream, column = read(), self.slab.select(1, i)
            if stream.n_rows < self.n_rows:
                raise ValueError(f"it has {stream.n_rows} rows of a batch of {self.n_rows}")
            for start, stop, at in self.stretches:
                stream.write(column.narrow(0, at, stop - start), start, stop)
            self.errors.pop(self.points[i], None)
        except Exception as error:  # whatever a model's module hands out must not end the engine
            self.errors[self.points[i]] = str(error)

    def receive_all(self, values: Tensor) -> None:
        """The same of all points at once. values: [batch rows, points, hidden]"""
        for start, stop, at in self.stretches:
            self.slab.narrow(0, at, stop - start).copy_(values.narrow(0, start, stop - start))
        self.errors.clear()


class Lane:
    """From the device to host memory. On the CPU the slab is host memory."""

    def leave(self, slab: Tensor, token_ids: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Start the copy; the result, called on the writer thread, waits for it and returns both on the host.

        Nobody else writes into either tensor.
        """
        return lambda: (slab, token_ids)


class CudaLane(Lane):
    """An asynchronous copy to pinned memory on a stream of its own."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def leave(self, slab: Tensor, token_ids: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host = torch.empty(slab.shape, dtype=slab.dtype, pin_memory=True).copy_(slab, non_blocking=True)
            ids = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
            ids.copy_(token_ids, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # else the writer thread spins for as long as it waits
            done.record(self._stream)
        for tensor in (slab, token_ids):
            tensor.record_stream(self._stream)

        def wait() -> tuple[Tensor, Tensor]:
            done.synchronize()
            return host, ids

        return wait


@dataclass
class Writer:
    """A thread that takes jobs in order; `put` waits while more than `bound` bytes are queued."""

    bound: int
    metrics: Metrics = field(default_factory=Metrics)
    _jobs: deque[tuple[int, Callable[[], object]]] = field(default_factory=deque)
    _queued: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        threading.Thread(target=self._run, name="tautap-writer", daemon=True).start()

    def put(self, n_bytes: int, job: Callable[[], object]) -> None:
        with self._changed:
            if not self._fits(n_bytes):
                self._wait(n_bytes)
            self._queue(n_bytes)
            self._jobs.append((n_bytes, job))
            self._changed.notify_all()

    def _fits(self, n_bytes: int) -> bool:
        """One job larger than the bound goes through alone rather than never; nothing waits that holds nothing."""
        return not n_bytes or not self._queued or self._queued + n_bytes <= self.bound

    def _wait(self, n_bytes: int) -> None:
        self.metrics.add("buffer_waits_total")
        begun = time.monotonic()
        self._changed.wait_for(lambda: self._fits(n_bytes))
        self.metrics.add("buffer_wait_seconds_total", time.monotonic() - begun)

    def _queue(self, n_bytes: int) -> None:
        self._queued += n_bytes
        self.metrics.set("buffer_bytes", self._queued)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs))
                n_bytes, job = self._jobs.popleft()
            try:
                job()
            except Exception:
                logger.exception("a capture job failed")
            del job
            with self._changed:
                self._queue(-n_bytes)
                self._changed.notify_all()


class Recorder:
    """One engine's recorder. Everything but the writer's jobs runs on the step thread."""

    def __init__(
        self, config: Config, source: Source, dtype: torch.dtype, dtype_code: str, hidden: int, lane: Lane
    ) -> None:
        """dtype: the engine's; dtype_code: safetensors' name of it. lane: how rows leave the device."""
        self.config = config
        self._source = source
        self._dtype, self._dtype_code, self._hidden = dtype, dtype_code, hidden
        self._lane = lane
        self._spool = Path(config.spool_dir)
        self._metrics = Metrics(self._spool)
        self._writer = Writer(config.buffer_bytes, self._metrics)
        self._captured: dict[str, Captured] = {}
        self._files: dict[str, SpoolFile] = {}  # the writer's own
        for point in config.points:
            source.watch(point)

    # ---- the step thread

    def admit(
        self, request: str, extra_args: dict[str, Any] | None, prompt: list[int], refused: str | None = None
    ) -> None:
        """A request has been scheduled for the first time; capture it if its `extra_args` hold an Order.

        refused: why it cannot be captured, if so
        """
        if not extra_args or request in self._captured:
            return
        try:
            order = msgspec.convert(extra_args[XARG], Order)
        except (KeyError, msgspec.ValidationError):  # a client's own xarg of that name is no order
            return
        child = CHILD.match(request)
        choice = order.first_choice + (int(child[1]) if child else 0)
        captured = Captured(order.call, choice, tuple(order.points), prompt, *bounds(order.tokens, len(prompt)))
        with contextlib.suppress(OSError):  # which the writer meets, too
            # Now, for the writer may be late: who sees nothing of a sequence whose client left takes it for not run.
            spooled(self._spool, order.call, choice, PART).touch()
        try:
            for point in captured.points:
                self._source.watch(point)
        except Exception as error:
            refused = str(error)
        if refused is not None:
            self._writer.put(0, partial(self._refuse, f"{order.call}.{choice}", refused))
            return
        self._captured[request] = captured
        self._writer.put(0, lambda: self._open(request, captured))

    def retire(self, requests: Iterable[str]) -> None:
        """These requests are over, whichever way."""
        for request in requests:
            if self._captured.pop(request, None) is not None:
                self._writer.put(0, partial(self._finish, request))

    def rows(self, batch: Batch) -> list[Rows]:
        """The captured requests' rows of a batch, all of them, whether they are to be recorded or not."""
        found, at = [], 0
        for request, start, n_rows in batch:
            captured = self._captured.get(request)
            if captured is not None:
                found.append(Rows(request, at, start, n_rows, len(captured.prompt)))
            at += n_rows
        return found

    def fail(self, request: str, reason: str) -> None:
        """End the capture of a request; the engine goes on."""
        self._writer.put(0, partial(self._fail, request, reason))

    def slab(self, n_rows: int, n_points: int, device: torch.device) -> Tensor:
        """Where a step's rows are staged: [n_rows, n_points, hidden], the engine's dtype."""
        return torch.empty((n_rows, n_points, self._hidden), dtype=self._dtype, device=device)

    def plan(self, batch: Batch, device: torch.device) -> Step | None:
        """The step that will record this batch, or None if nothing in it is captured."""
        spans: list[Span] = []
        stretches: list[tuple[int, int, int]] = []
        kinds: list[tuple[str, ...]] = []
        row = at = 0
        for request, start, n_rows in batch:
            captured = self._captured.get(request)
            first, stop = (max(start, captured.first), min(start + n_rows, captured.stop)) if captured else (0, 0)
            if captured and first < stop:
                spans.append(Span(request, first, stop - first, at))
                if captured.points not in kinds:
                    kinds.append(captured.points)
                begin, end = row + first - start, row + stop - start
                if stretches and stretches[-1][1] == begin:
                    stretches[-1] = (stretches[-1][0], end, stretches[-1][2])
                else:
                    stretches.append((begin, end, at))
                at += stop - first
            row += n_rows
        if not spans:
            return None
        points = dict.fromkeys(point for kind in kinds for point in kind)
        try:
            slab = self.slab(at, len(points), device)
        except RuntimeError as error:  # no memory left on the device
            self._drop(spans, f"no room to stage {at} rows: {error}")
            return None
        return Step(row, spans, stretches, tuple(points), slab, dict.fromkeys(points, NOT_RUN))

    def hand_over(self, step: Step, input_ids: Tensor) -> None:
        """The forward pass is done: send the slab on its way.

        input_ids: the step's token ids, at least as many as the batch has rows; what lies behind them is ignored
        """
        try:
            token_ids = torch.cat([input_ids[start:stop] for start, stop, _ in step.stretches])
            arrive = self._lane.leave(step.slab, token_ids)
        except RuntimeError as error:  # no pinned memory left
            self._drop(step.spans, f"no room to take {len(step.slab)} rows off the device: {error}")
            return
        # Nothing of the slab: the device has its memory again as soon as the copy is made.
        job = partial(self._write, step.spans, step.points, step.errors, arrive)
        self._writer.put(step.slab.nbytes, job)

    def _drop(self, spans: list[Span], reason: str) -> None:
        for span in spans:
            self.fail(span.request, reason)

    # ---- the writer thread

    def _open(self, request: str, captured: Captured) -> None:
        self._metrics.add("captures_total")
        name = f"{captured.call}.{captured.choice}"
        used = used_bytes(self._spool)
        if used >= self.config.spool_bytes:
            reason = f"the spool is full: {used} of {self.config.spool_bytes} bytes wait to be claimed"
            return self._refuse(name, reason)
        try:
            self._files[request] = SpoolFile(
                self._spool,
                captured.call,
                captured.choice,
                list(captured.points),
                self._dtype_code,
                self._hidden,
                captured.prompt,
            )
        except Exception as error:
            self._refuse(name, f"the spool cannot be written: {error}")

    def _refuse(self, name: str, reason: str) -> None:
        self._metrics.add("captures_failed_total")
        try:
            refuse(self._spool, name, reason)
        except OSError:
            logger.exception("capture of %s failed: %s", name, reason)

    def _write(
        self,
        spans: list[Span],
        points: tuple[str, ...],
        errors: dict[str, str],
        arrive: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        slab, ids = arrive()
        # numpy has no bf16: rows travel as bytes, [rows, points, bytes].
        rows: NDArray[Any] = slab.view(torch.uint8).numpy()
        token_ids: NDArray[np.int32] = ids.to(torch.int32).numpy()
        n_rows = n_bytes = 0
        for span in spans:
            file = self._files.get(span.request)
            if file is None:  # failed earlier
                continue
            if point := next((point for point in file.points if point in errors), None):
                self._fail(span.request, f"{point}: {errors[point]}")
                continue
            own = slice(span.at, span.at + span.n_rows)
            mine = rows[own]
            if tuple(file.points) != points:
                mine = mine[:, [points.index(point) for point in file.points]]
            try:
                n_new = file.append(span.start, token_ids[own], mine)
                n_rows, n_bytes = n_rows + n_new, n_bytes + n_new * mine.nbytes // span.n_rows
            except Exception as error:
                self._fail(span.request, f"the spool cannot be written: {error}")
        self._metrics.add("rows_total", n_rows)
        self._metrics.add("row_bytes_total", n_bytes)

    def _finish(self, request: str) -> None:
        if request not in self._files:
            return
        try:
            self._files[request].finish()
            del self._files[request]
        except Exception as error:
            self._fail(request, f"the spool cannot be written: {error}")

    def _fail(self, request: str, reason: str) -> None:
        file = self._files.pop(request, None)
        if file is not None:
            logger.error("capture of %s failed: %s", request, reason)
            file.drop()
            self._refuse(file.name, reason)
