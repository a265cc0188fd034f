"""`tautap top`: how a proxy that runs is doing, read from its `/metrics` again and again."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from dataclasses import dataclass

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from rich.live import Live
from rich.table import Column, Table

from episodes.errors import BadInput, BenchFailed
from episodes.terminal import console
from proxy.metrics import PREFIX

ASK_S = 10.0
MB = 1e6
# What a line says, the counter, its labels, its unit.
COUNTED: tuple[tuple[str, str, dict[str, str], float], ...] = (
    ("episodes sealed", "episodes_sealed_total", {}, 1),
    ("turns of agents", "turns_total", {}, 1),
    ("calls", "calls_total", {}, 1),
    ("prompt tokens", "tokens_total", {"kind": "prompt"}, 1),
    ("completion tokens", "tokens_total", {"kind": "completion"}, 1),
    ("rows stored", "rows_total", {"kind": "stored"}, 1),
    ("rows shared", "rows_total", {"kind": "shared"}, 1),
    ("rows missing", "rows_total", {"kind": "missing"}, 1),
    ("MB stored", "row_bytes_total", {}, MB),
)
TIMED = (
    ("first byte", "first_byte_seconds"),
    ("whole call", "call_seconds"),
    ("added by the proxy", "added_seconds"),
    ("claim", "claim_seconds"),
    ("commit", "commit_seconds"),
)
STANDING = (
    ("workers", "worker_up", 1),
    ("calls under way", "in_flight", 1),
    ("episodes not sealed", "episodes_live", 1),
    ("backlog: calls", "queue", 1),
    ("backlog: MB in the workers' spools", "spool_bytes", MB),
    ("GB of disk left", "disk_free_bytes", 1e9),
)


@dataclass(frozen=True)
class Sample:
    """What `/metrics` said, and when. series: name, labels, value."""

    at: float
    series: list[tuple[str, dict[str, str], float]]

    @classmethod
    def parse(cls, text: str, at: float) -> Sample:
        """BadInput for what is no proxy's."""
        try:
            families = list(text_string_to_metric_families(text))
        except ValueError:
            families = []
        series = [(s.name, s.labels, s.value) for family in families for s in family.samples]
        if not any(name.startswith(PREFIX) for name, _, _ in series):
            raise BadInput("no metrics of a proxy of tautap's")
        return cls(at, series)

    def total(self, name: str, **labels: str) -> float:
        """The sum of the series that have these labels, NaN if none of them is known."""
        values = [v for n, found, v in self.series if n == PREFIX + name and labels.items() <= found.items()]
        known = [value for value in values if not math.isnan(value)]
        return sum(known) if known or not values else math.nan

    def by(self, name: str, label: str) -> dict[str, float]:
        """The sum for each value of a label."""
        values = {found[label] for n, found, _ in self.series if n == PREFIX + name}
        return {value: self.total(name, **{label: value}) for value in sorted(values)}


async def top(url: str, key: str, every_s: float) -> None:
    """Show it until somebody stops us; once, after `every_s`, where the output is no terminal."""
    out, timeout = console(), aiohttp.ClientTimeout(total=ASK_S)
    live = Live(console=out, auto_refresh=False) if out.is_terminal else None
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}, timeout=timeout) as session:
        before = await _ask(session, url)
        with live or contextlib.nullcontext():
            while True:
                await asyncio.sleep(every_s)
                now = await _ask(session, url)
                if live is None:
                    out.print(view(url, before, now))
                    return
                live.update(view(url, before, now), refresh=True)
                before = now


async def _ask(session: aiohttp.ClientSession, url: str) -> Sample:
    """BadInput if something else answers, BenchFailed if nothing does."""
    try:
        async with session.get(f"{url}/metrics") as reply:
            text = await reply.text()
    except (aiohttp.ClientError, TimeoutError, UnicodeError) as error:
        raise BenchFailed(f"{url} does not answer: {error or type(error).__name__}") from None
    if reply.status != 200:
        raise BadInput(f"{url}/metrics: HTTP {reply.status}: {text[:200]}")
    try:
        return Sample.parse(text, time.monotonic())
    except BadInput as error:
        raise BadInput(f"{url}/metrics: {error}: is one running there?") from None


def view(url: str, before: Sample, now: Sample) -> Table:
    """What happened between the two samples, what stands now, and what there was since the proxy started."""
    table = Table("", Column("now", justify="right"), Column("in all", justify="right"), title=url, box=None)
    for said, name, labels, unit in COUNTED:
        total = now.total(name, **labels)
        new = total - before.total(name, **labels)
        per_s = "–" if new < 0 else f"{new / (now.at - before.at) / unit:,.1f}/s"  # less: it was started again
        table.add_row(said, per_s, f"{total / unit:,.{0 if unit == 1 else 1}f}")
    for said, name in TIMED:
        since, never = (name, now, before), (name, now, Sample(0.0, []))
        table.add_row(said, _mean(*since), _mean(*never))
    for said, name, unit in STANDING:
        value = now.total(name) / unit
        table.add_row(said, "–" if math.isnan(value) else f"{value:,.{0 if unit == 1 else 1}f}")
    for role, n_calls in now.by("calls_total", "role").items():
        table.add_row(f"calls of {role}", "", f"{n_calls:,.0f}")
    for status, n_requests in now.by("refusals_total", "status").items():
        table.add_row(f"refused by the proxy: {status}", "", f"{n_requests:,.0f}")
    for reason, n_calls in now.by("captures_failed_total", "reason").items():
        table.add_row(f"lost: {reason}", "", f"{n_calls:,.0f}")
    return table


def _mean(name: str, now: Sample, before: Sample) -> str:
    """Of a histogram of seconds, over what came between."""
    n = now.total(f"{name}_count") - before.total(f"{name}_count")
    seconds = now.total(f"{name}_sum") - before.total(f"{name}_sum")
    return f"{seconds / n * 1e3:,.1f} ms" if n > 0 and seconds >= 0 else "–"
