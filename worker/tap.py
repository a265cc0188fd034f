"""The tap: nnsight observers on the points of a model, reading each step's whole batch once.

A step on which nothing is captured costs a module with a point one attribute test, and a module without a point
nothing at all: only modules with points carry nnsight's controller.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from nnsight.intervention.interleaver import Interleaver
from torch import Tensor, nn

from episodes.errors import UnknownPoint
from episodes.points import Points, split

# The submodule whose output joins the residual stream, by the names that model families give it.
JOINING = {
    "attn": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "block_sparse_moe"),
}
# Where a norm stands between a submodule and the residual stream (Gemma 2 and 3, OLMo 2), it is the norm's output.
SANDWICHED = {"attn": ("post_attention_layernorm",), "mlp": ("post_feedforward_layernorm",)}
FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")


class Stream(NamedTuple):
    """A value at a point: `hidden`, plus `residual` where vLLM carries the residual stream in two parts.

    Each is (rows, d_model), or (1, rows, d_model) where vLLM runs a model of transformers' own.
    """

    hidden: Tensor
    residual: Tensor | None = None

    @property
    def n_rows(self) -> int:
        return len(flat(self.hidden))

    def write(self, into: Tensor, start: int, stop: int) -> None:
        """Rows start to stop into a [stop - start, hidden] slice, at once: fused norms overwrite both parts soon."""
        hidden = flat(self.hidden).narrow(0, start, stop - start)
        if self.residual is None:
            into.copy_(hidden)
        else:
            torch.add(hidden, flat(self.residual).narrow(0, start, stop - start), out=into)


Read = Callable[[Any], Stream]


class Sink(Protocol):
    """Where the values of one pass go."""

    @property
    def points(self) -> tuple[str, ...]: ...

    def receive(self, i: int, read: Callable[[], Stream]) -> None:
        """The pass is at the i-th point: `read()` gives the value there, or raises what an odd one makes it raise."""


class Location:
    """What nnsight's `instrument` asks of an envoy: a module, its path and the interleaver that it reports to."""

    def __init__(self, module: nn.Module, path: str, interleaver: Interleaver) -> None:
        self._module, self.path, self.interleaver = module, path, interleaver


class Watch(NamedTuple):
    """Where a point is found: a module, the side of it, and the way from the value there to a Stream."""

    module: nn.Module
    path: str
    side: str
    read: Read

    @property
    def location(self) -> str:
        """The module's, as nnsight names it: its root is `model`, whatever vLLM's own tree begins with."""
        return f"model.{self.path}"

    @property
    def provider(self) -> str:
        return f"{self.location}.{self.side}"


def flat(value: Tensor) -> Tensor:
    """Rows alone, where vLLM runs a model of transformers' own."""
    return value[0] if value.dim() == 3 and value.shape[0] == 1 else value


def first_output(value: Any) -> Stream:
    """What a module returns, the first of several: norms return the residual beside it, linear layers a bias."""
    return Stream(value[0] if isinstance(value, tuple) else value)


def first_input(value: Any) -> Stream:
    """The first tensor that a module was called with."""
    args, kwargs = value
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return Stream(value)
    raise UnknownPoint("it is called with no tensor of numbers")


def find_blocks(model: nn.Module, n_layers: int) -> tuple[str, nn.ModuleList]:
    """The path and the list of a model's decoder blocks: its one ModuleList as long as the model is deep. A second list
    of the same blocks is none.
    """
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    n_lists = len({tuple(map(id, blocks)) for _, blocks in lists})
    if n_lists != 1:
        raise UnknownPoint(f"{type(model).__name__}: found {n_lists} lists of {n_layers} blocks, need exactly one")
    return lists[0]


