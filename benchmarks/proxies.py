"""What the proxy costs a client, beside no proxy, a bare aiohttp pass-through and LiteLLM's proxy, in one run.

    python benchmarks/proxies.py [--rounds 5] [--litellm VENV] [--data DIR] [--spool DIR]
    python benchmarks/proxies.py --soak 300

Every proxy has the first core to itself; the clients and the backends are on the second. The ways take turns in every
round, whose order alternates, after one to warm up; figures are medians of the rounds' medians. Requests per second
count until everything that they left to be written is on disk. (Not called `proxy`: that is the package's name.)
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, cast

import uvloop

from peers import DONE, LENGTH, MODEL, PAUSE_S, PIECES, SAID, TOKEN_S, TOKENS
from servers import Server, machine, running

PROXY_CORE, OTHER_CORE = "0", "1"
HERE = Path(__file__).parent
PEERS = [sys.executable, str(HERE / "peers.py")]
ALONE, AT_ONCE, STREAMS, SOAKED = 300, 64, 8, 256
LOAD_S, STREAMED, RECORDED = 2.0, 8, 50
STALL_MS = 50
QUEUE = re.compile(rb"^tautap_proxy_(?:queue|in_flight) (\S+)$", re.MULTILINE)
NAMES = ("direct", "bare", "LiteLLM", "tautap")
numbers = itertools.count(10**11)


class Reply(NamedTuple):
    """When its first byte of a body and its last came, in seconds after it was asked for."""

    first: float
    last: float


class Client(asyncio.Protocol):
    """A connection that is kept, with one request at a time on it."""

    def __init__(self) -> None:
        self._came = bytearray()
        self._over: asyncio.Future[None]
        self._first = 0.0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    async def ask(self, request: bytes) -> Reply:
        """The times of a reply, which has to be right."""
        self._over = asyncio.get_running_loop().create_future()
        self._came.clear()
        self._first = 0.0
        at = time.perf_counter()
        self._transport.write(request)
        await asyncio.wait_for(self._over, 120)
        last = time.perf_counter() - at
        whole = bytes(self._came)
        right = DONE in whole if b"event-stream" in whole else SAID.encode() in whole
        assert whole.startswith(b"HTTP/1.1 200") and right, whole[:2000]
        return Reply(self._first - at, last)

    def data_received(self, data: bytes) -> None:
        self._came += data
        end = self._came.find(b"\r\n\r\n")
        if end < 0 or len(self._came) == end + 4:
            return
        self._first = self._first or time.perf_counter()
        length = LENGTH.search(self._came, 0, end)
        whole = len(self._came) >= end + 4 + int(length[1]) if length else self._came.endswith(b"\r\n0\r\n\r\n")
        if whole and not self._over.done():
            self._over.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if hasattr(self, "_over") and not self._over.done():
            self._over.set_exception(error or ConnectionError("the connection was closed"))

    def close(self) -> None:
        self._transport.close()


@asynccontextmanager
async def clients(port: int, n: int) -> AsyncIterator[list[Client]]:
    loop = asyncio.get_running_loop()
    made = [(await loop.create_connection(Client, "127.0.0.1", port))[1] for _ in range(n)]
    try:
        yield made
    finally:
        for client in made:
            client.close()


def request(*options: str) -> bytes:
    """A conversation's first call, as nobody has sent it before: 2 KB."""
    messages = [
        f'{{"role":"system","content":"{SAID * 5}"}}',
        f'{{"role":"user","content":"{next(numbers)}: {SAID}"}}',
    ]
    fields = [f'"model":"{MODEL}"', f'"messages":[{",".join(messages)}]', '"temperature":0', *options]
    body = f"{{{','.join(fields)}}}"
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Authorization: Bearer none\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


async def alone(port: int, n: int, *options: str) -> float:
    """Median seconds of a reply, one request at a time."""
    async with clients(port, 1) as (client,):
        return statistics.median([(await client.ask(request(*options))).last for _ in range(n)])


async def loaded(port: int, ours: bool) -> float:
    """Replies a second with so many requests in flight."""
    async with clients(port, AT_ONCE) as talking:
        begun, n = time.perf_counter(), 0

        async def talk(client: Client) -> None:
            nonlocal n
            while time.perf_counter() < begun + LOAD_S:
                await client.ask(request())
                n += 1

        await asyncio.gather(*map(talk, talking))
    if ours:
        await settled(port)
    return n / (time.perf_counter() - begun)


