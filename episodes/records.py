"""What the journal's lines and `run.json` hold, as typed records."""

from __future__ import annotations

from typing import Literal

import msgspec

from episodes.points import Points
from episodes.wire import Sequence, Tokens

BACKFILL = "backfill"


class Model(msgspec.Struct, frozen=True):
    """What a worker says of itself in `/v1/capabilities`, as far as a run keeps it. dtype is the engine's (`bfloat16`);
    points and tokens are the default ones, custom the hooks that the user named, as in `episodes.points.Points`. edit:
    the user's intervention that the rows were computed under, `steer.py:steer <sha256>`.
    """

    model: str
    dtype: str
    hidden_size: int
    n_layers: int
    points: list[str]
    versions: dict[str, str | None]
    custom: dict[str, str] = {}
    tokens: Tokens = "all"
    source: Literal["nnsight", "aux"] = "nnsight"
    edit: str = ""

    @property
    def offered(self) -> Points:
        """The points that a call may ask for."""
        return Points(self.n_layers, self.custom, self.points if self.source == "aux" else None)


class Run(msgspec.Struct, frozen=True):
    """`run.json`. recorded: the model, None until a worker was heard of. created: unix seconds.

    compression: of the vectors in shards, `zstd` or `none`.
    """

    format: int
    run: str
    created: float
    recorded: Model | None = None
    compression: Literal["zstd", "none"] = "zstd"


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """Rows that a call stores: positions start to stop of its choice."""

    choice: int
    start: int
    stop: int


class Call(msgspec.Struct, frozen=True, tag="call", omit_defaults=True):
    """One request and its reply, as committed.

    started, first_byte, ended: unix seconds. status: the HTTP status that the client got, 0 if it left before one.
    request, reply: JSON texts. points, tokens: what was asked of the worker; no points if the call was not captured.
    sequences: the engine's token ids. kept: the rows this call stores, all in its live file or shard.
    role: who the model was playing; `backfill` for a call of ours that stores what another lacked (`episodes.holes`).
    lost: why activations that were asked for are not there. foreign: the backend sent some of its own.
    """

    id: str
    thread: str
    episode: str
    turn: int
    attempt: int
    endpoint: str
    model: str
    started: float
    ended: float
    status: int
    first_byte: float | None = None
    role: str = "agent"
    finish_reason: str | None = None
    error: str | None = None
    request: str = ""
    reply: str = ""
    points: list[str] = []
    tokens: Tokens = "all"
    sequences: list[Sequence] = []
    kept: list[Kept] = []
    lost: str | None = None
    foreign: bool = False

    @property
    def spec(self) -> tuple[str, ...]:
        """What rows are shared under: the points, in order, and which tokens."""
        return (*self.points, self.tokens)

    @property
    def n_prompt(self) -> int:
        return sum(len(s.prompt_token_ids) for s in self.sequences)

    @property
    def n_completion(self) -> int:
        return sum(len(s.completion_token_ids) for s in self.sequences)

    @property
    def n_positions(self) -> int:
        """Positions that should have a row."""
        return sum(stop - first for first, stop in (s.wanted(self.tokens) for s in self.sequences))

    @property
    def n_kept(self) -> int:
        return sum(kept.stop - kept.start for kept in self.kept)


class Seal(msgspec.Struct, frozen=True, tag="seal"):
    """An episode's rows are in its shard; `calls` are the ones it holds. crc32: of the whole file. at: unix seconds."""

    episode: str
    calls: list[str]
    n_rows: int
    n_bytes: int
    crc32: int
    at: float


Record = Call | Seal
