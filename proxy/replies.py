"""Replies on their way to a client: the worker's own, with what the proxy adds to their headers."""

from __future__ import annotations

import re
import uuid

from aiohttp import HttpVersion11, web

from proxy.upstream import Reply

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# Of a request that came with none.
ID = web.RequestKey("id", str)
# litellm prices a reply by this; without it tau-bench's act and react agents fail on a model without a price.
OUR_HEADERS = {"x-litellm-response-cost": "0", "X-Accel-Buffering": "no"}


def answer(upstream: Reply, whole: bytes | None = None) -> web.StreamResponse:
    """The reply to a client, as the worker's is; `whole` where it is sent in one piece."""
    headers = upstream.headers | OUR_HEADERS
    if whole is None:
        return web.StreamResponse(status=upstream.status, headers=headers)
    return web.Response(status=upstream.status, headers=headers, body=whole)


def break_off(request: web.Request) -> None:
    """End a reply of which part is out, so that nobody takes it for whole."""
    if request.transport is not None:
        request.transport.abort()


def given_id(request: web.Request) -> str:
    """The id that a client gave its request, if it is one that can be sent back; else nothing."""
    given = request.headers.get("X-Request-Id", "")
    return given if REQUEST_ID.fullmatch(given) else ""


async def sign(request: web.Request, reply: web.StreamResponse) -> None:
    """Every reply has its request's id, the call's if it came with none, and does not say what software we are. Where
    HTTP/1.0 has no other way to end one, its connection does.
    """
    reply.headers["X-Request-Id"] = request.get(ID) or given_id(request) or f"r-{uuid.uuid4().hex[:16]}"
    reply.headers.pop("Server", None)
    if request.version < HttpVersion11 and reply.content_length is None:
        reply.force_close()  # which aiohttp leaves to the client, if that asked for a connection to keep
