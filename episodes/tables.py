"""The index tables: `calls.parquet` and `episodes.parquet`, made from the journal's history.

**calls.parquet**, a row per call in the order of the journal, those too that fill holes (role `backfill`):

    call episode thread role turn attempt kind   where it belongs, as in `episodes.records.Call`
    endpoint model request reply                 what was asked and answered, JSON texts
    started first_byte ended                     first_byte: null if no reply began
    status finish_reason error                   HTTP status, 0 if none; `length` if its first choice was cut short;
                                                 why the reply failed
    lost foreign                                 why activations were lost, which a backfill may have had since; whether
                                                 the backend sent some of its own
    n_prompt n_completion                        tokens, of all choices; without `sequences` what the reply's `usage`
                                                 says, a prompt once for all its choices; null if it says nothing
    n_cached                                     of the prompt, out of the cache
    n_rows n_missing                             rows that it stores; positions that should have a row and have none,
                                                 null if they were all lost and how many there are is not known
    points tokens                                what was asked of the worker, no points if nothing
    spans sequences                              whose rows its positions have; the engine's token ids, per choice
    journal_at                                   where its line is

**episodes.parquet**, a row per episode, `warmups` too:

    episode status                               status: `live`, or `sealed` if its shard has all of its calls
    benchmark env split task_id trial            null until a results file is linked, but for benchmark; task_id is text
    strategy user_strategy                       the agent's and the user's
    reward error info                            the results file's; error: why the attempt crashed; info: JSON
    linked_by link_tied                          `transcript`, `instruction` or `order`, the weakest; other episodes
                                                 that the result fits as well
    agent_thread user_thread threads tied        tied: other threads that could stand in it as well
    n_calls n_turns n_prompt n_completion        of its calls, without backfills; n_turns: the agent's,
                                                 of all its threads if there are more than one;
                                                 tokens: as far as they are known
    n_rows n_shared n_missing                    rows it stores; positions whose row is another call's; or nobody's,
                                                 as far as that is known
    n_incomplete                                 its calls, without backfills, that lack rows: n_missing not 0, or null
    started ended                                null where nothing but backfills can be read any more
    shard n_bytes                                shard: its path in the run, null if it has none

The file metadata `journal_bytes` says how much of the journal a table stands for, `journal_crc32` what the last of it
is (`journal.end`). Who reads a run need not read that part of the journal, but for the lines of calls that are asked
for, which `journal_at` finds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from episodes import journal
from episodes.cast import n_episodes
from episodes.errors import CorruptFile
from episodes.history import Episode, History
from episodes.layout import Layout, whole
from episodes.records import BACKFILL, Call, Record
from episodes.rows import Owner, Span, n_missing

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
        pa.field("n_incomplete", pa.int32()),
        pa.field("started", pa.timestamp("us", "UTC")),
        pa.field("ended", pa.timestamp("us", "UTC")),
        pa.field("shard", pa.string()),
        pa.field("n_bytes", pa.int64()),
    ]
)


# The columns of CALLS that hold what a record has under their name.
AS_RECORDED = [name for name in CALLS.names if hasattr(Call, name)]
BATCH = 256
JOURNAL_BYTES, JOURNAL_CRC32 = b"journal_bytes", b"journal_crc32"


class Roll:
    """The index made from a run's history, or brought up to date: then only the calls are read again whose row may be
    another by now, those of episodes that were not sealed, lacked rows or have gone on.
    """

    def __init__(
        self, history: History, layout: Layout, records: Iterable[tuple[int, Record]], before: Index | None = None
    ) -> None:
        """history: who stored which row. before: the index so far. records: the journal's behind it, each with its
        place, passed through once, so a long run need not fit in memory
        """
        self._history = history
        self._layout = layout
        self._records = records if before is None else list(records)
        self._before = before
        self._settled = self._still_settled(before) if before else {}
        # In the order of their first calls.
        self._tallies: dict[str, Tally | None] = {}

    def _still_settled(self, before: Index) -> dict[str, dict[str, Any]]:
        """The episodes' rows that only what is said of them can change: no call came, nor was moved there."""
        episodes, home = before.episodes, self._history.home
        whole = pc.and_(pc.equal(episodes["status"], "sealed"), pc.equal(episodes["n_missing"], 0))
        rows = {row["episode"]: row for row in episodes.filter(whole).to_pylist()}
        gone_on = {home(record.thread, record.episode) for _, record in self._records if isinstance(record, Call)}
        gone_on |= {home(e.thread, e.episode) for e in before.calls.values() if e.episode not in rows}
        return {name: row for name, row in rows.items() if name not in gone_on}

    def calls(self, unchanged: bool = True) -> Iterator[pa.Table]:
        """Tables of CALLS, in the journal's order. unchanged: the rows too that are as they were"""
        for entries, group in self._before.groups() if self._before else ():
            stale = [i for i, entry in enumerate(entries) if not self._begin(entry)]
            again = {i: call for i in stale if (call := self._again(entries[i].journal_at))}
            fresh = self._rows([(entries[i].journal_at, call) for i, call in again.items()])
            if not unchanged:
                yield fresh
            elif stale:
                order = np.arange(len(entries))
                order[list(again)] = len(entries) + np.arange(len(again))
                yield pa.concat_tables([group(), fresh]).take(np.delete(order, [i for i in stale if i not in again]))
            else:
                yield group()
        calls = ((place, record) for place, record in self._records if isinstance(record, Call))
        while batch := list(islice(calls, BATCH)):
            yield self._rows(batch)

    def _begin(self, entry: Entry) -> bool:
        """Take in the episode of a call of the index; returns whether it is settled."""
        settled = entry.episode in self._settled
        name = entry.episode if settled else self._history.home(entry.thread, entry.episode)
        if name not in self._tallies:
            self._tallies[name] = None if settled else Tally(self._episode(name))
        return settled

    def _again(self, place: int) -> Call | None:
        """The call whose line is there, None if it cannot be read any more."""
        try:
            record = journal.record_at(self._layout.journal, place)
        except CorruptFile:
            return None
        return record if isinstance(record, Call) else None

    def _rows(self, calls: list[tuple[int, Call]]) -> pa.Table:
        rows = []
        for place, record in calls:
            call = self._history.at_home(record)
            row = _call_row(self._history, call) | {"journal_at": place}
            rows.append(row)
            assert call.episode not in self._settled
            tally = self._tallies.get(call.episode) or Tally(self._episode(call.episode))
            self._tallies[call.episode] = tally
            tally.add(call, row)
        return pa.Table.from_pylist(rows, CALLS)

    def _episode(self, name: str) -> Episode:
        return self._history.episodes.get(name) or Episode(name)

    def episodes(self) -> pa.Table:
        """The table of EPISODES, once the calls were all asked for."""
        rows = []
        for name, tally in self._tallies.items():
            if tally is None:
                rows.append(self._settled[name] | Tally(self._episode(name)).said())
            elif tally.calls:
                rows.append(tally.row(self._layout))
        return pa.Table.from_pylist(rows, EPISODES)


