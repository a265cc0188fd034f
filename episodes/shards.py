"""Shards: an episode's rows as one Parquet file. The columns are specified in `episodes.layout`."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from episodes.errors import CorruptFile
from episodes.layout import ROW_GROUP, whole
from episodes.records import Call, Kept, Model
from episodes.rows import Owner
from episodes.wire import DTYPE_CODES, DTYPES, CallFile

INDEX = [
    pa.field("call", pa.string(), nullable=False),
    pa.field("thread", pa.string(), nullable=False),
    pa.field("role", pa.string(), nullable=False),
    pa.field("turn", pa.int32(), nullable=False),
    pa.field("attempt", pa.int32(), nullable=False),
    pa.field("choice", pa.int16(), nullable=False),
    pa.field("position", pa.int32(), nullable=False),
    pa.field("token_id", pa.int32(), nullable=False),
    pa.field("phase", pa.string(), nullable=False),
]
INDEX_NAMES = [field.name for field in INDEX]
# The bits of the exponent: all of them set in infinity and NaN, and in nothing else.
EXPONENTS: dict[str, tuple[Any, Any, int]] = {
    "bfloat16": (np.int16, np.uint16, 0x7F80),
    "float16": (np.int16, np.uint16, 0x7C00),
    "float32": (np.int32, np.uint32, 0x7F80_0000),
}


class Block(NamedTuple):
    """Rows of one call. vectors: point → [n, hidden]."""

    call: Call
    kept: Kept
    token_id: NDArray[np.int32]
    vectors: dict[str, NDArray[Any]]


def live_blocks(call: Call, path: Path) -> Iterator[Block]:
    """The rows that a call keeps, out of its live file; CorruptFile if one of them is not in it."""
    file = CallFile(path)
    rows = file.rows
    prompts = {s.choice: s for s in call.sequences}
    for kept in call.kept:
        if kept.choice not in prompts:
            raise CorruptFile(f"{path.name}: keeps rows of choice {kept.choice}, which the call does not have")
        own = np.flatnonzero((file.choice == kept.choice) & (file.position >= kept.start) & (file.position < kept.stop))
        if not np.array_equal(file.position[own], np.arange(kept.start, kept.stop)):
            raise CorruptFile(f"{path.name}: positions {kept.start} to {kept.stop} are not all there")
        for at in range(0, len(own), ROW_GROUP):
            part = own[at : at + ROW_GROUP]
            piece = Kept(kept.choice, kept.start + at, kept.start + at + len(part))
            contiguous = slice(int(part[0]), int(part[-1]) + 1) if part[-1] - part[0] == len(part) - 1 else part
            vectors = {point: rows[contiguous, i] for i, point in enumerate(file.points)}
            yield Block(call, piece, file.token_id[part], vectors)


def write_shard(path: Path, calls: Iterable[Call], blocks: Iterable[Block], model: Model, compression: str) -> int:
    """Write the shard whole; returns its rows.

    calls: the episode's, for the points that need a column. compression: of the vectors, `zstd` or `none`
    """
    points = list(dict.fromkeys(point for call in calls for point in call.points))
    width = DTYPES[DTYPE_CODES[model.dtype]].itemsize * model.hidden_size
    about = {"dtype": model.dtype, "shape": json.dumps([model.hidden_size])}
    vectors = [pa.field(point, pa.binary(width), metadata=about) for point in points]
    zstd = [*INDEX_NAMES, *(points if compression == "zstd" else ())]
    schema = pa.schema([*INDEX, *vectors])
    nonfinite = dict.fromkeys(points, 0)
    n_rows = 0
    with (
        whole(path) as draft,
        pq.ParquetWriter(
            draft,
            schema,
            compression=dict.fromkeys([*INDEX_NAMES, *points], "NONE") | dict.fromkeys(zstd, "ZSTD"),
            compression_level=dict.fromkeys(zstd, 1),
            use_dictionary=["call", "thread", "role", "phase"],
            write_statistics=INDEX_NAMES,
            write_page_checksum=True,
            store_schema=True,
        ) as writer,
    ):
        for group in _groups(blocks):
            table = pa.Table.from_batches([_batch(block, schema, nonfinite) for block in group])
            writer.write_table(table, row_group_size=ROW_GROUP)
            n_rows += sum(len(block.token_id) for block in group)
        writer.add_key_value_metadata({"nonfinite": json.dumps(nonfinite)})
    return n_rows


class Shard:
    """A shard being read: whose rows they are at once, vectors row group by row group as they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._vectors = lru_cache(maxsize=4)(self._read)  # calls of an episode share rows
        self._file = pq.ParquetFile(path, page_checksum_verification=True)
        about = self._file.metadata
        self._starts = [0, *accumulate(about.row_group(i).num_rows for i in range(about.num_row_groups))]
        table = self._file.read(["call", "choice", "position"])
        self._positions = table["position"].to_numpy()
        calls = table["call"].combine_chunks().dictionary_encode()
        whose = np.stack([calls.indices.to_numpy(), table["choice"].to_numpy()], axis=1)
        edges = [0, *(np.flatnonzero(np.diff(whose, axis=0).any(axis=1)) + 1).tolist(), len(whose)]
        names = calls.dictionary.to_pylist()
        self._own = {Owner(names[whose[a, 0]], int(whose[a, 1])): slice(a, b) for a, b in pairwise(edges) if a < b}

    def rows(self, owner: Owner, start: int, stop: int, point: str) -> NDArray[Any]:
        """[stop - start, hidden] of the rows at these positions of a sequence; CorruptFile if they are not there."""
        own = self._own.get(owner, slice(0, 0))
        at = place(self._positions[own], start, stop)
        if at is None:
            raise CorruptFile(f"{self._path} lacks rows {start} to {stop} of {owner.call}, choice {owner.choice}")
        first, last = own.start + at.start, own.start + at.stop
        parts = []
        for group in range(bisect_right(self._starts, first) - 1, bisect_left(self._starts, last)):
            offset = self._starts[group]
            parts.append(self._vectors(group, point)[max(first - offset, 0) : last - offset])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read(self, group: int, point: str) -> NDArray[Any]:
        return vector_column(self._file.read_row_group(group, [point]), point)


