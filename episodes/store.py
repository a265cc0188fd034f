"""The writing end of a run: commits calls, seals episodes, rolls the index. One process at a time, one thread in it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import zstandard

from episodes import checkpoint, journal
from episodes.begun import Begun, left_begun
from episodes.cast import Cast, Dialect, Group
from episodes.errors import BadRun, CorruptFile, RunLocked, WrongFormat, WrongModel
from episodes.history import Ranges
from episodes.layout import FORMAT, Layout, crc32, links, make, publish, sync_directory, whole
from episodes.records import Call, Link, Model, Pair, Record, Run, Seal
from episodes.recovery import STOPPED, recover, unrecorded
from episodes.rows import runs
from episodes.shards import Block, live_blocks, shard_blocks, shard_points, write_shard
from episodes.tables import Index, Roll, stands_for, write_index
from episodes.wire import DTYPE_CODES, CallFile

# How much the journal may grow before what it adds up to is written down: about three seconds of reading.
CHECKPOINT_BYTES = 256 << 20
# Whoever looks whether a run is being written (`being_written`) holds its lock for an instant.
GLANCE_S = 0.05


def read_run(layout: Layout) -> Run:
    """`run.json`; CorruptFile if it is none, WrongFormat names the version of a run that this release does not read."""
    try:
        fields: dict[str, Any] = msgspec.json.decode(layout.run.read_bytes(), type=dict[str, Any])
        if fields.get("format") != FORMAT:
            raise WrongFormat(f"{layout.root} has format {fields.get('format')!r}: this release reads format {FORMAT}")
        return msgspec.convert(fields, Run)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{layout.run}: {error}") from None


def family(layout: Layout, run: Run) -> str:
    """What the salts of a run's captures begin with, and those of no other run's, not of a copy's either."""
    place = layout.root.stat()
    return f"{run.run}/{run.created!r}/{place.st_dev:x}.{place.st_ino:x}/"


def check_journal(layout: Layout) -> None:
    """BadRun if files of the run are there and their journal is not, or not to its end, as in a copy that broke off: a
    writer would delete what the journal does not account for.
    """
    # These first: of a run that is being written, the journal is never behind them.
    ends = {layout.calls: stands_for(layout), layout.rows: checkpoint.stands_for(layout)}
    n_bytes = journal.size(layout.journal)
    left = next((path for path, end in ends.items() if end > n_bytes), None) or _unaccounted(layout)
    if left is not None:
        raise BadRun(
            f"{layout.root} lacks its journal.jsonl, or the end of it, by which alone its other files mean anything, "
            f"such as {left.relative_to(layout.root)}: copy the run whole"
        )


def _unaccounted(layout: Layout) -> Path | None:
    """A file that there could not be if the journal was what it is, without a line; None if it has one. A crash leaves
    files of calls that have begun, and a run without calls has an index.
    """
    if journal.has_line(layout.journal):
        return None
    files = list(layout.accounted())
    if not layout.journal.exists():
        files += filter(Path.exists, layout.index)
    begun = {call.id for call in left_begun(layout.begun)}
    left = [path for path in files if path.name.removesuffix(".safetensors").removesuffix(".json.zst") not in begun]
    # Once more: a call that was recorded meanwhile has begun no longer.
    return left[0] if left and not journal.has_line(layout.journal) else None


