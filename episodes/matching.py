"""Matching one to one: who gets whom when several fit, and whether it could be otherwise."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Set
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


def ties(fitting: Mapping[A, list[B]], pairs: Mapping[A, B]) -> dict[A, list[B]]:
    """one → the candidates that it could have just as well, all others still having one. pairs: a matching"""
    freed: dict[B, set[B]] = {}  # candidate → those that their holders would leave for it
    for one, own in pairs.items():
        for other in fitting[one]:
            freed.setdefault(other, set()).add(own)
    anyway = _to_be_had(freed.keys() - set(pairs.values()), freed)
    found = {}
    for one, own in pairs.items():
        swapped = _to_be_had({own}, freed)
        found[one] = [other for other in fitting[one] if other != own and (other in anyway or other in swapped)]
    return found


def _to_be_had(ends: Set[B], freed: Mapping[B, set[B]]) -> Set[B]:
    """The candidates that can be had if these can: their holders take one of these instead, or one to be had so."""
    # What is found is looked for no more, so that where everybody fits everybody all steps but the first cost nothing.
    left = freed.keys() - ends
    queue = list(ends)
    while queue:
        more = freed[queue.pop()] & left
        left -= more
        queue += more
    return freed.keys() - left
