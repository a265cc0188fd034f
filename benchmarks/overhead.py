"""What capture costs: agent-like traffic through stock vLLM and through our worker, in one run, as a ratio.

8 conversations at once, 6 turns each, on the embedded model. The servers take turns (stock, ours, stock, ours), and
ours alternates rounds with capture on and off, so that a machine that speeds up or slows down does so for all three.
Rows are claimed and deleted while the traffic runs, as the proxy does. Wall and CPU seconds are medians of all rounds.

    python benchmarks/overhead.py [--blocks 2] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import psutil

from episodes.wire import CAPTURE_HEADER, Capture
from worker.__main__ import plan
from worker.smollm import NAME

PORT = 8011
URL = f"http://127.0.0.1:{PORT}"
CONVERSATIONS, TURNS, TOKENS = 8, 6, 32
POLICY = "You are an agent of an airline. Look a reservation up before you change it, and confirm every change. " * 12
REPLY = "The reservation was found: two passengers, one bag, economy, leaving on the first of May at nine. " * 2


@contextlib.contextmanager
def server(stock: bool, log: Path) -> Iterator[psutil.Process]:
    """A server with the worker's own flags, without anything of ours in it if `stock`."""
    flags = ["--port", str(PORT), "--max-model-len", "8192"]
    command, env = [sys.executable, "-m", "worker", *flags], dict(os.environ)
    if stock:
        command, env, _ = plan(flags, env)
        for flag in ("--worker-cls", "--middleware", "--additional-config"):
            at = command.index(flag)
            del command[at : at + 2]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        asyncio.run(ready(process, log))
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


async def ready(process: subprocess.Popen[bytes], log: Path) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(1200):
            if process.poll() is not None:
                sys.exit(f"the server ended, see {log}")
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{URL}/health") as reply:
                    if reply.status == 200:
                        return
            await asyncio.sleep(0.25)
    sys.exit("the server did not get ready in 300 s")


def cpu_seconds(root: psutil.Process) -> float:
    """User and system time of the server's processes so far."""
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(t.user + t.system for t in times)


async def round_of_traffic(capture: bool) -> int:
    """All conversations once; returns the bytes claimed. Prompts are new, so no round finds another's cache."""
    tag = uuid.uuid4().hex
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        return sum(await asyncio.gather(*(converse(session, tag, i, capture) for i in range(CONVERSATIONS))))


async def converse(session: aiohttp.ClientSession, tag: str, number: int, capture: bool) -> int:
    messages = [{"role": "system", "content": f"{tag} {POLICY}"}]
    claims: list[asyncio.Task[int]] = []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"Customer {number}, question {turn}. {REPLY}"})
        body: dict[str, Any] = {"model": NAME, "messages": messages, "temperature": 0}
        body |= {"max_tokens": TOKENS, "ignore_eos": True}
        call = f"c-{uuid.uuid4().hex}"
        headers = {CAPTURE_HEADER: Capture(call, tag).header()} if capture else {}
        async with session.post(f"{URL}/v1/chat/completions", json=body, headers=headers) as reply:
            reply.raise_for_status()
            message = (await reply.json())["choices"][0]["message"]
        messages.append({"role": "assistant", "content": message["content"]})
        if capture:
            claims.append(asyncio.create_task(claim(session, call)))
    return sum(await asyncio.gather(*claims))


async def claim(session: aiohttp.ClientSession, call: str) -> int:
    url = f"{URL}/v1/activations/{call}"
    async with session.get(url, params={"wait_s": "30"}, headers={"Accept-Encoding": "identity"}) as reply:
        assert reply.status == 200, await reply.text()
        size = len(await reply.read())
    async with session.delete(url) as reply:
        assert reply.status == 204
    return size


def measure(capture: bool, root: psutil.Process) -> dict[str, float]:
    cpu, begun = cpu_seconds(root), time.monotonic()
    n_bytes = asyncio.run(round_of_traffic(capture))
    return {"wall": time.monotonic() - begun, "cpu": cpu_seconds(root) - cpu, "bytes": n_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2, help="times that each server is started (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each kind per start (%(default)s)")
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"stock vLLM": [], "ours, capture off": [], "ours, 3 layers": []}
    with TemporaryDirectory() as scratch:
        for block in range(options.blocks):
            for stock in (True, False):
                kinds = ["stock vLLM"] if stock else ["ours, capture off", "ours, 3 layers"]
                with server(stock, Path(scratch) / "server.log") as root:
                    asyncio.run(round_of_traffic(False))  # warm
                    for number in range(options.rounds):
                        for kind in kinds if (number + block) % 2 else kinds[::-1]:
                            found[kind].append(measure(kind == "ours, 3 layers", root))
                            print(
                                f"  {kind}: {json.dumps({k: round(v, 2) for k, v in found[kind][-1].items()})}",
                                file=sys.stderr,
                            )
    print(
        f"{CONVERSATIONS} conversations × {TURNS} turns, {TOKENS} tokens each, {NAME}, {os.cpu_count()} × {cpu_name()}"
    )
    print(f"{'':22}{'rounds':>7}{'wall s':>9}{'ratio':>7}{'spread':>14}{'CPU s':>9}{'ratio':>7}{'rows MB':>9}")
    base = {key: statistics.median(r[key] for r in found["stock vLLM"]) for key in ("wall", "cpu")}
    for kind, rounds in found.items():
        wall, cpu, size = (statistics.median(r[key] for r in rounds) for key in ("wall", "cpu", "bytes"))
        spread = f"{min(r['wall'] for r in rounds):.1f}–{max(r['wall'] for r in rounds):.1f}"
        print(
            f"{kind:22}{len(rounds):>7}{wall:>9.2f}{wall / base['wall']:>7.3f}{spread:>14}"
            f"{cpu:>9.2f}{cpu / base['cpu']:>7.3f}{size / 1e6:>9.1f}"
        )


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
