"""Brings what nnsight's edit saved home to vLLM's API server as requests end, as nnsight's own engines do.

Apart from `nnsight_edit`, because importing nnsight breaks anyio, which is in this process: every object gets a `save`.
"""

from __future__ import annotations

import pickle
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse


class HomeMiddleware:
    """Follows every request to its end, and answers `GET /saved/{reply id}` with the bytes that it saved."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._saved: dict[str, int] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            engine = scope["app"].state.engine_client
            engine.generate = self._follow(engine.generate, engine)
            scope["app"].add_route("/saved/{reply}", self._tell)
        await self._app(scope, receive, send)

    def _follow(self, generate: Callable[..., AsyncGenerator[Any, None]], engine: Any) -> Callable[..., Any]:
        async def following(prompt: Any, params: Any, request_id: str, **kwargs: Any) -> AsyncGenerator[Any, None]:
            async for output in generate(prompt, params, request_id, **kwargs):
                if output.finished:
                    self._saved[request_id] = await collect(engine, request_id)
                yield output

        return following

    async def _tell(self, request: Request) -> JSONResponse:
        return JSONResponse(self._saved.pop(request.path_params["reply"]))


async def collect(engine: Any, request: str) -> int:
    """The bytes of a finished request's tensors, fetched from the engine's process.

    source: nnsight 0.8.1, modeling/vllm/engines/engine.py, acollect
    """
    (payload,) = await engine.collective_rpc("collect_nnsight", args=([request], [request]))
    (entry,) = pickle.loads(payload).values()
    assert entry["error"] is None, entry["error"]
    return sum(tensor.nbytes for tensor in entry["registered"]["rows"])
