"""The tap: nnsight observers on the points of a model, reading each step's whole batch once.

A step on which nothing is captured costs a module with a point one attribute test, and a module without a point
nothing at all: only modules with points carry nnsight's controller.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from nnsight.intervention.interleaver import Interleaver
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from episodes.errors import UnknownPoint
from episodes.points import split

# The submodule whose output joins the residual stream, by the names that model families give it.
JOINING = {
    "attn": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "block_sparse_moe"),
}
# Where a norm stands between a submodule and the residual stream (Gemma 2 and 3, OLMo 2), it is the norm's output.
SANDWICHED = {"attn": ("post_attention_layernorm",), "mlp": ("post_feedforward_layernorm",)}
FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
# Rounding of a sum that vLLM and the probe add up in different order.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Stream(NamedTuple):
    """A value at a point: `hidden`, plus `residual` where vLLM carries the residual stream in two parts.

    Each is (rows, d_model), or (1, rows, d_model) where vLLM runs a model of transformers' own.
    """

    hidden: Tensor
    residual: Tensor | None = None

    @property
    def n_rows(self) -> int:
        return len(_flat(self.hidden))

    def write(self, into: Tensor, start: int, stop: int) -> None:
        """Rows start to stop into a [stop - start, hidden] slice, at once: fused norms overwrite both parts soon."""
        hidden = _flat(self.hidden).narrow(0, start, stop - start)
        if self.residual is None:
            into.copy_(hidden)
        else:
            torch.add(hidden, _flat(self.residual).narrow(0, start, stop - start), out=into)


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


def _flat(value: Tensor) -> Tensor:
    return value[0] if value.dim() == 3 and value.shape[0] == 1 else value


def block_output(value: Any) -> Stream:
    """The residual stream after a block: its hidden states and, in most of vLLM's families, the residual apart.

    value:  `hidden` or `(hidden, residual)`, each (rows, d_model)
    source: vllm 0.32, model_executor/models/llama.py, LlamaDecoderLayer.forward
    """
    return Stream(*value[:2]) if isinstance(value, tuple) else Stream(value)


def block_input(module: nn.Module) -> Read:
    """A reader of the residual stream before a block, out of the `(args, kwargs)` that the block was called with."""
    signature = inspect.signature(type(module).forward)
    if "hidden_states" not in signature.parameters:
        raise UnknownPoint(f"{type(module).__name__} takes no hidden_states: its input cannot be told")

    def read(value: Any) -> Stream:
        args, kwargs = value
        given = signature.bind(module, *args, **kwargs).arguments
        return Stream(given["hidden_states"], given.get("residual"))

    return read


def first_output(value: Any) -> Stream:
    """What a module returns, the first of several: norms return the residual beside it, linear layers a bias."""
    return Stream(value[0] if isinstance(value, tuple) else value)


def first_input(value: Any) -> Stream:
    """The first tensor that a module was called with."""
    args, kwargs = value
    return Stream(next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()))


def find_blocks(model: nn.Module, n_layers: int) -> tuple[str, nn.ModuleList]:
    """The path and the list of a model's decoder blocks: its one ModuleList as long as the model is deep."""
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if len(found) != 1:
        raise UnknownPoint(f"{type(model).__name__}: found {len(found)} lists of {n_layers} blocks, need exactly one")
    return found[0]


