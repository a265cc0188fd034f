"""The probe: one pass of a model before it serves, which tells what points hold what their names say.

Families differ in what a block takes and returns, in silence: most return the residual stream in two parts, some return
it whole and something else beside it, some scale what attention adds, or norm it once more. So each point is measured,
not trusted; and what is to be recorded is tried, as it will be recorded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from episodes.errors import UnknownPoint
from episodes.points import split
from worker.recorder import NOT_RUN, Source, Step
from worker.tap import JOINING, Tap, Watch, flat

STREAM = ("input", "output")
# Of a sum that vLLM and the probe add up in different order: a share of its largest element.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def probe(
    tap: Tap,
    n_rows: int,
    hidden: int,
    dtype: torch.dtype,
    forward: Callable[[], Any],
    by_rank: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Run `forward`, and tell the tap how its model's blocks hand on the residual stream and what points are wrong.

    n_rows: of the pass that is run. hidden: the residual stream's width; dtype: the engine's. by_rank: gives every
    rank's value, [ranks, n_rows, hidden], where a model is split over several
    """
    tap.whole = False
    first = Probe(tap, n_rows, hidden, dtype)
    tap.wrong = first.run(forward, by_rank)
    if not any(split(point).hook in STREAM for point in tap.wrong):
        return
    tap.whole = True
    second = Probe(tap, n_rows, hidden, dtype)
    wrong = second.run(forward, by_rank)
    tap.whole = second.same_end(first) and not any(split(point).hook in STREAM for point in wrong)
    if tap.whole:
        tap.wrong = wrong


