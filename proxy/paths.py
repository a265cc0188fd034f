"""Which of the worker's paths a URL asks for, and for which run and episode.

A path is matched as it is after its percent signs are resolved once, and what is passed on is exactly what matched: no
dots, no empty parts, no percent signs are left in it that the next server could read in another way.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

PATH = re.compile(r"(?:/runs/(?P<run>[^/]+))?(?:/episodes/(?P<episode>[^/]+))?(?P<path>/v1(?:/[A-Za-z0-9._~:@+,=-]+)*)")
DOTS = {".", ".."}
# The worker's store: the proxy's own, whatever a client writes for it.
CLOSED = "activations"


class Target(NamedTuple):
    path: str
    run: str | None
    episode: str | None


@lru_cache(1024)
def target(url_path: str) -> Target | None:
    """What a URL's path, its percent signs resolved, asks for; None if it is nothing of the API's."""
    match = PATH.fullmatch(url_path)
    if match is None:
        return None
    parts = match["path"].split("/")[2:]
    if DOTS & set(parts) or (parts and parts[0].lower() == CLOSED):
        return None
    return Target(match["path"], match["run"], match["episode"])
