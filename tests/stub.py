"""A stub worker: the worker's own middleware, ledger and spool over an engine that only pretends.

Tokens are the bytes of the prompt; a reply is a function of the prompt; a row is a function of the token prefix and the
point; whole blocks are served from a cache keyed by salt, as vLLM's prefix cache does. It speaks the worker's HTTP
contract, which `test_contract.py` holds against the real one, and can be told to fail.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import msgspec
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from episodes.wire import DTYPES, bounds
from worker.metrics import Metrics
from worker.orders import XARG, Config, Order
from worker.server import CaptureMiddleware
from worker.spool import SpoolFile, prepare, refuse

MODEL = "stub"
HIDDEN = 16
N_LAYERS = 6
BLOCK = 16
POINTS = ["layers.1.output", "layers.3.output"]
DTYPE = DTYPES["BF16"]
Token = Annotated[int, msgspec.Meta(ge=0, lt=256)]


class Asked(msgspec.Struct):
    """The fields of a request that the stub reads, so that it takes and refuses what vLLM does."""

    model: str
    messages: list[dict[str, Any]] = []
    prompt: str | list[str | int | list[int]] = ""
    n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    stream: bool | None = None
    cache_salt: str | None = None
    vllm_xargs: dict[str, Any] | None = None
    stub_fault: str | None = None
    stub_reply: dict[str, Any] | None = None

    def prompts(self, kind: str) -> list[list[int]]:
        """The tokens of each; ValueError if there are none."""
        if kind == "chat.completion":
            parts: list[Any] = [render(self.messages)]
        elif isinstance(self.prompt, str):
            parts = [self.prompt]
        elif len({type(part) for part in self.prompt}) != 1:
            raise ValueError(f"prompt {self.prompt!r} is not all of one kind")
        else:
            parts = [self.prompt] if isinstance(self.prompt[0], int) else self.prompt
        tokens = [list(part.encode()) if isinstance(part, str) else part for part in parts]
        return msgspec.convert(tokens, list[Annotated[list[Token], msgspec.Meta(min_length=1)]])


def render(messages: list[dict[str, Any]]) -> list[int]:
    """A chat template: the messages as JSON, one token a byte."""
    kept = [[m.get("role"), m.get("content") or "", m.get("tool_calls") or []] for m in messages]
    return list("".join(json.dumps(message) for message in kept).encode())


def answer(prompt: list[int], choice: int = 0) -> str:
    """What the stub replies: seven to fourteen letters that depend on the prompt."""
    digest = hashlib.sha256(bytes(t % 256 for t in prompt) + bytes([choice])).hexdigest()
    return digest[: 7 + int(digest[0], 16) % 8]


def rows(tokens: list[int], points: list[str]) -> np.ndarray:
    """[tokens, points, HIDDEN]: each token's row, given all before it."""
    prefix = hashlib.blake2b(digest_size=HIDDEN)
    found = []
    for token in tokens:
        prefix.update(token.to_bytes(4, "little"))
        for point in points:
            digest = prefix.copy()
            digest.update(point.encode())
            found.append(digest.digest())
    values = np.frombuffer(b"".join(found), np.uint8).reshape(len(tokens), len(points), HIDDEN)
    return (values.astype(np.float32) / 64 - 2).astype(DTYPE)


