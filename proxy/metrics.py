"""What a proxy counts and shows at `GET /metrics`, in Prometheus' text format. Counters count since it started."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from episodes.records import Call
from proxy.exchange import Exchange

PREFIX = "tautap_proxy_"
QUICK_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)
SLOW_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# What differs from one call to the next in why it was lost, and how many reasons are told apart.
PARTICULAR = re.compile(r"\b(?:c-)?[0-9a-f]{8,}\b|\d[\d,.]*")
N_REASONS, REASON_LIMIT, OTHER = 30, 100, "other"
# Of a worker's metrics what says how much waits there for the proxy.
WORKERS = {
    "spool_bytes": "Rows in the worker's spool, waiting to be claimed.",
    "spool_limit_bytes": "What the worker's --spool-bytes allows.",
}
WORKERS_LINE = re.compile(rb"^tautap_(\w+) (\S+)$", re.MULTILINE)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, of no use here


class Seen(NamedTuple):
    """A worker: whether it is given calls, how many are under way there, and its own metrics if it answers."""

    address: str
    up: bool
    n_calls: int
    metrics: bytes


class Metrics:
    """The counters of one proxy, and what it looks up when it is asked (`look_up`)."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._reasons: set[str] = set()
        calls = self._counter("calls", "Generation calls; status 0: broken off before one.", "role", "status")
        self._calls = lru_cache(1024)(lambda role, status: calls.labels(role, str(status)))
        self._turns = self._counter("turns", "Turns of agents.")
        tokens = self._counter("tokens", "Tokens of recorded calls.", "kind")
        self._prompt, self._completion = tokens.labels("prompt"), tokens.labels("completion")
        self._rows = self._counter("rows", "Positions of calls as recorded: stored, shared, missing.", "kind")
        self._row_bytes = self._counter("row_bytes", "Bytes of the vectors that were stored.")
        self._failed = self._counter("captures_failed", "Calls whose activations were lost.", "reason")
        self._refused = self._counter("refusals", "Requests that got an error of the proxy's own.", "status")
        self.sealed = self._counter("episodes_sealed", "Episodes sealed.")
        self._added = self._histogram(
            "added_seconds", "What the proxy itself added to a call, of a stream until it begins.", QUICK_S
        )
        self._first_byte = self._histogram("first_byte_seconds", "From a call to its reply's first byte.", SLOW_S)
        self._whole = self._histogram("call_seconds", "From a call to its reply's end.", SLOW_S)
        self.claim = self._histogram("claim_seconds", "From a reply's end until its activations were here.", SLOW_S)
        self.commit = self._histogram("commit_seconds", "From then until they were on disk for good.", QUICK_S)
        self._up = self._gauge("worker_up", "Whether the worker is given calls.")
        self._at_worker = self._gauge("worker_calls", "Calls under way at the worker.")
        self._workers = {name: self._gauge(name, said) for name, said in WORKERS.items()}

    def look_up(self, name: str, said: str, value: Callable[[], float]) -> None:
        """Show under this name what the function says at the time."""
        Gauge(PREFIX + name, said, registry=self._registry).set_function(value)

    def ended(self, call: Exchange) -> None:
        """A call is over, whatever became of it."""
        self._calls(call.role, call.status).inc()
        self._turns.inc(call.role == "agent" and call.place.kind == "turn")
        self._added.observe(call.watch.seconds)
        self._whole.observe(max(time.time() - call.started, 0))
        if call.first_byte is not None:
            self._first_byte.observe(max(call.first_byte - call.started, 0))

    def recorded(self, call: Call, rows: Mapping[str, int], row_bytes: int) -> None:
        """A call is on disk. rows: how many of its positions it stored, shares or lacks, as far as that is known: the
        rest is counted by `came`. row_bytes: of the stored.
        """
        self._prompt.inc(call.n_prompt or 0)
        self._completion.inc(call.n_completion or 0)
        self.came(rows)
        self._row_bytes.inc(row_bytes)

    def came(self, rows: Mapping[str, int]) -> None:
        """What became of so many positions of calls, as in `recorded`."""
        for kind, n_rows in rows.items():
            self._rows.labels(kind).inc(n_rows)

    def refused(self, status: int) -> None:
        """The proxy itself answered a request with an error."""
        self._refused.labels(str(status)).inc()

    def failed(self, reason: str) -> None:
        """The activations of a call were lost. Reasons that differ in numbers alone are one."""
        kind = PARTICULAR.sub("N", reason)[:REASON_LIMIT]
        if kind not in self._reasons and len(self._reasons) == N_REASONS:
            kind = OTHER
        else:
            self._reasons.add(kind)
        self._failed.labels(kind).inc()

    def exposition(self, workers: Iterable[Seen]) -> bytes:
        """All of it. Of a worker's own metrics some are shown, as NaN if it does not answer."""
        for worker in workers:
            self._up.labels(worker.address).set(worker.up)
            self._at_worker.labels(worker.address).set(worker.n_calls)
            found = dict(WORKERS_LINE.findall(worker.metrics))
            for name, gauge in self._workers.items():
                gauge.labels(worker.address).set(float(found.get(name.encode(), "nan")))
        return generate_latest(self._registry)

    def _gauge(self, name: str, said: str) -> Gauge:
        return Gauge(PREFIX + name, said, ["worker"], registry=self._registry)

    def _counter(self, name: str, said: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, said, labels, registry=self._registry)

    def _histogram(self, name: str, said: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, said, buckets=buckets, registry=self._registry)


METRICS = web.AppKey("metrics", Metrics)
# What looks at the workers.
SEEN = web.AppKey[Callable[[], Awaitable[list[Seen]]]]("seen")


async def answer(request: web.Request) -> web.Response:
    """`GET /metrics`."""
    body = request.app[METRICS].exposition(await request.app[SEEN]())
    return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