async def settled(port: int) -> None:
    """Wait until a proxy of ours has nothing under way and nothing left to write."""
    await asyncio.to_thread(wait_until_idle, f"http://127.0.0.1:{port}/metrics")


def wait_until_idle(url: str) -> None:
    while True:
        with urllib.request.urlopen(url, timeout=60) as reply:
            if not any(map(float, QUEUE.findall(reply.read()))):
                return
        time.sleep(0.05)


async def streamed(port: int) -> float:
    """Median seconds until the first event, so many streams flowing at once."""
    async with clients(port, STREAMS) as talking:

        async def talk(client: Client, number: int) -> list[float]:
            await asyncio.sleep(PIECES * PAUSE_S * number / STREAMS)  # others flow when one begins
            return [(await client.ask(request('"stream":true'))).first for _ in range(STREAMED)]

        times = await asyncio.gather(*(talk(client, number) for number, client in enumerate(talking)))
        return statistics.median(itertools.chain(*times))


async def recorded(port: int, switch: str) -> float:
    """Median seconds of a reply, one request at a time, that is recorded or not."""
    took = await alone(port, RECORDED, f'"collect_activations":{switch}')
    await settled(port)
    return took


class Round(NamedTuple):
    """Of one proxy: seconds alone, replies a second, seconds to a stream's first event."""

    alone: float
    loaded: float
    streamed: float


async def one_round(ports: dict[str, int], backwards: bool) -> dict[str, Round]:
    found = {}
    for name in reversed(NAMES) if backwards else NAMES:
        port, ours = ports[name], name == "tautap"
        n = ALONE // 5 if name == "LiteLLM" else ALONE
        found[name] = Round(await alone(port, n), await loaded(port, ours), await streamed(port))
    return found


async def compare(ports: dict[str, int], rounds: int) -> None:
    found, added = [], []
    for number in range(rounds + 1):
        one = await one_round(ports, bool(number % 2))
        switches = ("true", "false") if number % 2 else ("false", "true")
        took = {switch: await recorded(ports["recording"], switch) for switch in switches}
        if number:  # the first is to warm up
            found.append(one)
            added.append((took["true"], took["false"]))
    told = {name: Round(*map(statistics.median, zip(*(one[name] for one in found), strict=True))) for name in NAMES}
    show(told, rounds)
    on, off = (statistics.median(values) for values in zip(*added, strict=True))
    what = f"recording 0.5 MB a call: p50 {on * 1e3:.2f} ms, without {off * 1e3:.2f} ms"
    print(f"{what}: {(on - off) * 1e3:+.2f} ms (≤ 0.3)")
    spread = sorted((on - off) * 1e3 for on, off in added)
    print(f"  of the rounds: {', '.join(f'{value:+.2f}' for value in spread)}")


def show(told: dict[str, Round], rounds: int) -> None:
    direct, bare, ours = told["direct"], told["bare"], told["tautap"]
    print(f"{machine()}; a proxy has one core; {rounds} rounds, medians")
    print(f"{'':10}{'p50 ms':>8}{'added':>8}{'req/s':>9}{'to bare':>9}{'event ms':>10}{'to bare':>9}")
    for name, one in told.items():
        print(
            f"{name:10}{one.alone * 1e3:>8.2f}{(one.alone - direct.alone) * 1e3:>8.2f}{one.loaded:>9,.0f}"
            f"{one.loaded / bare.loaded:>9.2f}{one.streamed * 1e3:>10.2f}{one.streamed / bare.streamed:>9.2f}"
        )
    print(f"{'target':10}{'':8}{'≤ 0.60':>8}{'':9}{'≥ 0.60':>9}{'':10}{'≤ 1.50':>9}")
    print(f"requests/s, to LiteLLM: {ours.loaded / told['LiteLLM'].loaded:.1f} (≥ 30)")


# ---- 256 streams


async def soak(port: int, server: Server, beats: Path, seconds: float) -> None:
    """Hold so many streams open for so long; prints a line each tenth of it."""
    async with clients(port, SOAKED) as talking:
        begun, n = time.perf_counter(), 0

        async def talk(client: Client, number: int) -> None:
            nonlocal n
            await asyncio.sleep(TOKENS * TOKEN_S * number / SOAKED)  # as if they had begun one after the other
            while time.perf_counter() < begun + seconds:
                await client.ask(request('"stream":true'))
                n += 1

        async def watch() -> None:
            while True:
                await asyncio.sleep(seconds / 10)
                print(f"{time.perf_counter() - begun:>5.0f} s{n:>8,} streams  {health(server, beats)}", flush=True)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(talk(client, i) for i, client in enumerate(talking)))
        watching.cancel()
    await settled(port)
    print(f"{n:,} streams of {TOKENS} events, {SOAKED} at a time, no error")


