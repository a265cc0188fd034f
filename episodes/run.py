"""The reading end: a run's episodes and calls as Arrow tables, and any call's activations, live and sealed alike."""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from episodes import journal, records
from episodes.errors import BadName, BadRun, MissingRows, UnknownPoint
from episodes.history import History
from episodes.layout import Layout
from episodes.rows import Owner, Span
from episodes.shards import Shard
from episodes.store import read_run
from episodes.tables import Index, index
from episodes.wire import DTYPE_CODES, DTYPES, CallFile, Sequence, bits


def open_run(path: str | Path) -> Run:
    """The run in a directory, as it is now; BadRun if there is none or it cannot be read."""
    return Run(Layout(Path(path)))


class Run:
    """A run, read only. What is committed after it was opened is not seen.

    Where the index stands for the whole journal, as it does once a proxy has stopped, only what is asked for is read.
    """

    def __init__(self, layout: Layout) -> None:
        if not layout.run.exists():
            raise BadRun(f"{layout.root} is not a run: it has no run.json")
        self.layout = layout
        self.about: records.Run = read_run(layout)
        self._index = Index.of(layout)
        self._shard = lru_cache(maxsize=2)(self._open_shard)  # an episode's calls are read one after the other
        if self._index is None:
            self._lines = list(journal.placed(layout.journal))

    @cached_property
    def _lines(self) -> list[tuple[int, records.Record | journal.Broken]]:
        return list(journal.placed(self.layout.journal))

    @property
    def broken(self) -> list[journal.Broken]:
        """Lines of the journal that cannot be read."""
        return [line for _, line in self._lines if isinstance(line, journal.Broken)]

    @property
    def lines(self) -> list[tuple[int, records.Record]]:
        """The journal's other lines, each with its place."""
        return [(at, line) for at, line in self._lines if not isinstance(line, journal.Broken)]

    @cached_property
    def history(self) -> History:
        """All that the journal adds up to, read whole."""
        return History(record for _, record in self.lines)

    @property
    def calls(self) -> pa.Table:
        """One row per call, columns as in `episodes.tables.CALLS`."""
        return self._index.table() if self._index else pa.concat_tables(self._tables[:-1])

    @property
    def episodes(self) -> pa.Table:
        """One row per episode, columns as in `episodes.tables.EPISODES`."""
        return self._index.episodes if self._index else self._tables[-1]

    @cached_property
    def _tables(self) -> list[pa.Table]:
        return list(index(self.history, self.layout, self.lines))

    @property
    def names(self) -> list[str]:
        """The episodes'."""
        return list(self._index.members if self._index else self.history.episodes)

    def call(self, call_id: str) -> Call:
        if call_id not in (self._index or self.history).calls:
            raise BadName(f"run {self.about.run} has no call {call_id!r}")
        return Call(self, self._record(call_id))

    def _record(self, call_id: str) -> records.Call:
        if self._index is None:
            return self.history.calls[call_id]
        entry = self._index.calls[call_id]
        record = journal.record_at(self.layout.journal, entry.journal_at)
        assert isinstance(record, records.Call)
        return msgspec.structs.replace(record, episode=entry.episode)

    def episode(self, name: str) -> list[Call]:
        """The episode's calls, in the order they were committed, without those that only fill holes."""
        if name not in (self._index.members if self._index else self.history.episodes):
            raise BadName(f"run {self.about.run} has no episode {name!r}: {_some(self.names)}")
        if self._index is None:
            return [Call(self, call) for call in self.history.episodes[name].calls if call.role != records.BACKFILL]
        calls, members = self._index.calls, self._index.members[name]
        return [self.call(call) for call in members if calls[call].role != records.BACKFILL]

    def spans(self, call: records.Call) -> dict[int, list[Span]]:
        """choice → whose rows the call's positions have, in order; owner None where there is none."""
        return self._index.spans(call.id) if self._index else self.history.spans(call)

    def read(self, owner: Owner, start: int, stop: int, point: str, into: NDArray[Any]) -> None:
        """Copy the rows that a sequence stored itself; CorruptFile if they are not there.

        into: [stop - start, hidden]
        """
        call = (self._index or self.history).calls[owner.call]
        try:
            file = CallFile(self.layout.live_file(call.thread, owner.call))
        except FileNotFoundError:  # sealed, by now if not when the run was opened
            self._shard(call.episode).read(owner, start, stop, point, into)
            return
        bits(into)[:] = bits(file.rows[file.place(owner.choice, start, stop), file.points.index(point)])

    def _open_shard(self, episode: str) -> Shard:
        return Shard(self.layout.shard(episode))


class Call:
    """A call of a run: its record's fields, and its activations."""

    def __init__(self, run: Run, record: records.Call) -> None:
        self.run = run
        self.record = record

    def spans(self, choice: int = 0) -> list[Span]:
        """Whose rows the call's positions have, in order."""
        return self.run.spans(self.record).get(choice, [])

    @property
    def missing(self) -> int:
        """Positions that should have a row and have none."""
        spans = self.run.spans(self.record).values()
        return sum(span.stop - span.start for own in spans for span in own if span.owner is None)

    def positions(self, choice: int = 0) -> NDArray[np.int32]:
        """[positions]: the ones that have a row: all but the last sampled token's, or those that were asked for."""
        return np.arange(*self._sequence(choice).wanted(self.record.tokens), dtype=np.int32)

    def token_ids(self, choice: int = 0) -> NDArray[np.int32]:
        """[positions]: the tokens at `positions`."""
        return self._sequence(choice).tokens[self.positions(choice)]

    def _sequence(self, choice: int) -> Sequence:
        return next(s for s in self.record.sequences if s.choice == choice)

    def activations(self, point: str, choice: int = 0) -> NDArray[Any]:
        """[positions, hidden] in the engine's dtype, the spans stitched together: a row for each of `positions`.

        UnknownPoint for a point that this call did not record; MissingRows if positions have no row.
        """
        if point not in self.record.points:
            lost = f": {self.record.lost}" if self.record.lost else ""
            raise UnknownPoint(f"{point}: call {self.record.id} recorded {self.record.points or 'no points'}{lost}")
        spans = self.spans(choice)
        holes = [f"{span.start} to {span.stop}" for span in spans if span.owner is None]
        if holes:
            raise MissingRows(f"call {self.record.id}, choice {choice}: no rows for positions {', '.join(holes)}")
        rows = self._rows(sum(span.stop - span.start for span in spans))
        at = 0
        for owner, start, stop in spans:
            assert owner is not None
            self.run.read(owner, start, stop, point, rows[at : at + stop - start])
            at += stop - start
        return rows

    def _rows(self, n_rows: int) -> NDArray[Any]:
        """[n_rows, hidden], not filled."""
        model = self.run.about.recorded
        return np.empty((n_rows, model.hidden_size), DTYPES[DTYPE_CODES[model.dtype]]) if model else np.empty((0, 0))


def _some(names: list[str]) -> str:
    return f"it has {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" if names else "it has none"
