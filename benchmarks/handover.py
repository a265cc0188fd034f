"""What the hand-over costs: calls from the worker's spool to the proxy's draft, by each way there is, in one run.

A server process with the worker's own routes and a client with the proxy's own backend; every round claims the same
calls by each way in turn. CPU seconds are those of both processes, the kernel's share included. Nothing is synced.

    python benchmarks/handover.py [--rounds 7] [--data DIR] [--tmpfs DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import aiohttp
import ml_dtypes
import numpy as np
import psutil
import uvicorn
import uvloop
import zstandard
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount, Route

from episodes.wire import CallFile
from proxy.backend import Backend
from worker.ledger import Ledger
from worker.server import Routes
from worker.spool import SpoolFile, prepare

CALLS, TOKENS, HIDDEN = 8, 1500, 4096
POINTS = ["layers.8.output", "layers.12.output", "layers.16.output"]
SIZES = dict.fromkeys(("tmpfs", "disk"), (CALLS, TOKENS))
SIZE = CALLS * TOKENS * HIDDEN * len(POINTS) * 2

Way = Callable[[str, Path], Awaitable[None]]


def serve(port: int, spools: dict[str, Path], sizes: dict[str, tuple[int, int]] = SIZES) -> None:
    """Be the worker: spool the calls, and serve each spool's under its name. sizes: calls and rows of each"""
    routes = [Route("/health", lambda _: Response())]
    for name, spool in spools.items():
        prepare(spool)
        ledger = Ledger(spool)
        n_calls, n_rows = sizes[name]
        rows = random_rows(n_rows, HIDDEN, POINTS)
        for number in range(n_calls):
            fill(ledger, f"c-{number}", [number, *range(n_rows - 1)], POINTS, rows)
        routes.append(Mount(f"/{name}", routes=activations(ledger)))
    uvicorn.run(Starlette(routes=routes), port=port, log_level="critical", loop="uvloop", ws="none")


def activations(ledger: Ledger) -> list[Route]:
    """A worker's own routes, but for what it says of a model: there is none."""
    own = Routes(ledger, None)  # type: ignore[arg-type]  # only capabilities would look at it
    return [
        Route("/v1/activations", own.waiting, methods=["GET"]),
        Route("/v1/activations/{call}", own.claim, methods=["GET"]),
        Route("/v1/activations/{call}", own.forget, methods=["DELETE"]),
    ]


def random_rows(n_rows: int, hidden: int, points: list[str]) -> NDArray[np.uint8]:
    rows = np.random.default_rng(0).standard_normal((n_rows, len(points), hidden), np.float32)
    return rows.astype(ml_dtypes.bfloat16).view(np.uint8)


