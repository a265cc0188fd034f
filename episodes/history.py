"""What a run's journal adds up to: its calls, its episodes, and who stored which row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from episodes.records import Call, Kept, Record, Seal
from episodes.rows import Owner, Rows, Span
from episodes.wire import Sequence

Ranges = dict[int, list[tuple[int, int]]]


@dataclass
class Episode:
    """An episode's calls, in the order they were committed, and its last seal."""

    id: str
    calls: list[Call] = field(default_factory=list)
    sealed: Seal | None = None

    @property
    def unsealed(self) -> list[Call]:
        """The calls that no shard holds yet."""
        held = set(self.sealed.calls) if self.sealed else set()
        return [call for call in self.calls if call.id not in held]

    @property
    def status(self) -> Literal["live", "sealed"]:
        return "live" if self.unsealed else "sealed"


class History:
    """Replays records into the state they stand for. Records come in the order of the journal."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.calls: dict[str, Call] = {}
        self.episodes: dict[str, Episode] = {}
        self._rows: dict[tuple[str, ...], Rows] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        if isinstance(record, Seal):
            self._episode(record.episode).sealed = record
            return
        kept: Ranges = {}
        for part in record.kept:
            kept.setdefault(part.choice, []).append((part.start, part.stop))
        with self.keeping(record, kept):
            self.commit(record)

    def commit(self, call: Call) -> None:
        """Take in a call whose rows count as stored."""
        self.calls[call.id] = call
        self._episode(call.episode).calls.append(call)

    @contextmanager
    def keeping(self, call: Call, computed: Ranges) -> Iterator[list[Kept]]:
        """Which of the rows that a call computed it is the first to store; they count as stored once the block ends
        well.

        computed: choice → ranges of positions
        """
        kept: list[Kept] = []
        stored: list[Sequence] = []
        rows = self._rows.setdefault(call.spec, Rows())
        try:
            for sequence in call.sequences:
                # Surplus rows, past what the client was given, belong to no token of the sequence.
                mine = [(a, min(b, sequence.n_positions)) for a, b in computed.get(sequence.choice, [])]
                ranges = rows.store(Owner(call.id, sequence.choice), sequence.tokens, mine)
                stored.append(sequence)
                kept += [Kept(sequence.choice, start, stop) for start, stop in ranges]
            yield kept
        except BaseException:
            for sequence in stored:
                rows.forget(Owner(call.id, sequence.choice), sequence.tokens)
            raise

    def spans(self, call: Call) -> dict[int, list[Span]]:
        """choice → whose rows the call's positions have, in order; owner None where there is none."""
        rows = self._rows.get(call.spec, Rows())
        return {s.choice: rows.spans(s.tokens) for s in call.sequences} if call.points else {}

    def n_missing(self, call: Call) -> int:
        """Positions of the call that have no row."""
        return sum(s.stop - s.start for spans in self.spans(call).values() for s in spans if s.owner is None)

    def _episode(self, name: str) -> Episode:
        return self.episodes.setdefault(name, Episode(name))
