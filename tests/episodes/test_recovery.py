"""A writer that is killed: at whatever instant, the next one finds every call that began, and nothing else."""

import fcntl
import os
import signal
import sys
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from episodes import journal
from episodes.begun import Begun, left_begun
from episodes.cast import Group
from episodes.errors import BadRun, RunLocked
from episodes.layout import Layout, whole
from episodes.records import Call
from episodes.run import open_run
from episodes.store import Store
from episodes.taubench import DIALECT
from episodes.verify import problems
from tests.episodes.test_store import POINTS, Writer, expected

# What the calls of `a_day` are made of: name → tokens, and the first position that the engine computed.
CALLS = {
    "c1": ([1, 2, 3, 4, 5], 0),
    "c2": ([1, 2, 3, 4, 5, 7, 8], 5),
    "c3": ([1, 2, 9, 9], 2),
    "c4": ([1, 2, 3, 4, 5, 7, 8, 6, 6], 7),
}


def a_day(writer, begun, done):
    """A writer's work: two episodes, one of which goes on after its seal; begun, done: told the calls as they are."""

    def commit(name, episode="e", turn=0):
        tokens, computed = CALLS[name]
        call = writer.call(name, episode, turn)
        writer.store.begin([call])
        begun(name)
        writer.commit(name, tokens[:-1], [tokens[-1], 0], computed, episode, turn=turn)
        done(name)

    commit("c1")
    commit("c2", turn=1)
    commit("c3", "f")
    writer.store.seal("e")
    writer.store.pair(Group("g", ["t-f"], ["t-f"], None, None, []), None)
    commit("c4", turn=2)
    writer.store.seal("e")
    writer.store.seal("g")
    writer.store.roll()
    writer.close()


class Instants:
    """Kills its process at the n-th of the instants at which a run's files are about to change."""

    EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")

    def __init__(self, root, n):
        self.root, self.left = str(root), n
        self.fsync = os.fsync
        os.fsync = self.sync
        sys.addaudithook(self.hear)

    def hear(self, event, args):
        changes = event in self.EVENTS or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and str(args[0]).startswith(self.root):
            self.pass_by()

    def sync(self, file):
        self.pass_by()
        self.fsync(file)

    def pass_by(self):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_at(home, n, work=a_day):
    """Work in a process that dies at instant n; returns the calls that began and that were done, and whether it died
    at all.
    """
    reading, writing = os.pipe()
    home.mkdir(exist_ok=True)
    child = os.fork()
    if not child:
        try:
            Instants(home / "run", n)
            work(Writer(home), *(lambda name, k=k: os.write(writing, f"{k}{name} ".encode()) for k in "bd"))
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    os.close(writing)
    with os.fdopen(reading) as said:
        words = said.read().split()
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, "the work failed by itself"
    return *({word[1:] for word in words if word[0] == kind} for kind in "bd"), status != 0


def recovery(writer, begun=None, done=None):
    writer.store.seal_all(DIALECT)
    writer.store.roll()
    writer.close()


def check_named(run, begun):
    """Before anybody has mended anything: a call whose reply may have ended is there, or `verify` names it."""
    said = "\n".join(problems(run))
    assert not {name for name in begun if name not in run.history.calls and f"call {name}: its proxy" not in said}


def check_recovered(home, begun, done):
    """All that began is in the journal, what was done is whole, what was not says so, and nothing else lies about."""
    recovery(Writer(home))
    run = open_run(home / "run")
    assert begun <= run.history.calls.keys() <= begun | set(CALLS)
    for name in run.history.calls:
        call, tokens = run.call(name), CALLS[name][0]
        if name in done or not call.record.lost:
            assert call.record.lost is None
            for point in POINTS if not call.missing else ():
                assert np.array_equal(call.activations(point), expected(tokens, point)), name
        if call.missing or call.record.lost:
            assert not {c for c in CALLS if c <= name} <= done, "rows are missing of calls that were all committed"
    lost = [name for name, call in run.history.calls.items() if call.lost or run.call(name).missing]
    assert all(problem.split()[1].rstrip(",:") in lost for problem in problems(run))
    assert [row["status"] for row in run.episodes.to_pylist()] == ["sealed"] * run.episodes.num_rows
    names = {path.name for path in run.layout.root.rglob("*") if path.is_file()}
    shards = {f"{e.id}.parquet" for e in run.history.episodes.values() if e.sealed and e.sealed.n_rows}
    kept = {"run.json", "journal.jsonl", "begun.jsonl", "calls.parquet", "episodes.parquet", "rows.parquet", ".lock"}
    assert names == kept | shards and not (run.layout.begun.stat().st_size)


