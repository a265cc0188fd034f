"""Where a worker listens, and what it is spoken to through."""

from __future__ import annotations

import re
from typing import NamedTuple

import aiohttp

from episodes.errors import BadInput

UNIX = "unix:"
# With `/v1`, as a client would be given it: the proxy asks for more than lies below that.
URL = re.compile(r"(https?://[^/?#]+)(/v1)?/*")
# vLLM closes a connection that was idle for 5 s; one given up earlier is never used while it does.
KEEPALIVE_S = 3.0


class Address(NamedTuple):
    """url: the base of its requests. socket: the path of the socket that it listens at, if it is no port."""

    url: str
    socket: str | None = None

    @classmethod
    def parse(cls, backend: str) -> Address:
        """Out of `--backend`; BadInput if it is neither a worker's URL nor `unix:` and a path."""
        if backend.startswith(UNIX):
            # A socket has no host name, but every request names one.
            return cls("http://worker", backend.removeprefix(UNIX).removeprefix("//"))
        if match := URL.fullmatch(backend):
            return cls(match[1])
        raise BadInput(f"--backend {backend}: give a URL without a path, such as http://127.0.0.1:8001, or unix:PATH")


def session(backend: str, connect_s: float) -> aiohttp.ClientSession:
    """Connections to a worker. They keep no cookies: those would go from one client to the next.

    connect_s: how long connecting may take
    """
    path = Address.parse(backend).socket
    connector: aiohttp.BaseConnector
    if path is None:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
    else:
        connector = aiohttp.UnixConnector(path, limit=0, keepalive_timeout=KEEPALIVE_S)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_s)
    jar = aiohttp.DummyCookieJar()
    return aiohttp.ClientSession(timeout=timeout, connector=connector, cookie_jar=jar, auto_decompress=False)
