"""Which of several workers a call goes to.

A conversation stays with the worker that has its beginning in the cache, and the threads of an episode go together as
far as that is known when they begin. A new one goes where the fewest calls are under way, and among those where the
fewest conversations are at home. A worker that failed is passed over until it is said to be back; what was at home
there moves, which costs computing its beginning again, and stays where it moved to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Generic, TypeVar

W = TypeVar("W")


class Fleet(Generic[W]):
    """The workers, whatever they are. `enter` and `leave` stand around every call; nothing here waits or talks."""

    def __init__(self, workers: Sequence[W]) -> None:
        self.workers = list(workers)
        self._down: set[W] = set()
        self._homes: dict[str, W] = {}
        self._calls: Counter[W] = Counter()
        self._tenants: Counter[W] = Counter()

    def enter(self, names: Sequence[str] = (), tried: Collection[W] = ()) -> W | None:
        """The worker for a call, counted as under way there; None if all were tried.

        names: the call's thread, then its episode; none for a call that is at home nowhere. tried: workers that could
        not be reached with this call
        """
        homes = [self._homes[name] for name in names if name in self._homes]
        worker = next((home for home in homes if home not in tried and home not in self._down), self.idlest(tried))
        if worker is None:
            return None
        for name in names:
            if name == names[0] or self._homes.get(name) in (None, *tried, *self._down):
                self._settle(name, worker)
        self._calls[worker] += 1
        return worker

    def leave(self, worker: W) -> None:
        """A call is over there."""
        self._calls[worker] -= 1

    def idlest(self, tried: Collection[W] = ()) -> W | None:
        """The worker that does least; one that is down only if all that were not tried are."""
        left = [worker for worker in self.workers if worker not in tried]
        return min(left, key=lambda w: (w in self._down, self._calls[w], self._tenants[w]), default=None)

    def close(self, names: Iterable[str]) -> None:
        """These threads and episodes are over."""
        for name in names:
            self._settle(name, None)

    def fail(self, worker: W) -> bool:
        """Pass a worker over from now on; whether that is news."""
        news = worker not in self._down
        self._down.add(worker)
        return news

    def back(self, worker: W) -> bool:
        """Count on a worker again; whether that is news."""
        news = worker in self._down
        self._down.discard(worker)
        return news

    def up(self, worker: W) -> bool:
        return worker not in self._down

    def n_calls(self, worker: W) -> int:
        """Calls under way there."""
        return self._calls[worker]

    def _settle(self, name: str, worker: W | None) -> None:
        """Let a thread or an episode be at home with a worker, or with none any more."""
        before = self._homes.pop(name, None)
        if before is not None:
            self._tenants[before] -= 1
        if worker is not None:
            self._homes[name] = worker
            self._tenants[worker] += 1
