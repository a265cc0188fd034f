"""The index tables: `calls.parquet` and `episodes.parquet`, made from the journal's history.

The file metadata `journal_bytes` says how much of the journal a table stands for. Who reads a run whose tables stand
for all of it need not read the journal, but for the lines of calls that are asked for, which `journal_at` finds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from episodes.cast import WARMUPS
from episodes.history import History
from episodes.layout import Layout, whole
from episodes.records import BACKFILL, Call, Link, Pair, Record, Seal
from episodes.rows import Owner, Span

SPAN = pa.struct(
    [
        pa.field("choice", pa.int16()),
        pa.field("call", pa.string()),
        pa.field("source_choice", pa.int16()),
        pa.field("start", pa.int32()),
        pa.field("stop", pa.int32()),
    ]
)
SEQUENCE = pa.struct(
    [
        pa.field("choice", pa.int16()),
        pa.field("prompt_token_ids", pa.list_(pa.int32())),
        pa.field("completion_token_ids", pa.list_(pa.int32())),
        pa.field("finish_reason", pa.string()),
        pa.field("n_cached", pa.int32()),
    ]
)
CALLS = pa.schema(
    [
        pa.field("call", pa.string()),
        pa.field("episode", pa.string()),
        pa.field("thread", pa.string()),
        pa.field("role", pa.string()),
        pa.field("turn", pa.int32()),
        pa.field("attempt", pa.int32()),
        pa.field("kind", pa.string()),
        pa.field("endpoint", pa.string()),
        pa.field("model", pa.string()),
        pa.field("started", pa.timestamp("us", "UTC")),
        pa.field("first_byte", pa.timestamp("us", "UTC")),
        pa.field("ended", pa.timestamp("us", "UTC")),
        pa.field("status", pa.int16()),
        pa.field("finish_reason", pa.string()),
        pa.field("error", pa.string()),
        pa.field("lost", pa.string()),
        pa.field("foreign", pa.bool_()),
        pa.field("n_prompt", pa.int32()),
        pa.field("n_cached", pa.int32()),
        pa.field("n_completion", pa.int32()),
        pa.field("n_rows", pa.int32()),
        pa.field("n_missing", pa.int32()),
        pa.field("points", pa.list_(pa.string())),
        pa.field("tokens", pa.string()),
        pa.field("spans", pa.list_(SPAN)),
        pa.field("sequences", pa.list_(SEQUENCE)),
        pa.field("request", pa.string()),
        pa.field("reply", pa.string()),
        pa.field("journal_at", pa.int64()),
    ]
)
EPISODES = pa.schema(
    [
        pa.field("episode", pa.string()),
        pa.field("status", pa.string()),
        pa.field("benchmark", pa.string()),
        pa.field("env", pa.string()),
        pa.field("split", pa.string()),
        pa.field("task_id", pa.string()),
        pa.field("trial", pa.int32()),
        pa.field("strategy", pa.string()),
        pa.field("user_strategy", pa.string()),
        pa.field("reward", pa.float64()),
        pa.field("error", pa.string()),
        pa.field("info", pa.string()),
        pa.field("linked_by", pa.string()),
        pa.field("link_tied", pa.list_(pa.string())),
        pa.field("agent_thread", pa.string()),
        pa.field("user_thread", pa.string()),
        pa.field("threads", pa.list_(pa.string())),
        pa.field("tied", pa.list_(pa.string())),
        pa.field("n_calls", pa.int32()),
        pa.field("n_turns", pa.int32()),
        pa.field("n_prompt", pa.int64()),
        pa.field("n_completion", pa.int64()),
        pa.field("n_rows", pa.int64()),
        pa.field("n_shared", pa.int64()),
        pa.field("n_missing", pa.int64()),
        pa.field("started", pa.timestamp("us", "UTC")),
        pa.field("ended", pa.timestamp("us", "UTC")),
        pa.field("shard", pa.string()),
        pa.field("n_bytes", pa.int64()),
    ]
)


BATCH = 256
JOURNAL_BYTES = "journal_bytes"


def index(history: History, layout: Layout, records: Iterable[tuple[int, Record]]) -> Iterator[pa.Table]:
    """The index in pieces: tables of CALLS in the journal's order, then one table of EPISODES.

    history: who stored which row. records: the journal's, each with its place, passed through once, so a long run need
    not fit in memory
    """
    episodes: dict[str, Tally] = {}
    rows: list[dict[str, Any]] = []
    for place, record in records:
        if not isinstance(record, Call):
            episodes.setdefault(record.episode, Tally(record.episode)).note(record)
            continue
        call = history.at_home(record)
        row = _call_row(history, call) | {"journal_at": place}
        episodes.setdefault(call.episode, Tally(call.episode)).add(call, row)
        rows.append(row)
        if len(rows) == BATCH:
            yield pa.Table.from_pylist(rows, CALLS)
            rows = []
    yield pa.Table.from_pylist(rows, CALLS)
    yield pa.Table.from_pylist([tally.row(layout) for tally in episodes.values() if tally.calls], EPISODES)


def write_index(history: History, layout: Layout, records: Iterable[tuple[int, Record]]) -> None:
    """Write both tables anew; arguments as `index`."""
    about = {JOURNAL_BYTES: str(layout.journal.stat().st_size)}
    options = {"compression": "zstd", "write_page_checksum": True}
    with (
        whole(layout.calls) as calls,
        whole(layout.episodes) as episodes,
        pq.ParquetWriter(calls, CALLS.with_metadata(about), **options) as to_calls,
        pq.ParquetWriter(episodes, EPISODES.with_metadata(about), **options) as to_episodes,
    ):
        for table in index(history, layout, records):
            writer = to_calls if table.schema.equals(CALLS) else to_episodes
            writer.write_table(table.cast(writer.schema))


class Index:
    """The tables read back: where each call's line is in the journal, and whose rows its positions have."""

    def __init__(self, calls: pq.ParquetFile, episodes: pa.Table) -> None:
        self.episodes = episodes
        self._calls = calls
        self._spans = lru_cache(maxsize=4)(self._read)
        self._groups = list(accumulate(calls.metadata.row_group(i).num_rows for i in range(calls.num_row_groups)))
        columns = calls.read(["call", "episode", "thread", "role", "journal_at"]).columns
        ids, homes, threads, roles, places = (column.to_pylist() for column in columns)
        self.calls = dict(zip(ids, map(Entry, range(len(ids)), homes, threads, roles, places), strict=True))
        self.members: dict[str, list[str]] = {}
        for call, home in zip(ids, homes, strict=True):
            self.members.setdefault(home, []).append(call)

    @classmethod
    def of(cls, layout: Layout) -> Index | None:
        """A run's, None unless it stands for the whole journal and is in this release's form."""
        try:
            calls = pq.ParquetFile(layout.calls, page_checksum_verification=True)
            episodes = pq.read_table(layout.episodes, page_checksum_verification=True)
            covered = str(layout.journal.stat().st_size).encode()
        except (OSError, pa.ArrowException):
            return None
        found = ((calls.schema_arrow, CALLS), (episodes.schema, EPISODES))
        for schema, wanted in found:
            if not schema.equals(wanted) or (schema.metadata or {}).get(JOURNAL_BYTES.encode()) != covered:
                return None
        return cls(calls, episodes)

    def table(self) -> pa.Table:
        """All of CALLS."""
        return self._calls.read()

    def spans(self, call: str) -> dict[int, list[Span]]:
        """As `History.spans`."""
        row = self.calls[call].row
        group = bisect_right(self._groups, row)
        column = self._spans(group)
        found: dict[int, list[Span]] = {}
        for span in column[row - self._groups[group] + len(column)].as_py():
            owner = Owner(span["call"], span["source_choice"]) if span["call"] is not None else None
            found.setdefault(span["choice"], []).append(Span(owner, span["start"], span["stop"]))
        return found

    def _read(self, group: int) -> pa.ChunkedArray:
        return self._calls.read_row_group(group, ["spans"])["spans"]


