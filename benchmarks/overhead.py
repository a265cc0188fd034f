"""What capture costs: agent traffic through stock vLLM, our worker and the alternatives, in one run, as ratios.

    python benchmarks/overhead.py [RESULTS] [--columns stock,off,3] [--blocks 2] [--rounds 3] [--dtype float32]
        [--model DIR] [--in-flight 8] [--server-flags=--gpu-memory-utilization=0.8]

RESULTS is a tau-bench results file: its trajectories are replayed, 8 episodes at once; without one, made-up ones are.
Every round has a system prompt that no server has seen, and puts it into the cache before its clock starts: a run of a
hundred episodes does so once. The embedded model answers each call with 32 tokens, which are thrown away: the recorded
reply goes into the next prompt, so that every server gets the same traffic.

The servers take turns, in blocks, and columns of one server alternate round by round, so that a machine that speeds up
or slows down does so for all. Rows are claimed, stored and deleted at the worker while the traffic runs, as the proxy
does. `ratio` is to the median of stock vLLM with the same flags: `compiled` for it and `aux`, `graphed` for `graphs`
(which want a CUDA device, and run only where they are named), eager for all others; `to off` is to our own worker with
capture off for the call, in the same process. `saving` is by how much storing every token of every call would have been
more. The worker of `off`, `3` and `all` has all its layers instrumented.

`edit` is nnsight's own runner in vLLM's API server, with a block that saves 3 layers of every request, under nnsight's
defaults: no prefix cache, no chunked prefill. `extract` is vLLM's extract_hidden_states, its connector mended so that
it runs on the CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

import servers
import traffic
from servers import Command, Server
from traffic import Keeper, Tally, Traffic

PORT = 8011
FLAGS = ["--port", str(PORT), "--max-model-len", str(traffic.MAX_MODEL_LEN)]
LAYERS = [8, 12, 16]
WIDTHS = {"bfloat16": 2, "float32": 4}


class Column(NamedTuple):
    """server: a name in `commands`. base, off: the columns that its ratios are to, of the same flags and of the same
    server without capture. n_points: how many the keeper keeps of each row, None for every layer. keeper: of a
    directory and a row's bytes.
    """

    title: str
    server: str
    base: str
    off: str
    n_points: int | None
    keeper: Callable[[Path, int], Keeper]


def three(scratch: Path, row_bytes: int) -> Keeper:
    return traffic.Claimed(scratch, tuple(f"layers.{n}.output" for n in LAYERS))


def every(scratch: Path, row_bytes: int) -> Keeper:
    return traffic.Claimed(scratch)


def nothing(scratch: Path, row_bytes: int) -> Keeper:
    return traffic.Nothing()


def home(scratch: Path, row_bytes: int) -> Keeper:
    return traffic.Home(row_bytes)


def extracted(scratch: Path, row_bytes: int) -> Keeper:
    return traffic.Extracted()


COLUMNS = {
    "stock": Column("stock vLLM", "stock", "stock", "", 0, nothing),
    "off": Column("ours, capture off", "ours", "stock", "off", 0, nothing),
    "3": Column("ours, 3 layers", "ours", "stock", "off", 3, three),
    "all": Column("ours, all layers", "ours", "stock", "off", None, every),
    "edit": Column("nnsight edit(), 3 layers", "edit", "stock", "", 3, home),
    "extract": Column("extract_hidden_states, 3 layers", "extract", "stock", "", 3, extracted),
    "compiled": Column("stock vLLM, compiled", "compiled", "compiled", "", 0, nothing),
    "aux-off": Column("ours, aux, capture off", "aux", "compiled", "aux-off", 0, nothing),
    "aux": Column("ours, aux, 3 layers", "aux", "compiled", "aux-off", 3, three),
    "aux-all": Column("ours, aux, all layers", "aux-all", "compiled", "", None, every),
    "graphed": Column("stock vLLM, decode graphs", "graphed", "graphed", "", 0, nothing),
    "graphs-off": Column("ours, graphs, capture off", "graphs", "graphed", "graphs-off", 0, nothing),
    "graphs": Column("ours, graphs, 3 layers", "graphs", "graphed", "graphs-off", 3, three),
    "graphs-all": Column("ours, graphs, all layers", "graphs-all", "graphed", "", None, every),
}
ON_CUDA = ("graphed", "graphs-off", "graphs", "graphs-all")


def commands(scratch: Path, options: argparse.Namespace) -> dict[str, Callable[[], Command]]:
    """How each server is started."""
    model = [str(options.model), "--served-model-name", traffic.NAME] if options.model else []
    flags = [*model, *FLAGS, "--dtype", options.dtype, *options.server_flags]
    three, every = ["--layers", ",".join(map(str, LAYERS))], ["--layers", "all"]
    aux, graphs = ([*flags, "--capture-source", source] for source in ("aux", "graphs"))
    return {
        "stock": lambda: servers.stock(flags),
        "ours": lambda: servers.ours([*flags, *every]),
        "compiled": lambda: servers.stock([*aux, *three]),
        "aux": lambda: servers.ours([*aux, *three]),
        "aux-all": lambda: servers.ours([*aux, *every]),
        "graphed": lambda: servers.stock([*graphs, *three]),
        "graphs": lambda: servers.ours([*graphs, *three]),
        "graphs-all": lambda: servers.ours([*graphs, *every]),
        "edit": lambda: servers.edited(flags, LAYERS, traffic.MAX_MODEL_LEN),
        "extract": lambda: servers.extracting(flags, LAYERS, scratch),
    }


class Round(NamedTuple):
    wall_s: float
    cpu_s: float
    n_rows: int
    n_bytes: int


def measure(server: Server, keeper: Keeper, replay: Traffic) -> Round:
    """All episodes once; the clock starts when their system prompt is in the cache."""
    tally, episodes = Tally(), replay.fresh()
    asyncio.run(replay.prime(server.url, keeper, episodes[0], tally))
    cpu, begun = server.cpu_seconds(), time.monotonic()
    asyncio.run(replay.play(server.url, keeper, episodes, tally))
    return Round(time.monotonic() - begun, server.cpu_seconds() - cpu, tally.n_rows, tally.n_bytes)


def measure_server(
    name: str, columns: list[str], replay: Traffic, options: argparse.Namespace, scratch: Path
) -> list[tuple[str, Round]]:
    """Rounds of the columns that one server serves, in turn."""
    keepers = {column: COLUMNS[column].keeper(scratch, row_bytes(column, options)) for column in columns}
    found = []
    with servers.running(commands(scratch, options)[name](), PORT, scratch / "server.log") as server:
        for column in columns:  # not counted: the first calls compile and instrument
            asyncio.run(replay.prime(server.url, keepers[column], replay.fresh()[0], Tally()))
        for number in range(options.rounds):
            for column in columns if number % 2 else columns[::-1]:
                found.append((column, measure(server, keepers[column], replay)))
                print(f"  {COLUMNS[column].title}: {json.dumps(found[-1][1]._asdict())}", file=sys.stderr)
    return found


def row_bytes(column: str, options: argparse.Namespace) -> int:
    """Bytes of the vectors that are kept of one token."""
    n_points = COLUMNS[column].n_points
    return (options.n_layers if n_points is None else n_points) * options.hidden * WIDTHS[options.dtype]


def table(found: dict[str, list[Round]], options: argparse.Namespace) -> Table:
    """One line a column. MB stored a round; and by how much every token of every call would have been more."""
    shown = Table("", "rounds", "wall s", "ratio", "to off", "spread s", "CPU s", "ratio", "to off", "MB", "saving")
    for name, rounds in found.items():
        column = COLUMNS[name]
        bases = [found.get(base, []) for base in (column.base, column.off)]
        times = [*timings("wall_s", rounds, bases), spread(rounds), *timings("cpu_s", rounds, bases)]
        shown.add_row(column.title, str(len(rounds)), *times, *sizes(rounds, row_bytes(name, options)))
    return shown


def timings(key: str, rounds: list[Round], bases: list[list[Round]]) -> list[str]:
    """Median seconds, and their ratio to those of each of the bases that there is."""
    median, *others = (statistics.median(getattr(r, key) for r in rs) if rs else None for rs in (rounds, *bases))
    return [f"{median:.2f}", *("" if other is None else f"{median / other:.3f}" for other in others)]


def spread(rounds: list[Round]) -> str:
    return f"{min(r.wall_s for r in rounds):.1f}–{max(r.wall_s for r in rounds):.1f}"


def sizes(rounds: list[Round], row_bytes: int) -> list[str]:
    if not row_bytes:
        return ["", ""]
    stored, every = sum(r.n_bytes for r in rounds), sum(r.n_rows for r in rounds) * row_bytes
    return [f"{stored / len(rounds) / 1e6:.1f}", f"{every / stored:.1f}×"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, help="a tau-bench results file to replay")
    usual = ",".join(name for name in COLUMNS if name not in ON_CUDA)
    parser.add_argument("--columns", default=usual, help="which to measure (%(default)s)")
    parser.add_argument("--blocks", type=int, default=2, help="times that each server is started (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each column per start (%(default)s)")
    parser.add_argument("--in-flight", type=int, default=traffic.IN_FLIGHT, help="episodes at once (%(default)s)")
    parser.add_argument("--episodes", type=int, help="episodes of a round (as many as at once)")
    parser.add_argument("--turns", type=int, help="calls of an episode, at most (all)")
    parser.add_argument("--dtype", choices=WIDTHS, default="bfloat16", help="of the model and its rows (%(default)s)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="another than the embedded one; 17 layers at least")
    parser.add_argument(
        "--server-flags", type=str.split, default=[], metavar="FLAGS", help="of every server's, vLLM's own"
    )
    options = parser.parse_args()
    config = json.loads(((options.model or servers.model_home()) / "config.json").read_text())
    options.n_layers, options.hidden = config["num_hidden_layers"], config["hidden_size"]
    options.columns = options.columns.split(",")
    unknown = set(options.columns) - set(COLUMNS)
    if unknown:
        parser.error(f"--columns: no {', '.join(sorted(unknown))}; there are {', '.join(COLUMNS)}")
    return options


def main() -> None:
    options = parse()
    replay = traffic.load(options.results, options.episodes or options.in_flight, options.turns, options.in_flight)
    by_server: dict[str, list[str]] = defaultdict(list)
    for column in options.columns:
        by_server[COLUMNS[column].server].append(column)
    found: dict[str, list[Round]] = {column: [] for column in options.columns}
    for block in range(options.blocks):
        for name in list(by_server)[:: -1 if block % 2 else 1]:
            with TemporaryDirectory() as scratch:
                rounds = measure_server(name, by_server[name], replay, options, Path(scratch))
                for column, one in rounds:
                    found[column].append(one)
    name = options.model.name if options.model else traffic.NAME
    print(f"{servers.machine()}, {name}: {replay.title}, {options.dtype}")
    Console(width=120).print(table(found, options))


if __name__ == "__main__":
    main()