class Engine:
    """What the stub has in place of vLLM's AsyncLLM."""

    def __init__(self, spool: Path, spool_bytes: int = 1 << 30) -> None:
        self.config = Config(str(spool), spool_bytes, 1 << 30, POINTS)
        self.metrics = Metrics(spool)
        self.cached: set[tuple[str, bytes]] = set()
        self.fail_captures: str | None = None
        self._turn = asyncio.Lock()
        self.vllm_config = SimpleNamespace(
            additional_config={XARG: msgspec.to_builtins(self.config)},
            model_config=SimpleNamespace(
                served_model_name=MODEL,
                get_total_num_hidden_layers=lambda: N_LAYERS,
                get_hidden_size=lambda: HIDDEN,
                dtype="torch.bfloat16",
                max_model_len=100_000,
                model="tests/stub",
                revision=None,
                quantization=None,
            ),
        )

    async def generate(self, prompt: dict[str, Any], params: Any, request_id: str) -> AsyncIterator[Any]:
        """One prompt after the other; then one token an output, all choices in step, the rows spooled when the last is
        out.
        """
        ids: list[int] = prompt["prompt_token_ids"]
        replies = [list((params.told or answer(ids, i))[: params.max_tokens].encode()) for i in range(params.n)]
        salt = prompt.get("cache_salt", "")
        async with self._turn:
            await asyncio.sleep(params.prompt_s * len(ids))
        n_cached = self._n_cached(salt, ids)
        step = 0
        try:
            for step in range(max(map(len, replies))):
                await asyncio.sleep(params.token_s)
                if not step:
                    self._cache(salt, ids)
                outputs = [
                    SimpleNamespace(
                        index=i,
                        token_ids=reply[step : step + 1] if params.output_kind.name == "DELTA" else reply[: step + 1],
                        finish_reason="stop" if step + 1 >= len(reply) else None,
                        stop_reason=None,
                    )
                    for i, reply in enumerate(replies)
                    if step < len(reply)
                ]
                yield SimpleNamespace(prompt_token_ids=ids, num_cached_tokens=n_cached, outputs=outputs)
        finally:  # finished, or dropped by its client: what was computed is spooled either way
            computed = [reply[: step + 1] for reply in replies]
            self._spool(params.extra_args, ids, computed, n_cached)
            self._cache(salt, ids + computed[0][:-1])

    def _blocks(self, salt: str, ids: list[int]) -> list[tuple[str, bytes]]:
        """Each whole block by all that it ends."""
        prefix, found = hashlib.blake2b(digest_size=16), []
        for stop in range(BLOCK, len(ids) + 1, BLOCK):
            prefix.update(bytes(ids[stop - BLOCK : stop]))
            found.append((salt, prefix.digest()))
        return found

    def _cache(self, salt: str, ids: list[int]) -> None:
        self.cached.update(self._blocks(salt, ids))

    def _n_cached(self, salt: str, ids: list[int]) -> int:
        """Whole leading blocks in the cache; the last token is always computed."""
        hits = 0
        for block in self._blocks(salt, ids[:-1]):
            if block not in self.cached:
                break
            hits += 1
        return hits * BLOCK

    def _spool(self, extra: dict[str, Any], prompt: list[int], replies: list[list[int]], n_cached: int) -> None:
        if XARG not in extra:
            return
        order = msgspec.convert(extra[XARG], Order)
        spool = Path(self.config.spool_dir)
        for i, reply in enumerate(replies):
            choice = order.first_choice + i
            self.metrics.add("captures_total")
            if self.fail_captures:
                self.metrics.add("captures_failed_total")
                refuse(spool, f"{order.call}.{choice}", self.fail_captures)
                continue
            tokens = prompt + reply[:-1]
            file = SpoolFile(spool, order.call, choice, order.points, "BF16", HIDDEN, prompt)
            first, stop = bounds(order.tokens, len(prompt))
            first, stop = max(first, n_cached), min(stop, len(tokens))
            if first < stop:
                computed = rows(tokens, order.points)[first:stop]
                self.metrics.add("rows_total", stop - first)
                file.append(first, np.array(tokens[first:stop], np.int32), computed.view(np.uint8))
            file.finish()


