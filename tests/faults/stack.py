"""The processes that faults are injected into, the clients that talk to them meanwhile, and what must hold after it.

A stub worker and a proxy, each a process of its own that keeps its port over any number of lives.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import httpx
import numpy as np
import openai

from episodes import records
from episodes.messages import chat, parse_object
from episodes.run import Call, open_run
from episodes.verify import problems
from servers import healthy
from tests.conftest import free_port, until
from tests.stub import MODEL, POINTS, answer, render, rows

TURNS = 3
CLIENTS = 4
# What `verify` may say of a call: that it was lost. Anything else is damage.
LOSS = re.compile(
    r"call (?P<call>[\w-]+)(, choice \d+)?: no (activations: (?P<reason>.+)|rows for positions \d+ to (?P<stop>\d+))"
)
TROUBLE = (openai.OpenAIError, httpx.HTTPError, httpx.StreamError)


class CutShort(openai.OpenAIError):
    """A stream that ended before its last event."""


class Process:
    """A server, from here on with the same port; `log` has what it said in all its lives."""

    def __init__(self, command: list[str], health: str, log: Path) -> None:
        self.command = command
        self.log = log
        self._env = {name: text for name, text in os.environ.items() if name != "NNSIGHT_CONFIG"}
        self._health = health
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *prefix: str) -> None:
        """prefix: a program that runs the command, such as a tracer."""
        with self.log.open("ab") as log:
            command = [*prefix, *self.command]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=self._env, start_new_session=True)
        until(lambda: healthy(self._health, "") or not self.alive, f"{self.command}", 120)
        assert self.alive, self.log.read_text(errors="replace")[-4000:]

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """`kill -9` of it and all that it started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(120)


