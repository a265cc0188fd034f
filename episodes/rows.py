"""Which call stored the row of which token: a radix tree over token ids.

A row belongs to a prefix of token ids. The tree holds every prefix once, so a lookup compares arrays, a call costs
what is new in it, and two calls share a row exactly when the engine would have computed the same one for both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Range = tuple[int, int]
NOBODY = -1


class Owner(NamedTuple):
    """A sequence that stores rows."""

    call: str
    choice: int


class Span(NamedTuple):
    """Positions start to stop of a sequence and the owner of their rows, None where nobody stored them."""

    owner: Owner | None
    start: int
    stop: int


def n_missing(spans: Iterable[Span]) -> int:
    """How many positions nobody stored the row of."""
    return sum(span.stop - span.start for span in spans if span.owner is None)


class Stretch(NamedTuple):
    """Tokens behind one another and the owner of all their rows. depth: how many stretches precede it in its prefix."""

    depth: int
    owner: Owner | None
    tokens: Tokens


class Node:
    """A stretch of tokens that all sequences through here share, and who stored each one's row."""

    __slots__ = ("children", "owners", "tokens")

    def __init__(self, tokens: Tokens, owners: NDArray[np.int32]) -> None:
        self.tokens = tokens
        self.owners = owners
        self.children: dict[int, Node] = {}

    def split(self, at: int) -> None:
        """Cut the stretch in two; this node keeps the first `at` tokens."""
        tail = Node(self.tokens[at:], self.owners[at:])
        tail.children = self.children
        self.children = {int(tail.tokens[0]): tail}
        self.tokens, self.owners = self.tokens[:at], self.owners[:at]


class Rows:
    """The rows stored under one capture spec."""

    def __init__(self) -> None:
        self._root = Node(np.empty(0, np.int32), np.empty(0, np.int32))
        self._owners: list[Owner] = []

    def store(self, owner: Owner, tokens: Tokens, computed: list[Range]) -> list[Range]:
        """Give `owner` the rows of `computed` that nobody stored yet; returns those, as ranges of positions.

        tokens: the sequence's token ids from position 0 on
        """
        mine = np.zeros(len(tokens), bool)
        for start, stop in computed:
            mine[start:stop] = True
        number = len(self._owners)
        self._owners.append(owner)
        at = 0
        for node in self._path(tokens, grow=True):
            new = mine[at : at + len(node.owners)] & (node.owners == NOBODY)
            node.owners[new] = number
            mine[at : at + len(node.owners)] = new
            at += len(node.owners)
        return runs(mine)

    def forget(self, owner: Owner, tokens: Tokens) -> None:
        """Undo a `store`: the rows that `owner` has of these tokens are nobody's again."""
        numbers = [number for number, known in enumerate(self._owners) if known == owner]
        for node in self._path(tokens, grow=True):
            node.owners[np.isin(node.owners, numbers)] = NOBODY
        while self._owners and self._owners[-1] == owner:  # one that is tried again and again would pile up
            self._owners.pop()

    def spans(self, tokens: Tokens) -> list[Span]:
        """Who stored the rows of these tokens: spans that cover positions 0 to len(tokens) in order."""
        owners = np.full(len(tokens), NOBODY, np.int32)
        at = 0
        for node in self._path(tokens, grow=False):
            stop = min(at + len(node.owners), len(tokens))
            owners[at:stop] = node.owners[: stop - at]
            at = stop
        edges = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)] if len(owners) else []
        return [
            Span(None if owners[a] == NOBODY else self._owners[owners[a]], a, b) for a, b in itertools.pairwise(edges)
        ]

    def stretches(self) -> Iterator[Stretch]:
        """The whole tree, a stretch before those that go on from it; the same for the same rows, however they came."""
        stack = [(0, child) for _, child in sorted(self._root.children.items(), reverse=True)]
        while stack:
            depth, node = stack.pop()
            tokens, owners, children = node.tokens, node.owners, node.children
            while len(children) == 1:  # a sequence ended here that another goes on from
                (child,) = children.values()
                tokens, owners = np.concatenate([tokens, child.tokens]), np.concatenate([owners, child.owners])
                children = child.children
            edges = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
            for a, b in itertools.pairwise(edges):
                yield Stretch(depth, None if owners[a] == NOBODY else self._owners[owners[a]], tokens[a:b])
                depth += 1
            stack += [(depth, child) for _, child in sorted(children.items(), reverse=True)]

    @classmethod
    def of(cls, stretches: Iterable[Stretch]) -> Rows:
        """The tree again, as `stretches` gave it."""
        rows = cls()
        numbers: dict[Owner | None, int] = {None: NOBODY}
        path = [rows._root]
        for depth, owner, tokens in stretches:
            number = numbers.setdefault(owner, len(numbers) - 1)
            node = Node(tokens, np.full(len(tokens), number, np.int32))
            path[depth].children[int(tokens[0])] = node
            path[depth + 1 :] = [node]
        rows._owners = [owner for owner in numbers if owner is not None]
        return rows

    def _path(self, tokens: Tokens, grow: bool) -> Iterator[Node]:
        """The nodes along `tokens`. With `grow` they end exactly with it; without, the last may be matched in part
        (its tokens then differ past the match, and a copy of the matched part is given).
        """
        node, at = self._root, 0
        while at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None:
                if grow:
                    rest = tokens[at:].copy()
                    child = node.children[int(rest[0])] = Node(rest, np.full(len(rest), NOBODY, np.int32))
                    yield child
                return
            shared = _shared(child.tokens, tokens[at:])
            if shared < len(child.tokens):
                if not grow:
                    yield Node(child.tokens[:shared], child.owners[:shared])
                    return
                child.split(shared)
            yield child
            node, at = child, at + shared


def _shared(a: Tokens, b: Tokens) -> int:
    """How many leading tokens are equal."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    first = int(different.argmax()) if n else 0
    return first if n and different[first] else n


def runs(mask: NDArray[np.bool_]) -> list[Range]:
    """The ranges where a mask is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