class Stub:
    """The HTTP side; `faults` and `engine` can be changed while it runs.

    faults: one per call to come; a field `stub_fault` in a body is that call's own.
        "garbage" (a 200 that is no JSON, a stream with an event that is none), "cut" (the reply breaks off), "error" (a
        stream says that it failed, as vLLM's does, and ends as if it had not), "stall"
        (it stops half way and nothing more comes), "silence" (nothing comes at all), "429", "500"
    """

    def __init__(self, spool: Path, api_key: str | None = None, **engine: Any) -> None:
        """api_key: as vLLM's `--api-key`."""
        prepare(spool)
        self.engine = Engine(spool, **engine)
        self.faults: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.token_s = self.prompt_s = 0.0  # a token of a reply, and of a prompt
        self.foreign: dict[str, Any] = {}
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", lambda _: JSONResponse({"object": "list", "data": [{"id": MODEL}]})),
            Route("/health", lambda _: Response()),
            Route("/metrics", lambda _: Response("stub_up 1\n", media_type="text/plain; version=0.0.4")),
        ]
        self.app = Starlette(routes=routes)
        self.app.state.engine_client = self.engine
        self.app.state.args = SimpleNamespace(api_key=[api_key] if api_key else None, uds=None)

    async def chat(self, request: Request) -> Response:
        return await self._serve(request, "chat.completion")

    async def completions(self, request: Request) -> Response:
        return await self._serve(request, "text_completion")

    async def _serve(self, request: Request, kind: str) -> Response:
        self.headers.append(dict(request.headers))
        try:
            body = await request.json()
            self.bodies.append(body)
            asked = msgspec.convert(body, Asked)
            told = self.told(asked)
            spared = told is not None and XARG not in (asked.vllm_xargs or {})
            prompts = [] if spared else asked.prompts(kind)
        except ValueError as error:
            return _error(400, f"bad request: {error!r}")
        if asked.model != MODEL:
            return _error(404, f"The model `{asked.model}` does not exist.")
        fault = asked.stub_fault or (self.faults.pop(0) if self.faults else None)
        if fault in ("429", "500"):
            return _error(int(fault), "told to fail")
        if fault == "silence":
            return await _silence(request)
        if fault == "garbage" and not asked.stream:
            return Response(b"<html>", media_type="application/json")
        n = asked.n or 1
        if spared:  # nothing to record
            return self._tell(told)
        identity = request.headers.get("x-request-id") or "none"
        params = [
            SimpleNamespace(
                n=n,
                max_tokens=asked.max_tokens or 1000,
                extra_args=dict(asked.vllm_xargs or {}),
                output_kind=SimpleNamespace(name="DELTA" if asked.stream else "FINAL_ONLY"),
                token_s=self.token_s,
                prompt_s=self.prompt_s,
                told=None if told is None else json.dumps(told),
            )
            for _ in prompts
        ]
        generate = self.engine.generate
        streams = [
            generate({"prompt_token_ids": ids, "cache_salt": asked.cache_salt or ""}, p, f"{identity}-{i}")
            for i, (ids, p) in enumerate(zip(prompts, params, strict=True))
        ]
        head = {"id": f"chatcmpl-{identity}", "object": kind, "created": int(time.time()), "model": MODEL}
        if asked.stream:
            return StreamingResponse(self._events(streams[0], head, kind, fault), media_type="text/event-stream")
        texts = [[answer(ids, j)[: params[0].max_tokens] for j in range(n)] for ids in prompts]
        for stream in streams:
            async for _ in stream:
                pass
        if told is not None:
            return self._tell(told, head["id"])
        choices = [self._choice(i, text, kind) for i, text in enumerate(t for part in texts for t in part)]
        n_prompt, n_completion = sum(map(len, prompts)), sum(len(t) for p in texts for t in p)
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "total_tokens": n_prompt + n_completion}
        reply = json.dumps({**head, "choices": choices, "usage": usage, **self.foreign}).encode()
        if fault in ("cut", "stall"):
            return StreamingResponse(_half(reply, fault), headers={"content-type": "application/json"})
        return Response(reply, media_type="application/json")

    def told(self, asked: Asked) -> dict[str, Any] | None:
        """The message that this request is to be answered with; None for one that depends on the prompt."""
        return asked.stub_reply

    @staticmethod
    def _tell(message: dict[str, Any], identity: str = "chatcmpl-told") -> Response:
        """The reply that the request tells, in a field `stub_reply`: for tests that replay a conversation."""
        choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
        head = {"id": identity, "object": "chat.completion", "created": int(time.time()), "model": MODEL}
        return JSONResponse({**head, "choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    @staticmethod
    def _choice(index: int, text: str, kind: str) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if kind == "chat.completion" else {"text": text}
        return {"index": index, **said, "finish_reason": "stop"}

    async def _events(self, stream: Any, head: dict[str, Any], kind: str, fault: str | None) -> AsyncIterator[bytes]:
        def event(index: int, delta: dict[str, Any], reason: str | None) -> bytes:
            said = {"delta": delta} if kind == "chat.completion" else {"text": delta.get("content", "")}
            chunk = {**head, "object": f"{kind}.chunk", "choices": [{"index": index, **said, "finish_reason": reason}]}
            return b"data: " + json.dumps({**chunk, **self.foreign}).encode() + b"\n\n"

        begun = False
        async for output in stream:
            if not begun:
                yield event(0, {"role": "assistant", "content": ""}, None)
            begun = True
            for part in output.outputs:
                yield event(part.index, {"content": bytes(part.token_ids).decode()}, part.finish_reason)
            if fault == "cut":
                await stream.aclose()  # else what is spooled at its end waits for the garbage collector
                raise ConnectionError("told to cut")
            if fault == "stall":
                await asyncio.Event().wait()
            if fault == "error":
                await stream.aclose()
                yield b'data: {"error": {"message": "told to fail", "type": "InternalServerError", "code": 500}}\n\n'
                break
            if fault == "garbage":
                yield b"data: \xff{<html>\n\n"
        yield b"data: [DONE]\n\n"


async def _half(reply: bytes, fault: str) -> AsyncIterator[bytes]:
    yield reply[: len(reply) // 2]
    if fault == "cut":
        raise ConnectionError("told to cut")
    await asyncio.Event().wait()


async def _silence(request: Request) -> Response:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    return Response()


def _error(status: int, message: str) -> Response:
    kinds = {400: "BadRequestError", 404: "NotFoundError"}
    error = {"message": message, "type": kinds.get(status, "ServerError"), "param": None, "code": status}
    return JSONResponse({"error": error}, status)


def server(stub: Stub, captures: bool = True, port: int = 0, uds: Path | None = None) -> uvicorn.Server:
    """A server for a stub. captures: False makes it a backend that is not ours: no middleware, no routes. uds: a path
    to listen at instead of a port.
    """
    stub.app.state.args.uds = None if uds is None else str(uds)
    app = CaptureMiddleware(stub.app) if captures else stub.app
    # The middleware stands outside the app here, so the app's own lifespan scope has to be given to it.
    config = uvicorn.Config(
        _with_app(app, stub.app),
        port=port,
        uds=stub.app.state.args.uds,
        log_level="critical",
        lifespan="on",
        ws="none",
    )
    return uvicorn.Server(config)


class Running:
    """A stub in a thread, on a port of its own unless one is given; `url` is its base. uds: a path to listen at
    instead.
    """

    def __init__(self, stub: Stub, captures: bool = True, port: int = 0, uds: Path | None = None) -> None:
        self.stub = stub
        self._uds = uds
        self._server = server(stub, captures, port, uds)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> Running:
        self._thread.start()
        deadline = time.monotonic() + 10
        while not self._server.started:
            assert time.monotonic() < deadline and self._thread.is_alive(), "the stub did not start"
            time.sleep(0.005)
        if self._uds is None:
            port = self._server.servers[0].sockets[0].getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)


def _with_app(app: Any, starlette: Starlette) -> Any:
    async def run(scope: Any, receive: Any, send: Any) -> None:
        scope["app"] = starlette
        await app(scope, receive, send)

    return run


def main(worker: type[Stub] = Stub) -> None:
    """A worker's command line, as far as `tautap up` needs one."""
    flags = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
    if "--fail" in flags:
        sys.exit(f"told to fail with {flags['--fail']}")
    with tempfile.TemporaryDirectory() as scratch:
        stub = worker(Path(flags.get("--spool-dir", scratch)))
        stub.token_s = float(flags.get("--token-s", 0))
        server(stub, port=int(flags["--port"])).run()


if __name__ == "__main__":
    main()
