"""Shards: an episode's rows as one Parquet file. The columns are specified in `episodes.layout`."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable, Iterator
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from episodes.errors import CorruptFile
from episodes.layout import ROW_GROUP, whole
from episodes.records import Call, Model
from episodes.rows import Owner
from episodes.wire import DTYPE_CODES, DTYPES, CallFile, bits

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
# Of a point in a row group: what is copied, counted and compressed stays in the CPU's cache.
GROUP_BYTES = 4 << 20
# Of vectors that are looked at in one go.
PIECE_BYTES = 1 << 19
CACHED_GROUPS = 32
# The bits of the exponent: all of them set in infinity and NaN, and in nothing else.
EXPONENTS: dict[str, tuple[Any, Any, int]] = {
    "bfloat16": (np.int16, np.uint16, 0x7F80),
    "float16": (np.int16, np.uint16, 0x7C00),
    "float32": (np.int32, np.uint32, 0x7F80_0000),
}


class Whose(NamedTuple):
    """The call that computed a row, and the choice of it whose sequence the row is of."""

    call: str
    thread: str
    role: str
    turn: int
    attempt: int
    choice: int


class Block(NamedTuple):
    """Rows of one sequence, at positions start, start + 1, …: the prompt's below n_prompt, then the completion's.

    token_id: [n]. vectors: point → [n, hidden], in the engine's dtype
    """

    whose: Whose
    start: int
    n_prompt: int
    token_id: NDArray[np.int32]
    vectors: dict[str, NDArray[Any]]

    def part(self, start: int, stop: int) -> Block:
        """The rows from the start-th to the stop-th."""
        vectors = {point: values[start:stop] for point, values in self.vectors.items()}
        return Block(self.whose, self.start + start, self.n_prompt, self.token_id[start:stop], vectors)


def live_blocks(call: Call, path: Path) -> Iterator[Block]:
    """The rows that a call keeps, out of its live file; CorruptFile if one of them is not in it."""
    file = CallFile(path)
    rows = file.rows
    prompts = {s.choice: len(s.prompt_token_ids) for s in call.sequences}
    for kept in call.kept:
        if kept.choice not in prompts:
            raise CorruptFile(f"{path.name}: keeps rows of choice {kept.choice}, which the call does not have")
        whose = Whose(call.id, call.thread, call.role, call.turn, call.attempt, kept.choice)
        own = file.place(kept.choice, kept.start, kept.stop)
        vectors = {point: rows[own, i] for i, point in enumerate(file.points)}
        yield Block(whose, kept.start, prompts[kept.choice], file.token_id[own], vectors)


def write_shard(path: Path, points: list[str], blocks: Iterable[Block], model: Model, compression: str) -> int:
    """Write the shard whole; returns its rows.

    points: those that need a column. compression: of the vectors, `zstd` or `none`
    """
    width = DTYPES[DTYPE_CODES[model.dtype]].itemsize * model.hidden_size
    about = {"dtype": model.dtype, "shape": json.dumps([model.hidden_size])}
    schema = pa.schema([*INDEX, *(pa.field(point, pa.binary(width), metadata=about) for point in points)])
    zstd = [*INDEX_NAMES, *(points if compression == "zstd" else ())]
    group = Group(schema, points, model)
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
            write_batch_size=max(PIECE_BYTES // width, 1),  # a page is closed between two batches only
            store_schema=True,
        ) as writer,
    ):
        for table in group.tables(blocks):
            writer.write_table(table, row_group_size=ROW_GROUP)
            n_rows += table.num_rows
        writer.add_key_value_metadata({"nonfinite": json.dumps(group.nonfinite)})
    return n_rows


class Group:
    """A row group while it is gathered. Its memory is used for one after the other: to have new memory from the kernel
    takes as long as to copy the rows into it.
    """

    def __init__(self, schema: pa.Schema, points: list[str], model: Model) -> None:
        self._schema = schema
        self._dtype = DTYPES[DTYPE_CODES[model.dtype]]
        width = self._dtype.itemsize * model.hidden_size
        self._room = min(ROW_GROUP, max(GROUP_BYTES // width, 1))
        self._piece = max(PIECE_BYTES // width, 1)
        shape = (self._room, model.hidden_size)
        self._vectors = {point: np.empty(shape, f"<u{self._dtype.itemsize}") for point in points}
        self._blocks: list[Block] = []
        self._n_rows = 0
        self.nonfinite = dict.fromkeys(points, 0)

    def tables(self, blocks: Iterable[Block]) -> Iterator[pa.Table]:
        """The blocks' rows, a table for each row group, good until the next is asked for."""
        for block in blocks:
            while len(block.token_id):
                n = min(len(block.token_id), self._room - self._n_rows)
                self._add(block.part(0, n))
                block = block.part(n, len(block.token_id))
                if self._n_rows == self._room:
                    yield self._take()
        if self._n_rows:
            yield self._take()

    def _add(self, block: Block) -> None:
        for point, values in block.vectors.items():
            for at in range(0, len(values), self._piece):
                source = bits(values[at : at + self._piece])
                place = self._vectors[point][self._n_rows + at :][: len(source)]
                place[:] = source
                self.nonfinite[point] += count_nonfinite(place.view(self._dtype))
        self._blocks.append(block)
        self._n_rows += len(block.token_id)

    def _take(self) -> pa.Table:
        lengths = [len(block.token_id) for block in self._blocks]
        position = np.concatenate([np.arange(b.start, b.start + n) for b, n in zip(self._blocks, lengths, strict=True)])
        n_prompt = np.repeat([block.n_prompt for block in self._blocks], lengths)
        columns: dict[str, Any] = {
            name: [getattr(block.whose, name) for block in self._blocks] for name in Whose._fields
        }
        rows = pa.array(np.repeat(np.arange(len(lengths)), lengths))
        columns = {name: pa.array(v, self._schema.field(name).type).take(rows) for name, v in columns.items()}
        columns["position"] = pa.array(position, pa.int32())
        columns["token_id"] = pa.array(np.concatenate([block.token_id for block in self._blocks]), pa.int32())
        columns["phase"] = pa.array(np.where(position < n_prompt, "prompt", "completion"))
        for point, values in self._vectors.items():
            has = np.repeat([point in block.vectors for block in self._blocks], lengths)
            valid = None if has.all() else pa.py_buffer(np.packbits(has, bitorder="little"))
            data = [valid, pa.py_buffer(values)]
            columns[point] = pa.FixedSizeBinaryArray.from_buffers(self._schema.field(point).type, len(rows), data)
        self._blocks, self._n_rows = [], 0
        return pa.Table.from_arrays([columns[name] for name in self._schema.names], schema=self._schema)


