"""The proxy's HTTP side: what a client sends goes to the worker, what the worker answers goes to the client.

/v1/…                      the worker's own API; generation calls are recorded
/runs/<run>/v1/…           the same, recorded into that run
/episodes/<id>/v1/…        the same, as calls of that episode (so does a header `X-Episode-Id: <id>`)
/tautap/runs/<run>         `proxy.admin`
/health/live /health/ready /metrics
"""

from __future__ import annotations

import asyncio
import re
import signal
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from episodes import messages
from episodes.errors import BadInput, BadRun
from episodes.layout import check_name
from episodes.messages import JSON
from episodes.records import Call, Role
from episodes.threads import Place
from episodes.wire import CAPTURE_HEADER, GENERATION_PATHS, Capture, Collect
from proxy import admin, metrics
from proxy.backend import Backend
from proxy.config import Config
from proxy.metrics import Metrics, Watch
from proxy.recorder import Recorder, Recording

BODY_LIMIT = 256 << 20
PATH = re.compile(r"(?:/runs/(?P<run>[^/]+))?(?:/episodes/(?P<episode>[^/]+))?(?P<path>/v1(?:/.*)?)")
REQUEST_HEADERS = ("Content-Type", "Accept", "User-Agent")
REPLY_HEADERS = re.compile(r"content-type|retry-after|cache-control|x-request-id|openai-.*|x-ratelimit-.*", re.I)
GONE = "the client left before the end of the reply"
# litellm prices a reply by this; without it tau-bench's act and react agents fail on a model without a price.
OUR_REPLY_HEADERS = {"x-litellm-response-cost": "0", "X-Accel-Buffering": "no"}


@dataclass
class Exchange:
    """A generation call while it runs, for the record. Times are unix seconds."""

    id: str
    endpoint: str
    place: Place
    role: Role
    named: bool
    fields: JSON | None
    body: bytes
    capture: Capture | None
    started: float = field(default_factory=time.time)
    first_byte: float | None = None
    status: int = 0
    reply: JSON | None = None
    error: str | None = None
    foreign: JSON = field(default_factory=dict)
    told: bool = False
    watch: Watch = field(default_factory=Watch)

    def call(self) -> Call:
        return Call(
            id=self.id,
            thread=self.place.thread,
            episode=self.place.episode,
            turn=self.place.turn,
            attempt=self.place.attempt,
            kind=self.place.kind,
            role=self.role,
            named=self.named,
            endpoint=self.endpoint,
            model=str((self.reply or {}).get("model") or (self.fields or {}).get("model") or ""),
            started=self.started,
            first_byte=self.first_byte,
            ended=time.time(),
            status=self.status,
            finish_reason=messages.finish_reason(self.reply or {}),
            error=self.error,
            request=self.body.decode("utf-8", "replace"),
            reply=msgspec.json.encode(self.reply).decode() if self.reply is not None else "",
            points=list(self.capture.points or ()) if self.capture else [],
            tokens=self.capture.tokens if self.capture else "all",
        )


