"""`tautap up`: a worker process and a proxy in this one, started together and stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console

from episodes.errors import BadInput
from episodes.terminal import console
from proxy.config import Config
from proxy.server import check, serve, stopper

READY_S = 3600.0
STOP_S = 30.0
REPORT_S = 10.0


# What is done while both run, given an event that says when to stop; it returns the exit code.
Job = Callable[[asyncio.Event], Awaitable[int]]


async def run_stack(config: Config, command: list[str], environment: Mapping[str, str], job: Job) -> int:
    """Run both until the job is done; returns the exit code. command, environment: the worker's.

    Only this proxy can talk to the worker: both get a key that nobody else knows.

    When a signal comes or the worker ends, the job is told, and may still use the proxy until it is done.
    """
    config = replace(config, backend_key=secrets.token_urlsafe(32))
    (backend,) = config.backends
    stop = stopper()
    out = console(err=True)
    log = config.data / config.run / "worker.log"
    if await _healthy(backend):
        raise BadInput(f"something else answers at {backend}: stop it, or give another --worker-port")
    await check(config)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)  # it may be a link to anything
        output = log.open("wb")
    except OSError as error:
        raise BadInput(f"--data {config.data} cannot be written: {error.strerror}") from None
    with output:
        # A session of its own: Ctrl-C reaches us alone, and the worker lives until its last rows are claimed, if there
        # is time for that.
        worker = await asyncio.create_subprocess_exec(
            *command,
            env={**environment, "VLLM_API_KEY": str(config.backend_key)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    ended = asyncio.create_task(worker.wait())
    try:
        if not await _loaded(backend, ended, stop, out):
            return _report(worker.returncode, stop, out, log)
        code = await _with_proxy(config, stop, ended, job)
        return _report(worker.returncode, stop, out, log) if ended.done() else code
    finally:
        await end(worker, ended)


async def attend(job: Job) -> int:
    """Do the job with a proxy that somebody else started; returns its exit code."""
    return await job(stopper())


async def _with_proxy(config: Config, stop: asyncio.Event, ended: asyncio.Task[int], job: Job) -> int:
    """Do the job while a proxy serves; returns its exit code. ended: the worker's end, which is the job's."""
    over, ready = asyncio.Event(), asyncio.Event()
    proxy = asyncio.create_task(serve(config, over, ready.set))
    waiting = asyncio.create_task(ready.wait())
    await _first(proxy, waiting)
    waiting.cancel()
    code = 0
    try:
        if ready.is_set():
            doing = asyncio.ensure_future(job(stop))
            await _first(proxy, ended, doing)
            stop.set()
            code = await doing
    finally:
        over.set()
        await proxy
    return code


async def _loaded(backend: str, ended: asyncio.Task[int], stop: asyncio.Event, out: Console) -> bool:
    """Wait until the worker answers, saying what it does meanwhile; False if it ended or we were told to stop."""
    begun = reported = time.monotonic()
    with out.status("starting the worker") as status:
        while not ended.done() and not stop.is_set() and time.monotonic() - begun < READY_S:
            if await _healthy(backend):
                out.print(f"the worker is ready after {time.monotonic() - begun:.0f} s")
                return True
            passed = f"loading the model, {time.monotonic() - begun:.0f} s"
            status.update(passed)
            if not out.is_terminal and time.monotonic() - reported >= REPORT_S:
                reported = time.monotonic()
                out.print(passed)
            await asyncio.sleep(0.25)
    return False


async def _healthy(backend: str) -> bool:
    timeout = aiohttp.ClientTimeout(total=2)
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(f"{backend}/health") as reply:
            return reply.status == 200
    return False


async def greet(config: Config, stop: asyncio.Event) -> int:
    """The job of `tautap up`: say where the proxy is, and wait."""
    url, key = f"{config.url}/v1", "YOUR_KEY" if config.keys else "none"
    Console(stderr=True).print(
        f"[bold]{url}[/bold] is ready; recording into [bold]{config.data / config.run}[/bold]\n\n"
        "tau-bench, from its checkout:\n"
        f"  OPENAI_BASE_URL={url} OPENAI_API_KEY={key} python run.py --env retail --model MODEL \\\n"
        "    --model-provider openai --user-model MODEL --user-model-provider openai\n\n"
        "Ctrl-C stops and seals.",
        highlight=False,
        soft_wrap=True,
    )
    await stop.wait()
    return 0


def _report(code: int | None, stop: asyncio.Event, out: Console, log: Path) -> int:
    """Say how the worker ended, with what it said last unless it was bad input, which is one line."""
    if code is None:
        return 0 if stop.is_set() else 1
    lines = log.read_text(errors="replace").splitlines()
    out.print("\n".join(lines[-1:] if code == 2 else lines[-20:]), soft_wrap=True)
    if code != 2:
        out.print(f"the worker ended with exit code {code}; all it said is in {log}")
    return code if code > 0 else 1


async def _first(*tasks: asyncio.Future[Any]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def end(process: asyncio.subprocess.Process, ended: asyncio.Task[int]) -> None:
    """Stop a process that leads a session of its own, and whatever it started."""
    if not ended.done():
        process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(ended), STOP_S)
    with contextlib.suppress(ProcessLookupError):  # its process group: engine processes that outlived it
        os.killpg(process.pid, signal.SIGKILL)
    await ended
