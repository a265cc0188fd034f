"""A run on disk, format 1.

    <data>/<run>/
      run.json                          format, run, created, recorded, compression (`episodes.records.Run`)
      journal.jsonl                     one checksummed line per call, seal, pair or link; append-only; the truth
      begun.jsonl                       lines of calls that have begun, some of them in the journal by now
      live/<thread>/<call>.safetensors  call files (`episodes.wire`) of episodes that are not sealed yet
      shards/<episode>.parquet          a sealed episode: one row per token that it computed
      foreign/<call>.json.zst           activations that a backend which is not ours put into its reply
      calls.parquet  episodes.parquet   the index, rolled from the journal
      rows.parquet                      a checkpoint of who stored which row (`episodes.checkpoint`), to start from
      .lock                             held by the process that writes the run
      worker.log  results/              what `up` and `bench` put beside it: the worker's output, tau-bench's results

In `run.json`, `recorded` has what the worker runs, `episodes.records.Model`: model, dtype, hidden size, points,
versions, …; null until one was heard of.

A **row** is one token's vectors. It belongs to the call that computed it first; a later call of the same token ids
refers to it. A **span** `(choice, call, source_choice, start, stop)` says that positions start to stop of a call's
choice are the rows at the same positions of `call`'s `source_choice`; `call` is null where no row was stored.
A call with the role `backfill` is nobody's request: it stores rows that another call lacked (`episodes.holes`).

**Shard columns**: `call` `thread` `role` string, `turn` `attempt` int32, `choice` int16, `position` `token_id` int32,
`phase` (`prompt` or `completion`), then one column per point, fixed_size_binary(itemsize · hidden): little-endian
elements, null where that call did not record that point. `role` is the thread's, as in `episodes.records.Role`, or
`backfill` where such a call stored the row. `phase` tells whether the token stood in the prompt of the call that
computed the row, so a reply's last token, which the next call feeds in, is `prompt` there. Field metadata: `dtype`
(`bfloat16`, `float16`, `float32`) and `shape` (`[hidden]`). File metadata `nonfinite`: NaN and infinite elements per
point. Rows are in the order of the journal, then choice, then position; row groups hold at most 4,096 rows; pages
carry checksums; vectors have neither dictionary nor statistics and are compressed with zstd level 1 unless the run says
`none`.

**Which episode.** A call's line names the episode it began in: the one that the client named (`named`), else one of its
thread's own. A `pair` line moves threads into an episode, any number of times until it is sealed, never after; a
`link` line joins a results file's entry to an episode, at any time. The last line of a kind counts, and no other file
changes with it: live files lie by thread, a shard is written when the episode is sealed. Simulator calls made before
there is a task, role `warmup`, are in the episode `warmups`.

**calls.parquet** and **episodes.parquet**: see `CALLS` and `EPISODES` in `episodes.tables`. They are written when the
proxy stops and by `tautap seal`; the journal is always ahead of them or equal. So is **rows.parquet**, which a writer
also writes when the journal has grown by much. All three can be deleted at any time: the journal has everything.
A run whose journal is behind `calls.parquet` or `rows.parquet`, or without a line beside files of calls that never
began, is refused.

A page's checksum guards reading; the whole file's CRC-32 is in the journal's seal.

**Journal line**: eight hex digits of the CRC-32 of the JSON, a blank, the JSON (`episodes.records`), a newline.

Every file but the two of lines appears whole or not at all: written under a name that begins with a dot, synced,
renamed, its directory synced. A call is committed when its journal line is on disk, and not before its live file is.
Nothing in it is a symbolic link: a writer would write and delete where that leads, and refuses the run.

**Crashes.** Before a call's reply ends, the call is in `begun.jsonl` as it was when it began. So after a crash a call
whose reply had ended is in the journal, or a line there says that it is not. Who opens the run for writing records
these calls first, with `error` and what can still be had of their rows (`episodes.recovery`).
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from episodes.errors import BadName, BadRun

FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
ROW_GROUP = 4096


def check_name(kind: str, name: str) -> str:
    """The name, if it is a plain file name; BadName says what is accepted."""
    if not NAME.fullmatch(name):
        raise BadName(f"{kind} {name[:200]!r}: use letters, digits, '.', '_' and '-', at most 128, not '.' first")
    return name


class Layout:
    """The paths of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = root / "run.json"
        self.journal = root / "journal.jsonl"
        self.begun = root / "begun.jsonl"
        self.live = root / "live"
        self.shards = root / "shards"
        self.foreign = root / "foreign"
        self.calls = root / "calls.parquet"
        self.episodes = root / "episodes.parquet"
        self.rows = root / "rows.parquet"
        self.lock = root / ".lock"

    @property
    def index(self) -> tuple[Path, ...]:
        """The files that can be made from the journal."""
        return self.calls, self.episodes, self.rows

    def accounted(self) -> Iterator[Path]:
        """The files that are there and that a line of the journal has to account for."""
        yield from self.live.glob("*/[!.]*.safetensors")
        yield from self.shards.glob("[!.]*.parquet")
        yield from self.foreign.glob("[!.]*.json.zst")

    def live_file(self, thread: str, call: str) -> Path:
        return self.live / thread / f"{call}.safetensors"

    def claim(self, call: str) -> Path:
        """Where a call's activations lie while they are fetched."""
        return self.live / f".{call}.claim"

    def shard(self, episode: str) -> Path:
        return self.shards / f"{episode}.parquet"

    def foreign_file(self, call: str) -> Path:
        return self.foreign / f"{call}.json.zst"


def existing(root: Path) -> Layout:
    """The paths of the run in a directory; BadRun if there is none."""
    layout = Layout(root)
    if not layout.run.exists():
        raise BadRun(f"{root} is not a run: it has no run.json")
    return layout


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft's path to write to; when the block ends well the draft is synced and becomes `path`, else it goes."""
    make(path.parent)
    draft = path.with_name(f".{path.name}.draft")
    try:
        yield draft
        publish(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def publish(draft: Path, path: Path) -> None:
    """Give a finished draft its name, durably. The draft may lie in another directory of the same file system."""
    make(path.parent)
    with draft.open("rb+") as file:
        os.fsync(file.fileno())
    draft.rename(path)
    sync_directory(path.parent)


def make(directory: Path) -> None:
    """Make a directory, and those above it, durably, if it is not there."""
    if not directory.exists():
        make(directory.parent)
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)


def links(directory: Path) -> Iterator[Path]:
    """The symbolic links in a directory and below it; none is followed. What may not be looked into is passed over,
    such as a file system's `lost+found`.
    """
    # Not found: another process may be at work in it.
    with suppress(FileNotFoundError, PermissionError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield Path(entry.path)
            elif entry.is_dir():
                yield from links(Path(entry.path))


def crc32(path: Path) -> int:
    """The CRC-32 of a file's bytes."""
    value = 0
    buffer = memoryview(bytearray(1 << 18))  # small enough to stay in the CPU's cache
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            value = zlib.crc32(buffer[:n], value)
    return value


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
