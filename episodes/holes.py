"""Holes: positions of recorded calls whose row nobody stored, and what fills them.

A row belongs to a prefix of token ids. To have it, the prefix is run through the model once more, as a prompt, and
what comes back is stored as a call of its own, with the role `backfill`: at the episode, thread and turn of the call
that it mends, and with that call's sequence, so that spans, shards and `verify` find its rows where they look for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from episodes.history import History
from episodes.messages import media, parse_object
from episodes.records import BACKFILL, Call
from episodes.rows import n_missing
from episodes.wire import Sequence, Tokens


class Hole(NamedTuple):
    """A sequence of a call with `n_missing` positions without a row, the last one before `stop`."""

    call: Call
    sequence: Sequence
    n_missing: int
    stop: int

    def prompt(self, edit: str = "") -> list[int]:
        """The token ids to run. edit: as in `unfillable`; it may look at a prompt's length, so that one is run whole"""
        stop = max(self.stop, len(self.sequence.prompt_token_ids)) if edit else self.stop
        return [int(token) for token in self.sequence.tokens[:stop]]

    @property
    def tokens(self) -> Tokens:
        """Whose rows to ask for: in what is run, every position is the prompt's."""
        return "last" if self.call.tokens == "last" else "prompt"

    def filler(self, call: str, started: float, ended: float) -> Call:
        """The record of a call that computed the prompt, before its rows are stored."""
        mended = self.call
        return Call(
            id=call,
            thread=mended.thread,
            episode=mended.episode,
            turn=mended.turn,
            attempt=mended.attempt,
            endpoint="/v1/completions",
            model=mended.model,
            started=started,
            ended=ended,
            status=200,
            role=BACKFILL,
            points=mended.points,
            tokens=mended.tokens,
            sequences=[msgspec.structs.replace(self.sequence, choice=0)],
        )


def holes(calls: Iterable[Call], history: History) -> Iterator[Hole]:
    """The holes of these calls, each as it is when its turn comes: what was filled meanwhile is not given."""
    for call in calls:
        for sequence in call.sequences:
            missing = [span for span in history.spans(call).get(sequence.choice, []) if span.owner is None]
            if missing:
                yield Hole(call, sequence, n_missing(missing), missing[-1].stop)


def unfillable(call: Call, history: History, edit: str = "") -> str | None:
    """Why a call's rows cannot be had from its token ids; None if they can, or if it lacks none.

    edit: the intervention that the run is recorded under, as in `Model`
    """
    if call.lost and not call.sequences:
        return "its token ids are not known: the worker that ran it did not tell them"
    found = list(holes([call], history))
    if found and (kinds := media(parse_object(call.request.encode()) or {})):
        return f"its request holds {', '.join(kinds)}: its rows do not follow from its token ids"
    if edit and any(hole.stop > len(hole.sequence.prompt_token_ids) for hole in found):
        return f"its reply was generated under {edit}, which may do otherwise to the same tokens in a prompt"
    return None
