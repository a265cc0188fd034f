"""Calls that have begun, in `begun.jsonl`: what a run knows of a call before its journal does.

A call's line is written before its reply ends, and once more by a writer that must stop before it can record it. Once
the call is in the journal its line means nothing any more and goes at the next chance; so what a writer leaves here are
the calls that it did not record. Lines are as in the journal.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from episodes import journal
from episodes.layout import whole
from episodes.records import Call

LIMIT_BYTES = 64 << 20


class Begun:
    """The writing end. Safe to call from several threads: calls begin while others are being put on disk."""

    def __init__(self, path: Path) -> None:
        self.left = left_begun(path)
        self._path = path
        self._lock = threading.Lock()
        self._open = {call.id: journal.encode(call) for call in self.left}
        self._file = journal.Journal(path)
        self._limit_bytes = LIMIT_BYTES

    def add(self, calls: Iterable[Call]) -> None:
        """Note calls. They outlive this process when this returns, and the machine's power after the next `sync`."""
        lines = {call.id: journal.encode(call) for call in calls}
        with self._lock:
            if self._file.n_bytes > self._limit_bytes:
                self._shrink()
            self._file.write(b"".join(lines.values()))
            self._open |= lines

    def sync(self) -> None:
        with self._lock:
            if not self._open:
                return
            file = self._file.duplicate()
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def done(self, call: str) -> None:
        """Take a call out that is in the journal now."""
        with self._lock:
            self._open.pop(call, None)
            if not self._open:
                with contextlib.suppress(OSError):  # then they go the next time
                    self._file.clear()

    def _shrink(self) -> None:
        with whole(self._path) as draft:
            draft.write_bytes(b"".join(self._open.values()))
        self._file.close()
        self._file = journal.Journal(self._path)
        self._limit_bytes = max(LIMIT_BYTES, 2 * self._file.n_bytes)

    def close(self) -> None:
        self._file.close()


def left_begun(path: Path) -> list[Call]:
    """The calls in a file of begun ones, each as it was noted last. A line that cannot be read is of a call whose reply
    had not ended.
    """
    return list({record.id: record for record in journal.read(path) if isinstance(record, Call)}.values())