def test_a_writer_killed_at_any_instant_loses_no_call_without_saying_so(tmp_path):
    """At every sync, rename, deletion and opening of a file in turn, until a day's work gets to its end."""
    n, died, outcomes = 0, True, set()
    while died:
        home = tmp_path / str(n)
        begun, done, died = killed_at(home, n)
        assert done <= begun
        try:
            check_named(open_run(home / "run"), begun)
        except BadRun:
            assert not begun, "no run, and a call that began"
        check_recovered(home, begun, done)
        outcomes.add((len(begun), len(done)))
        n += 1
    assert n > 60 and outcomes > {(i + 1, i) for i in range(4)} | {(4, 4)}


def test_a_recovery_that_is_killed_is_taken_up_by_the_next(tmp_path):
    """A call claimed and not recorded, in an episode that goes on after its seal: each time a step more."""
    for n in range(50, 100):
        home = tmp_path / str(n)
        begun, done, _ = killed_at(home, n)
        if len(done) == 3 and Layout(home / "run").live_file("t-e", "c4").exists():
            break
    n, died = 0, True
    while died:
        *_, died = killed_at(home, n, recovery)
        n += 1
    check_recovered(home, begun, done | {"c4"})
    assert n > 10


def test_a_run_that_another_process_writes_is_refused_until_that_is_dead(tmp_path):
    layout = Layout(tmp_path / "run")
    reading, writing = os.pipe()
    holder = os.fork()
    if not holder:
        store = Store(layout)
        os.write(writing, b"!")
        signal.pause()
        store.close()
    try:
        os.read(reading, 1)
        with pytest.raises(RunLocked, match=f"process {holder}"):
            Store(layout)
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    Store(layout).close()
    os.close(reading)
    os.close(writing)


def test_a_run_can_be_opened_while_somebody_looks_whether_it_is_being_written(tmp_path, monkeypatch):
    """Which takes its lock, for an instant."""
    layout = Layout(tmp_path / "run")
    Store(layout).close()
    looking = layout.lock.open()
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("episodes.store.time.sleep", lambda _: looking.close())
    Store(layout).close()
    assert looking.closed


def test_what_cannot_be_told_to_be_garbage_stays(tmp_path):
    """Files of a call whose line in the journal is damaged, what is not ours, and what a flipped bit makes of a shard:
    text into bytes.
    """
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2], [3])
    writer.close()
    layout = writer.layout
    layout.journal.write_bytes(layout.journal.read_bytes().replace(b"c1", b"c2", 1))
    layout.shards.mkdir()
    (layout.shards / "notes.txt").write_text("mine")
    pq.write_table(pa.table({"mine": [1]}), layout.shards / "mine.parquet")
    pq.write_table(pa.table({"thread": [b"t-e"], "call": [b"c1"]}), layout.shards / "flipped.parquet")
    (layout.live / ".c9.claim").write_bytes(b"")
    store = Store(layout)
    assert store.recovered == ["live/.c9.claim: a file that was not finished; deleted"]
    assert layout.live_file("t-e", "c1").exists()
    assert {path.name for path in layout.shards.iterdir()} == {"notes.txt", "mine.parquet", "flipped.parquet"}
    store.close()