class Tap(Interleaver):
    """An nnsight interleaver that hands each watched value to one function, once for the whole batch.

    watch: puts an observer on a point. run: lets values through for one forward pass.
    """

    def __init__(self, model: nn.Module, n_layers: int, custom: Mapping[str, str] | None = None) -> None:
        """custom: as in `episodes.points.Points`."""
        super().__init__()
        self._model = model
        self._path, self.blocks = find_blocks(model, n_layers)
        self._custom = custom or {}
        self.points = Points(n_layers, custom).all
        # What `worker.probe` finds out: whether a block takes and returns the residual stream whole and something else
        # beside it, and why a point cannot be had.
        self.whole = False
        self.wrong: dict[str, str] = {}
        self._watched: dict[str, Watch] = {}
        self._receive: dict[str, list[Callable[[Any], None]]] = {}
        self.reached = False  # whether the last pass came by any of its points

    @property
    def family(self) -> str:
        return type(self._model).__name__

    def watch(self, point: str) -> None:
        """Instrument the module behind a point; UnknownPoint, naming what there is, if it is not there."""
        if point in self.wrong:
            raise UnknownPoint(self.wrong[point])
        if point not in self._watched:
            self._watched[point] = watch = self.find(point)
            self.instrument(Location(watch.module, watch.location, self))

    def find(self, point: str) -> Watch:
        """Where a point should be; UnknownPoint, naming what there is, if there is no such module."""
        layer, hook = split(point)
        if hook in self._custom:
            return self._module(self._custom[hook].replace("*", str(layer)))
        if point == "embed.output":
            layer, hook = 0, "input"
        if point == "final.output":
            return self._final_norm()
        if layer is None or layer >= len(self.blocks):
            raise UnknownPoint(f"{point}: {self.family} has layers 0 to {len(self.blocks) - 1}")
        block, path = self.blocks[layer], f"{self._path}.{layer}"
        if hook == "output":
            return Watch(block, path, "output", self._output)
        if hook == "input":
            return Watch(block, path, "input", self._input(block))
        names = SANDWICHED[hook] if hasattr(block, SANDWICHED["mlp"][0]) else JOINING[hook]
        name = next((n for n in names if isinstance(getattr(block, n, None), nn.Module)), None)
        if name is None:
            has = ", ".join(name for name, _ in block.named_children())
            raise UnknownPoint(f"{point}: {type(block).__name__} has no {hook}, only {has}")
        return Watch(getattr(block, name), f"{path}.{name}", "output", first_output)

    def _stream(self, hidden: Tensor, residual: Tensor | None = None) -> Stream:
        """The residual stream, (rows, d_model), of what a block takes or returns: most of vLLM's families carry it in
        two parts.
        """
        return Stream(hidden, None if self.whole else residual)

    def _output(self, value: Any) -> Stream:
        """The residual stream after a block, out of the `hidden` or `(hidden, residual)` that it returned.

        source: vllm 0.32, model_executor/models/llama.py, LlamaDecoderLayer.forward
        """
        return self._stream(*value[:2]) if isinstance(value, tuple) else self._stream(value)

    def _input(self, block: nn.Module) -> Read:
        """A reader of the residual stream before a block, out of the `(args, kwargs)` that it was called with."""
        signature = inspect.signature(type(block).forward)
        if "hidden_states" not in signature.parameters:
            raise UnknownPoint(f"{type(block).__name__} takes no hidden_states: its input cannot be told")

        def read(value: Any) -> Stream:
            args, kwargs = value
            given = signature.bind(block, *args, **kwargs).arguments
            return self._stream(given["hidden_states"], given.get("residual"))

        return read

    def _final_norm(self) -> Watch:
        parent_path, _, _ = self._path.rpartition(".")
        parent = self._model.get_submodule(parent_path)
        name = next((n for n in FINAL_NORMS if isinstance(getattr(parent, n, None), nn.Module)), None)
        if name is None:
            raise UnknownPoint(f"final.output: {type(parent).__name__} has none of {', '.join(FINAL_NORMS)}")
        return Watch(getattr(parent, name), f"{parent_path}.{name}".lstrip("."), "output", first_output)

    def _module(self, location: str) -> Watch:
        path, _, side = location.rpartition(".")
        try:
            module = self._model.get_submodule(path)
        except AttributeError:
            raise UnknownPoint(f"{location} does not exist: {self._nearest(path)}") from None
        return Watch(module, path, side, first_output if side == "output" else first_input)

    def _nearest(self, path: str) -> str:
        """The deepest part of a path that exists, and what is in it."""
        while path:
            path = path.rpartition(".")[0]
            try:
                module = self._model.get_submodule(path)
            except AttributeError:
                continue
            return f"{path or self.family} has {', '.join(name for name, _ in module.named_children())}"
        return ""

    def run(self, sink: Sink | None, forward: Callable[[], Any]) -> Any:
        """What `forward` returns; the sink receives each of its points as the pass reaches it."""
        if sink is not None:
            for i, point in enumerate(sink.points):
                watch = self._watched[point]
                self._receive.setdefault(watch.provider, []).append(_route(i, watch.read, sink))
        self.reached = False
        self.interleaving = self.busy = True
        try:
            return forward()
        finally:
            self.interleaving = self.busy = False
            self._receive.clear()

    def handle(self, provider: str, value: Any) -> Any:
        """nnsight's hand-over: every location of an instrumented module comes by here, once, whole batch.

        What blocks there are (`worker.edit`) have their turn first, so that the observers see what they leave.
        """
        if self.mediators:
            value = super().handle(provider, value)
        for receive in self._receive.get(provider, ()):
            self.reached = True
            receive(value)
        return value


def _route(i: int, read: Read, sink: Sink) -> Callable[[Any], None]:
    return lambda value: sink.receive(i, partial(read, value))
