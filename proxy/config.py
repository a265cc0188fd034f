"""The proxy's configuration, built once by the command line and passed down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from episodes.records import Role
from episodes.wire import Tokens
from proxy.keys import Keys
from proxy.logs import Format


@dataclass(frozen=True)
class Timeouts:
    """How long to wait for the worker, in seconds: for a connection, for a reply's first byte, for its next, and for
    all of it. Clients commonly wait 600 s and try again: what gives up before they do would make them lose a reply.
    idle_s is also how long the body of a client's request may take.
    """

    connect_s: float = 10.0
    first_byte_s: float = 900.0
    idle_s: float = 900.0
    total_s: float = 3600.0


@dataclass(frozen=True)
class Limits:
    """body_bytes: of a request, also unpacked. in_flight: requests that clients wait for. runs: those that are open and
    stay open, each with files and a thread of its own.
    """

    body_bytes: int = 64 << 20
    in_flight: int = 1024
    runs: int = 256


@dataclass(frozen=True)
class TLS:
    """Files in PEM's form: the certificate with its chain, and its key."""

    cert: Path
    key: Path


@dataclass(frozen=True)
class Config:
    """backends: where the workers are, all of one model: URLs, or `unix:` and a socket's path. run:
    the run of calls that name none.

    keys: of clients. backend_key: bearer token for the worker.
    spool_dir: the worker's `--spool-dir` as it is called here, where that is another path than there.
    backfill: run again what an episode's calls lack, before it is sealed.
    aliases: model names that clients send → names that the worker serves.
    claim_timeout_s: how long it may take to claim a call's activations, or to run it again for `backfill`.
    min_free_bytes: while the data's disk has less, new calls wait, `room_wait_s` at most; rows that would leave less
    wait at the worker.
    durability: a reply ends when its call is known of on disk (`async`), or recorded there with all its rows (`sync`),
    if it is no error.
    drain_s: how long what is under way may take when the proxy is to stop.
    capture: role → which tokens to record of its calls; the worker's default for those that are not there.
    """

    backends: tuple[str, ...]
    data: Path
    run: str
    host: str = "127.0.0.1"
    port: int = 8000
    episode_idle_s: float = 300.0
    aliases: Mapping[str, str] = field(default_factory=dict)
    keys: Keys = field(default_factory=Keys)
    backend_key: str | None = field(default=None, repr=False)
    tls: TLS | None = None
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    compression: Literal["zstd", "none"] = "zstd"
    spool_dir: Path | None = None
    backfill: bool = False
    claim_timeout_s: float = 600.0
    drain_s: float = 120.0
    log_format: Format = "text"
    min_free_bytes: int = 1 << 30
    room_wait_s: float = 10.0
    durability: Literal["async", "sync"] = "async"
    capture: Mapping[Role, Tokens | Literal["none"]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where clients on this machine find the proxy."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"
