"""The proxy's configuration, built once by the command line and passed down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from episodes.records import Role
from episodes.wire import Tokens
from proxy.logs import Format


@dataclass(frozen=True)
class Config:
    """backend: the worker's base URL, without `/v1`. run: the run of calls that name none.

    spool_dir: the worker's `--spool-dir` as it is called here, where that is another path than there.
    backfill: run again what an episode's calls lack, before it is sealed.
    drain_s: how long what is under way may take when the proxy is to stop.
    aliases: model names that clients send → names that the worker serves. backend_key: bearer token for the worker.
    capture: role → which tokens to record of its calls; the worker's default for those that are not there.
    """

    backend: str
    data: Path
    run: str
    host: str = "127.0.0.1"
    port: int = 8000
    episode_idle_s: float = 300.0
    aliases: Mapping[str, str] = field(default_factory=dict)
    backend_key: str | None = None
    compression: Literal["zstd", "none"] = "zstd"
    spool_dir: Path | None = None
    backfill: bool = False
    claim_timeout_s: float = 600.0
    drain_s: float = 120.0
    log_format: Format = "text"
    capture: Mapping[Role, Tokens | Literal["none"]] = field(default_factory=dict)
