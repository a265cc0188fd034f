"""What the store costs: committing calls, sealing them, opening a run of many calls and reading of it.

python benchmarks/store.py [--calls N] [--data DIR] [--tmpfs DIR]

The worker is a process of its own whose spool lies on tmpfs. Beside each figure stands what this machine does with the
same bytes and nothing else: a plain file written and synced, or the same bytes read from a file; and the ratio of both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import aiohttp
import msgspec
import numpy as np
import pyarrow.parquet as pq
import uvloop

from episodes import journal
from episodes.layout import Layout
from episodes.records import Call, Kept, Model, Seal
from episodes.run import open_run
from episodes.store import Store
from episodes.wire import Sequence
from handover import HIDDEN, POINTS, parse, ready, serve, worker
from proxy.backend import Backend

MODEL = Model("m", "bfloat16", HIDDEN, 32, POINTS, {})
ROW_BYTES = HIDDEN * 2 * len(POINTS)
# Calls by the run that they are recorded into: how many, and the rows of each. 21 rows are 0.5 MB, 1,500 are 37 MB.
RUNS = {"small-disk": (200, 21), "small-tmpfs": (200, 21), "large-tmpfs": (48, 1500), "large-disk": (8, 1500)}
EPISODE = 2  # calls
# Of a long run: a system prompt that all share, turns of an episode, tokens that each adds, and of them generated.
SYSTEM, TURNS, TURN, SAID = 1000, 25, 160, 60
TEXT = "I have looked at the order and can offer you the following, if you agree to it. "


def a_call(name: str, episode: str, turn: int, sequences: list[Sequence], kept: list[Kept]) -> Call:
    request = json.dumps({"messages": [{"role": "user", "content": TEXT * (8 * turn + 4)}]})
    reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": TEXT * 3}}]})
    return Call(
        id=name, thread=f"t-{episode}", episode=episode, turn=turn, attempt=0, endpoint="/v1/chat/completions",
        model="m", started=1.0, ended=2.0, status=200, request=request, reply=reply, points=POINTS,
        sequences=sequences, kept=kept,
    )  # fmt: skip


async def record(url: str, layout: Layout) -> tuple[list[float], float]:
    """Record a run's calls as a proxy does; seconds from claim to committed of each, and of all together."""
    store = Store(layout)
    store.describe(MODEL)
    took = []
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        await ready(session, url)
        backend = Backend(url, session)
        backend.url += f"/{layout.root.name}"
        begun = time.perf_counter()
        for number in range(RUNS[layout.root.name][0]):
            call = a_call(f"c-{number}", f"e{number // EPISODE}", number % EPISODE, [], [])
            await asyncio.to_thread(store.begin, [call])
            at = time.perf_counter()
            await backend.claim(call.id, store.draft(call.id))
            await asyncio.to_thread(store.commit, call, store.draft(call.id))
            took.append(time.perf_counter() - at)
            await backend.forget(call.id)
        wall = time.perf_counter() - begun
    assert len(store.history.unsealed()) == len(took)
    store.close()
    return took, wall


def plain(directory: Path, n_bytes: int, times: int) -> float:
    """Median seconds of writing so many bytes into a new file and syncing it."""
    data, took = os.urandom(n_bytes), []
    for _ in range(times):
        at = time.perf_counter()
        with (directory / "plain").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        took.append(time.perf_counter() - at)
    return statistics.median(took)


def seal(layout: Layout, compression: Literal["zstd", "none"]) -> tuple[int, int, float, float]:
    """Bytes of vectors, bytes of shards, CPU seconds and seconds of sealing the first eight live episodes."""
    store = Store(layout)
    store.run = msgspec.structs.replace(store.run, compression=compression)
    live = [episode.id for episode in store.history.episodes.values() if episode.unsealed]
    cpu, at = time.process_time(), time.perf_counter()
    sealed = [seal for episode in live[:8] if (seal := store.seal(episode))]
    cpu, wall = time.process_time() - cpu, time.perf_counter() - at
    store.close()
    return sum(seal.n_rows for seal in sealed) * ROW_BYTES, sum(seal.n_bytes for seal in sealed), cpu, wall


