"""The proxy's HTTP side: what a client sends goes to the worker, what the worker answers goes to the client.

/v1/…                      the worker's own API; generation calls are recorded
/runs/<run>/v1/…           the same, recorded into that run
/episodes/<id>/v1/…        the same, as calls of that episode (so does a header `X-Episode-Id: <id>`)
/tautap/runs/<run>         `proxy.admin`
/openapi.json              `proxy.openapi`
/health/live /health/ready /metrics
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import msgspec
from aiohttp import web

from episodes import messages
from episodes.cast import WARMUPS
from episodes.errors import BadInput, BadName, RunLocked, WorkerFailed
from episodes.layout import Layout, check_name
from episodes.messages import JSON
from episodes.records import Role
from episodes.store import being_written
from episodes.wire import GENERATION_PATHS, Capture, Collect
from proxy import admin, bodies, metrics, openapi
from proxy.config import TLS, Config
from proxy.exchange import Exchange, Watch
from proxy.generation import GONE, STOPPED, Generation
from proxy.guards import CLIENT, guard, local
from proxy.metrics import Metrics
from proxy.paths import Target, target
from proxy.recorder import Recorder, Recording
from proxy.refusals import Refusal, in_openai_shape
from proxy.replies import ID, answer, break_off, given_id, sign
from proxy.upstream import REQUEST_HEADERS, passed
from proxy.workers import Workers

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Proxy:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._workers: Workers
        self._recorder: Recorder
        self._in_flight = 0

    def app(self) -> web.Application:
        guarded = guard(self._config.keys) if self._config.keys else local
        app = web.Application(client_max_size=self._config.limits.body_bytes, middlewares=[in_openai_shape, guarded])
        app.on_response_prepare.append(sign)
        app.cleanup_ctx.append(self._run)
        app.on_shutdown.append(self._drain)
        app.router.add_get("/health/live", self._live)
        app.router.add_get("/health/ready", self._ready)
        app.router.add_get("/metrics", metrics.answer)
        app.router.add_get("/openapi.json", openapi.answer)
        app.add_routes(admin.routes())
        for path in (*GENERATION_PATHS, "/{path:.*}"):  # a plain path is found at once
            app.router.add_route("*", path, self._handle)
        return app

    async def _run(self, app: web.Application) -> AsyncIterator[None]:
        async with Workers.run(self._config) as self._workers:
            app[metrics.SEEN] = self._workers.seen
            counted = app[metrics.METRICS] = Metrics()
            self._recorder = app[admin.RECORDER] = Recorder(self._config, self._workers, counted)
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
        troubles = await self._workers.troubles()
        ready = not all(troubles.values())
        said: JSON = {"status": "ready" if ready else next(iter(troubles.values()))}
        if len(troubles) > 1:
            said["workers"] = {address: trouble or "ready" for address, trouble in troubles.items()}
        return web.json_response(said, status=200 if ready else 503)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        """Pass a request on to the worker, if it is one of its API's and there is room for one more."""
        asked = target(request.path)
        if asked is None:
            return Refusal(404, f"{request.path[:200]} is not served here: the API is under /v1", "not_found")
        if request.method not in METHODS:
            raise web.HTTPMethodNotAllowed(request.method[:40], METHODS)
        if self._in_flight >= self._config.limits.in_flight:
            message = f"{self._in_flight} requests are in flight, which is all that are taken (--max-in-flight)"
            return Refusal(429, message, "rate_limit_exceeded", {"Retry-After": "1"})
        self._in_flight += 1
        try:
            if request.method == "POST" and asked.path in GENERATION_PATHS:
                return await self._generate(request, asked)
            return await self._forward(request, asked)
        finally:
            self._in_flight -= 1

    async def _forward(self, request: web.Request, asked: Target) -> web.StreamResponse:
        """Pass a request that is not recorded through, the reply chunk by chunk."""
        body = await bodies.read(request, self._config.timeouts.idle_s)
        headers = passed(request.headers, REQUEST_HEADERS)
        reply = web.StreamResponse()
        try:
            async with self._workers.lease().ask(
                request.method, asked.path, request.rel_url.raw_query_string, headers, body
            ) as upstream:
                reply = answer(upstream)
                reply.content_length = upstream.content_length
                await reply.prepare(request)
                while piece := await upstream.piece():
                    await reply.write(piece)
                await reply.write_eof()
        except WorkerFailed:
            if not reply.prepared:
                raise
            break_off(request)
        return reply

    async def _generate(self, request: web.Request, asked: Target) -> web.StreamResponse:
        """Pass a generation call through and hand it to the recorder, whatever becomes of it."""
        episode = asked.episode or request.headers.get("X-Episode-Id")
        if episode is not None:
            check_name("episode", episode)
            if episode == WARMUPS:
                raise BadName(f"episode {episode!r}: kept for calls before there is a task: give any other name")
        recording = await self._recorder.run(asked.run)
        watch = Watch()
        await recording.room()
        watch.pause()  # while the client is at it
        body = await bodies.read(request, self._config.timeouts.idle_s)
        watch.go_on()
        recording = await self._recorder.run(asked.run)  # while the body came, the worker may have become another
        exchange = self._begin(request, asked.path, body, episode, recording, watch)
        lease = self._workers.lease(exchange.place.thread, exchange.place.episode)
        generation = Generation(request, exchange, recording, lease, self._config.durability == "sync")
        try:
            return await generation.run(self._translated(exchange.fields, body))
        except asyncio.CancelledError:
            generation.broken_off(STOPPED if self._recorder.deadline.over else GONE)
            raise
        finally:
            generation.over()

    def _begin(
        self,
        request: web.Request,
        path: str,
        body: bytes,
        episode: str | None,
        recording: Recording,
        watch: Watch,
    ) -> Exchange:
        """The call that this request is, placed in its conversation; BadInput if it cannot be read or recorded."""
        fields = messages.parse_request(body)
        call = f"c-{secrets.token_hex(8)}"
        said = messages.chat(fields)
        part = recording.part(said)
        # Also where we cannot read it: if the worker can and answers, its rows are lost, and that has to be said.
        capture = self._capture(call, recording.salt, fields or {}, part.role)
        request_id = given_id(request)
        if not request_id:
            request[ID] = call
        place = recording.place(call, said, part, episode, _retried(request))
        return Exchange(
            call,
            request_id,
            request.get(CLIENT, ""),
            path,
            place,
            part.role,
            episode is not None,
            fields,
            body,
            capture,
            watch,
        )

    def _capture(self, call: str, salt: str, fields: JSON, role: Role) -> Capture | None:
        """What to capture of a call: what it asks for itself, else what is recorded of its role, else the worker's
        default; nothing from a backend that is not ours, which is left to read the asking itself.
        """
        model, asked = self._workers.model, fields.get("collect_activations")
        wanted = self._config.capture.get(role, model.tokens if model else "none")
        if model is None or asked is False or (asked is None and wanted == "none"):
            return None
        collect = Collect.parse(True if asked is None else asked)
        points = collect.points(model.points, model.offered)
        tokens = collect.tokens or (model.tokens if wanted == "none" else wanted)
        return Capture(call, salt, tuple(points), tokens)

    def _translated(self, fields: JSON | None, body: bytes) -> bytes:
        """The body as the worker should see it: the client's own bytes unless something in them is for us."""
        changed = dict(fields or {})
        if self._workers.model is not None:
            changed.pop("collect_activations", None)
        alias = self._config.aliases.get(str(changed.get("model")))
        if alias is not None:
            changed["model"] = alias
        return body if changed == (fields or {}) else msgspec.json.encode(changed)