def fill(ledger: Ledger, name: str, prompt: list[int], points: list[str], rows: NDArray[np.uint8]) -> None:
    """Have a call of these rows, one for each token of its prompt, ended and spooled."""
    call = ledger.open(name, points, "all")
    call.order(1)
    file = SpoolFile(ledger.spool, name, 0, points, "BF16", rows.shape[2] // 2, prompt)
    file.append(0, np.array(prompt, np.int32), rows)
    file.finish()
    part = SimpleNamespace(index=0, token_ids=[1], finish_reason="length")
    call.note(0, SimpleNamespace(prompt_token_ids=prompt, num_cached_tokens=0, outputs=[part]), delta=True)
    ledger.close(call)


@contextlib.contextmanager
def worker(spools: dict[str, Path], script: str = __file__) -> Iterator[tuple[psutil.Process, str]]:
    """Another process that runs `script --serve PORT NAME=SPOOL…`, and the URL that it then serves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    named = [f"{name}={path}" for name, path in spools.items()]
    process = subprocess.Popen([sys.executable, script, "--serve", str(port), *named])
    try:
        yield psutil.Process(process.pid), f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


async def zstd(session: aiohttp.ClientSession, url: str, call: str, into: Path) -> None:
    """Claim a call as a client does that accepts zstd."""
    unpack = zstandard.ZstdDecompressor().decompressobj()
    async with session.get(f"{url}/v1/activations/{call}", headers={"Accept-Encoding": "zstd"}) as reply:
        assert reply.headers["Content-Encoding"] == "zstd"
        with into.open("wb") as file:
            async for chunk in reply.content.iter_chunked(1 << 20):
                await asyncio.to_thread(lambda chunk=chunk: file.write(unpack.decompress(chunk)))


async def measure(way: Way, data: Path, server: psutil.Process) -> tuple[float, float]:
    """GB/s and CPU seconds per GB of claiming every call once."""
    cpu, begun = cpu_seconds(server), time.monotonic()
    for number in range(CALLS):
        await way(f"c-{number}", data / f"{number}")
    wall, spent = time.monotonic() - begun, cpu_seconds(server) - cpu
    for number in range(CALLS):
        assert CallFile(data / f"{number}").n_rows == TOKENS
        (data / f"{number}").unlink()
    return SIZE / 1e9 / wall, spent / (SIZE / 1e9)


def cpu_seconds(server: psutil.Process) -> float:
    return sum(t.user + t.system for t in (server.cpu_times(), psutil.Process().cpu_times()))


async def compare(url: str, server: psutil.Process, data: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        await ready(session, url)

        def backend(name: str, spool_dir: Path | None = None) -> Backend:
            found = Backend(url, session, spool_dir=spool_dir)
            found.url += f"/{name}"
            return found

        ways: dict[str, Way] = {
            "HTTP": backend("tmpfs", data / "nowhere").claim,
            "HTTP, zstd": lambda call, into: zstd(session, f"{url}/tmpfs", call, into),
            "shared, spool on tmpfs": backend("tmpfs").claim,
            "shared, spool beside the data": backend("disk").claim,
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name in ways if number % 2 else reversed(ways):
                result = await measure(ways[name], data, server)
                if number:  # the first round is to warm up
                    found[name].append(result)
    return found


async def ready(session: aiohttp.ClientSession, url: str) -> None:
    for _ in range(600):
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(f"{url}/health"):
                return
        await asyncio.sleep(0.1)
    sys.exit("the server did not start in 60 s")


def parse(parser: argparse.ArgumentParser, serve: Callable[[int, dict[str, Path]], None]) -> argparse.Namespace:
    """The command line, with the two directories to compare; in the process that `worker` starts, serve instead."""
    parser.add_argument("--data", type=Path, default=Path(), help="directory on the data's file system (%(default)s)")
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"), help="directory in memory (%(default)s)")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        pairs = (pair.split("=", 1) for pair in options.serve[1:])
        serve(int(options.serve[0]), {name: Path(path) for name, path in pairs})
        sys.exit()
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds of every way (%(default)s)")
    options = parse(parser, serve)
    with TemporaryDirectory(dir=options.data) as disk, TemporaryDirectory(dir=options.tmpfs) as tmpfs:
        spools = {"tmpfs": Path(tmpfs) / "spool", "disk": Path(disk) / "spool"}
        with worker(spools) as (server, url):
            found = uvloop.run(compare(url, server, Path(disk), options.rounds))
    print(f"{CALLS} calls of {SIZE / CALLS / 1e6:.0f} MB, {options.rounds} rounds, {os.cpu_count()} CPUs; medians")
    print(f"{'':31}{'GB/s':>8}{'spread':>14}{'ratio':>8}{'CPU s/GB':>10}{'ratio':>8}")
    base = [statistics.median(values) for values in zip(*found["HTTP"], strict=True)]
    for name, results in found.items():
        speeds, cpu = zip(*results, strict=True)
        speed, spent = statistics.median(speeds), statistics.median(cpu)
        spread = f"{min(speeds):.2f}–{max(speeds):.2f}"
        print(f"{name:31}{speed:>8.2f}{spread:>14}{speed / base[0]:>8.2f}{spent:>10.3f}{spent / base[1]:>8.2f}")


if __name__ == "__main__":
    main()
