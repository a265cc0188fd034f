"""Points: the names of places in a model, `layers.<n>.<hook>`, and the ways people write them.

A point means the same on every architecture: `layers.8.output` is the residual stream after block 8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from episodes.errors import UnknownPoint

HOOKS = {
    "output": "the residual stream after the block",
    "input": "the residual stream before the block",
    "attn": "what the attention block adds to the residual stream",
    "mlp": "what the MLP block adds to the residual stream",
}
ALIASES = {"attn.output": "attn", "mlp.output": "mlp"}
POINT = re.compile(r"layers\.(\d+)\.(\w+)")
DEFAULT_LAYERS = (8, 12, 16)


def hook_names(given: Iterable[str]) -> list[str]:
    """The hooks in `given`, aliases resolved (`attn.output` is `attn`); UnknownPoint for any other."""
    hooks = [ALIASES.get(hook, hook) for hook in given]
    for hook in hooks:
        if hook not in HOOKS:
            raise UnknownPoint(f"hook point {hook!r} does not exist: hook points are {', '.join(HOOKS)}")
    return hooks


def name_points(layers: Iterable[int], hooks: Iterable[str], n_layers: int) -> list[str]:
    """`["layers.8.output", …]`, layer by layer in the order given, each once; UnknownPoint past the model's depth."""
    hooks = hook_names(hooks)
    points = []
    for layer in dict.fromkeys(layers):
        if not 0 <= layer < n_layers:
            raise UnknownPoint(
                f"layer {layer} does not exist: this model has layers 0 to {n_layers - 1}, each with hook points "
                f"{', '.join(HOOKS)}"
            )
        points += [f"layers.{layer}.{hook}" for hook in dict.fromkeys(hooks)]
    return points


def split_point(point: str) -> tuple[int, str]:
    """`"layers.8.output"` → `(8, "output")`; UnknownPoint for what is not a point's name."""
    match = POINT.fullmatch(point)
    if match is None or match[2] not in HOOKS:
        raise UnknownPoint(f"point {point!r} does not exist: points are layers.<n>.<hook>, hooks {', '.join(HOOKS)}")
    return int(match[1]), match[2]


def default_layers(n_layers: int) -> list[int]:
    """Layers 8, 12 and 16 where the model has them, else a quarter, half and three quarters of its depth."""
    if n_layers > max(DEFAULT_LAYERS):
        return list(DEFAULT_LAYERS)
    return sorted({n_layers // 4, n_layers // 2, 3 * n_layers // 4})


def parse_layers(text: str) -> list[int]:
    """`"8,12,16"` → `[8, 12, 16]`; UnknownPoint for anything that is not whole numbers between commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UnknownPoint(f"--layers {text!r}: give layer numbers between commas, such as 8,12,16") from None


def legacy_key(point: str) -> str:
    """`layers.8.output` → `layer_8_output`, the key that clients of activation servers know."""
    layer, hook = split_point(point)
    return f"layer_{layer}_{hook}"