def _retried(request: web.Request) -> bool | None:
    """Whether the OpenAI SDK says that it sends a request again; None if it says nothing, as other clients do."""
    count = request.headers.get("x-stainless-retry-count")
    return None if count is None else count != "0"


def stopper() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set."""
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    return stop


async def run(config: Config, tell: Callable[[], object]) -> None:
    """Serve until a signal comes, as `serve` does."""
    await serve(config, stopper(), tell)


async def serve(config: Config, stop: asyncio.Event, tell: Callable[[], object]) -> None:
    """Serve until `stop` is set, then finish what is under way and seal; `tell` is called once clients can connect.

    BadInput if the data directory cannot be written, the port is taken or the certificate is none; BadRun if the run
    cannot be used.
    """
    encryption = _encryption(config.tls)
    runner = web.AppRunner(
        Proxy(config).app(),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=max(config.drain_s / 2, 0.001),  # aiohttp waits so long twice, and for ever for 0
        auto_decompress=False,  # `proxy.bodies` does it, within a limit
    )
    try:
        try:
            if not await _unless(stop, runner.setup()):
                return
        except OSError as error:
            user = f"user {os.getuid()}"  # in a container that is nobody's name
            raise BadInput(f"--data {config.data} cannot be written by {user}: {error.strerror}") from None
        with _listening(config):
            await web.TCPSite(runner, config.host, config.port, ssl_context=encryption).start()
        tell()
        await stop.wait()
    finally:
        await runner.cleanup()


async def check(config: Config) -> None:
    """What `serve` would stop at as well, for whoever has much to do before: BadInput for the certificate and the
    port, RunLocked for the run.
    """
    _encryption(config.tls)
    with _listening(config):
        (await asyncio.get_running_loop().create_server(asyncio.Protocol, config.host, config.port)).close()
    layout = Layout(config.data / config.run)
    if being_written(layout):
        raise RunLocked(f"{layout.root} is being written by another process: stop it first, or give another --run")


@contextlib.contextmanager
def _listening(config: Config) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"cannot listen on {config.host}:{config.port}: {error.strerror}") from None


async def _unless(stop: asyncio.Event, doing: Coroutine[Any, Any, None]) -> bool:
    """Do it, and break it off if `stop` is set; whether it was done."""
    task, stopping = asyncio.create_task(doing), asyncio.create_task(stop.wait())
    await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return not task.cancelled()


def _encryption(tls: TLS | None) -> ssl.SSLContext | None:
    if tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(tls.cert, tls.key)
    except (OSError, ssl.SSLError) as error:
        raise BadInput(f"--tls-cert {tls.cert}, --tls-key {tls.key}: {error}: give two files in PEM's form") from None
    return context