@pytest.mark.parametrize("file", ["journal.jsonl", "begun.jsonl"])
def test_a_run_from_elsewhere_cannot_name_files_outside_of_it(tmp_path, file):
    """Neither a call nor an episode, whose files go or are written when somebody seals the run."""
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("model.safetensors", "table.parquet", ".draft.claim"):
        (victim / name).write_text("mine")
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2], [3])
    writer.close()
    (call,) = (record for record in journal.read(writer.layout.journal) if isinstance(record, Call))
    crafted = [
        msgspec.structs.replace(call, id=f"{victim}/model"),
        msgspec.structs.replace(call, id="c8", thread=f"../../{victim.name}"),
        msgspec.structs.replace(call, id="c9", episode=f"{victim}/table"),
    ]
    with (writer.layout.root / file).open("ab") as lines:
        lines.writelines(map(journal.encode, crafted))
    store = Store(writer.layout)
    store.seal_all(DIALECT)
    store.close()
    assert {path.name: path.read_text() for path in victim.iterdir()} == dict.fromkeys(
        ("model.safetensors", "table.parquet", ".draft.claim"), "mine"
    )


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("live", "other"),
        ("live/t-x", "other/t-x"),
        ("shards", "other"),
        ("foreign", "other"),
        (".lock", "other/notes.parquet"),
        ("begun.jsonl", "other/notes.parquet"),
        (".run.json.draft", "other/notes.parquet"),
        ("gone", "other/gone"),
    ],
)
def test_a_run_with_a_link_in_it_is_not_written(tmp_path, link, target):
    """What recovery would delete there, or a writer write, is somebody else's."""
    writer = Writer(tmp_path)
    writer.store.commit(writer.call("c1"))
    writer.close()
    other, link = tmp_path / "other", tmp_path / "run" / link
    files = [other / "t-x" / "model.safetensors", other / "notes.parquet", other / "notes.json.zst"]
    (other / "t-x").mkdir(parents=True)
    for file in files:
        file.write_text("mine")
    link.rmdir() if link.is_dir() else link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / target)
    with pytest.raises(BadRun, match=f"{link.name} is a symbolic link"):
        Store(Layout(tmp_path / "run"))
    assert [file.read_text() for file in files] == ["mine"] * 3
    assert open_run(tmp_path / "run").names == ["e"]


def test_what_nobody_may_look_into_is_in_no_runs_way(tmp_path, monkeypatch):
    """Such as `lost+found`, where a run is a whole file system."""
    Writer(tmp_path).close()
    (tmp_path / "run" / "lost+found").mkdir()
    scandir = os.scandir

    def looked(path):
        if Path(path).name == "lost+found":
            raise PermissionError(path)
        return scandir(path)

    monkeypatch.setattr("episodes.layout.os.scandir", looked)
    Writer(tmp_path).close()


@pytest.mark.parametrize("left", ["c1 c2 damaged", "c1 c2", "c1"])
def test_the_only_copy_of_rows_stays_whatever_the_journal_says(tmp_path, left):
    """Of an episode whose seal is a damaged line, or which was sealed after its journal had been copied; and a reader
    finds the rows.
    """
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2], [3])
    writer.commit("c2", [1, 2, 3], [4], computed=2, turn=1)
    writer.store.seal("e")
    writer.close()
    layout = writer.layout
    lines = dict(zip(("c1", "c2", "damaged"), layout.journal.read_bytes().splitlines(keepends=True), strict=True))
    layout.journal.write_bytes(b"".join(lines[name] for name in left.split()).replace(b'"seal"', b'"seam"'))
    store = Store(layout)
    assert layout.shard("e").exists() and store.recovered == []
    store.close()
    assert np.array_equal(open_run(layout.root).call("c1").activations(POINTS[0]), expected([1, 2], POINTS[0]))


def test_a_shard_without_its_seal_goes_where_live_files_have_its_rows(tmp_path):
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2], [3])
    live = writer.layout.live_file("t-e", "c1")
    rows, lines = live.read_bytes(), writer.layout.journal.read_bytes()
    writer.store.seal("e")
    writer.close()
    writer.layout.journal.write_bytes(lines)
    live.parent.mkdir()
    live.write_bytes(rows)
    store = Store(writer.layout)
    assert store.recovered == ["shards/e.parquet: no sealed episode of that name; deleted"]
    store.close()


