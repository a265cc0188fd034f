"""What a run's journal adds up to, without what was said: texts and token ids stay there until they are read."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from episodes import journal
from episodes.history import History
from episodes.layout import Layout
from episodes.records import Call, Record


class Outline(History):
    """A run's history as it is now, from the journal alone. Its calls have neither texts nor token ids, which are most
    of a journal; `whole` reads them again.

    broken: lines that cannot be read. places: where each call's lines are, one unless something is wrong
    """

    def __init__(self, layout: Layout) -> None:
        self._journal = layout.journal
        self._stop = journal.size(layout.journal)
        self.broken: list[journal.Broken] = []
        self.places: dict[str, list[int]] = {}
        super().__init__(self._read())

    @property
    def outgrown(self) -> bool:
        """Whether the journal goes on by now."""
        return journal.size(self._journal) > self._stop

    def _read(self) -> Iterator[Record]:
        for place, line in journal.placed(self._journal, 0, self._stop):
            if isinstance(line, journal.Broken):
                self.broken.append(line)
                continue
            if isinstance(line, Call):
                self.places.setdefault(line.id, []).append(place)
            yield line

    def lines(self) -> Iterator[tuple[int, Record]]:
        """The records again, whole, each with its place."""
        return journal.sound(self._journal, 0, self._stop)

    def commit(self, call: Call) -> None:
        super().commit(call)
        light = msgspec.structs.replace(self.calls[call.id], request="", reply="", sequences=[])
        self.calls[call.id] = self.episodes[light.episode].calls[-1] = light

    def whole(self, call: Call) -> Call:
        record = journal.record_at(self._journal, self.places[call.id][-1])
        assert isinstance(record, Call)
        return msgspec.structs.replace(record, episode=call.episode)
