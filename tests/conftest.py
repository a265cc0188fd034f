"""What the tests share: a stub worker and a proxy in threads, and the real engine, at most one of it at a time."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import hypothesis
import openai
import pytest

from episodes.run import Run, open_run
from proxy.config import Config
from proxy.server import serve
from servers import healthy, stock
from tests.stub import Running, Stub

# Before anything imports nnsight.
os.environ["NNSIGHT_CONFIG"] = str(Path(__file__).with_name("nnsight.yaml"))

hypothesis.settings.register_profile("tautap", deadline=None)  # that a machine is busy is no failure
hypothesis.settings.load_profile("tautap")

_new_context, _known_context = ssl.create_default_context, functools.cache(ssl.create_default_context)


def _context(purpose: ssl.Purpose = ssl.Purpose.SERVER_AUTH, **authorities: str) -> ssl.SSLContext:
    """A context that trusts these authorities, made once: to read their file takes 50 ms, which every HTTP client would
    spend. One without, as the proxy's own, into which a certificate is loaded, is a new one.
    """
    return (_known_context if authorities else _new_context)(purpose, **authorities)


ssl.create_default_context = _context


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--times", type=int, default=1, help="how often each fault of tests/faults is injected")


class ProxyThread:
    """A proxy in a thread with a loop of its own; leaving it drains and seals, as SIGTERM does, and fails if the loop
    was held for longer than `held_limit_s`.
    """

    # Tests share two cores with whatever they start, so this is far above what disk or tensors on the loop would need.
    held_limit_s = 3.0

    def __init__(self, config: Config) -> None:
        self.config = config
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._held_s = 0.0
        self._thread = threading.Thread(target=self._run)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.config.port}"

    @property
    def run_dir(self) -> Path:
        return self.config.data / self.config.run

    def open(self) -> Run:
        return open_run(self.run_dir)

    def client(self, path: str = "/v1") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}{path}", api_key="none", max_retries=0)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # handed to the test's thread
            self._error = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        watching = asyncio.create_task(self._watch())
        try:
            await serve(self.config, self._stop, self._started.set)
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    async def _watch(self) -> None:
        """Note for how long the loop let nobody else go on."""
        while True:
            due = time.monotonic() + 0.1
            try:
                await asyncio.sleep(0.1)
            finally:
                self._held_s = max(self._held_s, time.monotonic() - due)

    def __enter__(self) -> ProxyThread:
        self._thread.start()
        assert self._started.wait(30)
        if self._error is not None:
            self._thread.join()
            raise self._error
        return self

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(60)
            assert not self._thread.is_alive(), "the proxy did not stop"

    def __exit__(self, *error: object) -> None:
        self.stop()
        if self._error is not None:
            raise self._error
        assert self._held_s < self.held_limit_s, f"the proxy's event loop was held for {self._held_s:.1f} s"


@pytest.fixture(autouse=True)
def event_loops_may_be_held_beside_an_engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """There, transformers runs in the same process as the loop and takes Python's lock from it."""
    limit_s = math.inf if request.node.get_closest_marker("engine") else ProxyThread.held_limit_s
    with mock.patch.object(ProxyThread, "held_limit_s", limit_s):
        yield


@pytest.fixture(autouse=True)
def clients_are_closed() -> Iterator[None]:
    """The parts of an openai client refer to one another. Left to the garbage collector, its sockets may go before it
    closes them, which fails whatever test is on then.
    """
    made, begin = [], openai.OpenAI.__init__

    def noted(client: openai.OpenAI, *args: Any, **options: Any) -> None:
        begin(client, *args, **options)
        made.append(client)

    with mock.patch.object(openai.OpenAI, "__init__", noted):
        yield
    for client in made:
        client.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def slowly(monkeypatch: pytest.MonkeyPatch, method: tuple[type, str], seconds: float) -> None:
    """Have an asynchronous method take so much longer."""
    of, name = method
    was = getattr(of, name)

    async def slow(*args: Any) -> Any:
        await asyncio.sleep(seconds)
        return await was(*args)

    monkeypatch.setattr(of, name, slow)


def until(condition: Callable[[], bool], what: str, limit_s: float = 20) -> None:
    """Wait for something another thread or process does."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.01)


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Running]:
    with Running(Stub(tmp_path / "spool")) as running:
        yield running


@contextmanager
def proxy_to(backend: str | tuple[str, ...], data: Path, **options: object) -> Iterator[ProxyThread]:
    backends = (backend,) if isinstance(backend, str) else backend
    settings = {"backends": backends, "data": data, "run": "r", "port": free_port()} | options
    with ProxyThread(Config(**settings)) as running:
        yield running


@pytest.fixture
def proxy(stub: Running, tmp_path: Path) -> Iterator[ProxyThread]:
    with proxy_to(stub.url, tmp_path / "data") as running:
        yield running


FLOAT32 = ["--dtype", "float32", "--layers", "0,15,29", "--max-model-len", "8192", "--max-num-batched-tokens", "256"]
BFLOAT16 = ["--layers", "0,15,29", "--max-model-len", "8192"]


class Engines:
    """The real worker, one at a time: asking for another kind stops the one that runs."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._kind: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def get(self, kind: str, flags: list[str] | None = None) -> str:
        """The base URL of a worker of this kind: `float32`, `bfloat16`, `stock`, which is vLLM without us, or another
        name with the flags that it stands for.
        """
        if kind != self._kind:
            self.stop()
            self._start(kind, flags or {"float32": FLOAT32, "bfloat16": BFLOAT16, "stock": FLOAT32}[kind])
        return self.url

    def _start(self, kind: str, flags: list[str]) -> None:
        port = free_port()
        command = [sys.executable, "-m", "worker", *flags, "--port", str(port), "--spool-dir", str(self._logs)]
        # The model in the engine's own process, as on a GPU; on a CPU vLLM has one more, which takes longer to start.
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        env = {name: value for name, value in os.environ.items() if name != "NNSIGHT_CONFIG"} | own
        if kind == "stock":
            command, env = stock(command[3:], env)
        log = self._logs / f"{kind}.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)
        self._kind, self.url = kind, f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 300
        while not healthy(self.url):
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the {kind} engine did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.25)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(30)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
        self._process = self._kind = None


def tune(model: Any, home: Path) -> None:
    """Write a random LoRA adapter of a Llama (of transformers) into `home`, and merge it into that model."""
    import torch
    from safetensors.torch import save_file

    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": ["o_proj"]}
    (home / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for n, block in enumerate(model.model.layers):
        weight = block.self_attn.o_proj.weight.data
        down, up = torch.randn(8, weight.shape[1]), torch.randn(weight.shape[0], 8)
        name = f"base_model.model.model.layers.{n}.self_attn.o_proj"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        weight += 16 / 8 * up @ down
    save_file(tensors, home / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    running = Engines(tmp_path_factory.mktemp("engines"))
    yield running
    running.stop()


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=120) as client:
        yield client