def lengthen(layout: Layout, n_calls: int) -> None:
    """Add sealed episodes to a run's journal, until it has so many calls; their shards are not there."""
    random = np.random.default_rng(0)
    system = random.integers(0, 150_000, SYSTEM).tolist()
    with layout.journal.open("ab") as file:
        for number in range(n_calls // TURNS):
            name, tokens, start = f"long{number}", list(system), SYSTEM if number else 0
            calls = []
            for turn in range(TURNS):
                tokens = tokens + random.integers(0, 150_000, TURN).tolist()
                stop = len(tokens) - 1
                sequence = Sequence(0, tokens[:-SAID], tokens[-SAID:], "stop", start)
                calls.append(a_call(f"c-{number}-{turn}", name, turn, [sequence], [Kept(0, start, stop)]))
                start = stop
            n_rows = sum(call.n_kept for call in calls)
            lines = [*calls, Seal(name, [call.id for call in calls], n_rows, n_rows * ROW_BYTES, 0, 3.0)]
            file.write(b"".join(map(journal.encode, lines)))


def opened(what: str, layout: Layout, read: float) -> Store:
    at = time.perf_counter()
    store = Store(layout)
    line(what, time.perf_counter() - at, read, "s")
    return store


def seconds(work: Callable[[], object]) -> float:
    at = time.perf_counter()
    work()
    return time.perf_counter() - at


def line(what: str, value: float, best: float, unit: str, target: str = "") -> None:
    print(f"{what:52}{value:>9,.3g}{best:>9,.3g}{value / best:>8.2f}  {unit:6}{target}", flush=True)


def recording(url: str, data: dict[str, Path]) -> None:
    for place in ("disk", "tmpfs"):
        n_calls, n_rows = RUNS[f"small-{place}"]
        took, _ = uvloop.run(record(url, Layout(data[place] / f"small-{place}")))
        best = plain(data[place], n_rows * ROW_BYTES, 50)
        line(f"claim to committed, 0.5 MB, p50, {place}", statistics.median(took) * 1e3, best * 1e3, "ms", "≤ 6")
    n_calls, n_rows = RUNS["large-tmpfs"]
    n_bytes = n_rows * ROW_BYTES
    _, wall = uvloop.run(record(url, Layout(data["tmpfs"] / "large-tmpfs")))
    line(
        "calls of 37 MB, tmpfs",
        n_calls * n_bytes / 1e9 / wall,
        n_bytes / 1e9 / plain(data["tmpfs"], n_bytes, 7),
        "GB/s",
        "≥ 1",
    )
    uvloop.run(record(url, Layout(data["disk"] / "large-disk")))


def sealing(layout: Layout) -> None:
    best = 2**27 / 1e6 / plain(layout.root, 2**27, 5)
    for compression in ("zstd", "none"):
        n_bytes, n_stored, cpu, wall = seal(layout, compression)
        line(f"sealing, {compression}, a core", n_bytes / 1e6 / cpu, best, "MB/s", "≥ 500")
        line(f"sealing, {compression}, wall", n_bytes / 1e6 / wall, best, "MB/s")
        print(f"  of these rows, which are noise, {n_bytes / n_stored:.2f} times smaller")


def opening(layout: Layout, n_calls: int) -> None:
    seal(layout, "zstd")
    lengthen(layout, n_calls)
    size = layout.journal.stat().st_size
    what = f"{n_calls:,} calls, {size / 1e9:.1f} GB of journal"
    read = seconds(lambda: sum(len(part) for part in layout.journal.open("rb")))
    print(what)
    store = opened("open to write, without a checkpoint", layout, read)
    line("write its index and a checkpoint", seconds(store.roll), read, "s")
    store.close()
    line("open to read, with the table of episodes", seconds(lambda: open_run(layout.root).episodes), read, "s", "≤ 2")
    store = opened("open to write, by the checkpoint", layout, read)
    for turn in range(TURNS):
        store.commit(a_call(f"c-last-{turn}", "last", turn, [Sequence(0, [turn, turn], [1], "stop")], []))
    line(f"open to read, the index {TURNS} calls behind", seconds(lambda: open_run(layout.root).episodes), read, "s")
    line("bring its index up to date", seconds(store.roll), read, "s")
    store.close()
    shard, point = layout.shard("e0"), POINTS[1]
    runs = [open_run(layout.root) for _ in range(7)]  # each knows nothing yet of what is read
    ways: dict[str, Callable[[], object]] = {
        "pyarrow": lambda: pq.read_table(shard, columns=["call", "position", point]),
        "by its calls": lambda: [call.activations(point) for call in runs.pop().episode("e0")],
    }
    best = statistics.median(seconds(shard.read_bytes) for _ in range(7)) / len(POINTS)
    n_bytes = EPISODE * RUNS["large-disk"][1] * HIDDEN * 2
    for way, read_layer in ways.items():
        took = statistics.median(seconds(read_layer) for _ in range(7))
        line(f"one layer of an episode, {n_bytes / 1e6:.0f} MB, {way}", took * 1e3, best * 1e3, "ms", "≤ 50")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000, help="of the long run (%(default)s)")
    options = parse(parser, partial(serve, sizes=RUNS))
    with TemporaryDirectory(dir=options.data) as disk, TemporaryDirectory(dir=options.tmpfs) as tmpfs:
        data = {"disk": Path(disk), "tmpfs": Path(tmpfs)}
        print(f"{os.cpu_count()} CPUs, {platform.processor() or platform.machine()}")
        print(f"{'':52}{'store':>9}{'plain':>9}{'ratio':>8}  {'':6}target")
        with worker({name: data["tmpfs"] / "spools" / name for name in RUNS}, __file__) as (_, url):
            recording(url, data)
        sealing(Layout(data["tmpfs"] / "large-tmpfs"))
        opening(Layout(data["disk"] / "large-disk"), options.calls)


if __name__ == "__main__":
    main()
