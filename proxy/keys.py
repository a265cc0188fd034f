"""Who may talk to the proxy: named bearer keys, out of a file or the environment. A key is never logged or shown."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware
from multidict import istr

from episodes.access import from_elsewhere, key_in, text_of
from episodes.errors import BadInput
from proxy.refusals import Refusal

API_KEYS = "TAUTAP_API_KEYS"
BACKEND_KEY = "TAUTAP_BACKEND_KEY"
# Without a key: what tells a balancer that the proxy lives, and nothing more.
OPEN = ("/health/live", "/health/ready")
CLIENT = web.RequestKey("client", str)
SITE = istr("Sec-Fetch-Site")
ENTRY = re.compile(r"(?P<name>[A-Za-z0-9._@-]{1,64})\s+(?P<key>[\x21-\x7e]{8,512})")


class Keys:
    """Names and their keys, of which only digests are kept. Empty: everybody may."""

    def __init__(self, named: Mapping[str, str] | None = None) -> None:
        self._digests = {name: _digest(key) for name, key in (named or {}).items()}

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __repr__(self) -> str:
        return f"Keys({', '.join(self._digests)})"

    def whose(self, authorization: str | None) -> str | None:
        """The name of the key in an `Authorization` header, in a time that says nothing about the keys."""
        scheme, _, key = (authorization or "").partition(" ")
        given, found = _digest(key.strip()), None
        for name, digest in self._digests.items():
            if hmac.compare_digest(given, digest) and scheme.lower() == "bearer":
                found = name
        return found


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


def parse(lines: Iterable[str], source: str) -> dict[str, str]:
    """Names and keys out of lines `name key`, blank ones and comments left out; BadInput, without the key, if not."""
    named: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        entry = ENTRY.fullmatch(line)
        if entry is None:
            raise BadInput(f"{source}, entry {number}: give a name, a blank and a key of 8 to 512 printable characters")
        if entry["name"] in named:
            raise BadInput(f"{source}, entry {number}: the name {entry['name']} is there twice")
        named[entry["name"]] = entry["key"]
    if not named:
        raise BadInput(f"{source} holds no key: give lines of a name, a blank and a key")
    return named


def api_keys(file: Path | None, environment: Mapping[str, str]) -> dict[str, str]:
    """The keys of the proxy's clients: those of the file, else of `TAUTAP_API_KEYS`, where a comma ends a line too."""
    if file is not None:
        return parse(text_of(file).splitlines(), str(file))
    given = environment.get(API_KEYS)
    return parse(given.replace(",", "\n").splitlines(), API_KEYS) if given else {}


def backend_key(file: Path | None, environment: Mapping[str, str]) -> str | None:
    """The key towards the worker: the file's only word, else `TAUTAP_BACKEND_KEY`."""
    if file is None:
        return environment.get(BACKEND_KEY) or None
    return key_in(file)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