class Proxy:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._session: aiohttp.ClientSession
        self._backend: Backend
        self._recorder: Recorder

    def app(self) -> web.Application:
        app = web.Application(client_max_size=BODY_LIMIT, middlewares=[_in_openai_shape])
        app.cleanup_ctx.append(self._run)
        app.on_shutdown.append(self._drain)
        app.router.add_get("/health/live", self._live)
        app.router.add_get("/health/ready", self._ready)
        app.router.add_get("/metrics", metrics.answer)
        app.add_routes(admin.routes())
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    async def _run(self, app: web.Application) -> Any:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        # vLLM closes a connection that was idle for 5 s; one given up earlier is never used while it does.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False) as session:
            self._session = session
            self._backend = app[metrics.BACKEND] = Backend(self._config, session)
            counted = app[metrics.METRICS] = Metrics()
            self._recorder = app[admin.RECORDER] = Recorder(self._config, self._backend, counted)
            try:
                await self._recorder.start()
                yield
            finally:
                await self._recorder.close()

    async def _drain(self, app: web.Application) -> None:
        self._recorder.drain()

    async def _live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "live"})

    async def _ready(self, request: web.Request) -> web.Response:
        ready = await self._backend.ready()
        return web.json_response(
            {"status": "ready" if ready else "the worker does not answer"}, status=200 if ready else 503
        )

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        match = PATH.fullmatch(request.path)
        path = match["path"] if match else ""
        if match is None or path.startswith("/v1/activations"):
            return _error(404, f"{request.path} is not served here: the API is under /v1", "not_found")
        if request.method == "POST" and path in GENERATION_PATHS:
            episode = match["episode"] or request.headers.get("X-Episode-Id")
            return await self._generate(request, path, match["run"], episode)
        return await self._forward(request, path)

    async def _forward(self, request: web.Request, path: str) -> web.StreamResponse:
        """Pass a request that is not recorded through, the reply chunk by chunk."""
        body = await request.read()
        url = self._url(request, path)
        try:
            async with self._session.request(
                request.method, url, data=body, headers=self._headers(request)
            ) as upstream:
                reply = web.StreamResponse(status=upstream.status, headers=_reply_headers(upstream))
                reply.content_length = upstream.content_length
                await reply.prepare(request)
                async for chunk in upstream.content.iter_any():
                    await reply.write(chunk)
                await reply.write_eof()
                return reply
        except aiohttp.ClientConnectorError as error:
            return _error(502, f"the worker cannot be reached: {error.strerror or error}", "worker_unreachable")

    async def _generate(
        self, request: web.Request, path: str, run: str | None, episode: str | None
    ) -> web.StreamResponse:
        """Pass a generation call through and hand it to the recorder, whatever becomes of it."""
        if episode is not None:
            check_name("episode", episode)
        recording = await self._recorder.run(run)
        if recording.full:
            return _error(503, "too many calls wait to be written to disk", "overloaded", {"Retry-After": "5"})
        body = await request.read()
        watch = Watch()
        fields = messages.parse_object(body)
        call = f"c-{uuid.uuid4().hex[:16]}"
        headers = self._headers(request) | {"X-Request-Id": call}
        sent, capture = body, None
        said = messages.chat(fields)
        part = recording.part(said)
        if fields is not None:
            capture = self._capture(call, recording.salt, fields, part.role)
            sent = self._translated(fields, body)
        if capture is not None:
            headers[CAPTURE_HEADER] = capture.header()
        place = recording.place(call, said, part, episode, _retried(request))
        asked = Exchange(call, path, place, part.role, episode is not None, fields, body, capture, watch=watch)
        try:
            return await self._exchange(request, path, sent, headers, asked, recording)
        except asyncio.CancelledError:
            asked.error = GONE
            raise
        except (aiohttp.ClientError, TimeoutError) as error:
            asked.error = f"the worker failed: {error or type(error).__name__}"
            asked.status = 502
            return _error(502, asked.error, "worker_failed")
        finally:
            self._replied(asked, recording)
            claimable = capture is not None and asked.status in (0, 200)
            recording.record(asked.call(), claimable, asked.foreign, asked.watch.seconds)

    def _capture(self, call: str, salt: str, fields: JSON, role: Role) -> Capture | None:
        """What to capture of a call: what it asks for itself, else what is recorded of its role, else the worker's
        default; nothing from a backend that is not ours, which is left to read the asking itself.
        """
        model, asked = self._backend.model, fields.get("collect_activations")
        wanted = self._config.capture.get(role, model.tokens if model else "none")
        if model is None or asked is False or (asked is None and wanted == "none"):
            return None
        collect = Collect.parse(True if asked is None else asked)
        points = collect.points(model.points, model.offered)
        tokens = collect.tokens or (model.tokens if wanted == "none" else wanted)
        return Capture(call, salt, tuple(points), tokens)

    def _translated(self, fields: JSON, body: bytes) -> bytes:
        """The body as the worker should see it: the client's own bytes unless something in them is for us."""
        changed = dict(fields)
        if self._backend.model is not None:
            changed.pop("collect_activations", None)
        alias = self._config.aliases.get(str(fields.get("model")))
        if alias is not None:
            changed["model"] = alias
        return body if changed == fields else msgspec.json.encode(changed)

    async def _exchange(
        self,
        request: web.Request,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        asked: Exchange,
        recording: Recording,
    ) -> web.StreamResponse:
        asked.watch.pause()
        async with self._session.post(self._url(request, path), data=body, headers=headers) as upstream:
            asked.first_byte = time.time()
            if upstream.content_type == "text/event-stream":
                return await self._stream(request, upstream, asked, recording)
            whole = await upstream.read()
            asked.watch.go_on()
            whole, asked.foreign = messages.without_activations(whole)
            asked.status = upstream.status
            asked.reply = messages.parse_object(whole)
            self._replied(asked, recording)
            return web.Response(status=upstream.status, body=whole, headers=_reply_headers(upstream))

    async def _stream(
        self, request: web.Request, upstream: aiohttp.ClientResponse, asked: Exchange, recording: Recording
    ) -> web.StreamResponse:
        """Pass a stream on event by event, as each is complete, and keep what it spells out."""
        reply = web.StreamResponse(status=upstream.status, headers=_reply_headers(upstream))
        await reply.prepare(request)
        asked.status = upstream.status
        cutter = messages.Events()
        seen: list[bytes] = []
        try:
            async for chunk in upstream.content.iter_any():
                for event in cutter.feed(chunk):
                    kept, taken = messages.event_without_activations(event)
                    asked.foreign |= taken
                    seen.append(kept)
                    if messages.event_data(kept) == b"[DONE]":
                        # The client may send its next call on seeing this: its thread must be waiting by then.
                        asked.reply = messages.assemble(seen)
                        self._replied(asked, recording)
                    await reply.write(kept)
            if cutter.rest:
                await reply.write(cutter.rest)
            await reply.write_eof()
        except ConnectionError:  # on writing: aiohttp's errors of reading are not of this kind
            asked.error = GONE
        except (aiohttp.ClientError, TimeoutError) as error:
            # Part of the reply is out: all that can be done is to break it off, so that no one takes it for whole.
            asked.error = f"the worker failed: {error or type(error).__name__}"
            if request.transport is not None:
                request.transport.abort()
        finally:
            if asked.reply is None:
                asked.reply = messages.assemble(seen)
        return reply

    def _replied(self, asked: Exchange, recording: Recording) -> None:
        """Let the conversation go on from this reply, once; from none if the call failed."""
        if asked.told:
            return
        asked.told = True
        good = asked.status == 200 and asked.error is None and asked.reply is not None
        replies = messages.reply_messages(asked.reply) if good and asked.reply is not None else []
        recording.replied(asked.place, replies)

    def _headers(self, request: web.Request) -> dict[str, str]:
        """What the worker gets to see of a client's headers: no credentials, no cookies."""
        passed = {name: request.headers[name] for name in REQUEST_HEADERS if name in request.headers}
        return passed | self._backend.headers | {"Accept-Encoding": "identity"}

    def _url(self, request: web.Request, path: str) -> str:
        return f"{self._backend.url}{path}{'?' + request.query_string if request.query_string else ''}"


