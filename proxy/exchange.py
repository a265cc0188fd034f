"""A generation call while it runs, and what the journal gets of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import msgspec

from episodes import messages
from episodes.messages import JSON
from episodes.records import Call, Role
from episodes.threads import Place
from episodes.wire import Capture


class Watch:
    """How long a request has kept the proxy itself busy, without the worker's turn."""

    def __init__(self) -> None:
        self._before = 0.0
        self._since: float | None = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)

    def pause(self) -> None:
        self._before, self._since = self.seconds, None

    def go_on(self) -> None:
        self._since = time.perf_counter()


@dataclass(slots=True)
class Exchange:
    """Times are unix seconds; first_byte: when the reply's body began to come. request_id: what the client knows it by.
    client: the name of its key. reached: whether a worker may have got it.
    """

    id: str
    request_id: str
    client: str
    endpoint: str
    place: Place
    role: Role
    named: bool
    fields: JSON | None
    body: bytes
    capture: Capture | None
    watch: Watch
    started: float = field(default_factory=time.time)
    first_byte: float | None = None
    status: int = 0
    reply: JSON | None = None
    error: str | None = None
    foreign: JSON = field(default_factory=dict)
    reached: bool = True

    @property
    def claimable(self) -> bool:
        """Whether the worker may have activations of it: it may fail after the engine ran, if it lets one in at all."""
        return self.capture is not None and self.reached and self.status not in (401, 403)

    def call(self) -> Call:
        reply = self.reply
        return Call(
            id=self.id,
            thread=self.place.thread,
            episode=self.place.episode,
            turn=self.place.turn,
            attempt=self.place.attempt,
            kind=self.place.kind,
            role=self.role,
            named=self.named,
            endpoint=self.endpoint,
            model=str((reply or {}).get("model") or (self.fields or {}).get("model") or ""),
            started=self.started,
            first_byte=self.first_byte,
            ended=time.time(),
            status=self.status,
            finish_reason=None if reply is None else messages.finish_reason(reply),
            error=self.error,
            request=self.body.decode("utf-8", "replace"),
            reply="" if reply is None else msgspec.json.encode(reply).decode(),
            points=list(self.capture.points or ()) if self.capture else [],
            tokens=self.capture.tokens if self.capture else "all",
            request_id=self.request_id,
            client=self.client,
        )