def place(positions: NDArray[np.int32], start: int, stop: int) -> slice | None:
    """Where positions start to stop stand, one behind the other, in a sequence's; None if they are not all there."""
    at = int(np.searchsorted(positions, start))
    found = positions[at : at + stop - start]
    return slice(at, at + len(found)) if np.array_equal(found, np.arange(start, stop)) else None


def shard_blocks(path: Path, calls: dict[str, Call]) -> Iterator[Block]:
    """The rows of these calls in a shard, as they were written; for sealing an episode that went on after its seal."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            for call, kept in _stretches(table):
                if call not in calls:
                    continue
                part = table.slice(kept[1], kept[2] - kept[1])
                positions = part["position"].to_numpy()
                piece = Kept(kept[0], int(positions[0]), int(positions[-1]) + 1)
                vectors = {n: vector_column(part, n) for n in calls[call].points}
                yield Block(calls[call], piece, part["token_id"].to_numpy(), vectors)


def vector_column(table: pa.Table, point: str) -> NDArray[Any]:
    """[rows, hidden] of a point's column, in the dtype that its field metadata names."""
    field = table.schema.field(point)
    dtype = DTYPES[DTYPE_CODES[field.metadata[b"dtype"].decode()]]
    width = field.type.byte_width
    chunks = [
        np.frombuffer(c.buffers()[1], np.uint8, len(c) * width, c.offset * width) for c in table[point].chunks if len(c)
    ]
    data = chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, np.uint8), *chunks])
    return data.view(dtype).reshape(-1, width // dtype.itemsize)


def count_nonfinite(values: NDArray[Any]) -> int:
    """How many elements are NaN or infinite. On the bits, since ml_dtypes tests bf16 one element at a time.

    Without the sign these are the largest numbers of all. Two maxima tell whether there are any: four times as fast as
    counting, and there seldom are.
    """
    signed, unsigned, exponent = EXPONENTS[values.dtype.name]
    bits, sign = values.view(unsigned), np.iinfo(signed).max + 1
    if values.size == 0 or (values.view(signed).max() < exponent and bits.max() < sign + exponent):
        return 0
    return int(np.count_nonzero((bits & exponent) == exponent))


def _stretches(table: pa.Table) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """(call, (choice, first row, past last row)) for each stretch of consecutive positions of one sequence."""
    if not table.num_rows:
        return
    calls, choices = table["call"].to_pylist(), table["choice"].to_numpy()
    positions = table["position"].to_numpy()
    start = 0
    for i in range(1, len(calls) + 1):
        if (
            i == len(calls)
            or calls[i] != calls[start]
            or choices[i] != choices[start]
            or positions[i] != positions[i - 1] + 1
        ):
            yield calls[start], (int(choices[start]), start, i)
            start = i


def _groups(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Blocks gathered into row groups of at most ROW_GROUP rows."""
    group: list[Block] = []
    n_rows = 0
    for block in blocks:
        if group and n_rows + len(block.token_id) > ROW_GROUP:
            yield group
            group, n_rows = [], 0
        group.append(block)
        n_rows += len(block.token_id)
    if group:
        yield group


def _batch(block: Block, schema: pa.Schema, nonfinite: dict[str, int]) -> pa.RecordBatch:
    call, kept, n = block.call, block.kept, len(block.token_id)
    n_prompt = next(len(s.prompt_token_ids) for s in call.sequences if s.choice == kept.choice)
    position = np.arange(kept.start, kept.stop, dtype=np.int32)
    same = {"call": call.id, "thread": call.thread, "role": call.role, "turn": call.turn, "attempt": call.attempt}
    columns = {name: pa.repeat(pa.scalar(value, schema.field(name).type), n) for name, value in same.items()}
    columns["choice"] = pa.repeat(pa.scalar(kept.choice, pa.int16()), n)
    columns["position"] = pa.array(position)
    columns["token_id"] = pa.array(np.asarray(block.token_id, np.int32))
    columns["phase"] = pa.array(np.where(position < n_prompt, "prompt", "completion"))
    for field in list(schema)[len(INDEX) :]:
        values = block.vectors.get(field.name)
        if values is None:
            columns[field.name] = pa.nulls(n, field.type)
            continue
        data = np.ascontiguousarray(values)
        nonfinite[field.name] += count_nonfinite(data)
        columns[field.name] = pa.FixedSizeBinaryArray.from_buffers(field.type, n, [None, pa.py_buffer(data)])
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)