def _reply_headers(upstream: aiohttp.ClientResponse) -> dict[str, str]:
    passed = {name: value for name, value in upstream.headers.items() if REPLY_HEADERS.fullmatch(name)}
    return passed | OUR_REPLY_HEADERS


def _retried(request: web.Request) -> bool | None:
    """Whether the OpenAI SDK says that it sends a request again; None if it says nothing, as other clients do."""
    count = request.headers.get("x-stainless-retry-count")
    return None if count is None else count != "0"


@web.middleware
async def _in_openai_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give each of our errors its status."""
    try:
        return await handler(request)
    except BadInput as error:
        return _error(400, str(error), "invalid_request_error")
    except BadRun as error:
        return _error(409, str(error), "run_unusable")
    except web.HTTPRequestEntityTooLarge:
        return _error(413, f"the request body is larger than {BODY_LIMIT} bytes", "request_too_large")


def _error(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """An error in OpenAI's shape."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    return web.json_response({"error": error}, status=status, headers=headers)


def stopper() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set."""
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    return stop


async def serve(config: Config, stop: asyncio.Event, ready: asyncio.Event) -> None:
    """Serve until `stop` is set, then finish what is under way and seal; `ready` is set once clients can connect.

    BadInput if the data directory cannot be written or the port is taken; BadRun if the run cannot be used.
    """
    runner = web.AppRunner(
        Proxy(config).app(), handler_cancellation=True, access_log=None, shutdown_timeout=config.drain_s
    )
    try:
        try:
            await runner.setup()
        except OSError as error:
            raise BadInput(f"--data {config.data} cannot be written: {error.strerror}") from None
        try:
            await web.TCPSite(runner, config.host, config.port).start()
        except OSError as error:
            raise BadInput(f"cannot listen on {config.host}:{config.port}: {error.strerror}") from None
        ready.set()
        await stop.wait()
    finally:
        await runner.cleanup()
