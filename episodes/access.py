"""What proxy and worker agree on about who may connect: a key that lies in a file, and who is on this machine."""

from __future__ import annotations

import ipaddress
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


def loopback(host: str) -> bool:
    """Whether nobody outside this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
