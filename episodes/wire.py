"""The wire between proxy and worker: the capture header, and the file that a call's activations travel in.

**Capture header** `X-Tautap-Capture` on a request to a generation endpoint, JSON:

    {"call": "c-…", "salt": "run/epoch", "points": ["layers.8.output"], "tokens": "all"}

`points` is left out for the worker's default, `tokens` for `all`. The worker records the call under that id and puts
`salt`, points and tokens into vLLM's `cache_salt`, so that the call can only hit cache blocks recorded under the same.

**Call file**, the body of `GET /v1/activations/{call}`, is one safetensors file:

    rows      [n, points, hidden]  the engine's dtype, token-major, in the order the engine computed them
    position  [n] int32            place of the row's token in its sequence, from 0
    token_id  [n] int32            the token that was fed in
    choice    [n] int32            index of the reply's choice that the row's sequence became

and in its metadata `call`, `points` (JSON list of names), `tokens` and `sequences` (JSON list of `Sequence`).

**Spool file**, one per sequence, the same without `choice`, `tokens` and `sequences`, with `prompt_token_ids [p] int32`
behind the rest; `join` makes the one out of the others without copying a row.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import ml_dtypes
import msgspec
import numpy as np
from numpy.typing import NDArray

from episodes.errors import BadCapture, CorruptFile
from episodes.points import Points, split

CAPTURE_HEADER = "X-Tautap-Capture"
GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions")
HEADER_LIMIT = 64 << 20
INDEX = ("position", "token_id", "choice")
# An engine that is told late that a request is over has computed rows of tokens that nobody got.
AHEAD = 4096

DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
}
DTYPE_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


# Which tokens' rows: of the prompt, of what was generated, or of the last prompt token, from which the reply begins.
Tokens = Literal["all", "prompt", "completion", "last"]
CaptureSource = Literal["nnsight", "graphs", "aux"]


def bounds(tokens: Tokens, n_prompt: int) -> tuple[int, int]:
    """First position, and the one past the last, of the rows to record; the latter may lie past the sequence."""
    first = {"completion": n_prompt, "last": n_prompt - 1}.get(tokens, 0)
    return first, n_prompt if tokens in ("prompt", "last") else sys.maxsize


class Capture(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a proxy asks a worker to record of one call."""

    call: str
    salt: str = ""
    points: tuple[str, ...] | None = None
    tokens: Tokens = "all"

    def header(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def parse(cls, header: str) -> Capture:
        """The capture in a header's value; BadCapture says what was wrong with it."""
        try:
            return msgspec.json.decode(header, type=cls)
        except (ValueError, RecursionError) as error:
            raise BadCapture(f"{CAPTURE_HEADER} {header[:200]!r}: {error}") from None


class Collect(msgspec.Struct, frozen=True):
    """`collect_activations` of a request's body.

    tokens: whose rows; None for the server's default. positions: rows to return, negative ones from the end; None for
    all. encoding_format: as OpenAI's embeddings.
    """

    layers: list[int] | None = None
    hook_points: list[str] | None = None
    tokens: Tokens | None = None
    positions: list[int] | None = None
    return_activations: bool = True
    encoding_format: Literal["float", "base64"] = "float"

    @classmethod
    def parse(cls, value: Any) -> Collect:
        """BadCapture says which field is wrong and what it takes; `true` asks for the server's defaults."""
        try:
            return cls() if value is True else msgspec.convert(value, cls)
        except msgspec.ValidationError as error:
            raise BadCapture(f"collect_activations: {error}") from None

    def points(self, default: list[str], offered: Points) -> list[str]:
        """The points asked for, the server's where it names none; UnknownPoint for what the model lacks."""
        known = [split(point) for point in default]
        layers = [p.layer for p in known if p.layer is not None] if self.layers is None else self.layers
        hooks = [p.hook for p in known] if self.hook_points is None else self.hook_points
        points = offered.name(layers, hooks)
        if not points:
            raise BadCapture("collect_activations names no point: give at least one layer and one hook point")
        return points


class Sequence(msgspec.Struct, frozen=True, omit_defaults=True):
    """One sequence of a call: what the engine was given and what it sampled, as the client's choice saw it.

    The last sampled token is not fed in, so a finished sequence has `n_positions` rows behind it. adapter: the LoRA
    adapter that it ran with, as `name@path`, or nothing. last_fed: the last token was fed in all the same, and may be
    cached, for the engine learned late that the sequence was over: by a stop string, or of a client that left.
    """

    choice: int
    prompt_token_ids: list[int]
    completion_token_ids: list[int]
    finish_reason: str | None = None
    n_cached: int = 0
    adapter: str = ""
    last_fed: bool = False

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The tokens that have a row, in order of position: all that were fed in."""
        ids = (self.prompt_token_ids + self.completion_token_ids)[: self.n_positions]
        return np.frombuffer(struct.pack(f"<{len(ids)}i", *ids), "<i4")  # three times as fast as from a list

    @property
    def n_positions(self) -> int:
        return len(self.prompt_token_ids) + max(len(self.completion_token_ids) - (not self.last_fed), 0)

    def wanted(self, tokens: Tokens) -> tuple[int, int]:
        """The positions that should have a row where these tokens are recorded: first, and past the last."""
        first, stop = bounds(tokens, len(self.prompt_token_ids))
        return first, max(min(stop, self.n_positions), first)


class Tensor(NamedTuple):
    """Where a tensor lies in a safetensors file: `offset` and `nbytes` count from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    return DTYPES[dtype].itemsize * math.prod(shape)  # of Python's numbers, which do not overflow


Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]


