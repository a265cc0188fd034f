"""The reading end: a run's episodes and calls as Arrow tables, and any call's activations, live and sealed alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from episodes import checkpoint, journal, records
from episodes.cast import n_episodes
from episodes.errors import BadInput, BadName, CorruptFile, MissingRows, UnknownPoint
from episodes.history import History
from episodes.layout import Layout, existing
from episodes.outline import Outline
from episodes.rows import Owner, Span, n_missing
from episodes.shards import Shard
from episodes.store import check_journal, read_run
from episodes.tables import CALLS, Entry, Index, Roll
from episodes.wire import DTYPE_CODES, DTYPES, CallFile, Sequence, bits


def open_run(path: str | Path) -> Run:
    """The run in a directory, as it is now; BadRun if there is none or it cannot be read."""
    return Run(existing(Path(path)))


class Run:
    """A run, read only. What is committed after it was opened is not seen.

    about: what `run.json` says, `episodes.records.Run`

    By its index and its checkpoint only what the journal gained since they were written is read, nothing once a proxy
    has stopped, and the lines of calls that are asked for.
    """

    def __init__(self, layout: Layout) -> None:
        check_journal(layout)
        self.layout = layout
        self.about: records.Run = read_run(layout)
        # An episode's calls are read one after the other, each in stretches. Not of a method, as in `Shard`.
        self._shard = lru_cache(maxsize=2)(lambda episode: Shard(layout.shard(episode)))
        self._live = lru_cache(maxsize=2)(CallFile)
        self._journal_bytes = journal.size(layout.journal)
        # As it was when the run was opened; None if it cannot be used with the journal of then.
        self.index = Index.of(layout)
        # What the index does not know: lines behind it, and the run as it is with them; None if there are none.
        self._tail: Callable[[], Iterator[tuple[int, records.Record]]] = lambda: iter(())
        self._now: History | None = None
        self._calls = self.index.calls if self.index else {}
        if self.index is None or self.index.journal_bytes < layout.journal.stat().st_size:
            self._read_tail()
        self._members: dict[str, list[str]] = {}
        for call, entry in self._calls.items():
            self._members.setdefault(entry.episode, []).append(call)

    def __repr__(self) -> str:
        return f"<Run {self.layout.root}: {n_episodes(self.names)} episodes, {len(self._calls)} calls>"

    def _read_tail(self) -> None:
        now = checkpoint.state(self.layout) if self.index else None
        if self.index and now and now.read_from:
            self._tail = partial(journal.sound, self.layout.journal, self.index.journal_bytes, now.read_to)
            self._now = now.history
            news = ((place, call) for place, call in self._tail() if isinstance(call, records.Call))
        else:
            self.index, self._calls = None, {}
            self._now = outline = Outline(self.layout)
            self._tail = outline.lines
            news = ((outline.places[call.id][-1], call) for call in outline.calls.values())
        entries = {call.id: Entry(0, call.episode, call.thread, call.role, place) for place, call in news}
        self._calls = {call: self._at_home(entry, self._now) for call, entry in (self._calls | entries).items()}

    @staticmethod
    def _at_home(entry: Entry, now: History) -> Entry:
        """The entry with the episode where its thread belongs by now."""
        home = now.home(entry.thread, entry.episode)
        return entry if home == entry.episode else entry._replace(episode=home)

    @cached_property
    def history(self) -> History:
        """All that the journal adds up to, read whole."""
        return History(record for _, record in self.outline.lines())

    @cached_property
    def outline(self) -> Outline:
        """The same without what was said, which takes a tenth of the memory or less."""
        # Never an outgrown one: that no proxy writes, `verify` has seen only after the run was opened.
        return self._now if isinstance(self._now, Outline) and not self._now.outgrown else Outline(self.layout)

    @property
    def calls(self) -> pa.Table:
        """One row per call, columns as in `episodes.tables`; read anew each time, with all that was said."""
        return self.columns(*CALLS.names)

    def columns(self, *names: str) -> pa.Table:
        """`calls` with these columns alone: the others are not kept in memory, nor read where the index has all."""
        if unknown := [name for name in names if name not in CALLS.names]:
            raise BadInput(f"calls have no column {', '.join(unknown)}: they have {', '.join(CALLS.names)}")
        columns = list(names)
        if self.index and self._now is None:
            return self.index.table(columns)
        return pa.concat_tables(
            [CALLS.empty_table().select(columns), *(table.select(columns) for table in self._roll().calls())]
        )

    @property
    def episodes(self) -> pa.Table:
        """One row per episode, columns as in `episodes.tables`."""
        if self.index and self._now is None:
            return self.index.episodes
        return self._recent_episodes

    @cached_property
    def _recent_episodes(self) -> pa.Table:
        roll = self._roll()
        for _ in roll.calls(unchanged=False):
            pass
        return roll.episodes()

    def _roll(self) -> Roll:
        assert self._now is not None
        return Roll(self._now, self.layout, self._tail(), self.index)

    @property
    def names(self) -> list[str]:
        """The episodes'."""
        return list(self._members)

    def call(self, call_id: str) -> Call:
        if call_id not in self._calls:
            raise BadName(f"run {self.about.run} has no call {call_id!r}")
        entry = self._calls[call_id]
        record = journal.record_at(self.layout.journal, entry.journal_at)
        assert isinstance(record, records.Call)
        return Call(self, msgspec.structs.replace(record, episode=entry.episode))

    def episode(self, name: str) -> list[Call]:
        """The episode's calls, in the order they were committed, without those that only fill holes."""
        if name not in self._members:
            raise BadName(f"run {self.about.run} has no episode {name!r}: {_some(self.names)}")
        return [self.call(call) for call in self._members[name] if self._calls[call].role != records.BACKFILL]

    def spans(self, call: records.Call) -> dict[int, list[Span]]:
        """choice → whose rows the call's positions have, in order; owner None where there is none."""
        if self._now is not None:
            return self._now.spans(call)
        assert self.index is not None
        return self.index.spans(call.id)

    def read(self, owner: Owner, start: int, stop: int, point: str, into: NDArray[Any]) -> None:
        """Copy the rows that a sequence stored itself; CorruptFile if they are not where they should be, MissingRows if
        that file is not there.

        into: [stop - start, hidden]
        """
        call = self._calls[owner.call]
        try:
            file = self._live(self.layout.live_file(call.thread, owner.call))
            bits(into)[:] = bits(file.rows[file.place(owner.choice, start, stop), file.points.index(point)])
        except FileNotFoundError:  # sealed, by now if not when the run was opened
            try:
                self._read_sealed(owner, start, stop, point, into)
            except FileNotFoundError:
                raise MissingRows(f"{self._home(owner.call)} is not there: move runs whole") from None

    def _read_sealed(self, owner: Owner, start: int, stop: int, point: str, into: NDArray[Any]) -> None:
        try:
            self._shard(self._calls[owner.call].episode).read(owner, start, stop, point, into)
        except (FileNotFoundError, CorruptFile):
            n_bytes = self.layout.journal.stat().st_size
            if n_bytes == self._journal_bytes:
                raise
            # Sealed since the run was opened, with another episode or once more.
            self._journal_bytes = n_bytes
            self._shard.cache_clear()
            now = Run(self.layout)._calls
            self._calls = {call: now.get(call, entry) for call, entry in self._calls.items()}
            self._shard(self._calls[owner.call].episode).read(owner, start, stop, point, into)

    def _home(self, call: str) -> Path:
        """The file that should have the rows that a call stored."""
        entry = self._calls[call]
        named = self.episodes.filter(pc.field("episode") == entry.episode)["shard"].to_pylist()
        return self.layout.shard(entry.episode) if any(named) else self.layout.live_file(entry.thread, call)


