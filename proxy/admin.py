"""A proxy's own routes, and the client for them: what is recorded of a run so far, seal it, join results to it.

GET  /tautap                   `About` the proxy
GET  /tautap/runs/<run>        `Progress` of the run; 400 if it is not open
POST /tautap/runs/<run>        the same, and open it, so that one that cannot be written is known beforehand
POST /tautap/runs/<run>/seal   wait for what is under way, seal, roll the index; `Totals` of the run
POST /tautap/runs/<run>/link   ?name=FILE&env=ENV&split=SPLIT, body: `Results`; `Joined`
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

import aiohttp
import msgspec
from aiohttp import web

from episodes.errors import BadInput, BadName, BenchFailed
from episodes.tables import Totals
from episodes.taubench import parse_results
from proxy import bodies
from proxy.recorder import Recorder, Recording

T = TypeVar("T")

# Sealing a long run, or filling its holes first, takes minutes.
TIMEOUT_S = 3600.0
PROBE_S = 10.0


class Progress(msgspec.Struct, frozen=True):
    """What a run holds so far. bytes: of vectors, as they came."""

    calls: int = 0
    tokens: int = 0
    rows: int = 0
    bytes: int = 0


class About(msgspec.Struct, frozen=True):
    """run: that of calls which name none. aliases: names that it serves models under beside their own."""

    run: str
    aliases: list[str]


class Results(msgspec.Struct, frozen=True):
    """A results file of tau-bench's, and the instructions of tasks by their ids, as far as they are known."""

    results: msgspec.Raw
    tasks: dict[int, str] = {}


class Joined(msgspec.Struct, frozen=True):
    """What became of a results file: results that found their episode, those of them that are new, task and trial of
    those that found none, episodes that no results file tells of, and what of it all is not certain.
    """

    joined: int
    new: int
    results: list[str]
    episodes: list[str]
    doubts: list[str] = []


class Served(msgspec.Struct, frozen=True):
    id: str


class Models(msgspec.Struct, frozen=True):
    """OpenAI's list of models."""

    data: list[Served]


RECORDER = web.AppKey("recorder", Recorder)


def routes() -> list[web.RouteDef]:
    """To be added before a catch-all, to an application that holds its `RECORDER`."""
    path = "/tautap/runs/{run}"
    return [
        web.get("/tautap", _about),
        web.get(path, _progress),
        web.post(path, _open),
        web.post(f"{path}/seal", _seal),
        web.post(f"{path}/link", _link),
    ]


async def _about(request: web.Request) -> web.Response:
    config = request.app[RECORDER].config
    return _json(About(config.run, list(config.aliases)))


async def _progress(request: web.Request) -> web.Response:
    return _json(msgspec.convert(_recording(request).counts, Progress))


async def _open(request: web.Request) -> web.Response:
    recording = await request.app[RECORDER].run(request.match_info["run"])
    return _json(msgspec.convert(recording.counts, Progress))


async def _seal(request: web.Request) -> web.Response:
    return _json(await _recording(request).finish())


async def _link(request: web.Request) -> web.Response:
    query, timeouts = request.query, request.app[RECORDER].config.timeouts
    try:
        told = msgspec.json.decode(await bodies.read(request, timeouts.idle_s), type=Results)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadInput(f"the body is not results, a results file of tau-bench's, and tasks: {error}") from None
    results = await asyncio.to_thread(parse_results, bytes(told.results), query.get("name", "results"))
    found, n_new = await _recording(request).link(results, query.get("env"), query.get("split"), told.tasks)
    silent = [f"task {result.task_id}, trial {result.trial}" for result in found.results]
    return _json(Joined(len(found.links), n_new, silent, found.episodes, list(found.doubts())))


def _recording(request: web.Request) -> Recording:
    name = request.match_info["run"]
    recording = request.app[RECORDER].opened(name)
    if recording is None:
        raise BadName(f"run {name[:200]!r} is not being written: POST /tautap/runs/<run> opens one")
    return recording


def _json(value: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


class Client:
    """A proxy as seen from elsewhere. url: its base, without `/v1`; key: the bearer token it wants to see."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str) -> None:
        self.url = url
        self._session = session
        self._headers = {"Authorization": f"Bearer {key}"}

    async def about(self) -> About:
        """BadInput unless a proxy of tautap's answers."""
        try:
            return await self._ask("GET", "/tautap", About, timeout_s=PROBE_S)
        except BenchFailed as error:
            raise BadInput(f"{error}: is a proxy of tautap's running at {self.url}?") from None

    async def models(self) -> list[str]:
        """The names that the worker serves; BadInput if it does not answer."""
        try:
            return [model.id for model in (await self._ask("GET", "/v1/models", Models, timeout_s=PROBE_S)).data]
        except BenchFailed as error:
            raise BadInput(str(error)) from None

    async def open(self, run: str) -> Progress:
        return await self._ask("POST", f"/tautap/runs/{run}", Progress)

    async def progress(self, run: str) -> Progress:
        return await self._ask("GET", f"/tautap/runs/{run}", Progress, timeout_s=PROBE_S)

    async def seal(self, run: str) -> Totals:
        return await self._ask("POST", f"/tautap/runs/{run}/seal", Totals)

    async def link(self, run: str, name: str, results: bytes, env: str, split: str, tasks: Mapping[int, str]) -> Joined:
        """Join a results file of that name. tasks: task id → instruction, as far as they are known"""
        params = {"name": name, "env": env, "split": split}
        body = msgspec.json.encode(Results(msgspec.Raw(results), dict(tasks)))
        return await self._ask("POST", f"/tautap/runs/{run}/link", Joined, params=params, data=body)

    async def _ask(self, method: str, path: str, kind: type[T], timeout_s: float = TIMEOUT_S, **options: Any) -> T:
        """A route's reply; BadInput if it says that we asked wrongly, BenchFailed for all else that goes wrong."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        url = f"{self.url}{path}"
        try:
            asking = self._session.request(method, url, headers=self._headers, timeout=timeout, **options)
            async with asking as reply:
                body = await reply.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchFailed(f"{url}: {error or type(error).__name__}") from None
        try:
            if reply.status != 200:
                raise (BadInput if reply.status == 400 else BenchFailed)(f"{url}: {_reason(reply.status, body)}")
            return msgspec.json.decode(body, type=kind)
        except msgspec.MsgspecError as error:
            raise BenchFailed(f"{url} answers something else: {error}") from None


def _reason(status: int, body: bytes) -> str:
    """What an error says, in OpenAI's shape or any other."""
    try:
        return str(msgspec.json.decode(body, type=dict[str, Any])["error"]["message"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        return f"HTTP {status}: {body[:200].decode('utf-8', 'replace')}"
