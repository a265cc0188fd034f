"""What the proxy answers of its own when it does not pass a request on, in OpenAI's shape; each error's status."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Mapping

from aiohttp import web
from aiohttp.typedefs import Handler

from episodes.errors import BadInput, BadRun, NotStored, WorkerFailed, WorkerTooSlow
from proxy.metrics import METRICS

logger = logging.getLogger("tautap.proxy")

LATER = {"Retry-After": "5"}
FULL = (errno.ENOSPC, errno.EDQUOT)
KINDS = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_encoding"}


class Refusal(web.Response):
    """An error that is the proxy's own. kind: the `type` in its body"""

    def __init__(self, status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> None:
        error = {"message": message, "type": kind, "param": None, "code": status}
        body = json.dumps({"error": error})
        super().__init__(status=status, text=body, content_type="application/json", headers=headers)


def status(error: WorkerFailed | NotStored) -> int:
    return 503 if isinstance(error, NotStored) else 504 if isinstance(error, WorkerTooSlow) else 502


@web.middleware
async def in_openai_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give each error its status, and count it. What nobody foresaw is logged, and not shown."""
    reply = await _answer(request, handler)
    if isinstance(reply, Refusal):
        request.app[METRICS].refused(reply.status)
    return reply


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except BadInput as error:
        return Refusal(400, str(error), "invalid_request_error")
    except BadRun as error:
        return Refusal(409, str(error), "run_unusable")
    except NotStored as error:
        return Refusal(status(error), str(error), "overloaded", LATER)
    except WorkerFailed as error:
        return Refusal(status(error), str(error), "worker_failed")
    except web.HTTPRequestEntityTooLarge:
        limit = f"the request body is larger than {request.client_max_size:,} bytes"
        return Refusal(413, limit, KINDS[413], {"Connection": "close"})
    except web.HTTPException as error:
        headers = {name: value for name, value in error.headers.items() if name in ("Allow", "Accept-Encoding")}
        return Refusal(
            error.status, error.text or error.reason, KINDS.get(error.status, "invalid_request_error"), headers
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            return Refusal(503, f"the disk does not take what is to be recorded: {error.strerror}", "overloaded", LATER)
        logger.exception("%s %s failed", request.method, request.path)
        return Refusal(500, "the proxy failed; its log says why", "internal_error")
