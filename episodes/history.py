"""What a run's journal adds up to: its calls, its episodes, and who stored which row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from episodes.records import BACKFILL, Call, Kept, Link, Pair, Record, Seal
from episodes.rows import Owner, Rows, Span
from episodes.wire import Sequence

Ranges = dict[int, list[tuple[int, int]]]


@dataclass
class Episode:
    """An episode's calls, in the order they were committed, its last seal, and what its threads and a results file say
    of it.
    """

    id: str
    calls: list[Call] = field(default_factory=list)
    sealed: Seal | None = None
    pair: Pair | None = None
    link: Link | None = None

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

    def __init__(self, records: Iterable[Record] = (), forget_sealed: bool = False) -> None:
        """forget_sealed: let go of the calls that a seal names, as a writer does that runs for weeks; who stored which
        row stays known.
        """
        self.calls: dict[str, Call] = {}
        self.episodes: dict[str, Episode] = {}
        # Of all calls, the forgotten ones too: calls, tokens as far as they are known, rows, and vectors, as many of a
        # row as it has points.
        self.counts: Counter[str] = Counter()
        self._homes: dict[str, str] = {}
        self._forget_sealed = forget_sealed
        # By what rows are shared under: a call's spec, and the adapter of a sequence.
        self.rows: dict[tuple[str, ...], Rows] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        match record:
            case Seal():
                self._seal(record)
            case Pair():
                self._pair(record)
            case Link():
                self._episode(record.episode).link = record
            case Call():
                kept: Ranges = {}
                for part in record.kept:
                    kept.setdefault(part.choice, []).append((part.start, part.stop))
                with self.keeping(record, kept):
                    self.commit(record)

    def commit(self, call: Call) -> None:
        """Take in a call whose rows count as stored."""
        self.calls[call.id] = call = self.at_home(call)
        self._episode(call.episode).calls.append(call)
        counts = self.counts
        counts["rows"] += call.n_kept
        counts["vectors"] += call.n_kept * len(call.points)
        if call.role != BACKFILL:  # it said nothing: only its rows count
            counts["calls"] += 1
            counts["tokens"] += (call.n_prompt or 0) + (call.n_completion or 0)

    def whole(self, call: Call) -> Call:
        """One of `calls` with all that was said, of which an `Outline` keeps nothing."""
        return call

    def at_home(self, call: Call) -> Call:
        """The call in the episode where its thread belongs by now."""
        home = self.home(call.thread, call.episode)
        return call if home == call.episode else msgspec.structs.replace(call, episode=home)

    def home(self, thread: str, first: str | None = None) -> str:
        """The episode where a thread belongs by now; first: where it began, if that is not one of its own."""
        return self._homes.get(thread, first or thread)

    def _seal(self, seal: Seal) -> None:
        episode = self._episode(seal.episode)
        episode.sealed = seal
        if self._forget_sealed:
            episode.calls = episode.unsealed
            for call in seal.calls:
                self.calls.pop(call, None)

    def _pair(self, pair: Pair) -> None:
        """Move the threads' calls that are in no shard yet."""
        episode = self._episode(pair.episode)
        episode.pair = pair
        for thread in pair.threads:
            old = self.episodes.get(self.home(thread))
            self._homes[thread] = episode.id
            if old is None or old is episode:
                continue
            moved = [call for call in old.unsealed if call.thread == thread]
            old.calls = [call for call in old.calls if call.thread != thread or call not in moved]
            for call in moved:
                self.calls[call.id] = self.at_home(call)
                episode.calls.append(self.calls[call.id])
            if not old.calls and old.sealed is None:
                del self.episodes[old.id]

    @property
    def held(self) -> set[str]:
        """The calls that a shard holds."""
        return {call for episode in self.episodes.values() if episode.sealed for call in episode.sealed.calls}

    def unsealed(self) -> list[Call]:
        """The calls that no shard holds yet."""
        return [call for episode in self.episodes.values() for call in episode.unsealed]

    @contextmanager
    def keeping(self, call: Call, computed: Ranges) -> Iterator[list[Kept]]:
        """Which of the rows that a call computed it is the first to store; they count as stored once the block ends
        well.

        computed: choice → ranges of positions
        """
        kept: list[Kept] = []
        stored: list[Sequence] = []
        try:
            for sequence in call.sequences:
                # Surplus rows, past what the client was given, belong to no token of the sequence.
                first, stop = sequence.wanted(call.tokens)
                mine = [(max(a, first), min(b, stop)) for a, b in computed.get(sequence.choice, [])]
                ranges = self._stored(call, sequence).store(Owner(call.id, sequence.choice), sequence.tokens, mine)
                stored.append(sequence)
                kept += [Kept(sequence.choice, start, stop) for start, stop in ranges]
            yield kept
        except BaseException:
            for sequence in reversed(stored):  # the last first, whose owner is the last
                self._stored(call, sequence).forget(Owner(call.id, sequence.choice), sequence.tokens)
            raise

    def spans(self, call: Call) -> dict[int, list[Span]]:
        """choice → whose rows the call's positions have, in order; owner None where there is none."""
        spans = {}
        for sequence in call.sequences if call.points else ():
            first, stop = sequence.wanted(call.tokens)
            found = self._stored(call, sequence).spans(sequence.tokens)
            clipped = (Span(s.owner, max(s.start, first), min(s.stop, stop)) for s in found)
            spans[sequence.choice] = [span for span in clipped if span.start < span.stop]
        return spans

    def _stored(self, call: Call, sequence: Sequence) -> Rows:
        """The rows that a sequence may share: those of its call's spec, computed by its adapter."""
        return self.rows.setdefault((*call.spec, sequence.adapter), Rows())

    def _episode(self, name: str) -> Episode:
        return self.episodes.setdefault(name, Episode(name))
