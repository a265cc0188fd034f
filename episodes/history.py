"""What a run's journal adds up to: its calls, its episodes, and who stored which row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from episodes.records import Call, Kept, Record, Seal
from episodes.rows import Owner, Rows, Span

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
        self.keep(record, kept)
        self.commit(record)

    def keep(self, call: Call, computed: Ranges) -> list[Kept]:
        """Which of the rows that a call computed it is the first to store; they count as stored from now on.

        computed: choice → ranges of positions
        """
        rows = self._rows.setdefault(call.spec, Rows())
        kept = []
        for sequence in call.sequences:
            # Surplus rows, past what the client was given, belong to no token of the sequence.
            mine = [(a, min(b, sequence.n_positions)) for a, b in computed.get(sequence.choice, [])]
            stored = rows.store(Owner(call.id, sequence.choice), sequence.tokens, mine)
            kept += [Kept(sequence.choice, start, stop) for start, stop in stored]
        return kept

    def commit(self, call: Call) -> None:
        """Take in a call whose rows `keep` has counted already."""
        self.calls[call.id] = call
        self._episode(call.episode).calls.append(call)

    def spans(self, call: Call) -> dict[int, list[Span]]:
        """choice → whose rows the call's positions have, in order; owner None where there is none."""
        rows = self._rows.get(call.spec, Rows())
        return {s.choice: rows.spans(s.tokens) for s in call.sequences} if call.points else {}

    def n_missing(self, call: Call) -> int:
        """Positions of the call that have no row."""
        return sum(s.stop - s.start for spans in self.spans(call).values() for s in spans if s.owner is None)

    def _episode(self, name: str) -> Episode:
        return self.episodes.setdefault(name, Episode(name))