class Store:
    """A run that this process writes. Not safe to call from several threads at once."""

    def __init__(self, layout: Layout, compression: Literal["zstd", "none"] = "zstd") -> None:
        """Open a run, making it if it is not there; RunLocked if another process writes it, BadRun if it has links or
        lacks its journal.
        """
        for link in links(layout.root):  # before anything is written, which may be elsewhere
            raise BadRun(f"{link} is a symbolic link: a run is written only where it lies; put in what it stands for")
        check_journal(layout)
        make(layout.live)
        self.layout = layout
        self._lock = _lock(layout)
        try:
            if not layout.run.exists():
                self._write(Run(FORMAT, layout.root.name, time.time(), compression=compression))
            self.run = read_run(layout)
            # Before anything is read, so that a line that a crash tore is none.
            self._journal = journal.Journal(layout.journal)
            self._state = checkpoint.state(layout)
            self.history = self._state.history
            self._checkpointed = self._state.read_from
            self._begun = Begun(layout.begun)
            sync_directory(layout.root)
            left = unrecorded(self.history, self._begun.left)
            # left: calls of a writer that died, to be recorded; recovered: what else was done about it, in words
            self.left, self.recovered = recover(layout, self.history, left, self._state.damaged)
            for call in self._begun.left:
                if call not in left:
                    self._begun.done(call.id)
            self._finish_seals()
        except BaseException:
            self._lock.close()
            raise

    def describe(self, model: Model) -> None:
        """Say which model is recorded; WrongModel if the run was recorded with another."""
        found = self.run.recorded
        if found is None:
            self._write(msgspec.structs.replace(self.run, recorded=model))
            self.run = read_run(self.layout)
            return
        for name, before, now in found.differences(model):
            raise WrongModel(
                f"run {self.run.run} was recorded with {name} {before}, the worker has {now}: give another --run"
            )

    def _write(self, run: Run) -> None:
        with whole(self.layout.run) as draft:
            draft.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=2))

    def begin(self, calls: Iterable[Call]) -> None:
        """Note that calls have begun, on any thread: they are known of now, whatever becomes of this process."""
        self._begun.add(calls)

    def sync_begun(self) -> None:
        """Let what has begun outlive the machine's power too."""
        self._begun.sync()

    def append(self, calls: list[Call]) -> None:
        """Put calls without activations on disk for good, with one sync: all of them, or OSError and none."""
        self._append(*calls)
        for call in calls:
            self._begun.done(call.id)

    def finish_left(self) -> int:
        """Record what a writer that died left, without a worker to ask; returns how many calls that were."""
        left, self.left = self.left, []
        for call in left:
            claim, lost = self.draft(call.id), call.lost or (STOPPED if call.points else None)
            try:
                if claim.exists():
                    self.commit(call, claim)
                    continue
            except CorruptFile as error:
                claim.unlink()
                lost = str(error)
            self.commit(msgspec.structs.replace(call, lost=lost))
        return len(left)

    def _finish_seals(self) -> None:
        """Seal again what was being sealed again: its shard is the new one, its seal the old."""
        for episode in list(self.history.episodes.values()):
            if episode.sealed and episode.sealed.n_rows and episode.unsealed:
                shard = self.layout.shard(episode.id)
                try:
                    if crc32(shard) != episode.sealed.crc32:
                        self.seal(episode.id)
                        self.recovered.append(f"shards/{shard.name}: its seal was not finished; sealed again")
                except Exception as error:  # a flipped bit in a shard's footer may raise a KeyError as well
                    self.recovered.append(f"shards/{shard.name}: {error}; see `tautap verify`")

    def draft(self, call: str) -> Path:
        """Where a claim may be written until `commit` takes it."""
        return self.layout.claim(call)

    def commit(self, call: Call, claim: Path | None = None, foreign: bytes | None = None) -> Call:
        """Put a call on disk for good; returns it with its token ids and the rows it keeps.

        claim: the call file as it came, which becomes the live file if any of its rows is new. foreign: activations
        that the backend itself sent, JSON. CorruptFile if the claim is not a whole call file of this run's model.
        """
        if foreign is not None:
            with whole(self.layout.foreign_file(call.id)) as draft:
                draft.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(foreign))
            call = msgspec.structs.replace(call, foreign=True)
        if claim is None:
            self.append([call])
            return call
        file = CallFile(claim)
        self._check(call, file)
        call = msgspec.structs.replace(call, points=file.points, tokens=file.tokens, sequences=file.sequences)
        return self._keep(call, file)

    def fill(self, call: Call, claim: Path) -> Call:
        """Put a call on disk that fills a hole (`Hole.filler`); returns it with the rows it keeps.

        claim: the call file of the re-run, whose prompt is the beginning of the call's sequence; CorruptFile if not.
        """
        file = CallFile(claim)
        self._check(call, file)
        came, asked = file.sequences[0], call.sequences[0]
        fed = came.prompt_token_ids
        same = (file.points, came.adapter) == (call.points, asked.adapter)
        if not same or not np.array_equal(fed, asked.tokens[: len(fed)]):
            raise CorruptFile(
                f"rows of {len(fed)} tokens at {file.points} came back for {call.id}, not those asked for"
            )
        return self._keep(call, file)

    def _keep(self, call: Call, file: CallFile) -> Call:
        """Commit a call; its file becomes the live file if any of its rows is new."""
        with self.history.keeping(call, _computed(file)) as kept:
            call = msgspec.structs.replace(call, kept=kept)
            live = self.layout.live_file(call.thread, call.id)
            try:
                if kept:
                    publish(file.path, live)
                (place,) = self._journal.append(call)
            except OSError:  # the claim is where it was, to be tried again
                with contextlib.suppress(FileNotFoundError):
                    live.rename(file.path)
                raise
        self.history.commit(call)
        self._state.lines.note(place, call)
        self._begun.done(call.id)
        if not kept:
            with contextlib.suppress(OSError):  # the call is committed, whatever becomes of the file
                file.path.unlink()
        return call

    def _check(self, call: Call, file: CallFile) -> None:
        """CorruptFile unless the file is this call's and of the model that the run records."""
        recorded = self.run.recorded
        if recorded is None:
            raise CorruptFile(f"rows of {call.id} came before the worker said what it runs")
        said = "call {}, {}, hidden size {}".format
        found = said(file.call, file.dtype, file.hidden_size)
        expected = said(call.id, DTYPE_CODES[recorded.dtype], recorded.hidden_size)
        if found != expected:
            raise CorruptFile(f"the file has rows of {found}; expected {expected}")

    def pair(self, group: Group, benchmark: str | None) -> None:
        """Note which threads make up an episode, if that is news. benchmark: whose, if it is one's."""
        threads = [thread for thread in group.placed if self.history.home(thread) != group.episode]
        known = self.history.episodes.get(group.episode)
        before = (known and known.pair) or Pair(group.episode, [], 0.0)
        said = (benchmark if group.user_strategy else None, group.strategy, group.user_strategy, group.tied)
        if threads or before != Pair(group.episode, before.threads, before.at, *said):
            self._append(Pair(group.episode, threads, time.time(), *said))

    def link(self, links: Iterable[Link]) -> int:
        """Note what results files say of episodes; returns how many links are new."""
        episodes = self.history.episodes
        news = [link for link in links if link.episode in episodes and episodes[link.episode].link != link]
        for link in news:
            self._append(link)
        return len(news)

    def _append(self, *records: Record) -> None:
        for place, record in zip(self._journal.append(*records), records, strict=True):
            self.history.add(record)
            self._state.lines.note(place, record)

    def seal_all(self, dialect: Dialect) -> list[Seal]:
        """Seal what is live, the threads that a writer before this one left open as their calls tell; what it had not
        recorded is recorded first. BadRun, once all else is sealed, names the episodes that cannot be, and why.
        """
        self.finish_left()
        cast = Cast(dialect)
        cast.replay(self.history.unsealed())
        for group in cast.groups():
            self.pair(group, dialect.name)
        seals, failed = [], []
        for episode in list(self.history.episodes):
            try:
                seals.append(self.seal(episode))
            except Exception as error:
                failed.append(f"episode {episode} is not sealed: {error}")
        if failed:
            raise BadRun("\n".join([*failed, f"see `tautap verify {self.layout.root}`"]))
        return [seal for seal in seals if seal is not None]

    def finish(self, dialect: Dialect) -> list[Seal]:
        """Seal what is live, as `seal_all`, and write the index, of what could be sealed if not all could be."""
        try:
            return self.seal_all(dialect)
        finally:
            self.roll()

    def seal(self, name: str) -> Seal | None:
        """Move an episode's rows into its shard; None if that has been done. An earlier seal's rows are taken along."""
        episode = self.history.episodes[name]
        if not episode.unsealed:
            return None
        before, fresh = episode.sealed, episode.unsealed
        held = before.calls if before else []
        shard = self.layout.shard(name)
        again = before is not None and before.n_rows > 0
        n_rows = 0
        if self.run.recorded is not None and (again or any(call.kept for call in fresh)):
            points = [*(shard_points(shard) if again else ()), *(p for call in fresh if call.kept for p in call.points)]
            blocks = self._blocks(shard, held if again else [], fresh)
            n_rows = write_shard(shard, list(dict.fromkeys(points)), blocks, self.run.recorded, self.run.compression)
        n_bytes, checksum = (shard.stat().st_size, crc32(shard)) if n_rows else (0, 0)
        seal = Seal(name, held + [call.id for call in fresh], n_rows, n_bytes, checksum, time.time())
        self._append(seal)
        for call in fresh:
            self.layout.live_file(call.thread, call.id).unlink(missing_ok=True)
        for thread in {call.thread for call in fresh}:
            with contextlib.suppress(OSError):  # a call of it is not recorded yet
                (self.layout.live / thread).rmdir()
        self._checkpoint_if_due()
        return seal

    def calls(self) -> Iterator[Call]:
        """Every call of the journal so far, sealed ones too."""
        return (record for _, record in journal.sound(self.layout.journal) if isinstance(record, Call))

    def _blocks(self, shard: Path, held: list[str], fresh: list[Call]) -> Iterator[Block]:
        """An episode's rows: of calls that its shard holds already, and of others."""
        if held:
            yield from shard_blocks(shard, set(held))
        for call in fresh:
            if call.kept:
                yield from live_blocks(call, self.layout.live_file(call.thread, call.id))

    def roll(self) -> None:
        """Write the index tables and the checkpoint anew, from what the journal has gained since they were written."""
        before = Index.of(self.layout)
        try:
            self._write_index(before)
        except (OSError, pa.ArrowException) as error:
            if before is None or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._write_index(None)  # a page of the one before may be damaged
        self._checkpoint()

    def _write_index(self, before: Index | None) -> None:
        news = journal.sound(self.layout.journal, before.journal_bytes if before else 0)
        write_index(Roll(self.history, self.layout, news, before), self.layout, self._journal.n_bytes)

    def _checkpoint_if_due(self) -> None:
        """Write the checkpoint anew if the journal has grown by much; all of them together stay small beside it."""
        behind = self._journal.n_bytes - self._checkpointed
        if behind > max(CHECKPOINT_BYTES, self._journal.n_bytes // 8):
            with contextlib.suppress(OSError):  # then the next one who opens the run reads more
                self._checkpoint()

    def _checkpoint(self) -> None:
        checkpoint.save(self.layout, self._state, self._journal.n_bytes)
        self._checkpointed = self._journal.n_bytes

    def close(self) -> None:
        self._begun.close()
        self._journal.close()
        self._lock.close()


def _computed(file: CallFile) -> Ranges:
    """choice → the positions that the file has a row of with the token that came to stand there, as ranges."""
    computed: Ranges = {}
    for sequence in file.sequences:
        own, tokens = file.choice == sequence.choice, sequence.tokens
        position, token_id = file.position[own], file.token_id[own]
        inside = position < len(tokens)
        present = np.zeros(len(tokens), bool)
        present[position[inside]] = token_id[inside] == tokens[position[inside]]
        computed[sequence.choice] = runs(present)
    return computed


def being_written(layout: Layout) -> bool:
    """Whether some process has the run open for writing now."""
    if not layout.lock.exists():
        return False
    with layout.lock.open() as file:  # read only, and shared: an archived run cannot be written
        return not _taken(file, fcntl.LOCK_SH)


def _lock(layout: Layout) -> IO[str]:
    file = layout.lock.open("a+")
    if not _taken(file, fcntl.LOCK_EX):
        time.sleep(GLANCE_S)
        if not _taken(file, fcntl.LOCK_EX):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise RunLocked(f"{layout.root} is being written by {holder}: stop it first, or use another run")
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()
    return file


def _taken(file: IO[str], how: int) -> bool:
    """Take a lock; False if somebody else has it."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
