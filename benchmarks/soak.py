"""The worker's memory under steady agent traffic, with capture off and on: how much more it is, and whether it grows.

    python benchmarks/soak.py [RESULTS] [--minutes 10] [--layers all] [--buffer-bytes 256M]

Two starts of the same worker, 8 conversations at a time, endlessly; rows are claimed as they come. Resident memory of
all its processes is sampled each second, pages that they share counted once, after a warm-up in which the cache of
keys and values gets its memory. What capture may add is bounded by --buffer-bytes, the rows on their way to the spool,
plus the slab of the step under way. The spool is apart: it lies in /dev/shm, has its own bound, and is listed beside.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

import servers
import traffic
from servers import Server
from traffic import Episode, Keeper, Tally, Traffic
from worker.spool import used_bytes

PORT = 8012
SAMPLE_S = 1.0
MB = 1e6


class Sample(NamedTuple):
    at_s: float
    resident: int
    spooled: int


class Phase(NamedTuple):
    title: str
    samples: list[Sample]
    tally: Tally

    @property
    def peak(self) -> int:
        return max(sample.resident for sample in self.samples)

    def half(self, second: bool) -> float:
        """Median resident bytes of a half of the time."""
        middle = len(self.samples) // 2
        return statistics.median(s.resident for s in (self.samples[middle:] if second else self.samples[:middle]))

    @property
    def growth(self) -> float:
        """Bytes a minute: the slope of a line through the samples."""
        times, sizes = [s.at_s for s in self.samples], [float(s.resident) for s in self.samples]
        return statistics.linear_regression(times, sizes).slope * 60


def endless(replay: Traffic) -> Iterator[Episode]:
    while True:
        yield from replay.fresh()


async def sample(server: Server, spool: Path, into: list[Sample]) -> None:
    begun = time.monotonic()
    while True:
        resident = await asyncio.to_thread(server.resident_bytes)
        into.append(Sample(time.monotonic() - begun, resident, await asyncio.to_thread(used_bytes, spool)))
        await asyncio.sleep(SAMPLE_S)


async def soak(
    server: Server, keeper: Keeper, replay: Traffic, spool: Path, seconds: float
) -> tuple[list[Sample], Tally]:
    """Traffic for so long; what was in flight at the end is given up."""
    samples: list[Sample] = []
    tally = Tally()
    sampling = asyncio.create_task(sample(server, spool, samples))
    with suppress(TimeoutError):
        await asyncio.wait_for(replay.play(server.url, keeper, endless(replay), tally), seconds)
    sampling.cancel()
    return samples, tally


def phase(capture: bool, replay: Traffic, options: argparse.Namespace) -> Phase:
    flags = ["--port", str(PORT), "--max-model-len", str(traffic.MAX_MODEL_LEN)]
    flags += ["--dtype", options.dtype, "--layers", options.layers, "--buffer-bytes", options.buffer_bytes]
    with TemporaryDirectory() as name:
        scratch = Path(name)
        keeper = traffic.Claimed(scratch) if capture else traffic.Nothing()
        with servers.running(servers.ours(flags), PORT, scratch / "server.log") as server:
            for minutes in (options.warm_minutes, options.minutes):
                samples, tally = asyncio.run(soak(server, keeper, replay, servers.spool(flags), minutes * 60))
    found = Phase("capture on" if capture else "capture off", samples, tally)
    print(f"  {found.title}: {tally}, peak {found.peak / MB:.0f} MB", file=sys.stderr)
    return found


def table(phases: list[Phase]) -> Table:
    shown = Table("", "calls", "rows stored MB", "peak MB", "1st half MB", "2nd half MB", "MB/min", "spool peak MB")
    for found in phases:
        spooled = max(sample.spooled for sample in found.samples)
        sizes = [found.tally.n_bytes, found.peak, found.half(False), found.half(True)]
        rest = [f"{size / MB:.0f}" for size in sizes] + [f"{found.growth / MB:+.2f}", f"{spooled / MB:.1f}"]
        shown.add_row(found.title, str(found.tally.n_calls), *rest)
    return shown


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, help="a tau-bench results file to replay")
    parser.add_argument("--minutes", type=float, default=10, help="of sampling, for each of the two (%(default)s)")
    parser.add_argument("--warm-minutes", type=float, default=3, help="of traffic before it (%(default)s)")
    parser.add_argument("--layers", default="all", help="as the worker's (%(default)s)")
    parser.add_argument("--buffer-bytes", default="256M", help="as the worker's (%(default)s)")
    parser.add_argument("--episodes", type=int, default=2 * traffic.IN_FLIGHT, help="different ones (%(default)s)")
    parser.add_argument("--turns", type=int, help="calls of an episode, at most (all)")
    parser.add_argument("--dtype", default="bfloat16", help="as the worker's (%(default)s)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    replay = traffic.load(options.results, options.episodes, options.turns)
    off, on = (phase(capture, replay, options) for capture in (False, True))
    if not on.tally.n_bytes:
        sys.exit("no call was claimed in that time: give --minutes more, or --turns less")
    print(f"{servers.machine()}, {traffic.NAME}: {replay.title}, again and again for {options.minutes:g} minutes each")
    Console(width=120).print(table([off, on]))
    print(f"peak with capture minus without: {(on.peak - off.peak) / MB:.0f} MB; --buffer-bytes {options.buffer_bytes}")


if __name__ == "__main__":
    main()