def trial(
    source: Source,
    points: Sequence[str],
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    forward: Callable[[], Any],
    by_rank: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Run `forward`, a pass of one row, as if these points of it were recorded: UnknownPoint for one that the source
    does not hand over, or of which each rank has a part. Twice, for what vLLM does in the first pass may come between.

    hidden, dtype, by_rank: as in `probe`. device: the engine's
    """
    for _ in range(2):
        slab = torch.empty((1, len(points), hidden), dtype=dtype, device=device)
        step = Step(1, [], [(0, 1, 0)], tuple(points), slab, dict.fromkeys(points, NOT_RUN))
        source.run(step, forward)
    for point, reason in step.errors.items():
        raise UnknownPoint(f"{point}: {reason}")
    if by_rank is not None:
        ranks = by_rank(slab)
        for i, point in enumerate(points):
            if not _agree(ranks[:, :, i], TOLERANCE[dtype]):
                raise UnknownPoint(f"{point}: each rank has a part of it")


class Probe:
    """What is wrong with a model's points: point → why it cannot be had."""

    def __init__(self, tap: Tap, n_rows: int, hidden: int, dtype: torch.dtype) -> None:
        self._tap = tap
        self._shape, self._dtype = (n_rows, hidden), dtype
        self._watches: dict[str, Watch] = {}
        self._seen: dict[str, Tensor] = {}  # point → the value there
        self._entered: dict[int, Tensor] = {}  # layer → what its block begins with
        self.wrong: dict[str, str] = {}

    def run(self, forward: Callable[[], Any], by_rank: Callable[[Tensor], Tensor] | None = None) -> dict[str, str]:
        """Every value must be (n_rows, hidden), met once, and the same on all ranks; a block must begin with its
        `input`, and with the `output` of the one before; and output must be input + attn + mlp.
        """
        for point in self._tap.points:
            try:
                self._watches[point] = self._tap.find(point)
            except UnknownPoint as error:
                self.wrong[point] = str(error)
        # Hooks of torch's own, which come off again: a controller of nnsight's would stay on every block.
        handles = [handle for n, block in enumerate(self._tap.blocks) for handle in self._enter(n, block)]
        handles += [
            watch.module.register_forward_hook(self._stir)
            for point, watch in self._watches.items()
            if split(point).hook == "attn"
        ]
        handles += [self._hook(point, watch) for point, watch in self._watches.items()]
        if self._tap.whole:
            handles += [block.register_forward_pre_hook(self._spoil, with_kwargs=True) for block in self._tap.blocks]
        try:
            forward()
        finally:
            for handle in handles:
                handle.remove()
        for point in self._watches.keys() - self._seen.keys() - self.wrong.keys():
            self.wrong[point] = f"{point}: {self._tap.family} does not run it"
        if by_rank is not None:
            self._check_whole(by_rank)
        self._check_stream()
        for n in range(len(self._tap.blocks)):
            self._check_joins(n)
        return self.wrong

    # ---- while the pass runs

    def _hook(self, point: str, watch: Watch) -> Any:
        """A torch hook that takes what nnsight's controller would hand over."""
        if watch.side == "output":
            return watch.module.register_forward_hook(lambda _, args, value: self._take(point, watch, value))
        return watch.module.register_forward_pre_hook(
            lambda _, args, kwargs: self._take(point, watch, (args, kwargs)), with_kwargs=True
        )

    def _take(self, point: str, watch: Watch, value: Any) -> None:
        try:
            stream = watch.read(value)
            shape = tuple(flat(stream.hidden).shape)
            if shape != self._shape:
                raise UnknownPoint(f"{self._tap.family} has {shape} there, needed {self._shape}")
            if point in self._seen:
                raise UnknownPoint(f"{self._tap.family} runs it more than once")
            self._seen[point] = into = torch.empty(shape, dtype=self._dtype, device=stream.hidden.device)
            stream.write(into, 0, shape[0])
        except Exception as error:  # whatever a model's module hands out
            self.wrong[point] = f"{point}: {error}"

    def _enter(self, layer: int, block: nn.Module) -> list[Any]:
        """Hooks that keep what the first of a block's submodules to run is given: the stream, in one part or two."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = {id(v): v for v in (*args, *kwargs.values())}.values()  # Cohere's norms are given the same twice
            values = [flat(v) for v in given if isinstance(v, Tensor) and v.is_floating_point()]
            parts = [value for value in values if tuple(value.shape) == self._shape]
            if layer not in self._entered and parts:
                self._entered[layer] = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0].clone()

        return [child.register_forward_pre_hook(enter, with_kwargs=True) for child in block.children()]

    def _stir(self, module: nn.Module, args: Any, value: Any) -> Any:
        """Add to what attention gives: with nothing in the cache that is nought, which joins the stream in any way."""
        first = value[0] if isinstance(value, tuple) else value
        if not isinstance(first, Tensor) or first.shape[-1] != self._shape[1]:
            return value
        stirred = first.nan_to_num() + torch.linspace(-1, 1, self._shape[1], dtype=first.dtype, device=first.device)
        return (stirred, *value[1:]) if isinstance(value, tuple) else stirred

    def _spoil(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Replace what is handed to a block beside the stream: one that begins with it comes to another end."""
        signature = inspect.signature(type(block).forward)
        if "residual" not in signature.parameters:
            return args, kwargs
        given = signature.bind(block, *args, **kwargs)
        if isinstance(residual := given.arguments.get("residual"), Tensor):
            given.arguments["residual"] = torch.linspace(-1, 1, residual.shape[-1]).to(residual).expand_as(residual)
        return given.args[1:], given.kwargs

    # ---- when it is over

    def same_end(self, other: Probe) -> bool:
        """Whether another pass came to the same `final.output`."""
        end, its = self._seen.get("final.output"), other._seen.get("final.output")
        return end is not None and its is not None and _same(end, its, TOLERANCE[self._dtype])

    def _check_whole(self, by_rank: Callable[[Tensor], Tensor]) -> None:
        for point, value in self._seen.items():
            if not _agree(by_rank(value), TOLERANCE[self._dtype]) or is_part(self._watches[point]):
                self.wrong[point] = (
                    f"{point}: {self._tap.family} has a part of it on each rank: name a module whose output is put "
                    "together"
                )

    def _check_stream(self) -> None:
        """A family whose blocks do not begin with what `input` or `output` says has neither, at no layer."""
        family, seen = self._tap.family, self._seen
        for n in range(len(self._tap.blocks)):
            begins = self._entered.get(n)
            before = f"layers.{n - 1}.output" if n else "embed.output"
            for point in (f"layers.{n}.input", before):
                if point in seen and (begins is None or not _same(begins, seen[point], TOLERANCE[self._dtype])):
                    self._refuse(split(point).hook, f"{family}: layer {n} does not begin with {point}")

    def _refuse(self, hook: str, reason: str) -> None:
        for point in self._watches:
            if split(point).hook == hook:
                self.wrong.setdefault(point, f"{point}: {reason}")

    def _check_joins(self, n: int) -> None:
        points = [f"layers.{n}.{hook}" for hook in ("input", "attn", "mlp", "output")]
        if any(point not in self._seen or point in self.wrong for point in points):
            reason = f"{self._tap.family}: what attn and mlp add at layer {n} cannot be told"
        else:
            before, attn, mlp, after = (self._seen[point].float() for point in points)
            rounding = 4 * torch.finfo(self._dtype).eps * (before.abs() + attn.abs() + mlp.abs() + after.abs())
            limit = TOLERANCE[self._dtype] * float((attn + mlp).nan_to_num().abs().max()) + rounding
            if not ((before + attn + mlp - after).abs() > limit).any():  # what is no number says nothing
                return
            reason = f"{self._tap.family}: attn and mlp are not what joins the residual stream at layer {n}"
        for hook in ("attn", "mlp"):
            self.wrong.setdefault(f"layers.{n}.{hook}", f"layers.{n}.{hook}: {reason}")


def is_part(watch: Watch) -> bool:
    """Whether each rank has its own there, which the probe cannot tell of attention: with nothing in the cache that is
    the same on all ranks. vLLM's linear layers say it; of anything else inside attention it is taken for granted.

    source: vllm 0.32, model_executor/layers/linear.py, LinearBase, ColumnParallelLinear and RowParallelLinear
    """
    module = getattr(watch.module, "base_layer", watch.module)  # that an adapter is wrapped around
    *around, name = watch.path.split(".")
    if not hasattr(module, "skip_bias_add"):  # no linear layer
        added_up = all(getattr(inner, "reduce_results", True) for inner in module.modules())
        return any(n in JOINING["attn"] for n in around) or (name in JOINING["attn"] and not added_up)
    if watch.side == "input":
        return bool(getattr(module, "input_is_parallel", False))
    return not getattr(module, "gather_output", True) or not getattr(module, "reduce_results", True)


def _agree(ranks: Tensor, tolerance: float) -> bool:
    """Whether every rank has what the first has. ranks: [ranks, …]"""
    first, *others = ranks
    return all(_same(other, first, tolerance) for other in others)


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Equal to within a share of the largest element; NaN equals NaN."""
    a, b = a.nan_to_num(), b.nan_to_num()
    return bool(torch.allclose(a, b, rtol=0, atol=tolerance * float(b.abs().max())))