class _Field(msgspec.Struct, frozen=True):
    """A tensor in a header. extent: where it starts and stops behind the header."""

    dtype: Literal["BF16", "F16", "F32", "I32"]
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=3)]
    extent: tuple[Count, Count] = msgspec.field(name="data_offsets")


_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_metadata = msgspec.json.Decoder(dict[str, str])
_field = msgspec.json.Decoder(_Field)


def header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], room: int = 0) -> bytes:
    """A safetensors header for tensors that follow it back to back in this order.

    room: bytes the whole header takes, padded with blanks as the format allows; 0 takes what it needs
    source: safetensors 0.8, README "Format"
    """
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + nbytes(dtype, shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    size = room - 8 if room else -len(text) % 8 + len(text)
    assert size >= len(text), f"{len(text)} bytes of header in a room of {room}"
    return struct.pack("<Q", size) + text.ljust(size)


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; CorruptFile unless every byte of it is accounted for, once."""
    try:
        with path.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            n_bytes = path.stat().st_size - 8
            if size > min(HEADER_LIMIT, n_bytes):
                raise ValueError(f"a header of {size} bytes")
            fields = _fields.decode(file.read(size))
        metadata = _metadata.decode(fields.pop("__metadata__", b"{}"))
        placed = sorted(((name, _field.decode(raw)) for name, raw in fields.items()), key=lambda item: item[1].extent)
        tensors, expected = {}, 0
        for name, field in placed:
            start, stop = field.extent
            if start != expected or stop - start != nbytes(field.dtype, field.shape):
                raise ValueError(f"{name} does not fit its place")
            tensors[name] = Tensor(field.dtype, field.shape, 8 + size + start, stop - start)
            expected = stop
        if size + expected != n_bytes:
            raise ValueError(f"{n_bytes + 8} bytes where the header says {8 + size + expected}")
    except (ValueError, struct.error, RecursionError) as error:
        raise CorruptFile(f"{path.name} is not a whole safetensors file: {error}") from None
    return tensors, metadata


def read_tensor(path: Path, tensor: Tensor) -> NDArray[Any]:
    """The tensor as a read-only view of the mapped file."""
    dtype = DTYPES[tensor.dtype]
    if not tensor.nbytes:
        return np.empty(tensor.shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=tensor.offset, shape=tensor.shape)


def bits(values: NDArray[Any]) -> NDArray[Any]:
    """The same elements as unsigned integers. numpy copies those in one go, and bfloat16 one by one."""
    return values.view(f"<u{values.dtype.itemsize}")


class Extent(NamedTuple):
    """A stretch of a file, `data` instead where the bytes are at hand."""

    path: Path | None
    offset: int
    nbytes: int
    data: bytes = b""


def join(call: str, spooled: list[tuple[Sequence, Path]], points: list[str], tokens: Tokens = "all") -> list[Extent]:
    """The call file of these sequences, as the stretches that make it up: nothing of the rows is read here."""
    parts = [(sequence, path, read_header(path)[0]) for sequence, path in spooled]
    counts = [tensors["position"].shape[0] for _, _, tensors in parts]
    n_rows = sum(counts)
    _, _, first = parts[0]
    metadata = {
        "call": call,
        "points": json.dumps(points),
        "tokens": json.dumps(tokens),
        "sequences": msgspec.json.encode([sequence for sequence, _, _ in parts]).decode(),
    }
    shapes = {
        "rows": (first["rows"].dtype, (n_rows, *first["rows"].shape[1:])),
        "position": ("I32", (n_rows,)),
        "token_id": ("I32", (n_rows,)),
        "choice": ("I32", (n_rows,)),
    }
    head = header(shapes, metadata)
    if len(parts) == 1 and len(head) <= first["rows"].offset:  # then the spool file can become the call file, in place
        head = header(shapes, metadata, first["rows"].offset)
    extents = [Extent(None, 0, len(head), head)]
    for name in ("rows", "position", "token_id"):
        extents += [Extent(path, t[name].offset, t[name].nbytes) for _, path, t in parts]
    choices = np.repeat(np.array([s.choice for s, _, _ in parts], "<i4"), counts).tobytes()
    return [*extents, Extent(None, 0, len(choices), choices)]


class CallFile:
    """A call's activations as they came over the wire, validated; the rows stay on disk until they are read."""

    def __init__(self, path: Path) -> None:
        """CorruptFile if the file is torn, misses a tensor or contradicts itself."""
        self.path = path
        tensors, metadata = read_header(path)
        try:
            self.points: list[str] = msgspec.json.decode(metadata["points"], type=list[str])
            self.tokens: Tokens = msgspec.json.decode(metadata["tokens"], type=Tokens)
            self.sequences = msgspec.json.decode(metadata["sequences"], type=list[Sequence])
            self.call = metadata["call"]
            self._rows, *index = (tensors[name] for name in ("rows", *INDEX))
            n_rows, n_points, self.hidden_size = self._rows.shape
        except (KeyError, ValueError, RecursionError) as error:
            raise CorruptFile(f"{path.name} is not a call file: {error!r}") from None
        if self.dtype not in DTYPE_CODES.values() or n_points != len(self.points):
            raise CorruptFile(f"{path.name} is not a call file: {n_points} points of {self.dtype} do not match")
        if any((tensor.dtype, tensor.shape) != ("I32", (n_rows,)) for tensor in index):
            raise CorruptFile(f"{path.name} is not a call file: its index is not of {n_rows} rows")
        self.position, self.token_id, self.choice = (read_tensor(path, tensor) for tensor in index)
        self._check()

    def _check(self) -> None:
        """CorruptFile unless every row is at a place that its sequence can have."""
        stops = {s.choice: len(s.prompt_token_ids) + len(s.completion_token_ids) + AHEAD for s in self.sequences}
        n_placed = sum(
            np.count_nonzero((self.choice == choice) & (self.position >= 0) & (self.position < stop))
            for choice, stop in stops.items()
        )
        if len(stops) != len(self.sequences) or n_placed != self.n_rows:
            raise CorruptFile(f"{self.path.name} is not a call file: it has rows that belong to no sequence of it")

    def place(self, choice: int, start: int, stop: int) -> slice | NDArray[np.intp]:
        """Which of the rows are those at positions start to stop of a choice, in order; CorruptFile if one is not
        there.
        """
        own = np.flatnonzero((self.choice == choice) & (self.position >= start) & (self.position < stop))
        if not np.array_equal(self.position[own], np.arange(start, stop)):
            raise CorruptFile(f"{self.path.name}: positions {start} to {stop} of choice {choice} are not all there")
        one_run = len(own) > 0 and own[-1] - own[0] == len(own) - 1
        return slice(int(own[0]), int(own[-1]) + 1) if one_run else own

    @property
    def dtype(self) -> str:
        """safetensors' name of the rows' dtype: BF16, F16 or F32."""
        return self._rows.dtype

    @property
    def n_rows(self) -> int:
        return self._rows.shape[0]

    @property
    def rows(self) -> NDArray[Any]:
        """[rows, points, hidden], mapped."""
        return read_tensor(self.path, self._rows)
