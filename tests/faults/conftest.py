"""A stack for each test, and the tally that is printed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.stack import Account, Stack


@dataclass
class Line:
    """What became of the calls of one kind of fault. lost: answered and nowhere."""

    times: int = 0
    answered: int = 0
    on_disk: int = 0
    named: int = 0
    lost: int = 0


TALLY: dict[str, Line] = {}


@pytest.fixture
def times(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--times"))


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    made = Stack(tmp_path)
    yield from running(made)


def running(made: Stack) -> Iterator[Stack]:
    made.start()
    try:
        yield made
    finally:
        made.kill()


@contextmanager
def tally(fault: str, stack: Stack, times: int = 1, lossless: bool = False) -> Iterator[None]:
    """A block that injects a fault so many times, after which every call that it answered must be accounted for.

    lossless: nothing is lost by such a fault, so none of them may be named for lost activations.
    """
    before = set(stack.answered)
    yield
    stack.ask(f"the next call, {len(before)}")
    ours = stack.answered.keys() - before
    try:
        stack.account(ours)
    finally:
        found = Account(stack, ours)
        line = TALLY.setdefault(fault, Line())
        line.times += times
        line.answered += len(ours)
        line.on_disk += len(ours - found.named - found.lost)
        line.named += len(found.named)
        line.lost += len(found.lost)
    assert not lossless or not found.named


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not TALLY:
        return
    terminalreporter.section("faults")
    head = ("fault", "times", "answered", "on disk", "named", "lost")
    rows = [head, *((name, *map(str, vars(line).values())) for name, line in TALLY.items())]
    width = max(len(row[0]) for row in rows)
    for name, *counts in rows:
        terminalreporter.write_line(name.ljust(width) + "".join(count.rjust(10) for count in counts))
