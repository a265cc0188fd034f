"""Points: the names of places in a model, and the ways people write them.

    layers.<n>.<hook>   at block n: `output`, `input`, `attn`, `mlp`, or a hook of the user's own
    embed.output        what enters the first block
    final.output        what leaves the final norm
    <name>              a module of the user's own, outside the blocks

A point means the same on every architecture: `layers.8.output` is the residual stream after block 8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import NamedTuple

from episodes.errors import BadInput, UnknownPoint

HOOKS = {
    "output": "the residual stream after the block",
    "input": "the residual stream before the block",
    "attn": "what the attention block adds to the residual stream",
    "mlp": "what the MLP block adds to the residual stream",
}
ENDS = {"embed.output": "the residual stream before the first block", "final.output": "the final norm's output"}
POINT_LIMIT = 512
ALIASES = {"attn.output": "attn", "mlp.output": "mlp"}
DEFAULT_LAYERS = (8, 12, 16)
LAYERS = re.compile(r"(-?\d+)|(-?\d+)-(-?\d+)|(-?\d*):(-?\d*)(?::([1-9]\d*))?")
CUSTOM = re.compile(r"([a-z]\w*)=([\w.]+(?:\.\*\.[\w.]+)?\.(?:input|output))")


class Point(NamedTuple):
    """A point's name, taken apart. layer: None outside the blocks."""

    layer: int | None
    hook: str


