"""A checkpoint: what a run's writer knows, for whoever opens the run next to read only what the journal gained since.

It is no second truth: it holds places of journal lines, and of the lines that need not be read again only what is
looked up all the time, who stored which row. `rows.parquet` has a row for each stretch of tokens (`episodes.rows`):

    spec          number, in the metadata's `specs`, of what the rows are shared under
    depth         how many stretches precede it: it goes on from the last one above it that is one less deep
    call, choice  who stored its rows; null if nobody did
    tokens        the token ids, little-endian int32

Metadata, JSON under the key `checkpoint 2`: `specs`; `journal_bytes`, how much of the journal it stands for, and
`crc32` of the last of these bytes; `lines`, the places of lines that still count; `counts`, as in `History`; `damaged`,
whether a line could not be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby, islice, pairwise
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from episodes import journal
from episodes.errors import CorruptFile
from episodes.history import History
from episodes.layout import Layout, whole
from episodes.records import Call, Link, Pair, Record, Seal
from episodes.rows import Owner, Rows, Stretch

ROWS = pa.schema(
    [
        pa.field("spec", pa.int32(), nullable=False),
        pa.field("depth", pa.int32(), nullable=False),
        pa.field("call", pa.string()),
        pa.field("choice", pa.int16()),
        pa.field("tokens", pa.large_binary(), nullable=False),
    ]
)
ABOUT = b"checkpoint 2"  # 1 had no tokens of calls without sequences in its counts
BATCH = 10_000


class About(msgspec.Struct, frozen=True):
    """The metadata."""

    journal_bytes: int
    crc32: int
    specs: list[tuple[str, ...]]
    lines: list[int]
    counts: dict[str, int]
    damaged: bool


class Lines:
    """Where the lines stand that say what is the case: of calls that no shard holds, pairs, last seals and links."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, str | int], int] = {}

    def note(self, place: int, record: Record) -> None:
        match record:
            case Call():
                self._places["call", record.id] = place
            case Seal():
                for call in record.calls:
                    self._places.pop(("call", call), None)
                self._places["seal", record.episode] = place
            case Pair():
                self._places["pair", place] = place
            case Link():
                self._places["link", record.episode] = place

    @property
    def places(self) -> list[int]:
        """In the order of the journal."""
        return sorted(self._places.values())


class State(NamedTuple):
    """A run as its journal says, but for the calls that shards hold.

    read_from, read_to: which of the journal's lines were all read. damaged: whether there are any that cannot be read
    """

    history: History
    lines: Lines
    read_from: int
    read_to: int
    damaged: bool


def state(layout: Layout) -> State:
    """The run now, by its checkpoint as far as that goes."""
    found = read(layout)
    history, lines = History(forget_sealed=True), Lines()
    start, damaged = 0, False
    stop = journal.size(layout.journal)
    if found is not None:
        about, history.rows = found
        try:
            for place in about.lines:
                _take(history, lines, place, journal.record_at(layout.journal, place))
            history.counts = Counter(about.counts)
            start, damaged = about.journal_bytes, about.damaged
        except CorruptFile:  # the line's rows are nobody's, whatever the checkpoint says
            history, lines = History(forget_sealed=True), Lines()
    for place, record in journal.placed(layout.journal, start, stop):
        if isinstance(record, journal.Broken):
            damaged = True
        else:
            _take(history, lines, place, record)
    return State(history, lines, start, stop, damaged)


def _take(history: History, lines: Lines, place: int, record: Record) -> None:
    history.add(record)
    lines.note(place, record)


def read(layout: Layout) -> tuple[About, dict[tuple[str, ...], Rows]] | None:
    """A run's checkpoint and who stored which row, None if there is none that can be read and is of this journal."""
    try:
        file = pq.ParquetFile(layout.rows, page_checksum_verification=True)
        about = msgspec.json.decode(file.schema_arrow.metadata[ABOUT], type=About)
        if not file.schema_arrow.equals(ROWS) or about.crc32 != journal.end(layout.journal, about.journal_bytes):
            return None
        table = file.read()
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        return None
    trees = {spec: Rows() for spec in about.specs}
    for number, group in groupby(_read(table), key=lambda item: item[0]):
        trees[about.specs[number]] = Rows.of(stretch for _, stretch in group)
    return about, trees


def _read(table: pa.Table) -> Iterator[tuple[int, Stretch]]:
    for batch in table.to_batches():
        specs, depths, calls, choices = (batch[name].to_pylist() for name in ROWS.names[:4])
        _, edges, data = batch["tokens"].buffers()
        stops = np.frombuffer(edges, np.int64, len(batch) + 1, 8 * batch["tokens"].offset) // 4
        ids = np.frombuffer(data, "<i4", int(stops[-1])) if stops[-1] else np.empty(0, np.int32)
        tokens = (ids[a:b] for a, b in pairwise(stops.tolist()))
        owners = (
            Owner(call, choice) if call is not None else None for call, choice in zip(calls, choices, strict=True)
        )
        yield from zip(specs, map(Stretch, depths, owners, tokens), strict=True)


def stands_for(layout: Layout) -> int:
    """How many bytes of the journal a run's checkpoint stands for; 0 if there is none that can be read."""
    try:
        return msgspec.json.decode(pq.read_schema(layout.rows).metadata[ABOUT], type=About).journal_bytes
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        return 0


def save(layout: Layout, now: State, journal_bytes: int) -> None:
    """Write the checkpoint of a run whose journal ends there."""
    history = now.history
    about = About(
        journal_bytes,
        journal.end(layout.journal, journal_bytes),
        list(history.rows),
        now.lines.places,
        dict(history.counts),
        now.damaged,
    )
    schema = ROWS.with_metadata({ABOUT: msgspec.json.encode(about)})
    stretches = ((i, s) for i, rows in enumerate(history.rows.values()) for s in rows.stretches())
    with (
        whole(layout.rows) as draft,
        pq.ParquetWriter(
            draft, schema, compression="zstd", use_dictionary=["call"], write_statistics=False, write_page_checksum=True
        ) as writer,
    ):
        while batch := list(islice(stretches, BATCH)):
            writer.write_batch(_batch(batch, schema))


def _batch(stretches: list[tuple[int, Stretch]], schema: pa.Schema) -> pa.RecordBatch:
    columns = [
        [spec for spec, _ in stretches],
        [stretch.depth for _, stretch in stretches],
        [stretch.owner.call if stretch.owner else None for _, stretch in stretches],
        [stretch.owner.choice if stretch.owner else None for _, stretch in stretches],
        [stretch.tokens.tobytes() for _, stretch in stretches],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
