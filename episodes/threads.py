"""Which conversation a call belongs to, found from its messages or told by the client.

A call continues the thread whose last call it extends: that call's messages, the reply it got, and whatever follows.
Conversations that look the same are told apart one to one: a thread that has been continued waits no more until its
own reply is there; among several that wait for the same, the caller may know which is meant, else it is the one that
got its reply last, since some of those before it will have ended there. What does not continue a reply is, in this
order of evidence,

- `retry`: the same messages again, of a call that failed, or that an SDK says it repeats
- `reask`: the same messages again though the reply was good: the reply was rejected. A first call repeated is another
  conversation unless `rejected` said otherwise
- `branch`: the last call's messages and more, without its reply, asked beside it; the thread waits at both ends.
  After a `reask` it is the next `turn` instead: the conversation has gone on without any of the replies

Where several threads fit alike, it is the one that had the last call: those before it may be over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from episodes.messages import JSON, prefix_digests
from episodes.records import Kind

Key = tuple[str | None, int]


class Place(NamedTuple):
    """Where a call belongs. attempt: counts the calls of a turn, whatever their kind."""

    episode: str
    thread: str
    turn: int
    attempt: int
    kind: Kind = "turn"


@dataclass(eq=False)
class Thread:
    """A conversation so far.

    scope: the episode that the client named, else None. asked: digest of the last turn's messages, `end` of the last
    call's. ends: what a next call must begin with. n_good: replies of this turn. placed: counts the run's calls.
    """

    id: str
    episode: str
    scope: str | None
    turn: int = -1
    attempt: int = 0
    asked: int | None = None
    end: int | None = None
    ends: list[int] = field(default_factory=list)
    n_good: int = 0
    placed: int = 0
    busy: bool = False
    failed: bool = False
    rejected: bool = False
    reasked: bool = False


class Threads:
    """The open conversations of a run."""

    def __init__(self) -> None:
        self._waiting: dict[Key, list[Thread]] = {}
        self._asked: dict[Key, list[Thread]] = {}
        self._threads: dict[str, Thread] = {}
        self._n_placed = 0

    def __len__(self) -> int:
        return len(self._threads)

    def place(
        self,
        call: str,
        messages: list[JSON] | None,
        episode: str | None = None,
        retried: bool | None = None,
        meant: Callable[[str], bool] = lambda thread: False,
    ) -> Place:
        """Where a new call belongs. messages: None for an endpoint that has none. episode: as the client named it.

        retried: whether the client says that it repeats a call; None if it says nothing. meant: whether a thread, of
        several that it could be, is known to be the one
        """
        digests = list(prefix_digests(messages)) if messages else []
        thread, kind = self._find(digests, messages or [], episode, retried, meant)
        if thread is None:
            thread = self._threads[f"t-{call}"] = Thread(f"t-{call}", episode or f"t-{call}", episode)
        turn, attempt = (thread.turn + 1, 0) if kind == "turn" else (thread.turn, thread.attempt + 1)
        place = Place(thread.episode, thread.id, turn, attempt, kind)
        self._enter(thread, place, digests)
        return place

    def replay(self, place: Place, messages: list[JSON], named: bool) -> None:
        """Take in a call that another process placed. named: the client said in which episode."""
        scope = place.episode if named else None
        thread = self._threads.setdefault(place.thread, Thread(place.thread, place.episode, scope))
        self._enter(thread, place, list(prefix_digests(messages)))

    def _enter(self, thread: Thread, place: Place, digests: list[int]) -> None:
        """A call of the thread has begun."""
        self._forget(thread)
        if place.kind == "turn":
            thread.n_good, thread.ends = 0, []
            thread.asked, thread.reasked = digests[-1] if digests else None, False
        else:
            thread.reasked |= place.kind == "reask"
            # A good reply that an SDK does not know of got lost on its way: nobody can have rejected it.
            thread.n_good -= place.kind == "retry" and not thread.failed and not thread.busy
        thread.turn, thread.attempt = place.turn, place.attempt
        thread.end = digests[-1] if digests else None
        thread.busy, thread.failed, thread.rejected = True, False, False
        self._n_placed += 1
        thread.placed = self._n_placed
        for key in self._asked_keys(thread):
            self._asked.setdefault(key, []).append(thread)

    def replied(self, place: Place, replies: list[JSON]) -> None:
        """The call at `place` is over; `replies` are its choices' messages, none if it failed."""
        thread = self._threads.get(place.thread)
        if thread is None or thread.end is None or (thread.turn, thread.attempt) != place[2:4]:
            return  # closed, without messages, or given up by its client, who has sent it again
        thread.busy, thread.failed = False, not replies
        thread.n_good += bool(replies)
        thread.ends += [next(prefix_digests([reply], thread.end)) for reply in replies]
        for end in set(thread.ends):
            self._waiting.setdefault((thread.scope, end), []).append(thread)

    def rejected(self, thread: str, n_asked: int) -> None:
        """The last reply of the thread will not be used: the same messages again are its next attempt, unless it has
        got n_asked replies to them.
        """
        if thread in self._threads:
            self._threads[thread].rejected = self._threads[thread].n_good < n_asked

    def close(self, thread: str) -> None:
        """Nothing continues the thread any more."""
        found = self._threads.pop(thread, None)
        if found is not None:
            self._forget(found)

    def _find(
        self,
        digests: list[int],
        messages: list[JSON],
        scope: str | None,
        retried: bool | None,
        meant: Callable[[str], bool],
    ) -> tuple[Thread | None, Kind]:
        """The thread that a call belongs to and what it is there, in order of evidence; None for a new one."""
        if not digests:
            return None, "turn"
        same = [t for t in reversed(self._asked.get((scope, digests[-1]), [])) if t.end == digests[-1]]
        if announced := self._announced(same, retried):
            return announced
        beside = None
        for n in range(len(digests), 0, -1):
            key = (scope, digests[n - 1])
            waiting = self._waiting.get(key)
            if waiting:
                known = (thread for thread in reversed(waiting) if len(waiting) > 1 and meant(thread.id))
                return next(known, waiting[-1]), "turn"
            if n < len(digests) and messages[n].get("role") != "assistant":
                beside = self._beside(key)
            if beside is not None:
                break
        again = self._unannounced(same, retried)
        if again and beside and again[1] == "reask" and again[0].placed < beside[0].placed:
            return beside  # a conversation that is going on, rather than one like it that may be over
        return again or beside or (None, "turn")

    @staticmethod
    def _announced(same: list[Thread], retried: bool | None) -> tuple[Thread, Kind] | None:
        """A repeat of which there is a sign. An SDK sends again what failed, else what it gave up waiting for."""
        if retried and same:
            return min(same, key=lambda thread: (not thread.failed, not thread.busy)), "retry"
        return next(((thread, "reask") for thread in same if thread.rejected), None)

    @staticmethod
    def _unannounced(same: list[Thread], retried: bool | None) -> tuple[Thread, Kind] | None:
        """A repeat of which there is no sign but that nothing else fits."""
        for thread in same:
            if thread.failed and not (retried is False and thread.turn == 0):
                return thread, "retry"
            if thread.n_good and not thread.busy and not thread.failed and thread.turn > 0:
                return thread, "reask"
        return None

    def _beside(self, key: Key) -> tuple[Thread, Kind] | None:
        """A thread whose last turn these messages begin with, something else than its reply behind it."""
        for thread in reversed(self._asked.get(key, [])):
            if thread.asked == key[1] and thread.n_good and not thread.busy:
                return thread, "turn" if thread.reasked else "branch"
        return None

    @staticmethod
    def _asked_keys(thread: Thread) -> set[Key]:
        return {(thread.scope, digest) for digest in (thread.asked, thread.end) if digest is not None}

    def _forget(self, thread: Thread) -> None:
        """Take the thread out of both indexes: it is busy, or gone."""
        waiting = {(thread.scope, end) for end in thread.ends}
        for index, keys in ((self._waiting, waiting), (self._asked, self._asked_keys(thread))):
            for key in keys:
                if thread in index.get(key, []):
                    index[key].remove(thread)
                    if not index[key]:
                        del index[key]
