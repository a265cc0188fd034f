"""What proxy and worker agree on about who may connect: a key that lies in a file, and who is on this machine."""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from pathlib import Path

from episodes.errors import BadInput


def key_in(file: Path) -> str:
    """The key that is a file's only word; BadInput, without the key, if there is none or more."""
    words = text_of(file).split()
    if len(words) != 1:
        raise BadInput(f"{file}: a key is one word, here are {len(words)}")
    return words[0]


def text_of(file: Path) -> str:
    """A file of keys; BadInput if it cannot be read."""
    try:
        return file.read_text()
    except (OSError, UnicodeError) as error:
        raise BadInput(f"{file} cannot be read: {error}") from None


ONLY_HERE = "without keys only this machine is served, as localhost or 127.0.0.1, and no web page from elsewhere"
# A host and a port, as in a `Host` or an `Origin`; IPv6 in brackets.
AUTHORITY = re.compile(r"(?:https?://)?(?P<host>[^:/\[\]]+|\[[^\[\]/]+\])(?::\d+)?")


def from_elsewhere(host: str | None, origin: str | None, site: str | None) -> str | None:
    """Why a request is refused where no keys are, so that whoever is on this machine is let in: a browser here may have
    sent it for a web page from elsewhere, also to a name that the page's owner has lead here. None if it is not.

    host, origin, site: its headers `Host`, `Origin` and `Sec-Fetch-Site`; other clients than browsers send the first
    """
    for name, text in (("Host", host), ("Origin", origin)):
        if text is not None and not _here(text):
            return f"{name} {text[:200]!r}: {ONLY_HERE}"
    if site == "cross-site" and origin is None:  # from localhost to 127.0.0.1 is that, too
        return f"Sec-Fetch-Site {site!r}: {ONLY_HERE}"
    return None


@lru_cache(256)
def _here(authority: str) -> bool:
    match = AUTHORITY.fullmatch(authority)
    return match is not None and loopback(match["host"].lower())


def loopback(host: str) -> bool:
    """Whether nobody outside this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