class Shard:
    """A shard being read: whose rows they are at once, vectors row group by row group as they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = pq.ParquetFile(path, page_checksum_verification=True)
        # Calls of an episode share rows. Not of a method: a cache that knows the shard would keep it, in a circle.
        self._vectors = lru_cache(maxsize=CACHED_GROUPS)(partial(_vectors, self._file))
        about = self._file.metadata
        self._starts = [0, *accumulate(about.row_group(i).num_rows for i in range(about.num_row_groups))]
        table = self._file.read(["call", "choice", "position"])
        self._positions = table["position"].to_numpy()
        calls = table["call"].combine_chunks().dictionary_encode()
        whose = np.stack([calls.indices.to_numpy(), table["choice"].to_numpy()], axis=1)
        edges = [0, *(np.flatnonzero(np.diff(whose, axis=0).any(axis=1)) + 1).tolist(), len(whose)]
        names = calls.dictionary.to_pylist()
        self._own = {Owner(names[whose[a, 0]], int(whose[a, 1])): slice(a, b) for a, b in pairwise(edges) if a < b}

    def read(self, owner: Owner, start: int, stop: int, point: str, into: NDArray[Any]) -> None:
        """Copy the rows at these positions of a sequence; CorruptFile if they are not there.

        into: [stop - start, hidden]
        """
        own = self._own.get(owner, slice(0, 0))
        first = own.start + int(np.searchsorted(self._positions[own], start))
        last = first + stop - start
        if last > own.stop or not np.array_equal(self._positions[first:last], np.arange(start, stop)):
            raise CorruptFile(f"{self._path} lacks rows {start} to {stop} of {owner.call}, choice {owner.choice}")
        for group in range(bisect_right(self._starts, first) - 1, bisect_left(self._starts, last)):
            offset = self._starts[group]
            part = self._vectors(group, point)[max(first - offset, 0) : last - offset]
            at = max(offset - first, 0)
            bits(into)[at : at + len(part)] = bits(part)


def _vectors(file: pq.ParquetFile, group: int, point: str) -> NDArray[Any]:
    return vector_column(file.read_row_group(group, [point]), point)


def shard_points(path: Path) -> list[str]:
    """The points that a shard has a column of."""
    return [name for name in pq.read_schema(path).names if name not in INDEX_NAMES]


def shard_calls(path: Path) -> set[tuple[str, str]]:
    """Thread and id of each call that a shard has rows of."""
    table = pq.read_table(path, columns=["thread", "call"], page_checksum_verification=True)
    return set(zip(table["thread"].to_pylist(), table["call"].to_pylist(), strict=True))


def shard_blocks(path: Path, calls: Container[str]) -> Iterator[Block]:
    """The rows of these calls in a shard, as they were written; for sealing an episode that went on after its seal."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            for start, stop in _stretches(table):
                block = _block(table.slice(start, stop - start))
                if block.whose.call in calls:
                    yield block


def _block(table: pa.Table) -> Block:
    """A stretch of a shard's rows. A point that its call did not record is null in all of them."""
    whose = Whose(*(table[name][0].as_py() for name in Whose._fields))
    start = table["position"][0].as_py()
    n_prompt = start + table["phase"].to_pylist().count("prompt")
    points = [name for name in table.schema.names if name not in INDEX_NAMES and table[name].null_count == 0]
    vectors = {point: vector_column(table, point) for point in points}
    return Block(whose, start, n_prompt, table["token_id"].to_numpy(), vectors)


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


def _stretches(table: pa.Table) -> Iterator[tuple[int, int]]:
    """First row, and past the last, of each stretch of consecutive positions of one sequence."""
    calls = table["call"].combine_chunks().dictionary_encode().indices.to_numpy()
    steps = [np.diff(column) for column in (calls, table["choice"].to_numpy(), table["position"].to_numpy())]
    edges = (steps[0] != 0) | (steps[1] != 0) | (steps[2] != 1)
    return pairwise([0, *(np.flatnonzero(edges) + 1).tolist(), table.num_rows])