class Call:
    """A call of a run, and its activations. record: what the journal has of it, `episodes.records.Call`."""

    def __init__(self, run: Run, record: records.Call) -> None:
        self.run = run
        self.record = record

    def __repr__(self) -> str:
        record = self.record
        n_prompt, n_completion = ("?" if n is None else n for n in (record.n_prompt, record.n_completion))
        tokens = f"{n_prompt} + {n_completion} tokens"
        said = f"{record.role}, turn {record.turn}, HTTP {record.status}, {tokens}, {len(record.points)} points"
        return f"<Call {record.id} of {record.episode}: {said}>"

    @property
    def whole(self) -> bool:
        """Whether it was answered to the end, recorded at some point, and has a row for every position asked for."""
        record = self.record
        return bool(record.answered and record.points and record.sequences) and not self.missing

    def spans(self, choice: int = 0) -> list[Span]:
        """Whose rows the call's positions have, in order."""
        return self.run.spans(self.record).get(choice, [])

    @property
    def missing(self) -> int | None:
        """Positions that should have a row and have none; None if it lost them all and they are not known."""
        if self.record.uncounted:
            return None
        return n_missing(chain.from_iterable(self.run.spans(self.record).values()))

    def positions(self, choice: int = 0) -> NDArray[np.int32]:
        """[positions]: the ones that have a row: those of all tokens that were fed in (the last sampled one seldom is),
        or of those that were asked for.
        """
        return np.arange(*self._sequence(choice).wanted(self.record.tokens), dtype=np.int32)

    def token_ids(self, choice: int = 0) -> NDArray[np.int32]:
        """[positions]: the tokens at `positions`."""
        return self._sequence(choice).tokens[self.positions(choice)]

    def _sequence(self, choice: int) -> Sequence:
        """What the engine was given and sampled; MissingRows if nothing is known of it, BadInput if there is no such
        choice.
        """
        record, found = self.record, {s.choice: s for s in self.record.sequences}
        if not found:
            raise MissingRows(f"call {record.id}: no activations: {self._why_none()}")
        if choice not in found:
            raise BadInput(f"call {record.id} has no choice {choice}: it has {', '.join(map(str, found))}")
        return found[choice]

    def _why_none(self) -> str:
        record = self.record
        refused = f"the client got HTTP {record.status}" if record.status != 200 else "not asked for"
        return record.lost or record.error or refused

    def activations(self, point: str, choice: int = 0, *, positions: ArrayLike | None = None) -> NDArray[Any]:
        """[positions, hidden] in the engine's dtype, the spans stitched together: a row for each of `positions()`.

        positions: [n] of those, in any order, negative ones counted from their end; then [n, hidden], and no other rows
        are read

        UnknownPoint for a point that this call did not record; MissingRows if one of the positions has no row, or its
        row is in a file that is not there; BadInput for a choice or a position that it does not have.
        """
        if point not in self.record.points:
            recorded = ", ".join(self.record.points) or f"no points: {self._why_none()}"
            raise UnknownPoint(f"{point}: call {self.record.id} recorded {recorded}")
        # Each stretch of a file is read once, however the positions are ordered.
        wanted, order = np.unique(self._wanted(choice, positions), return_inverse=True)
        parts = list(self._parts(choice, wanted))
        holes = [f"{wanted[a]} to {wanted[b - 1] + 1}" for owner, a, b in parts if owner is None]
        if holes:
            raise MissingRows(f"call {self.record.id}, choice {choice}: no rows for positions {', '.join(holes)}")
        rows = self._rows(len(wanted))
        for owner, a, b in parts:
            assert owner is not None
            self.run.read(owner, int(wanted[a]), int(wanted[b - 1]) + 1, point, rows[a:b])
        if not np.array_equal(order, np.arange(len(rows))):
            rows = bits(rows)[order].view(rows.dtype)
        return rows

    def _wanted(self, choice: int, positions: ArrayLike | None) -> NDArray[Any]:
        """[n]: the token positions that are asked for; BadInput if they are none of `positions()`."""
        if positions is None:
            return self.positions(choice)
        first, stop = self._sequence(choice).wanted(self.record.tokens)
        given = np.asarray(positions)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise BadInput("positions: give a list of token positions; with a mask, `call.positions()[mask]`")
        # What no int64 holds becomes negative, and is none of them.
        wanted: NDArray[Any] = given.astype(np.int64) + np.where(given < 0, stop, 0)
        outside = given[(wanted < first) | (wanted >= stop)]
        if outside.size:
            has = f"{first} to {stop - 1}" if first < stop else "none"
            raise BadInput(f"call {self.record.id}, choice {choice} has no row at position {outside[0]}: it has {has}")
        return wanted

    def _parts(self, choice: int, wanted: NDArray[Any]) -> Iterator[tuple[Owner | None, int, int]]:
        """Stretches of `wanted`, from where to where in it, that are consecutive positions of one owner's."""
        spans = self.spans(choice)
        whose = np.searchsorted([span.stop for span in spans], wanted, side="right")
        edges = np.flatnonzero((np.diff(wanted) != 1) | (np.diff(whose) != 0)) + 1
        for a, b in pairwise([0, *edges.tolist(), len(wanted)]):
            if a < b:
                yield spans[whose[a]].owner, a, b

    def _rows(self, n_rows: int) -> NDArray[Any]:
        """[n_rows, hidden], not filled; in memory of Arrow's, which keeps what is given back to it: to have new memory
        from the kernel may take longer than to decode what is put there.
        """
        model = self.run.about.recorded
        if model is None:
            return np.empty((0, 0))
        dtype = DTYPES[DTYPE_CODES[model.dtype]]
        memory = pa.allocate_buffer(n_rows * model.hidden_size * dtype.itemsize)
        return np.frombuffer(memory, dtype).reshape(n_rows, model.hidden_size)


def _some(names: list[str]) -> str:
    return f"it has {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" if names else "it has none"