def write_index(roll: Roll, layout: Layout, journal_bytes: int) -> None:
    """Write both tables anew, for a journal that ends there."""
    about = {JOURNAL_BYTES: b"%d" % journal_bytes, JOURNAL_CRC32: b"%d" % journal.end(layout.journal, journal_bytes)}
    options = {"compression": "zstd", "write_page_checksum": True}
    with (
        whole(layout.calls) as calls,
        whole(layout.episodes) as episodes,
        pq.ParquetWriter(calls, CALLS.with_metadata(about), **options) as to_calls,
        pq.ParquetWriter(episodes, EPISODES.with_metadata(about), **options) as to_episodes,
    ):
        for table in roll.calls():
            to_calls.write_table(table.cast(to_calls.schema))
        to_episodes.write_table(roll.episodes().cast(to_episodes.schema))


def stands_for(layout: Layout) -> int:
    """How many bytes of the journal a run's index stands for; 0 if there is none that can be read."""
    try:
        return int((pq.read_schema(layout.calls).metadata or {})[JOURNAL_BYTES])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return 0


class Index:
    """The tables read back: where each call's line is in the journal, and whose rows its positions have.

    journal_bytes: how much of the journal they stand for
    """

    def __init__(self, calls: pq.ParquetFile, episodes: pa.Table, journal_bytes: int) -> None:
        self.episodes = episodes.replace_schema_metadata(None)
        self.journal_bytes = journal_bytes
        self._file = calls
        self._spans = lru_cache(maxsize=4)(partial(_read_spans, calls))  # not of a method, as in `Shard`
        self._groups = list(accumulate(calls.metadata.row_group(i).num_rows for i in range(calls.num_row_groups)))
        columns = calls.read(["call", "episode", "thread", "role", "journal_at"]).columns
        ids, homes, threads, roles, places = (column.to_pylist() for column in columns)
        self.calls = dict(zip(ids, map(Entry, range(len(ids)), homes, threads, roles, places), strict=True))

    @classmethod
    def of(cls, layout: Layout) -> Index | None:
        """A run's, None unless it is of this journal and in this release's form."""
        try:
            calls = pq.ParquetFile(layout.calls, page_checksum_verification=True)
            episodes = pq.read_table(layout.episodes, page_checksum_verification=True)
            about = calls.schema_arrow.metadata or {}
            n_bytes = int(about[JOURNAL_BYTES])
            end = b"%d" % journal.end(layout.journal, n_bytes)
            if n_bytes > layout.journal.stat().st_size:
                return None
            for schema, wanted in ((calls.schema_arrow, CALLS), (episodes.schema, EPISODES)):
                said = schema.metadata or {}
                found = said.get(JOURNAL_BYTES), said.get(JOURNAL_CRC32)
                if not schema.equals(wanted) or found != (b"%d" % n_bytes, end):
                    return None
            return cls(calls, episodes, n_bytes)
        except (OSError, KeyError, ValueError, pa.ArrowException):
            return None

    def table(self, columns: list[str]) -> pa.Table:
        """These of CALLS."""
        return self._file.read(columns).select(columns).replace_schema_metadata(None)

    def groups(self) -> Iterator[tuple[list[Entry], Callable[[], pa.Table]]]:
        """The calls of each row group, and what reads it."""
        entries = list(self.calls.values())
        for group, (start, stop) in enumerate(pairwise([0, *self._groups])):
            yield entries[start:stop], partial(self._group, group)

    def _group(self, group: int) -> pa.Table:
        return self._file.read_row_group(group).replace_schema_metadata(None)

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