def test_what_is_claimed_of_a_call_and_damaged_is_not_used(tmp_path):
    """It is claimed anew from the worker, which still has it."""
    writer = Writer(tmp_path)
    writer.store.begin([writer.call("c1")])
    writer.store.draft("c1").write_bytes(b"torn")
    writer.close()
    store = Store(writer.layout)
    assert [call.id for call in store.left] == ["c1"] and not store.draft("c1").exists()
    store.close()


def test_activations_of_a_backend_that_is_not_ours_stay_with_a_call_that_was_left(tmp_path):
    writer = Writer(tmp_path)
    writer.store.begin([writer.call("c1", points=[])])
    with whole(writer.layout.foreign_file("c1")) as draft:
        draft.write_bytes(zstandard.compress(b"{}"))
    writer.close()
    recovery(Writer(tmp_path))
    run = open_run(writer.layout.root)
    assert run.call("c1").record.foreign and run.call("c1").record.lost is None and list(problems(run)) == []


def test_activations_of_a_backend_that_is_not_ours_stay_though_their_calls_line_is_damaged(tmp_path):
    writer = Writer(tmp_path)
    writer.store.commit(writer.call("c1", points=[]), foreign=b"{}")
    writer.close()
    writer.layout.journal.write_bytes(writer.layout.journal.read_bytes().replace(b"c1", b"c2", 1))
    Store(writer.layout).close()
    assert writer.layout.foreign_file("c1").exists()


# ---- the calls that have begun


def test_begun_calls_are_there_until_they_are_done(tmp_path):
    path = tmp_path / "begun.jsonl"
    begun = Begun(path)
    begun.add([Writer.call("c1"), Writer.call("c2")])
    begun.sync()
    begun.done("c1")
    assert [call.id for call in left_begun(path)] == ["c1", "c2"], "what is done goes with the rest"
    begun.done("c2")
    assert path.stat().st_size == 0
    begun.close()


def test_begun_calls_do_not_pile_up_while_others_go_on(tmp_path, monkeypatch):
    """The file is made anew, with the calls that are still open, when it has grown."""
    monkeypatch.setattr("episodes.begun.LIMIT_BYTES", 10_000)
    path = tmp_path / "begun.jsonl"
    begun = Begun(path)
    begun.add([Writer.call("stays")])
    for i in range(200):
        begun.add([Writer.call(f"c{i}")])
        begun.done(f"c{i}")
        assert path.stat().st_size < 11_000
    begun.close()
    left = [call.id for call in left_begun(path)]
    assert left[0] == "stays" and left[-1] == "c199"


def test_many_calls_at_once_do_not_make_the_file_of_begun_ones_anew_each_time(tmp_path, monkeypatch):
    """However many are open and however long: it is made anew when it has doubled since."""
    monkeypatch.setattr("episodes.begun.LIMIT_BYTES", 10_000)
    made = []
    monkeypatch.setattr("episodes.begun.whole", lambda path: made.append(path) or whole(path))
    begun = Begun(tmp_path / "begun.jsonl")
    for i in range(600):
        begun.add([Writer.call(f"c{i}")])
        if i >= 100:
            begun.done(f"c{i - 100}")
    begun.close()
    assert 2 <= len(made) <= 7
    assert [call.id for call in left_begun(tmp_path / "begun.jsonl")][-100:] == [f"c{i}" for i in range(500, 600)]


def test_a_torn_line_of_a_begun_call_does_not_hide_the_next(tmp_path):
    path = tmp_path / "begun.jsonl"
    begun = Begun(path)
    begun.add([Writer.call("c1"), Writer.call("c2")])
    begun.close()
    path.write_bytes(path.read_bytes()[:-5])
    begun = Begun(path)
    begun.add([Writer.call("c3")])
    begun.close()
    assert [call.id for call in left_begun(path)] == ["c1", "c3"]
