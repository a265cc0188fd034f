"""Which conversation a call belongs to, found from its messages or told by the client.

A call continues the thread whose last call it extends: that call's messages, the reply it got, and whatever follows.
Conversations that look the same are told apart one to one: a thread that has been continued waits no
more until its own reply is there. A repeat of a call that failed is an attempt of the same turn; so is a repeat of
one that succeeded once the conversation is under way (a first call repeated is another conversation).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import NamedTuple

from episodes.messages import JSON, prefix_digests


class Place(NamedTuple):
    """Where a call belongs."""

    episode: str
    thread: str
    turn: int
    attempt: int


@dataclass(eq=False)
class Thread:
    """A conversation so far. asked: digest of its last call's messages. ends: what a next call must begin with."""

    id: str
    episode: str
    turn: int = -1
    attempt: int = 0
    n_messages: int = 0
    asked: bytes = b""
    failed: bool = False
    ends: list[bytes] = field(default_factory=list)


class Threads:
    """The open conversations of a run; safe to call from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[tuple[str | None, bytes], list[Thread]] = {}
        self._asked: dict[tuple[str | None, bytes], list[Thread]] = {}
        self._threads: dict[str, Thread] = {}

    def place(self, call: str, messages: list[JSON] | None, episode: str | None = None) -> Place:
        """Where a new call belongs. messages: None for an endpoint that has none. episode: as the client named it."""
        with self._lock:
            digests = list(prefix_digests(messages)) if messages else []
            thread = self._repeated(digests, episode) or self._continued(digests, episode)
            if thread is None:
                thread = Thread(f"t-{call}", episode or f"t-{call}")
                self._threads[thread.id] = thread
            self._forget(thread)
            repeated = bool(digests) and thread.asked == digests[-1]
            thread.turn, thread.attempt = (thread.turn, thread.attempt + 1) if repeated else (thread.turn + 1, 0)
            thread.n_messages = len(digests)
            thread.asked, thread.failed, thread.ends = digests[-1] if digests else b"", False, []
            return Place(thread.episode, thread.id, thread.turn, thread.attempt)

    def replied(self, place: Place, messages: list[JSON] | None, replies: list[JSON], explicit: bool) -> None:
        """The call at `place` is over; `replies` are its choices' messages, none if it failed."""
        with self._lock:
            thread = self._threads.get(place.thread)
            if thread is None or not messages:
                return
            thread.failed = not replies
            key = place.episode if explicit else None
            thread.ends = [list(prefix_digests([*messages, reply]))[-1] for reply in replies]
            for end in thread.ends:
                self._waiting.setdefault((key, end), []).append(thread)
            self._asked.setdefault((key, thread.asked), []).append(thread)

    def close(self, episode: str) -> None:
        """The episode is sealed: nothing continues it any more."""
        with self._lock:
            for thread in [t for t in self._threads.values() if t.episode == episode]:
                self._forget(thread)
                del self._threads[thread.id]

    def _continued(self, digests: list[bytes], episode: str | None) -> Thread | None:
        """The thread that waits for the longest prefix of these messages, the one waiting longest first."""
        for digest in reversed(digests):
            waiting = self._waiting.get((episode, digest))
            if waiting:
                return waiting[0]
        return None

    def _repeated(self, digests: list[bytes], episode: str | None) -> Thread | None:
        for thread in self._asked.get((episode, digests[-1]), []) if digests else []:
            if thread.failed or thread.turn > 0:
                return thread
        return None

    def _forget(self, thread: Thread) -> None:
        """Take the thread out of both indexes: it is busy, or gone."""
        for index, digests in ((self._waiting, thread.ends), (self._asked, [thread.asked])):
            for key in [(k, digest) for digest in digests for k in (None, thread.episode)]:
                if thread in index.get(key, []):
                    index[key].remove(thread)
                    if not index[key]:
                        del index[key]
