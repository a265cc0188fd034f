"""Who is let in: whoever has a key, or, where none are set, whoever is on this machine.

Apart from `proxy.keys`, which every command imports: aiohttp takes a third of a second to import.
"""

from __future__ import annotations

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware
from multidict import istr

from episodes.access import from_elsewhere
from proxy.keys import Keys
from proxy.refusals import Refusal

# Without a key: what tells a balancer that the proxy lives, and nothing more.
OPEN = ("/health/live", "/health/ready")
CLIENT = web.RequestKey("client", str)
SITE = istr("Sec-Fetch-Site")


def guard(keys: Keys) -> Middleware:
    """Lets in who has one of the keys, and notes its name as the request's `CLIENT`."""

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in OPEN:
            name = keys.whose(request.headers.get("Authorization"))
            if name is None:
                message = "give one of the proxy's keys: Authorization: Bearer <key> (OPENAI_API_KEY)"
                return Refusal(401, message, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
            request[CLIENT] = name
        return await handler(request)

    return guarded


@web.middleware
async def local(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Lets in who is on this machine, and no web page that is open in a browser here: the guard where no keys are."""
    headers = request.headers
    reason = from_elsewhere(headers.get(hdrs.HOST), headers.get(hdrs.ORIGIN), headers.get(SITE))
    return await handler(request) if reason is None else Refusal(403, reason, "permission_denied")