class Points:
    """The points that a model offers.

    custom: hook name → nnsight location of a module's `.input` or `.output`, such as
    `model.layers.*.self_attn.o_proj.output`, where `*` stands for the layer. only: the points there are, where they
    were settled before the model was compiled. wrong: point → why this model does not have it all the same.
    """

    def __init__(
        self,
        n_layers: int,
        custom: Mapping[str, str] | None = None,
        only: Iterable[str] | None = None,
        wrong: Mapping[str, str] | None = None,
    ) -> None:
        self.n_layers = n_layers
        self.custom = dict(custom or {})
        self.only = None if only is None else list(only)
        self.wrong = wrong or {}

    @cached_property
    def all(self) -> list[str]:
        """Every point there is."""
        if self.only is not None:
            return self.only
        inside = [hook for hook in (*HOOKS, *self.custom) if self._inside(hook)]
        points = [f"layers.{layer}.{hook}" for layer in range(self.n_layers) for hook in inside]
        outside = [*ENDS, *(hook for hook in self.custom if not self._inside(hook))]
        return [point for point in (*points, *outside) if point not in self.wrong]

    def _inside(self, hook: str) -> bool:
        """Whether every layer has it."""
        return hook in HOOKS or "*" in self.custom.get(hook, "")

    @cached_property
    def hooks(self) -> list[str]:
        """Every hook name there is, those of the blocks first."""
        found = {split(point).hook for point in self.all}
        return [hook for hook in (*HOOKS, *ENDS, *self.custom) if hook in found]

    @cached_property
    def layers(self) -> list[int]:
        """The layers that have points."""
        return sorted({layer for layer, _ in map(split, self.all) if layer is not None})

    def name(self, layers: Iterable[int], hooks: Iterable[str]) -> list[str]:
        """`["layers.8.output", …]`, layer by layer in the order given, each once; negative layers count from the end.

        UnknownPoint for a layer or a hook that the model does not have.
        """
        wanted = dict.fromkeys(ALIASES.get(hook, hook) for hook in hooks)
        for hook in wanted:
            if hook not in self.hooks:
                raise UnknownPoint(f"hook point {hook!r} does not exist: hook points are {', '.join(self.hooks)}")
        inside = [hook for hook in wanted if self._inside(hook)]
        points = [f"layers.{layer}.{hook}" for layer in map(self.layer, layers) for hook in inside]
        named = list(dict.fromkeys([*points, *(hook for hook in wanted if hook not in inside)]))
        if len(named) > POINT_LIMIT:
            raise UnknownPoint(f"{len(named)} points: at most {POINT_LIMIT} can be recorded at once")
        for point in named:
            self._settled(point)
        return named

    def layer(self, number: int) -> int:
        """The layer's number from 0; UnknownPoint past the model's depth."""
        if not -self.n_layers <= number < self.n_layers:
            raise UnknownPoint(
                f"layer {number} does not exist: this model has layers 0 to {self.n_layers - 1}, each with hook points "
                f"{', '.join(HOOKS)}"
            )
        return number % self.n_layers

    def _settled(self, point: str) -> None:
        if point in self.wrong:
            raise UnknownPoint(self.wrong[point])
        if self.only is not None and point not in self.only:
            raise UnknownPoint(f"point {point!r} is not one of those that the worker was started with: {self.only}")

    def check(self, point: str) -> Point:
        """A point's name taken apart; UnknownPoint for what is none of this model's."""
        self._settled(point)
        parsed = split(point)
        if parsed.layer is None:
            if parsed.hook in (*ENDS, *self.custom) and not self._inside(parsed.hook):
                return parsed
        elif self._inside(parsed.hook):
            return Point(self.layer(parsed.layer), parsed.hook)
        raise UnknownPoint(
            f"point {point!r} does not exist: points are layers.<n>.<hook> with hooks {', '.join(HOOKS)}, and "
            f"{', '.join([*ENDS, *self.custom])}"
        )

    def parse_layers(self, text: str) -> list[int]:
        """`8,12,16`, `all`, ranges `8-15` (inclusive) and slices `::4`, `-4:` → layer numbers.

        UnknownPoint for anything else, and for a range without a layer in it
        """
        layers: list[int] = []
        for part in text.split(","):
            found = self._parse(part.strip())
            if not found:
                raise UnknownPoint(
                    f"--layers {text!r}: give layers of 0 to {self.n_layers - 1} as numbers (-1 is the last), ranges "
                    "(8-15), slices (::4) or all, with commas between"
                )
            layers += found
        return list(dict.fromkeys(map(self.layer, layers)))

    def _parse(self, part: str) -> list[int]:
        if part == "all":
            return list(range(self.n_layers))
        match = LAYERS.fullmatch(part)
        if match is None:
            return []
        one, first, last, start, stop, step = match.groups()
        if one is not None:
            return [int(one)]
        if first is not None:
            return list(range(self.layer(int(first)), self.layer(int(last)) + 1))
        bounds = slice(*(int(bound) if bound else None for bound in (start, stop, step)))
        return list(range(self.n_layers))[bounds]


def split(point: str) -> Point:
    """A point's name, taken apart without regard to any model."""
    match = re.fullmatch(r"layers\.(0|[1-9]\d*)\.(\w+)", point)
    return Point(int(match[1]), match[2]) if match else Point(None, point)


def parse_custom(text: str) -> tuple[str, str]:
    """`name=model.layers.*.self_attn.o_proj.output` → name and location; BadInput says what is accepted."""
    match = CUSTOM.fullmatch(text)
    if match is None or match[1] in (*HOOKS, "layers"):
        raise BadInput(
            f"--point {text!r}: give name=location, a new name and a module's .input or .output, at most one * for the "
            "layer, such as o_proj=model.layers.*.self_attn.o_proj.output"
        )
    return match[1], match[2]


def default_layers(n_layers: int) -> list[int]:
    """Layers 8, 12 and 16 where the model has them, else a quarter, half and three quarters of its depth."""
    if n_layers > max(DEFAULT_LAYERS):
        return list(DEFAULT_LAYERS)
    return sorted({n_layers // 4, n_layers // 2, 3 * n_layers // 4})


def legacy_key(point: str) -> str:
    """`layers.8.output` → `layer_8_output`, the key that clients of activation servers know."""
    layer, hook = split(point)
    return hook.replace(".", "_") if layer is None else f"layer_{layer}_{hook}"