class Stack:
    """A worker, a proxy and the run that they record. `answered`: call id → text, of replies that came whole.

    model, fields: what every request's body has.
    """

    model = MODEL
    fields: ClassVar[dict[str, Any]] = {}

    def __init__(self, home: Path, data: Path | None = None) -> None:
        self.home = home
        self.spool = home / "spool"
        self.run_dir = (data or home / "data") / "r"
        self.worker_port, self.port = free_port(), free_port()
        worker_url = f"http://127.0.0.1:{self.worker_port}"
        self.worker = Process([sys.executable, *self._worker()], f"{worker_url}/health", home / "worker.log")
        self.proxy = self.proxy_to(worker_url)
        self.answered: dict[str, str] = {}

    def _worker(self) -> list[str]:
        """The arguments of the worker's process."""
        where = ["--port", f"{self.worker_port}", "--spool-dir", f"{self.spool}"]
        return ["-m", "tests.stub", *where, "--token-s", "0.002"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def proxy_to(self, backend: str, *flags: str) -> Process:
        """The proxy, to be started, in front of this backend."""
        command = [sys.executable, "-m", "proxy", "proxy", "--backend", backend, "--port", f"{self.port}"]
        command += ["--data", f"{self.run_dir.parent}", "--run", self.run_dir.name, "--min-free-bytes", "0", *flags]
        self.proxy = Process(command, f"{self.url}/health/live", self.home / "proxy.log")
        return self.proxy

    def start(self) -> None:
        self.worker.start()
        self.proxy.start()

    def client(self, port: int | None = None, timeout_s: float = 60) -> openai.OpenAI:
        url = f"http://127.0.0.1:{port or self.port}/v1"
        return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=timeout_s)

    def ask(self, text: str, port: int | None = None, timeout_s: float = 60, **options: Any) -> str:
        """Ask one question; returns the call's id. What was answered whole has to be on disk later, or named."""
        with self.client(port, timeout_s) as client:
            call, reply = self.converse(client, [{"role": "user", "content": text}], **options)
        self.answered[call] = reply
        return call

    def converse(self, client: openai.OpenAI, messages: Any, stream: bool = False, **fields: Any) -> Answer:
        """A call's id and reply, if it comes whole; one of `TROUBLE` if not. fields: more for the body."""
        fields = self.fields | fields
        create = client.chat.completions.create
        if not stream:
            made = create(model=self.model, messages=messages, extra_body=fields)
            return Answer(made.id.removeprefix("chatcmpl-"), made.choices[0].message.content or "")
        text, name, whole = "", "", False
        for chunk in create(model=self.model, messages=messages, stream=True, extra_body=fields):
            name = chunk.id.removeprefix("chatcmpl-")
            text += chunk.choices[0].delta.content or ""
            whole = chunk.choices[0].finish_reason is not None
        if not whole:
            raise CutShort(f"{name} ended after {text!r}")
        return Answer(name, text)

    def check_call(self, call: Call, text: str) -> None:
        """A call of which nothing is lost has the tokens that its client got, and the rows that they make."""
        (sequence,) = call.record.sequences
        assert bytes(sequence.completion_token_ids).decode() == text
        expected = rows(sequence.tokens.tolist(), POINTS)
        for i, point in enumerate(POINTS):
            assert np.array_equal(call.activations(point), expected[:, i]), (call.record.id, point)

    def explains(self, lost: records.Call, call: records.Call, stop: int) -> bool:
        """Whether the loss of one call is why another lacks rows up to `stop`: it computed those tokens."""
        prompt = render(chat(parse_object(lost.request)) or [])
        computed = prompt + list(answer(prompt).encode())
        (sequence,) = call.sequences
        return computed[:stop] == sequence.tokens[:stop].tolist()

    def account(self, calls: Collection[str]) -> Account:
        """Wait until these calls, answered all, are in the journal and no file is left over; check them."""
        until(lambda: not Account(self, calls).lost, "every answered call in the journal")
        left: list[str] = []

        def none_is_left() -> bool:
            left[:] = self.leftovers()
            return not left

        with suppress(AssertionError):  # what is there for a moment is a seal's
            until(none_is_left, "no file left over")
        assert left == []
        found = Account(self, calls)
        found.check()
        return found

    def finish(self) -> None:
        """Stop the proxy as an operator would: all is still there, and `tautap verify` says what was found."""
        assert self.proxy.stop() == 0, self.proxy.log.read_text(errors="replace")[-4000:]
        found = Account(self, self.answered)
        assert not found.lost
        found.check()
        assert self.leftovers() == []
        self.verify()

    def verify(self) -> None:
        """`tautap verify` names what was lost, finds nothing else, and its exit code says the same."""
        command = [sys.executable, "-m", "proxy", "verify", str(self.run_dir)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        *named, total = done.stdout.splitlines()
        assert done.returncode == (1 if named else 0), (done.returncode, done.stdout, done.stderr)
        assert [line for line in named if not LOSS.fullmatch(line)] == []
        assert total.endswith(": all there") == (not named)

    def leftovers(self) -> list[str]:
        """Temporary files of the run and all files of the spool: nothing is under way, so there should be none."""
        names = itertools.chain.from_iterable(files for _, _, files in os.walk(self.run_dir))
        found = [Path(name) for name in names if re.fullmatch(r"\..*\.(draft|claim)", name)]
        found += [path for path in self.spool.glob("*") if not path.name.startswith(".")]
        return sorted(str(path) for path in found)

    def kill(self) -> None:
        self.proxy.kill()
        self.worker.kill()


class Account:
    """Where answered calls are, by the run as it lies on disk now: in the journal or `lost`."""

    def __init__(self, stack: Stack, calls: Collection[str]) -> None:
        self._stack = stack
        self._run = open_run(stack.run_dir)
        self._answered = {call: stack.answered[call] for call in calls}
        self.lost = self._answered.keys() - self._run.history.calls.keys()

    @cached_property
    def _said(self) -> list[str]:
        return list(problems(self._run))

    @cached_property
    def named(self) -> set[str]:
        """The calls whose activations are said to be lost, all or some."""
        losses = (LOSS.fullmatch(line) for line in self._said)
        return {loss["call"] for loss in losses if loss} & self._answered.keys()

    def check(self) -> None:
        """What is on disk is what the client got, with the rows that its tokens make; what is not has its reason."""
        assert [line for line in self._said if not LOSS.fullmatch(line)] == []
        for call in self._answered.keys() - self.named - self.lost:
            self._stack.check_call(self._run.call(call), self._answered[call])
        assert self._unexplained() == []

    def _unexplained(self) -> list[str]:
        """Losses that have no reason of their own, nor that of another call whose rows were to be shared."""
        calls = self._run.history.calls
        lost = [call for call in calls.values() if call.lost]
        found = []
        for line, loss in ((line, LOSS.fullmatch(line)) for line in self._said):
            if loss is None or loss["call"] not in self.named:
                continue
            call = calls[loss["call"]]
            if loss["reason"] is not None:
                explained = loss["reason"] == call.lost
            else:
                explained = bool(call.lost) or any(
                    self._stack.explains(other, call, int(loss["stop"])) for other in lost
                )
            found += [] if explained else [line]
        return found


class Load:
    """Clients that hold one conversation after another for as long as the block runs, streamed and not in turns.

    A conversation that fails is given up. `failures` counts them by the error's name.
    """

    def __init__(self, stack: Stack, port: int | None = None) -> None:
        self.failures: Counter[str] = Counter()
        self._stack, self._port = stack, port
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._talk, args=(n,)) for n in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a client waits for an answer that never comes"

    def wait(self, seconds: float) -> None:
        self._over.wait(seconds)

    def _talk(self, number: int) -> None:
        with self._stack.client(self._port) as client:
            for n in itertools.count():
                try:
                    for _ in self._conversation(client, f"{number}.{n}", stream=bool(n % 2)):
                        if self._over.is_set():
                            return
                except TROUBLE as error:
                    self.failures[type(error).__name__] += 1
                    if self._over.wait(0.02):
                        return

    def _conversation(self, client: openai.OpenAI, name: str, stream: bool) -> Iterator[None]:
        messages = [{"role": "system", "content": "You are a clerk. " * 5}]
        for turn in range(TURNS):
            messages.append({"role": "user", "content": f"{name}, turn {turn}, {len(self._stack.answered)}"})
            call, text = self._stack.converse(client, messages, stream=stream)
            self._stack.answered[call] = text
            messages.append({"role": "assistant", "content": text})
            yield


class Answer(NamedTuple):
    call: str
    text: str
