"""The reading end: a run's episodes and calls as Arrow tables, and any call's activations, live and sealed alike."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from episodes import journal, records
from episodes.errors import BadName, BadRun, CorruptFile, MissingRows, UnknownPoint
from episodes.history import Episode, History
from episodes.layout import Layout
from episodes.rows import Owner, Span
from episodes.shards import vector_column
from episodes.store import read_run
from episodes.tables import index
from episodes.wire import DTYPE_CODES, DTYPES, CallFile, Sequence


def open_run(path: str | Path) -> Run:
    """The run in a directory, as it is now; BadRun if there is none or it cannot be read."""
    return Run(Layout(Path(path)))


class Run:
    """A run, read only. What is committed after it was opened is not seen."""

    def __init__(self, layout: Layout) -> None:
        if not layout.run.exists():
            raise BadRun(f"{layout.root} is not a run: it has no run.json")
        self.layout = layout
        self.about: records.Run = read_run(layout)
        lines = list(journal.read(layout.journal))
        self.broken = [line for line in lines if isinstance(line, journal.Broken)]
        self._records = [line for line in lines if not isinstance(line, journal.Broken)]
        self.history = History(self._records)

    @property
    def calls(self) -> pa.Table:
        """One row per call, columns as in `episodes.tables.CALLS`."""
        return pa.concat_tables(self._index[:-1])

    @property
    def episodes(self) -> pa.Table:
        """One row per episode, columns as in `episodes.tables.EPISODES`."""
        return self._index[-1]

    @cached_property
    def _index(self) -> list[pa.Table]:
        return list(index(self.history, self.layout, self._records))

    def call(self, call_id: str) -> Call:
        if call_id not in self.history.calls:
            raise BadName(f"run {self.about.run} has no call {call_id!r}")
        return Call(self, self.history.calls[call_id])

    def episode(self, name: str) -> list[Call]:
        """The episode's calls, in the order they were committed, without those that only fill holes."""
        if name not in self.history.episodes:
            raise BadName(f"run {self.about.run} has no episode {name!r}: {_some(list(self.history.episodes))}")
        return [Call(self, call) for call in self.history.episodes[name].calls if call.role != records.BACKFILL]

    def stored(self, owner: Owner, start: int, stop: int, point: str) -> NDArray[Any]:
        """[stop - start, hidden] of the rows that a sequence stored itself; CorruptFile if they are not there."""
        call = self.history.calls[owner.call]
        episode: Episode = self.history.episodes[call.episode]
        sealed = episode.sealed is not None and call.id in episode.sealed.calls
        if sealed:
            path = self.layout.shard(episode.id)
            positions, vectors = _shard_rows(path, owner, point)
        else:
            path = self.layout.live_file(call.thread, call.id)
            file = CallFile(path)
            own = file.choice == owner.choice
            positions, vectors = file.position[own], file.rows[own, file.points.index(point)]
        at = np.searchsorted(positions, np.arange(start, stop))
        if len(positions) == 0 or not np.array_equal(positions.take(at, mode="clip"), np.arange(start, stop)):
            raise CorruptFile(f"{path} lacks rows {start} to {stop} of {owner.call}, choice {owner.choice}")
        return vectors[at]


class Call:
    """A call of a run: its record's fields, and its activations."""

    def __init__(self, run: Run, record: records.Call) -> None:
        self.run = run
        self.record = record

    def spans(self, choice: int = 0) -> list[Span]:
        """Whose rows the call's positions have, in order."""
        return self.run.history.spans(self.record).get(choice, [])

    @property
    def missing(self) -> int:
        """Positions that should have a row and have none."""
        spans = self.run.history.spans(self.record).values()
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
        parts = [self.run.stored(s.owner, s.start, s.stop, point) for s in spans if s.owner]
        if not parts:
            model = self.run.about.recorded
            return np.empty((0, model.hidden_size), DTYPES[DTYPE_CODES[model.dtype]]) if model else np.empty((0, 0))
        return np.concatenate(parts)


def _shard_rows(path: Path, owner: Owner, point: str) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """Positions and vectors [n, hidden] of a sequence's rows in a shard; only its row groups are read."""
    columns = ["position", point]
    filters = [("call", "=", owner.call), ("choice", "=", owner.choice)]
    table = pq.read_table(path, columns=columns, filters=filters, page_checksum_verification=True)
    return table["position"].to_numpy(), vector_column(table, point)


def _some(names: list[str]) -> str:
    return f"it has {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" if names else "it has none"
