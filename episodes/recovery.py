"""What a writer that died left behind: calls that it had not recorded, and files that no record accounts for.

A crash leaves the journal, up to its last whole line, and that is the truth. Beside it may lie

- lines of `begun.jsonl` whose call the journal lacks: these calls are `left`, to be recorded with what can still be had
- the claim of such a call, as a draft or as a live file: it is used
- a shard without its seal: it goes if all its rows are in live files still, else it is the only one to have them
- live files behind a seal, files of no call, drafts: they go
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from episodes.errors import CorruptFile
from episodes.history import History
from episodes.layout import Layout
from episodes.records import Call
from episodes.shards import shard_calls
from episodes.wire import CallFile

STOPPED = "its proxy was stopped before it had recorded the call"


def unrecorded(history: History, begun: list[Call]) -> list[Call]:
    """The calls that began and are not in the journal."""
    held = history.held if begun else set()
    return [call for call in begun if call.id not in history.calls and call.id not in held]


class Stray(NamedTuple):
    """A file that no record accounts for, and why. ours: whether it may go; what may be somebody else's stays"""

    path: Path
    reason: str
    ours: bool = True


def strays(layout: Layout, history: History, left: Iterable[Call], damaged: bool = False) -> Iterator[Stray]:
    """Files that no record accounts for.

    left: calls that are still to be recorded. damaged: the journal has lines that cannot be read, so that a file of no
    call may be one of theirs
    """
    held, waiting = history.held, {call.id for call in left}
    known = history.calls.keys() | held | waiting
    for path in sorted(layout.live.glob("*/*.safetensors")):
        if path.stem in held:
            yield Stray(path, "sealed already")
        elif path.stem not in known:
            yield Stray(path, "no call in the journal", not damaged)
    with_rows = {e.id for e in history.episodes.values() if e.sealed and e.sealed.n_rows}
    for path in sorted(layout.shards.glob("[!.]*")):
        if path.stem not in with_rows:
            yield Stray(path, "no sealed episode of that name", _live_too(layout, path))
    for path in sorted(layout.foreign.glob("[!.]*")):
        if path.name.partition(".")[0] not in known:
            yield Stray(path, "no call in the journal", not damaged)
    for path in sorted([*layout.root.glob(".*.draft"), *layout.root.glob("*/.*.draft"), *layout.live.glob(".*.claim")]):
        if path.suffix == ".draft" or path.name[1:].removesuffix(".claim") not in waiting:
            yield Stray(path, "a file that was not finished")


def _live_too(layout: Layout, shard: Path) -> bool:
    """Whether live files have the rows of a shard."""
    try:
        return all(layout.live_file(thread, call).exists() for thread, call in shard_calls(shard))
    except Exception:  # it is none of ours, or damaged
        return False


def recover(layout: Layout, history: History, left: list[Call], damaged: bool) -> tuple[list[Call], list[str]]:
    """Clear away what a dead writer left; returns the calls to record, and what was done, in words.

    damaged: as in `strays`
    """
    done = []
    for path, reason, ours in strays(layout, history, left, damaged):
        if ours:
            path.unlink()
            done.append(f"{path.relative_to(layout.root)}: {reason}; deleted")
    for directory in layout.live.glob("*/"):
        with contextlib.suppress(OSError):  # it holds something
            directory.rmdir()
    return [_as_left(layout, call) for call in left], done


def _as_left(layout: Layout, call: Call) -> Call:
    """The call as it is to be recorded, what was claimed of it lying where a claim does, if it is sound."""
    claim, live = layout.claim(call.id), layout.live_file(call.thread, call.id)
    if live.exists():
        live.rename(claim)
    try:
        CallFile(claim)
    except FileNotFoundError:
        pass
    except CorruptFile:
        claim.unlink()
    over = call.status or call.error  # so that it is known how its reply ended
    foreign = layout.foreign_file(call.id).exists()
    return msgspec.structs.replace(call, error=call.error if over else STOPPED, foreign=foreign)