class Tap(Interleaver):
    """An nnsight interleaver that hands each watched value to one function, once for the whole batch.

    watch: puts an observer on a point. run: lets values through for one forward pass.
    """

    def __init__(self, model: nn.Module, n_layers: int, custom: Mapping[str, str] | None = None) -> None:
        """custom: as in `episodes.points.Points`."""
        super().__init__()
        self._model = model
        self._path, self._blocks = find_blocks(model, n_layers)
        self._custom = custom or {}
        self._watched: dict[str, Watch] = {}
        self._receive: dict[str, list[Callable[[Any], None]]] = {}
        self.reached = False  # whether the last pass came by any of its points

    @property
    def family(self) -> str:
        return type(self._model).__name__

    def watch(self, point: str) -> None:
        """Instrument the module behind a point; UnknownPoint, naming what there is, if it is not there."""
        if point not in self._watched:
            self._watched[point] = watch = self._find(point)
            self.instrument(Location(watch.module, watch.location, self))

    def _find(self, point: str) -> Watch:
        layer, hook = split(point)
        if hook in self._custom:
            return self._module(self._custom[hook].replace("*", str(layer)))
        if point == "embed.output":
            layer, hook = 0, "input"
        if point == "final.output":
            return self._final_norm()
        if layer is None or layer >= len(self._blocks):
            raise UnknownPoint(f"{point}: {self.family} has layers 0 to {len(self._blocks) - 1}")
        block, path = self._blocks[layer], f"{self._path}.{layer}"
        if hook == "output":
            return Watch(block, path, "output", block_output)
        if hook == "input":
            return Watch(block, path, "input", block_input(block))
        names = SANDWICHED[hook] if hasattr(block, SANDWICHED["mlp"][0]) else JOINING[hook]
        name = next((n for n in names if isinstance(getattr(block, n, None), nn.Module)), None)
        if name is None:
            has = ", ".join(name for name, _ in block.named_children())
            raise UnknownPoint(f"{point}: {type(block).__name__} has no {hook}, only {has}")
        return Watch(getattr(block, name), f"{path}.{name}", "output", first_output)

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

    def probe(
        self,
        points: Iterable[str],
        forward: Callable[[], Any],
        n_rows: int,
        hidden: int,
        dtype: torch.dtype,
        by_rank: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Run `forward`, a pass of n_rows, and check that the points hold what their names say.

        Every value must be (n_rows, hidden) and the same on all ranks; each block's input must be the output of the one
        before; and output must be input + attn + mlp where attn or mlp are asked for. UnknownPoint, naming the family,
        where it is not so.

        by_rank: gives every rank's value, [ranks, n_rows, hidden], where a model is split over several
        """
        asked = list(points)
        chain = [f"layers.{n}.{side}" for n in range(len(self._blocks)) for side in ("input", "output")]
        adding = ["layers.0.attn", "layers.0.mlp"] if {split(p).hook for p in asked} & {"attn", "mlp"} else []
        names = list(dict.fromkeys([*asked, *(chain if self._in_stream(asked) else []), *adding]))
        seen: dict[str, Tensor] = {}

        def receive(name: str, stream: Stream) -> None:
            shape = tuple(_flat(stream.hidden).shape)
            if shape != (n_rows, hidden):
                raise UnknownPoint(f"{name}: {self.family} has {shape} there, needed ({n_rows}, {hidden})")
            seen[name] = slab = torch.empty(shape, dtype=dtype, device=stream.hidden.device)
            stream.write(slab, 0, n_rows)

        # Hooks of torch's own, which come off again: a controller of nnsight's would stay on every block.
        handles = [_hook(self._find(name), partial(receive, name)) for name in names]
        try:
            forward()
        finally:
            for handle in handles:
                handle.remove()
        for name in names:
            if name not in seen:
                raise UnknownPoint(f"{name}: {self.family} does not run it")
        if by_rank is not None:
            self._check_whole({name: by_rank(seen[name]) for name in asked}, dtype)
        self._check_stream(seen, dtype)

    @staticmethod
    def _in_stream(points: list[str]) -> bool:
        return any(split(p).hook in ("input", "output", "attn", "mlp") or p == "embed.output" for p in points)

    def _check_whole(self, ranks: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        for name, (first, *others) in ranks.items():
            if _is_part(self._find(name)) or not all(_same(other, first, TOLERANCE[dtype]) for other in others):
                raise UnknownPoint(
                    f"{name}: {self.family} has a part of it on each rank: name a module whose output is put together"
                )

    def _check_stream(self, seen: dict[str, Tensor], dtype: torch.dtype) -> None:
        for n in range(1, len(self._blocks) if "layers.0.output" in seen else 0):
            if not _same(seen[f"layers.{n}.input"], seen[f"layers.{n - 1}.output"], 0):
                raise UnknownPoint(f"{self.family}: layer {n} does not begin with what layer {n - 1} ends with")
        if "layers.0.attn" in seen:
            before, attn, mlp, after = (seen[f"layers.0.{part}"].float() for part in ("input", "attn", "mlp", "output"))
            if not _same(before + attn + mlp, after, TOLERANCE[dtype]):
                raise UnknownPoint(f"{self.family}: attn and mlp are not what joins the residual stream")


def _is_part(watch: Watch) -> bool:
    """Whether each rank has its own there, which the probe cannot tell inside attention: what that leaves without a
    cache is the same on all ranks. vLLM's linear layers say it; of anything else in there it is taken for granted.

    source: vllm 0.32, model_executor/layers/linear.py, LinearBase, ColumnParallelLinear and RowParallelLinear
    """
    module = getattr(watch.module, "base_layer", watch.module)  # that an adapter is wrapped around
    *around, _ = watch.path.split(".")
    if not hasattr(module, "skip_bias_add"):  # no linear layer
        return any(name in JOINING["attn"] for name in around)
    if watch.side == "input":
        return bool(getattr(module, "input_is_parallel", False))
    return not getattr(module, "gather_output", True) or not getattr(module, "reduce_results", True)


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Equal to within a share of the largest element. NaN equals NaN: without a cache, attention leaves what was in
    memory.
    """
    a, b = a.nan_to_num(), b.nan_to_num()
    return bool(torch.allclose(a, b, rtol=0, atol=tolerance * float(b.abs().max())))


def _hook(watch: Watch, receive: Callable[[Stream], None]) -> RemovableHandle:
    """A torch hook that reads what nnsight's controller would hand over."""
    if watch.side == "output":
        return watch.module.register_forward_hook(lambda module, args, value: receive(watch.read(value)))
    return watch.module.register_forward_pre_hook(
        lambda module, args, kwargs: receive(watch.read((args, kwargs))), with_kwargs=True
    )


def _route(i: int, read: Read, sink: Sink) -> Callable[[Any], None]:
    return lambda value: sink.receive(i, partial(read, value))
