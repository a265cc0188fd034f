"""`tautap up`: a worker process and a proxy in this one, started together and stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import aiohttp
from rich.console import Console

from episodes.errors import BadInput
from proxy.config import Config
from proxy.server import serve, stopper

READY_S = 3600.0
STOP_S = 30.0
REPORT_S = 10.0


async def run_stack(config: Config, command: list[str]) -> int:
    """Run both until a signal comes or the worker ends; returns the exit code."""
    stop = stopper()
    console = Console(stderr=True)
    log = config.data / config.run / "worker.log"
    if await _healthy(config.backend):
        raise BadInput(f"something else answers at {config.backend}: stop it, or give another --worker-port")
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("wb")
    except OSError as error:
        raise BadInput(f"--data {config.data} cannot be written: {error.strerror}") from None
    with output:
        # A session of its own: Ctrl-C reaches us alone, and the worker lives until its last rows are claimed.
        worker = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    ended = asyncio.create_task(worker.wait())
    try:
        if not await _loaded(config.backend, ended, stop, console, log):
            return _report(worker.returncode, stop, console, log)
        proxy = asyncio.create_task(serve(config, stop, ready := asyncio.Event()))
        await _first(proxy, asyncio.create_task(ready.wait()))
        if ready.is_set():
            _greet(config, console)
        await _first(proxy, ended)
        stop.set()
        await proxy
        return _report(worker.returncode, stop, console, log) if ended.done() else 0
    finally:
        await _end(worker, ended)


async def _loaded(backend: str, ended: asyncio.Task[int], stop: asyncio.Event, console: Console, log: Path) -> bool:
    """Wait until the worker answers, saying what it does meanwhile; False if it ended or we were told to stop."""
    begun = reported = time.monotonic()
    with console.status("starting the worker") as status:
        while not ended.done() and not stop.is_set() and time.monotonic() - begun < READY_S:
            if await _healthy(backend):
                console.print(f"the worker is ready after {time.monotonic() - begun:.0f} s")
                return True
            passed = f"loading the model, {time.monotonic() - begun:.0f} s"
            status.update(passed)
            if not console.is_terminal and time.monotonic() - reported >= REPORT_S:
                reported = time.monotonic()
                console.print(passed)
            await asyncio.sleep(0.25)
    return False


async def _healthy(backend: str) -> bool:
    timeout = aiohttp.ClientTimeout(total=2)
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(f"{backend}/health") as reply:
            return reply.status == 200
    return False


def _greet(config: Config, console: Console) -> None:
    url = f"http://{config.host}:{config.port}/v1"
    console.print(
        f"[bold]{url}[/bold] is ready; recording into [bold]{config.data / config.run}[/bold]\n\n"
        "tau-bench, from its checkout:\n"
        f"  OPENAI_BASE_URL={url} OPENAI_API_KEY=none python run.py --env retail --model MODEL \\\n"
        "    --model-provider openai --user-model MODEL --user-model-provider openai\n\n"
        "Ctrl-C stops and seals.",
        highlight=False,
        soft_wrap=True,
    )


def _report(code: int | None, stop: asyncio.Event, console: Console, log: Path) -> int:
    """Say how the worker ended, with what it said last unless it was bad input, which is one line."""
    if code is None:
        return 0 if stop.is_set() else 1
    lines = log.read_text(errors="replace").splitlines()
    console.print("\n".join(lines[-1:] if code == 2 else lines[-20:]), highlight=False, markup=False, soft_wrap=True)
    if code != 2:
        console.print(f"the worker ended with exit code {code}; all it said is in {log}", highlight=False)
    return code if code > 0 else 1


async def _first(*tasks: asyncio.Task[object]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _end(worker: asyncio.subprocess.Process, ended: asyncio.Task[int]) -> None:
    """Stop the worker and whatever it started."""
    if not ended.done():
        worker.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(ended), STOP_S)
    with contextlib.suppress(ProcessLookupError):  # its process group: engine processes that outlived it
        os.killpg(worker.pid, signal.SIGKILL)
    await ended