class Entry(NamedTuple):
    """A call in the index: the row of CALLS, and some of what stands there."""

    row: int
    episode: str
    thread: str
    role: str
    journal_at: int


class Totals(msgspec.Struct, frozen=True):
    """What all episodes of a run hold together, columns as in EPISODES. n_episodes: without the warmups."""

    n_episodes: int
    n_calls: int
    n_prompt: int
    n_completion: int
    n_rows: int
    n_shared: int
    n_missing: int
    n_bytes: int


def totals(layout: Layout) -> Totals:
    """What the run's index adds up to, as of when it was rolled."""
    names = [name for name in Totals.__struct_fields__ if name != "n_episodes"]
    table = pq.read_table(layout.episodes, columns=["episode", *names])
    sums = {name: pc.sum(table[name]).as_py() or 0 for name in names}
    return Totals(sum(name != WARMUPS for name in table["episode"].to_pylist()), **sums)


@dataclass
class Tally:
    """An episode's row while its calls go by."""

    episode: str
    sealed: Seal | None = None
    pair: Pair | None = None
    link: Link | None = None
    calls: dict[str, None] = field(default_factory=dict)
    threads: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    n_turns: int = 0
    started: float = math.inf
    ended: float = 0.0

    def note(self, record: Seal | Pair | Link) -> None:
        """Keep the last record of each kind."""
        match record:
            case Seal():
                self.sealed = record
            case Pair():
                self.pair = record
            case Link():
                self.link = record

    def add(self, call: Call, row: dict[str, Any]) -> None:
        self.calls[call.id] = None
        if call.role == BACKFILL:  # it said nothing: only its rows count
            self.counts["n_rows"] += row["n_rows"]
            return
        self.threads[call.thread] = call.role
        self.n_turns = max(self.n_turns, call.turn + 1)
        self.started, self.ended = min(self.started, call.started), max(self.ended, call.ended)
        self.counts.update({name: row[name] for name in ("n_prompt", "n_completion", "n_rows", "n_missing")})
        self.counts["n_calls"] += 1
        self.counts["n_positions"] += call.n_positions if call.points else 0

    def row(self, layout: Layout) -> dict[str, Any]:
        """n_rows: rows it stores; n_shared: positions of its calls whose row is another call's."""
        counts, sealed = self.counts, self.sealed
        whole = sealed is not None and self.calls.keys() <= set(sealed.calls)
        return {
            "episode": self.episode,
            "status": "sealed" if whole else "live",
            **self._said(),
            "agent_thread": self._thread("agent"),
            "user_thread": self._thread("user"),
            "threads": list(self.threads),
            "n_calls": self.counts["n_calls"],
            "n_turns": self.n_turns,
            "n_prompt": counts["n_prompt"],
            "n_completion": counts["n_completion"],
            "n_rows": counts["n_rows"],
            "n_shared": counts["n_positions"] - counts["n_rows"] - counts["n_missing"],
            "n_missing": counts["n_missing"],
            "started": _us(self.started),
            "ended": _us(self.ended),
            "shard": str(layout.shard(self.episode).relative_to(layout.root)) if sealed and sealed.n_rows else None,
            "n_bytes": sealed.n_bytes if sealed else 0,
        }

    def _said(self) -> dict[str, Any]:
        """What the results file says, and the conversations where it says nothing."""
        pair, link = self.pair, self.link
        said: dict[str, Any] = {"tied": pair.tied if pair else []}
        for name in ("benchmark", "strategy", "user_strategy"):
            said[name] = getattr(link, name, None) or getattr(pair, name, None)
        if link is not None:
            said |= {
                name: getattr(link, name) for name in ("env", "split", "task_id", "trial", "reward", "error", "info")
            }
            said |= {"linked_by": link.by, "link_tied": link.tied}
        return said

    def _thread(self, role: str) -> str | None:
        return next((thread for thread, played in self.threads.items() if played == role), None)


