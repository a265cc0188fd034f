"""The tap: nnsight observers on the points of a model, reading each step's whole batch once.

A step on which nothing is captured costs a module with a point one attribute test, and a module without a point
nothing at all: only modules with points carry nnsight's controller.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from nnsight.intervention.interleaver import Interleaver
from torch import Tensor, nn

from episodes.errors import UnknownPoint
from episodes.points import split_point

# The submodule of a block that computes a hook, by the names that model families give it.
SUBMODULES = {
    "attn": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "block_sparse_moe"),
}


class Stream(NamedTuple):
    """A value at a point: `hidden`, plus `residual` where vLLM carries the residual stream in two parts."""

    hidden: Tensor
    residual: Tensor | None

    def write(self, into: Tensor, start: int, stop: int) -> None:
        """Rows start to stop into a [stop - start, hidden] slice, at once: fused norms overwrite both parts soon."""
        if self.residual is None:
            into.copy_(self.hidden[start:stop])
        else:
            torch.add(self.hidden[start:stop], self.residual[start:stop], out=into)


class Location:
    """What nnsight's `instrument` asks of an envoy: a module, its path and the interleaver that it reports to."""

    def __init__(self, module: nn.Module, path: str, interleaver: Interleaver) -> None:
        self._module, self.path, self.interleaver = module, path, interleaver


class Watch(NamedTuple):
    """Where a point is found: nnsight's location and the way from the value there to a Stream."""

    point: str
    location: str
    read: Callable[[Any], Stream]


def block_output(value: Any) -> Stream:
    """The residual stream after a block: its hidden states and, in most of vLLM's families, the residual apart.

    value:  `hidden` or `(hidden, residual)`, each (rows, d_model)
    source: vllm 0.32, model_executor/models/llama.py, LlamaDecoderLayer.forward
    """
    return Stream(*value[:2]) if isinstance(value, tuple) else Stream(value, None)


def block_input(module: nn.Module) -> Callable[[Any], Stream]:
    """A reader of the residual stream before a block, out of the `(args, kwargs)` that the block was called with."""
    signature = inspect.signature(type(module).forward)

    def read(value: Any) -> Stream:
        args, kwargs = value
        given = signature.bind(module, *args, **kwargs).arguments
        return Stream(given["hidden_states"], given.get("residual"))

    return read


def submodule_output(value: Any) -> Stream:
    """What a submodule adds to the residual stream."""
    return Stream(value[0] if isinstance(value, tuple) else value, None)


def find_blocks(model: nn.Module, n_layers: int) -> tuple[str, nn.ModuleList]:
    """The path and the list of a model's decoder blocks: its one ModuleList as long as the model is deep."""
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if len(found) != 1:
        raise UnknownPoint(f"{type(model).__name__}: found {len(found)} lists of {n_layers} blocks, need exactly one")
    return found[0]


class Tap(Interleaver):
    """An nnsight interleaver that serves no intervention blocks: it hands each watched value to one function.

    watch: puts an observer on a point. open: lets values through for one forward pass.
    """

    def __init__(self, model: nn.Module, n_layers: int) -> None:
        super().__init__()
        self._path, self._blocks = find_blocks(model, n_layers)
        self._watched: dict[str, Watch] = {}
        self._receive: dict[str, Callable[[Any], None]] = {}

    def watch(self, point: str) -> None:
        """Instrument the module behind a point; UnknownPoint, naming what the block has, if it is not there."""
        if point in self._watched:
            return
        layer, hook = split_point(point)
        if layer >= len(self._blocks):
            raise UnknownPoint(f"{point}: this model has layers 0 to {len(self._blocks) - 1}")
        block, path = self._blocks[layer], f"{self._path}.{layer}"
        if hook in SUBMODULES:
            name = next((n for n in SUBMODULES[hook] if isinstance(getattr(block, n, None), nn.Module)), None)
            if name is None:
                has = ", ".join(name for name, _ in block.named_children())
                raise UnknownPoint(f"{point}: {type(block).__name__} has no {hook}, only {has}")
            watch = Watch(point, f"{path}.{name}.output", submodule_output)
            module, path = getattr(block, name), f"{path}.{name}"
        elif hook == "output":
            watch, module = Watch(point, f"{path}.output", block_output), block
        else:
            watch, module = Watch(point, f"{path}.input", block_input(block)), block
        self.instrument(Location(module, path, self))
        self._watched[point] = watch

    def open(self, points: Iterable[str], receive: Callable[[int, Stream], None]) -> None:
        """Until `close`, call `receive(i, stream)` with the value at the i-th point as the forward pass reaches it."""
        for i, point in enumerate(points):
            self._receive[self._watched[point].location] = self._route(i, self._watched[point].read, receive)
        self.interleaving = self.busy = True

    def close(self) -> None:
        self.interleaving = self.busy = False
        self._receive.clear()

    @staticmethod
    def _route(i: int, read: Callable[[Any], Stream], receive: Callable[[int, Stream], None]) -> Callable[[Any], None]:
        return lambda value: receive(i, read(value))

    def handle(self, provider: str, value: Any) -> Any:
        """nnsight's hand-over: every location of an instrumented module comes by here, once, whole batch."""
        receive = self._receive.get(provider)
        if receive is not None:
            receive(value)
        return value
