"""Every error tautap raises on purpose.

TautapError
├── BadInput             what was asked for cannot be: commands exit with 2, HTTP answers 400
│   ├── UnknownPoint     a layer or hook that the model does not have
│   ├── BadName          a run or episode name that is not a plain file name
│   └── BadCapture       a capture request that does not parse
├── BadRun               a run directory that cannot be used: commands exit with 1, HTTP answers 409
│   ├── WrongFormat      written by another format version
│   ├── WrongModel       recorded with another model or dtype
│   ├── RunLocked        another process is writing it
│   └── CorruptFile      bytes that are not what the format says
├── WorkerFailed         a worker that cannot be reached or broke off: HTTP answers 502
│   ├── WorkerUnreachable  one that was sent nothing
│   └── WorkerTooSlow    one that kept us waiting longer than it may: HTTP answers 504
├── NotStored            the disk does not take what is to be recorded: HTTP answers 503
├── MissingRows          a reader asked for rows that were never stored, or lie in a file that is not there
├── BenchFailed          a proxy or a benchmark that failed under way: commands exit with 1
└── CaptureLost          a call whose activations cannot be had, with the reason
    └── NotClaimed       in the time that there was
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from episodes.wire import Sequence


class TautapError(Exception):
    """The root: its text says what was given, what is accepted and what to do."""


class BadInput(TautapError):
    pass


class UnknownPoint(BadInput):
    pass


class BadName(BadInput):
    pass


class BadCapture(BadInput):
    pass


class BadRun(TautapError):
    pass


class WrongFormat(BadRun):
    pass


class WrongModel(BadRun):
    pass


class RunLocked(BadRun):
    pass


class CorruptFile(BadRun):
    pass


class WorkerFailed(TautapError):
    pass


class WorkerUnreachable(WorkerFailed):
    pass


class WorkerTooSlow(WorkerFailed):
    pass


class NotStored(TautapError):
    pass


class MissingRows(TautapError):
    pass


class BenchFailed(TautapError):
    pass


class CaptureLost(TautapError):
    """sequences: the call's tokens, where they are known. ran: whether the engine may have been given any of it; None
    if the worker knows nothing of the call.
    """

    def __init__(self, reason: str, sequences: Iterable[Sequence] = (), ran: bool | None = True) -> None:
        super().__init__(reason)
        self.sequences = list(sequences)
        self.ran = ran


class NotClaimed(CaptureLost):
    pass
