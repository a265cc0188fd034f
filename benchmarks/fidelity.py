"""Every row that the worker records, against transformers, on this machine's device.

    python benchmarks/fidelity.py [--sources nnsight,graphs,aux] [--dtypes float32] [--device cuda] [--model DIR]

For each source and dtype a worker is started, and conversations are held with it several at a time, so that prompts
come in chunks, beside decode steps, and find earlier turns in the cache. Every row is compared with what transformers
computes for the same tokens in float32. In float32 no row may be further off than 1e-4 of its length. In bfloat16 a
row's cosine has to be 0.999 but for one row in 500, and on average no further off than that of transformers in
bfloat16, which is listed beside, and a quarter more. Exits with 1 where that is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import servers
import traffic
from episodes.wire import CallFile
from traffic import Tally

PORT = 8013
EPISODES, TURNS = 6, 3
# Of the largest step: less than a prompt, so that prompts come in several.
CHUNK = 256
ERROR_LIMIT, NEAR, FEW, SLACK = 1e-4, 0.999, 1 / 500, 1.25

Rows = NDArray[np.float32]


class Recorded(NamedTuple):
    """Of one call: the tokens that were fed in, and of which positions there are rows: [positions, points, hidden]."""

    tokens: list[int]
    position: NDArray[np.int32]
    rows: Rows


class Kept(traffic.Claimed):
    """What is claimed stays in memory."""

    def __init__(self, scratch: Path, points: tuple[str, ...]) -> None:
        super().__init__(scratch, points)
        self.calls: list[Recorded] = []

    def take(self, path: Path) -> int:
        file = CallFile(path)
        (sequence,) = file.sequences
        tokens = sequence.tokens.tolist()
        assert [tokens[at] for at in file.position] == file.token_id.tolist()
        self.calls.append(Recorded(tokens, np.array(file.position), np.asarray(file.rows, np.float32)))
        return super().take(path)


class Reference:
    """transformers' own residual stream after some blocks."""

    def __init__(self, model: Path, layers: list[int], dtype: str, device: str) -> None:
        from transformers import AutoModelForCausalLM

        self._device, self._found = device, dict.fromkeys(layers, torch.empty(0))
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(device).eval()
        for layer in layers:
            block = self._model.get_decoder().layers[layer]
            block.register_forward_hook(lambda module, args, value, layer=layer: self._keep(layer, value))

    def _keep(self, layer: int, value: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        self._found[layer] = (value[0] if isinstance(value, tuple) else value).float()

    @torch.inference_mode()
    def __call__(self, call: Recorded) -> Rows:
        """What a call's rows should be."""
        self._model(torch.tensor([call.tokens], device=self._device))
        found = torch.stack([value.reshape(len(call.tokens), -1) for value in self._found.values()], 1)
        rows: Rows = found.cpu().numpy()[call.position]
        return rows


class Distance(NamedTuple):
    """Of rows to what they should be. error: relative. far: the share of rows whose cosine is below `NEAR`."""

    n_rows: int
    error: float
    cosine: float
    off: float
    far: float


def distance(found: Rows, expected: Rows) -> Distance:
    lengths = np.linalg.norm(expected, axis=-1)
    error = np.linalg.norm(found - expected, axis=-1) / lengths
    cosine = (found * expected).sum(-1) / (lengths * np.linalg.norm(found, axis=-1))
    return Distance(len(found), error.max(), cosine.min(), np.mean(1 - cosine), np.mean(cosine < NEAR))


def record(source: str, dtype: str, options: argparse.Namespace) -> list[Recorded]:
    """Hold the conversations with a worker, and keep what it records."""
    layers = ",".join(map(str, options.layers))
    model = [str(options.model), "--served-model-name", traffic.NAME] if options.model else []
    flags = [*model, "--port", str(PORT), "--dtype", dtype, "--capture-source", source, "--layers", layers]
    flags += ["--max-model-len", "8192", "--max-num-batched-tokens", str(CHUNK), *options.server_flags]
    replay = traffic.load(None, EPISODES, TURNS)
    with TemporaryDirectory() as name:
        kept = Kept(Path(name), tuple(f"layers.{n}.output" for n in options.layers))
        with servers.running(servers.ours(flags), PORT, Path(name) / "server.log") as server:
            asyncio.run(replay.play(server.url, kept, replay.fresh(), Tally()))
    return kept.calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", default="nnsight,aux", help="as the worker's --capture-source (%(default)s)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the model and its rows (%(default)s)")
    parser.add_argument("--layers", help="numbers, with commas between them (the first, the middle and the last)")
    parser.add_argument("--device", default="cpu", help="of transformers (%(default)s)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="another than the embedded one")
    parser.add_argument("--server-flags", type=str.split, default=[], metavar="FLAGS", help="vLLM's own")
    options = parser.parse_args()
    home = options.model or servers.model_home()
    depth = json.loads((home / "config.json").read_text())["num_hidden_layers"]
    numbers = options.layers.split(",") if options.layers else [0, depth // 2, depth - 1]
    options.layers = sorted(map(int, numbers))
    kinds = list(itertools.product(options.dtypes.split(","), options.sources.split(",")))
    found = {(dtype, source): record(source, dtype, options) for dtype, source in kinds}
    shown = Table("", "dtype", "rows", "worst error", "lowest cosine", "1 − cosine, mean", f"rows below {NEAR}")
    good = compare(found, home, options, shown)
    print(f"{servers.machine()}, {home.name}, layers {', '.join(map(str, options.layers))}, against float32")
    Console(width=120).print(shown)
    sys.exit(not good)


def compare(
    found: dict[tuple[str, str], list[Recorded]], home: Path, options: argparse.Namespace, shown: Table
) -> bool:
    """Whether all are as near as they have to be; a line each in the table."""
    good = True
    exact = Reference(home, options.layers, "float32", options.device)
    for dtype in dict.fromkeys(dtype for dtype, _ in found):
        theirs = None if dtype == "float32" else Reference(home, options.layers, dtype, options.device)
        for source in (source for kind, source in found if kind == dtype):
            calls = found[dtype, source]
            expected = np.concatenate([exact(call) for call in calls])
            ours = distance(np.concatenate([call.rows for call in calls]), expected)
            shown.add_row(f"tautap, {source}", dtype, *words(ours))
            if theirs is None:
                good &= ours.error <= ERROR_LIMIT
                continue
            rounded = distance(np.concatenate([theirs(call) for call in calls]), expected)
            shown.add_row("transformers, the same tokens", dtype, *words(rounded))
            good &= ours.far <= FEW and ours.off <= SLACK * rounded.off
    return good


def words(d: Distance) -> list[str]:
    return [f"{d.n_rows:,}", f"{d.error:.1e}", f"{d.cosine:.6f}", f"{d.off:.1e}", f"{d.far:.3%}"]


if __name__ == "__main__":
    main()