def _read_spans(file: pq.ParquetFile, group: int) -> pa.ChunkedArray:
    return file.read_row_group(group, ["spans"])["spans"]


class Entry(NamedTuple):
    """A call in the index: the row of CALLS, and some of what stands there."""

    row: int
    episode: str
    thread: str
    role: str
    journal_at: int


class Totals(msgspec.Struct, frozen=True):
    """What all episodes of a run hold together, columns as in EPISODES. n_episodes: without the warmups. n_waiting: the
    calls beside these that are not over, or whose rows have not come.
    """

    n_episodes: int
    n_calls: int
    n_prompt: int
    n_completion: int
    n_rows: int
    n_shared: int
    n_missing: int
    n_incomplete: int
    n_bytes: int
    n_waiting: int = 0


def totals(layout: Layout) -> Totals:
    """What the run's index adds up to, as of when it was rolled."""
    names = [name for name in Totals.__struct_fields__ if name in EPISODES.names]
    table = pq.read_table(layout.episodes, columns=["episode", *names])
    sums = {name: pc.sum(table[name]).as_py() or 0 for name in names}
    return Totals(n_episodes(table["episode"].to_pylist()), **sums)


@dataclass
class Tally:
    """An episode's row while its calls go by. turns: of the agent's threads."""

    episode: Episode
    calls: dict[str, None] = field(default_factory=dict)
    threads: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    turns: dict[str, int] = field(default_factory=dict)
    started: float = math.inf
    ended: float = -math.inf

    def add(self, call: Call, row: dict[str, Any]) -> None:
        self.calls[call.id] = None
        if call.role == BACKFILL:  # it said nothing: only its rows count
            self.counts["n_rows"] += row["n_rows"]
            return
        self.threads[call.thread] = call.role
        if call.role == "agent":
            self.turns[call.thread] = max(self.turns.get(call.thread, 0), call.turn + 1)
        self.started, self.ended = min(self.started, call.started), max(self.ended, call.ended)
        self.counts.update({name: row[name] or 0 for name in ("n_prompt", "n_completion", "n_rows", "n_missing")})
        self.counts["n_calls"] += 1
        self.counts["n_incomplete"] += row["n_missing"] != 0
        self.counts["n_positions"] += call.n_positions if call.points else 0

    def row(self, layout: Layout) -> dict[str, Any]:
        """n_rows: rows it stores; n_shared: positions of its calls whose row is another call's."""
        name, counts, sealed = self.episode.id, self.counts, self.episode.sealed
        whole = sealed is not None and self.calls.keys() <= set(sealed.calls)
        return {
            "episode": name,
            "status": "sealed" if whole else "live",
            **self.said(),
            "agent_thread": self._thread("agent"),
            "user_thread": self._thread("user"),
            "threads": list(self.threads),
            "n_calls": self.counts["n_calls"],
            "n_turns": sum(self.turns.values()),
            "n_prompt": counts["n_prompt"],
            "n_completion": counts["n_completion"],
            "n_rows": counts["n_rows"],
            "n_shared": counts["n_positions"] - counts["n_rows"] - counts["n_missing"],
            "n_missing": counts["n_missing"],
            "n_incomplete": counts["n_incomplete"],
            "started": _us(self.started),
            "ended": _us(self.ended),
            "shard": str(layout.shard(name).relative_to(layout.root)) if sealed and sealed.n_rows else None,
            "n_bytes": sealed.n_bytes if sealed else 0,
        }

    def said(self) -> dict[str, Any]:
        """What the results file says, and the conversations where it says nothing."""
        pair, link = self.episode.pair, self.episode.link
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
    spans = [(choice, span) for choice, part in history.spans(call).items() for span in part]
    return {
        **{name: getattr(call, name) for name in AS_RECORDED},
        "call": call.id,
        "started": _us(call.started),
        "first_byte": _us(call.first_byte),
        "ended": _us(call.ended),
        "n_cached": sum(s.n_cached for s in call.sequences),
        "n_rows": call.n_kept,
        "n_missing": None if call.uncounted else n_missing(span for _, span in spans),
        "spans": [(choice, *(span.owner or (None, None)), span.start, span.stop) for choice, span in spans],
        "sequences": [{f.name: getattr(s, f.name) for f in SEQUENCE} for s in call.sequences],
    }


def _us(seconds: float | None) -> int | None:
    return None if seconds is None or not math.isfinite(seconds) else round(seconds * 1e6)
