"""Matching one to one: who gets whom when several fit, and whether it could be otherwise."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from typing import TypeVar

A = TypeVar("A", bound=Hashable)
B = TypeVar("B", bound=Hashable)


def match(fitting: Mapping[A, list[B]]) -> dict[A, B]:
    """One of its candidates to each, for as many as can have one; the first ones as far as that goes.

    source: augmenting paths, found breadth first (Edmonds and Karp 1972)
    """
    pairs: dict[A, B] = {}
    taken: dict[B, A] = {}
    for one in fitting:
        asking = _asking(one, fitting, taken)
        other = next((other for other in asking if other not in taken), None)
        while other is not None:  # along the path back, each takes the candidate it asked for
            asker = asking[other]
            free = pairs.get(asker)
            pairs[asker], taken[other] = other, asker
            other = free
    return pairs


def _asking(first: A, fitting: Mapping[A, list[B]], taken: Mapping[B, A]) -> dict[B, A]:
    """Who asks for which candidate when `first` asks for one, whoever has that for another, and so on until one is
    free, which is then the last.
    """
    asking: dict[B, A] = {}
    queue = deque([first])
    while queue:
        one = queue.popleft()
        for other in fitting[one]:
            if other not in asking:
                asking[other] = one
                if other not in taken:
                    return asking
                queue.append(taken[other])
    return asking


def ties(one: A, fitting: Mapping[A, list[B]], taken: Mapping[B, A]) -> list[B]:
    """The candidates that `one` could have just as well, all others still having one. taken: the matching, reversed"""
    return [other for other in fitting.get(one, []) if taken.get(other) != one and _yields(other, one, fitting, taken)]


def _yields(other: B, to: A, fitting: Mapping[A, list[B]], taken: Mapping[B, A]) -> bool:
    """Whether `to` can take `other`: whoever has it takes another, and so on, down to a free one or the one it had."""
    seen: set[B] = set()
    queue = deque([other])
    while queue:
        candidate = queue.popleft()
        if taken.get(candidate, to) == to:
            return True
        if candidate not in seen:
            seen.add(candidate)
            queue.extend(fitting[taken[candidate]])
    return False