def health(server: Server, beats: Path) -> str:
    """Memory that the proxy uses, and how late its event loop has been."""
    late = [float(line) for line in beats.read_text().split()]
    stalls = sum(ms > STALL_MS for ms in late)
    memory = f"{server.resident_bytes() / 1e6:>6.0f} MB"
    return f"{memory}   at most {max(late):.1f} ms late; over {STALL_MS} ms in {stalls} of {len(late)} s"


# ---- the processes


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Stack:
    """The processes of a run, each on its core, in their order."""

    def __init__(self, exits: ExitStack, home: Path) -> None:
        self._exits = exits
        self._home = home

    def start(self, core: str, ready: str, command: list[str], port: int, **env: str) -> Server:
        pinned = ["taskset", "-c", core, *command]
        log = self._home / f"{port}.log"
        return self._exits.enter_context(running((pinned, os.environ | env), port, log, ready))

    def peer(self, kind: str, core: str, *arguments: str) -> int:
        port = free_port()
        self.start(core, "/health", [*PEERS, kind, str(port), *arguments], port)
        return port

    def ours(self, backend: int, data: Path, command: list[str], *flags: str) -> tuple[int, Server]:
        port = free_port()
        where = ["--backend", f"http://127.0.0.1:{backend}", "--port", str(port), "--data", str(data)]
        return port, self.start(PROXY_CORE, "/health/live", [*command, "proxy", *where, *flags], port)

    def litellm(self, venv: Path, backend: int) -> int:
        port, config = free_port(), self._home / "litellm.yaml"
        config.write_text(
            f"model_list:\n  - model_name: {MODEL}\n    litellm_params:\n      model: openai/{MODEL}\n"
            f"      api_base: http://127.0.0.1:{backend}/v1\n      api_key: none\n"
        )
        command = [str(venv / "bin/litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        env = {
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_TELEMETRY": "False",
            "LITELLM_LOG": "ERROR",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # it listens on loopback, as ours does
        }
        self.start(PROXY_CORE, "/health/liveliness", command, port, **env)
        return port


def installed(venv: Path) -> Path:
    """LiteLLM's proxy in an environment of its own."""
    if not (venv / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(venv / "bin/pip"), "install", "--quiet", "litellm[proxy]"], check=True)
        (venv / "ready").touch()
    return venv


@contextmanager
def stack(options: argparse.Namespace) -> Iterator[tuple[Stack, Path, Path]]:
    """Where to start processes, a directory for data and one for a spool."""
    with (
        TemporaryDirectory(dir=options.data) as data,
        TemporaryDirectory(dir=options.spool) as spool,
        ExitStack() as exits,
    ):
        yield Stack(exits, Path(data)), Path(data), Path(spool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (%(default)s)")
    parser.add_argument("--soak", type=float, metavar="S", help="hold 256 streams for so many seconds instead")
    parser.add_argument("--litellm", type=Path, default=Path(".venv/litellm"), help="LiteLLM's own (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path(), help="directory for the proxy's data (%(default)s)")
    parser.add_argument("--spool", type=Path, default=Path("/dev/shm"), help="for the worker's spool (%(default)s)")
    options = parser.parse_args()
    venv = None if options.soak else installed(options.litellm)
    with stack(options) as (processes, data, spool):
        worker = processes.peer("recording", OTHER_CORE, str(spool / "spool"))
        os.sched_setaffinity(0, {int(OTHER_CORE)})
        if venv is None:
            beats = data / "beats"
            command = [*PEERS, "beating", str(beats)]
            port, server = processes.ours(worker, data / "runs", command, "--episode-idle-s", "30")
            uvloop.run(soak(port, server, beats, options.soak))
            return
        command = [sys.executable, "-m", "proxy"]
        backend = processes.peer("replying", OTHER_CORE)
        ports = {
            "direct": backend,
            "bare": processes.peer("bare", PROXY_CORE, f"http://127.0.0.1:{backend}"),
            "LiteLLM": processes.litellm(venv, backend),
            "tautap": processes.ours(backend, data / "runs", command, "--run", "off", "--capture", "agent=none")[0],
            "recording": processes.ours(worker, data / "runs", command, "--run", "on")[0],
        }
        uvloop.run(compare(ports, options.rounds))


if __name__ == "__main__":
    main()
