"""What the journal's lines and `run.json` hold, as typed records."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from episodes.layout import NAME
from episodes.points import Points
from episodes.wire import CaptureSource, Sequence, Tokens

# What names a file in the run: a line that has another is refused where it is decoded, whoever wrote it.
Name = Annotated[str, msgspec.Meta(pattern=rf"\A{NAME.pattern}\Z")]


# What two models agree in whose rows may stand for each other's; the latter as far as both say it.
ALIKE = ("model", "dtype", "hidden_size", "n_layers", "edit", "source", "custom")
ALIKE_IF_KNOWN = ("checkpoint", "revision", "quantization")


class Model(msgspec.Struct, frozen=True):
    """What a worker says of itself in `/v1/capabilities`, as far as a run keeps it. dtype is the engine's (`bfloat16`);
    points and tokens are the default ones, custom the hooks that the user named, as in `episodes.points.Points`. edit:
    the user's intervention that the rows were computed under, `steer.py:steer <sha256>`. checkpoint: its name on the
    Hub, or its directory's and what is in it, `tuned <sha256>`, wherever that lies; revision, quantization: its own.
    Empty where they are not known.
    """

    model: str
    dtype: str
    hidden_size: int
    n_layers: int
    points: list[str]
    versions: dict[str, str | None]
    custom: dict[str, str] = {}
    tokens: Tokens = "all"
    source: CaptureSource = "nnsight"
    edit: str = ""
    checkpoint: str = ""
    revision: str = ""
    quantization: str = ""

    def differences(self, other: Model, *more: str) -> list[tuple[str, Any, Any]]:
        """What keeps rows of the other from standing for rows of this: field, this one's, the other's. more: fields
        that are to be the same as well
        """
        found = []
        for name in (*ALIKE, *ALIKE_IF_KNOWN, *more):
            own, its = getattr(self, name), getattr(other, name)
            if own != its and (name not in ALIKE_IF_KNOWN or (own and its)):
                found.append((name, own or "none", its or "none"))
        return found

    @property
    def offered(self) -> Points:
        """The points that a call may ask for."""
        return Points(self.n_layers, self.custom, None if self.source == "nnsight" else self.points)


class Run(msgspec.Struct, frozen=True):
    """`run.json`. recorded: the model, None until a worker was heard of. created: unix seconds.

    compression: of the vectors in shards, `zstd` or `none`.
    """

    format: int
    run: str
    created: float
    recorded: Model | None = None
    compression: Literal["zstd", "none"] = "zstd"


Role = Literal["agent", "user", "supervisor", "warmup"]
# In the place of a role: a call of ours that stores what another lacked (`episodes.holes`).
BACKFILL: Literal["backfill"] = "backfill"
# What a call is to its turn: the first one, the same again after a failure, the same again after a good reply that was
# rejected, or one asked beside it. `episodes.threads` tells them apart.
Kind = Literal["turn", "retry", "reask", "branch"]


Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Usage(msgspec.Struct, frozen=True):
    """What a reply says that its call took; None what it does not say."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None


class Reply(msgspec.Struct, frozen=True):
    """All of a reply that is looked at here."""

    usage: Usage | None = None


_replies = msgspec.json.Decoder(Reply)


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """Rows that a call stores: positions start to stop of its choice."""

    choice: int
    start: int
    stop: int


class Call(msgspec.Struct, frozen=True, tag="call", omit_defaults=True):
    """One request and its reply, as committed.

    started, first_byte, ended: unix seconds; first_byte: of the reply's body. status: the HTTP status that the client
    got, or was to get once this is on disk (`--durability sync`); 0 if none.
    request, reply: JSON texts. points, tokens: what was asked of the worker; no points if the call was not captured.
    sequences: the engine's token ids. kept: the rows this call stores, all in its live file or shard.
    episode: as far as was known when the call began: a `Pair` may move its thread unless it is named, which is to say
    by the client. attempt: counts a turn's calls.
    lost: why activations that were asked for are not there. foreign: the backend sent some of its own.
    request_id: the client's `X-Request-Id`. client: the name of the key that it came with.
    """

    id: Name
    thread: Name
    episode: Name
    turn: int
    attempt: int
    endpoint: str
    model: str
    started: float
    ended: float
    status: int
    first_byte: float | None = None
    role: Role | Literal["backfill"] = "agent"
    kind: Kind = "turn"
    named: bool = False
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
    request_id: str = ""
    client: str = ""

    @property
    def spec(self) -> tuple[str, ...]:
        """What rows are shared under: the points, in order, and which tokens."""
        return (*self.points, self.tokens)

    @property
    def n_prompt(self) -> int | None:
        """Tokens of the prompts, one for each choice. Without sequences what the reply's `usage` says, where a prompt
        counts once for all its choices; None if it says nothing.
        """
        return sum(len(s.prompt_token_ids) for s in self.sequences) if self.sequences else self._usage.prompt_tokens

    @property
    def n_completion(self) -> int | None:
        """Tokens that were generated, of all choices; as `n_prompt` without sequences."""
        if not self.sequences:
            return self._usage.completion_tokens
        return sum(len(s.completion_token_ids) for s in self.sequences)

    @property
    def _usage(self) -> Usage:
        """The reply's, empty if it has none that is sound."""
        try:
            return _replies.decode(self.reply).usage or Usage()
        except (ValueError, RecursionError):
            return Usage()

    @property
    def answered(self) -> bool:
        """Whether its client got a reply, to the end."""
        return self.status == 200 and self.error is None

    @property
    def n_positions(self) -> int:
        """Positions that should have a row."""
        return sum(stop - first for first, stop in (s.wanted(self.tokens) for s in self.sequences))

    @property
    def uncounted(self) -> bool:
        """Whether it lost its rows and its token ids are not known, so that nor is how many rows it lacks."""
        return bool(self.points) and self.lost is not None and not self.sequences

    @property
    def n_kept(self) -> int:
        return sum(kept.stop - kept.start for kept in self.kept)


class Seal(msgspec.Struct, frozen=True, tag="seal"):
    """An episode's rows are in its shard; `calls` are the ones it holds. crc32: of the whole file. at: unix seconds."""

    episode: Name
    calls: list[Name]
    n_rows: int
    n_bytes: int
    crc32: int
    at: float


class Pair(msgspec.Struct, frozen=True, tag="pair", omit_defaults=True):
    """These threads belong to the episode; a later record may move them again, until it is sealed.

    benchmark, strategy, user_strategy: what the conversations say of themselves. tied: threads that could stand in this
    episode as well as the ones that do, by all that was said and when.
    """

    episode: Name
    threads: list[Name]
    at: float
    benchmark: str | None = None
    strategy: str | None = None
    user_strategy: str | None = None
    tied: list[Name] = []


class Link(msgspec.Struct, frozen=True, tag="link", omit_defaults=True):
    """What a benchmark's results file says of an episode; a later link of the episode replaces an earlier one.

    by: what it was found by. tied: other episodes that the result fits as well. source: the file's name. info: JSON.
    """

    episode: Name
    benchmark: str
    task_id: str
    trial: int
    reward: float
    by: Literal["transcript", "instruction", "order"]
    env: str | None = None
    split: str | None = None
    strategy: str | None = None
    user_strategy: str | None = None
    error: str | None = None
    info: str = ""
    source: str = ""
    tied: list[Name] = []


Record = Call | Seal | Pair | Link
