"""`tautap verify`: whether a run is what its journal says, down to every row."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from episodes import checkpoint
from episodes.begun import left_begun
from episodes.errors import BadRun
from episodes.history import Episode
from episodes.journal import CUT_SHORT
from episodes.layout import crc32
from episodes.records import Call
from episodes.recovery import STOPPED, strays, unrecorded
from episodes.rows import Owner, Rows
from episodes.run import Run, open_run
from episodes.shards import live_blocks
from episodes.store import being_written
from episodes.tables import CALLS, Index, Roll

INDEX = "calls.parquet, episodes.parquet"
# How often to look once more at what seems wrong while a proxy writes.
AGAIN = 3
# How much to unpack at once. It may become 32,768 times as much.
PACKED = 1 << 10


def problems(run: Run) -> Iterator[str]:
    """What is wrong with a run, in words; nothing if it is whole."""
    writing = being_written(run.layout)
    for line in run.outline.broken:
        if not (writing and line.reason == CUT_SHORT):  # only the last one can be, and it is being written
            yield f"journal.jsonl, line {line.line}: {line.reason}"
    yield from _journal_problems(run)
    yield from _episodes_problems(run, again=AGAIN if writing else 0)
    for call in run.outline.calls.values():
        yield from _call_problems(run, run.outline.whole(call))
    yield from _index_problems(run)
    if not writing:  # else what no record accounts for yet is its business
        layout = run.layout
        if layout.calls.exists() and layout.episodes.exists() and Index.of(layout) is None:
            yield f"{INDEX}: they cannot be read, or are of another journal; `tautap seal` writes them anew"
        yield from _checkpoint_problems(run)
        left = unrecorded(run.outline, left_begun(run.layout.begun))
        for call in left:
            yield f"call {call.id}: {STOPPED}: start a proxy on the run, or seal it, without what only a worker has"
        for path, reason, _ in strays(run.layout, run.outline, left):
            yield f"{path.relative_to(run.layout.root)}: {reason}"


def _journal_problems(run: Run) -> Iterator[str]:
    """Records that contradict others."""
    for call, places in run.outline.places.items():
        if len(places) > 1:
            yield f"call {call}: in the journal {len(places)} times"
    for episode in run.outline.episodes.values():
        for call in episode.sealed.calls if episode.sealed else ():
            if call not in run.outline.places:
                yield f"episode {episode.id}: sealed with call {call}, which the journal lacks"


def _index_problems(run: Run) -> Iterator[str]:
    """Whether the index, if it stands for the whole journal, says what the journal says. As it was when the run was
    opened: a newer one may know more than was read of the journal since.
    """
    try:
        found = run.index
        if found is None or found.journal_bytes < run.layout.journal.stat().st_size:
            return
        roll = Roll(run.outline, run.layout, run.outline.lines())
        same = {run.layout.calls: _same_rows((group() for _, group in found.groups()), roll.calls())}
        same[run.layout.episodes] = found.episodes.equals(roll.episodes())
        for path, so in same.items():
            if not so:
                yield f"{path.name}: not what the journal says; `tautap seal` writes it anew"
    except (OSError, pa.ArrowException) as error:
        yield f"{INDEX}: {error}; `tautap seal` writes them anew"


def _same_rows(found: Iterator[pa.Table], wanted: Iterator[pa.Table]) -> bool:
    """Whether tables of CALLS have the same rows, however they are cut; passes through all that are wanted."""
    same, rest = True, CALLS.empty_table()
    for table in wanted:
        while len(rest) < len(table) and (more := next(found, None)) is not None:
            rest = pa.concat_tables([rest, more])
        same = same and rest.slice(0, len(table)).equals(table)
        rest = rest.slice(len(table))
    return same and len(rest) == 0 and next(found, None) is None


def _checkpoint_problems(run: Run) -> Iterator[str]:
    """Whether what a writer would start from is what the journal says."""
    path = run.layout.rows
    if not path.exists():
        return
    if checkpoint.read(run.layout) is None:
        yield f"{path.name}: it cannot be read, or is of another journal; `tautap seal` writes it anew"
        return
    found, wanted = checkpoint.state(run.layout).history, run.outline
    same = found.counts == wanted.counts and all(
        found.home(c.thread, c.episode) == c.episode for c in wanted.calls.values()
    )
    trees = ([(spec, _tree(rows)) for spec, rows in sorted(h.rows.items())] for h in (found, wanted))
    if not same or next(trees) != next(trees):
        yield f"{path.name}: not what the journal says; delete it, and `tautap seal` writes it anew"


def _tree(rows: Rows) -> list[tuple[int, Owner | None, bytes]]:
    return [(depth, owner, tokens.tobytes()) for depth, owner, tokens in rows.stretches()]


def _call_problems(run: Run, call: Call) -> Iterator[str]:
    spans = run.outline.spans(call)
    for kept in call.kept:
        owners = {s.owner for s in spans.get(kept.choice, []) if s.start < kept.stop and kept.start < s.stop}
        if owners != {Owner(call.id, kept.choice)}:
            yield f"call {call.id}, choice {kept.choice}: another stores rows of {kept.start} to {kept.stop} too"
    if call.foreign:
        path = run.layout.foreign_file(call.id)
        try:
            _unpack(path)
        except (OSError, zstandard.ZstdError) as error:
            yield f"{path.relative_to(run.layout.root)}: {error}"
    missing = [(choice, span) for choice, own in spans.items() for span in own if span.owner is None]
    if call.lost and (missing or not call.sequences):  # else the rows are there by now: `episodes.holes`
        yield f"call {call.id}: no activations: {call.lost}"
    for choice, span in missing:
        yield f"call {call.id}, choice {choice}: no rows for positions {span.start} to {span.stop}"


def _unpack(path: Path) -> None:
    """Unpack a file and let go of it piece by piece: a small one may hold any amount. ZstdError if it is not whole."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    with path.open("rb") as file:
        while packed := file.read(PACKED):
            frame.decompress(packed)
    if not frame.eof:
        raise zstandard.ZstdError("it ends too early")