def _call_row(history: History, call: Call) -> dict[str, Any]:
    spans = history.spans(call)
    return {
        "call": call.id,
        "episode": call.episode,
        "thread": call.thread,
        "role": call.role,
        "turn": call.turn,
        "attempt": call.attempt,
        "kind": call.kind,
        "endpoint": call.endpoint,
        "model": call.model,
        "started": _us(call.started),
        "first_byte": _us(call.first_byte),
        "ended": _us(call.ended),
        "status": call.status,
        "finish_reason": call.finish_reason,
        "error": call.error,
        "lost": call.lost,
        "foreign": call.foreign,
        "n_prompt": call.n_prompt,
        "n_cached": sum(s.n_cached for s in call.sequences),
        "n_completion": call.n_completion,
        "n_rows": call.n_kept,
        "n_missing": sum(s.stop - s.start for part in spans.values() for s in part if s.owner is None),
        "points": call.points,
        "tokens": call.tokens,
        "spans": [
            {
                "choice": choice,
                "call": span.owner.call if span.owner else None,
                "source_choice": span.owner.choice if span.owner else None,
                "start": span.start,
                "stop": span.stop,
            }
            for choice, part in spans.items()
            for span in part
        ],
        "sequences": [
            {
                "choice": s.choice,
                "prompt_token_ids": s.prompt_token_ids,
                "completion_token_ids": s.completion_token_ids,
                "finish_reason": s.finish_reason,
                "n_cached": s.n_cached,
            }
            for s in call.sequences
        ],
        "request": call.request,
        "reply": call.reply,
    }


def _us(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1e6)
