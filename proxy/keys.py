"""The keys of those who may talk to the proxy, out of a file or the environment. A key is never logged or shown."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from episodes.access import key_in, text_of
from episodes.errors import BadInput

API_KEYS = "TAUTAP_API_KEYS"
BACKEND_KEY = "TAUTAP_BACKEND_KEY"
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