def _episodes_problems(run: Run, again: int, calls: Collection[str] | None = None) -> Iterator[str]:
    """What is wrong with the rows of episodes, of all or of those that have any of these calls.

    again: how often to look once more at what seems wrong, as it is by then: a proxy may have sealed it meanwhile
    """
    doubtful: set[str] = set()
    for episode in run.outline.episodes.values():
        own = {call.id for call in episode.calls}
        if calls is None or not own.isdisjoint(calls):
            found = list(_episode_problems(run, episode))
            if found and again:
                doubtful |= own
            else:
                yield from found
    if doubtful:
        yield from _episodes_problems(open_run(run.layout.root), again - 1, doubtful)


def _episode_problems(run: Run, episode: Episode) -> Iterator[str]:
    held = set(episode.sealed.calls) if episode.sealed else set()
    shard = run.layout.shard(episode.id)
    found: dict[tuple[str, int], dict[int, int]] = {}
    if episode.sealed and episode.sealed.n_rows:
        try:
            if (shard.stat().st_size, crc32(shard)) != (episode.sealed.n_bytes, episode.sealed.crc32):
                raise BadRun("its checksum is not the one in the journal")
            found = _shard_tokens(shard, episode.sealed.n_rows)
        except (OSError, pa.ArrowException, BadRun) as error:
            yield f"shards/{shard.name}: {error}"
            return
    for call in episode.calls:
        if not call.kept:
            continue
        call = run.outline.whole(call)
        if call.id not in held:
            try:
                path = run.layout.live_file(call.thread, call.id)
                for block in live_blocks(call, path):
                    tokens = dict(enumerate(block.token_id.tolist(), block.start))
                    found.setdefault((call.id, block.whose.choice), {}).update(tokens)
            except (OSError, BadRun) as error:
                yield f"call {call.id}: {error}"
                continue
        for kept in call.kept:
            tokens = found.get((call.id, kept.choice), {})
            sequence = next(s for s in call.sequences if s.choice == kept.choice)
            expected = sequence.tokens[kept.start : kept.stop].tolist()
            if [tokens.pop(p, None) for p in range(kept.start, kept.stop)] != expected:
                yield f"call {call.id}, choice {kept.choice}: rows {kept.start} to {kept.stop} are not its tokens'"
    extra = sum(map(len, found.values()))
    if extra:
        yield f"episode {episode.id}: {extra} rows that no call keeps"


def _shard_tokens(path: Path, n_rows: int) -> dict[tuple[str, int], dict[int, int]]:
    """(call, choice) → position → token id; BadRun if a row is there twice or their number is wrong."""
    found: dict[tuple[str, int], dict[int, int]] = {}
    total = 0
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, ["call", "choice", "position", "token_id"])
            total += table.num_rows
            columns = (column.to_pylist() for column in table.columns)
            for call, choice, position, token_id in zip(*columns, strict=True):
                tokens = found.setdefault((call, choice), {})
                if position in tokens:
                    raise BadRun(f"position {position} of {call}, choice {choice} is there twice")
                tokens[position] = token_id
    if total != n_rows:
        raise BadRun(f"{total} rows where the journal says {n_rows}")
    return found
