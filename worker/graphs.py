"""The tap's observers inside CUDA graphs: decode steps are replayed, and leave what stood at the points all the same.

A replayed graph runs no Python, so no observer sees its values. But the observers do run while vLLM records its graphs:
what they copy then, on the same stream as all else, becomes part of each graph. Every replay copies the rows of its
step into one slab, from which they are taken at once when the pass is over. Steps that are too large for a graph, as
prompts are, run eagerly and are observed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from episodes.errors import UnknownPoint
from worker.recorder import Step
from worker.tap import Stream, Tap

# What no model has a whole row of.
UNWRITTEN = 12288.0


class Graphs:
    """A source of the points that the graphs were recorded with.

    `record` must be called around the recording, `probe` once after it, `run` around every step from then on.
    """

    def __init__(
        self, tap: Tap, points: list[str], n_rows: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """n_rows: of the largest graph."""
        for point in points:
            tap.watch(point)
        self._tap = tap
        self.points = tuple(points)
        self._slab = torch.empty((n_rows, len(points), hidden), dtype=dtype, device=device)

    def watch(self, point: str) -> None:
        """UnknownPoint if the graphs do not copy this one."""
        if point not in self.points:
            raise UnknownPoint(f"{point}: the recorded graphs have {', '.join(self.points)}")

    def record(self, forward: Callable[[], Any]) -> Any:
        """What `forward`, which runs the model while graphs are recorded, returns."""
        return self._tap.run(self, forward)

    def probe(self, forward: Callable[[], Any]) -> None:
        """Run `forward`, a pass of one row: UnknownPoint, with their names, if it leaves nothing of some points."""
        first = self._slab[:1].fill_(UNWRITTEN)  # none where there are no graphs
        self._tap.run(self, forward)
        missing = [p for i, p in enumerate(self.points) if bool((first[:, i] == UNWRITTEN).all(-1).any())]
        if missing:
            raise UnknownPoint(f"{', '.join(missing)}: not in vLLM's graphs, and left out when they are replayed")

    def receive(self, i: int, read: Callable[[], Stream]) -> None:
        """Copy all rows of a pass that is recorded, at the i-th point, into the slab."""
        stream = read()
        n_rows = min(stream.n_rows, len(self._slab))  # a pass to warm up may have more than any graph
        stream.write(self._slab[:n_rows, i], 0, n_rows)

    def run(self, step: Step | None, forward: Callable[[], Any]) -> Any:
        """What `forward` returns; the step receives its points as the pass reaches them, or after it was replayed."""
        if step is None:
            return forward()
        output = self._tap.run(step, forward)
        if not self._tap.reached:
            self._replayed(step)
        return output

    def _replayed(self, step: Step) -> None:
        if step.points == self.points:
            step.receive_all(self._slab)
            return
        for i, point in enumerate(step.points):
            step.receive(i, partial(Stream, self._slab[:, self.points.index(point)]))
