"""vLLM's in-graph auxiliary hidden states as a source of `output` points: a compiled, graph-captured model records too.

The model itself adds up the residual stream behind chosen blocks and returns it beside its output; made for EAGLE-3
drafters, it works without one. Which blocks is settled before the model is compiled, for as long as the worker runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from episodes.errors import UnknownPoint
from episodes.points import split
from worker.tap import Sink, Stream


class Auxiliary:
    """Reads the points that a model was told to return.

    source: vllm 0.32, model_executor/models/interfaces.py, EagleModelMixin: id k is the stream after k blocks
    """

    def __init__(self, model: nn.Module, points: Iterable[str]) -> None:
        """Tell the model, before it is compiled. UnknownPoint if it is of a family that cannot do so."""
        if not callable(getattr(model, "set_aux_hidden_state_layers", None)):
            raise UnknownPoint(
                f"{type(model).__name__} has no auxiliary hidden states in vLLM: leave --capture-source aux out"
            )
        ids = sorted(self._id(point) for point in set(points))
        model.set_aux_hidden_state_layers(tuple(ids))
        self._order = {k: i for i, k in enumerate(ids)}

    @staticmethod
    def _id(point: str) -> int:
        layer, hook = split(point)
        if layer is None or hook != "output":
            raise UnknownPoint(f"{point}: auxiliary hidden states are layers.<n>.output only")
        return layer + 1

    def watch(self, point: str) -> None:
        """UnknownPoint if the compiled model does not return this one."""
        if self._id(point) not in self._order:
            has = ", ".join(f"layers.{k - 1}.output" for k in self._order)
            raise UnknownPoint(f"{point}: the compiled model returns {has}")

    def run(self, sink: Sink | None, forward: Callable[[], Any]) -> Any:
        """What `forward` returns; the sink receives its points once the pass is over."""
        output = forward()
        _, states = output
        if sink is not None:
            for i, point in enumerate(sink.points):
                sink.receive(i, partial(self._read, states, point))
        return output

    def _read(self, states: Sequence[Tensor], point: str) -> Stream:
        if len(states) != len(self._order):
            raise UnknownPoint(f"the model returns {len(states)} auxiliary hidden states, of {len(self._order)}")
        return Stream(states[self._order[self._id(point)]])
