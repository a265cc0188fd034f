"""The index: brought up to date or read with what it does not know yet, it says what the whole journal says."""

import errno
import shutil

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from episodes import journal
from episodes.cast import Group
from episodes.records import Call, Link
from episodes.run import open_run
from episodes.store import Store
from episodes.tables import CALLS, Index, totals
from episodes.verify import problems
from episodes.wire import Sequence
from tests.episodes.test_store import POINTS, Writer, expected, flip, invoke, talk

THREADS = ("t-x", "t-y", "t-z", "t-q")


def speechless(writer, thread, turn):
    """A call of a thread that is an episode of its own until it is paired; without rows."""
    return msgspec.structs.replace(writer.call(f"{thread}-{turn}", thread, turn, points=[]), thread=thread)


def events(writer):
    """What may happen to a run, one after the other."""
    store = writer.store
    yield writer.commit("c1", [1, 2, 3, 4], [5, 6])
    yield writer.commit("c2", [1, 2, 3, 4, 5, 6, 7], [8, 9], computed=5, turn=1)
    yield writer.commit("c3", [1, 2, 9, 9], [8], computed=3, episode="f")  # position 2 is nobody's
    yield store.seal("e")
    for turn, thread in enumerate(THREADS):
        yield store.commit(speechless(writer, thread, turn))
    yield store.pair(Group("t-x", ["t-x", "t-y"], ["t-x", "t-y"], None, None, ["t-z"]), "tau-bench")
    yield store.pair(Group("t-z", ["t-z", "t-y"], ["t-z", "t-y"], None, None, []), "tau-bench")
    yield store.seal("f")
    yield store.seal("t-z")
    yield writer.commit("c4", [1, 2, 9, 9], [7], computed=2, episode="g")  # which fills the hole of a sealed call
    yield writer.commit("c5", [1, 2, 3, 4, 5, 6, 7, 8], [9], computed=7, turn=2)  # an episode goes on
    yield store.seal("e")
    yield store.pair(Group("e", ["t-q"], ["t-q"], None, None, []), None)  # a call moves into it
    yield store.link(
        [Link("e", "tau-bench", "7", 0, 1.0, "transcript"), Link("t-z", "tau-bench", "8", 1, 0.0, "order")]
    )
    yield store.seal("g")
    yield writer.commit("c6", [5, 5], [6], choices=2, episode="h", points=POINTS[:1])


N_EVENTS = 18


def check_same(layout, whole):
    """A run opened by its index, if there is one, is the run that its journal tells."""
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(layout.root, whole)
    for name in ("calls.parquet", "episodes.parquet", "rows.parquet"):
        (whole / name).unlink(missing_ok=True)
    found, wanted = open_run(layout.root), open_run(whole)
    assert found.calls.equals(wanted.calls)
    assert found.episodes.equals(wanted.episodes)
    assert found.names == wanted.names
    for name in wanted.names:
        calls, others = found.episode(name), wanted.episode(name)
        assert [c.record for c in calls] == [c.record for c in others] != []
        assert [found.spans(c.record) for c in calls] == [wanted.history.spans(c.record) for c in others]
    assert not vars(found).keys() & {"history", "outline"}
    return found


@pytest.mark.parametrize("rolls", [range(n, N_EVENTS, N_EVENTS) for n in range(N_EVENTS)] + [range(0, N_EVENTS, 3)])
def test_the_index_says_what_the_journal_says_whenever_it_was_written(tmp_path, rolls):
    """Written once, at each instant, or time and again; read behind it and after it was brought up to date."""
    writer = Writer(tmp_path)
    for number, _ in enumerate(events(writer)):
        if number in rolls:
            writer.store.roll()
        if number >= min(rolls):
            check_same(writer.layout, tmp_path / "whole")
    writer.store.roll()
    writer.close()
    run = check_same(writer.layout, tmp_path / "whole")
    assert Index.of(writer.layout).journal_bytes == writer.layout.journal.stat().st_size
    assert np.array_equal(run.call("c5").activations(POINTS[1]), expected([1, 2, 3, 4, 5, 6, 7, 8], POINTS[1]))
    assert list(problems(run)) == []


def test_of_a_live_run_only_what_is_behind_the_index_is_read(tmp_path, monkeypatch):
    """And the lines of what is not settled: calls without a shard, and with holes."""
    writer = Writer(tmp_path)
    steps = events(writer)
    for _ in range(12):
        next(steps)
    writer.store.roll()
    for _ in range(3):
        next(steps)
    read = []
    decode = journal.decode
    monkeypatch.setattr(journal, "decode", lambda line: read.append(decode(line)) or read[-1])
    run = open_run(writer.layout.root)
    assert {"c1", "c2"} <= set(run.calls["call"].to_pylist())
    assert run.episodes.num_rows == 6
    calls = {record.id for record in read if isinstance(record, Call)}
    assert {"c4", "c5"} <= calls and not calls & {"t-y-1", "t-z-2"}
    writer.close()


def test_an_index_of_another_journal_is_not_used(tmp_path):
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2], [3])
    writer.store.roll()
    writer.close()
    layout = writer.layout
    lines = layout.journal.read_bytes()
    assert Index.of(layout) is not None
    layout.journal.write_bytes(lines.replace(b"c1", b"c9"))
    assert Index.of(layout) is None
    layout.journal.write_bytes(lines[:-2])
    assert Index.of(layout) is None


def test_tokens_of_calls_that_have_no_rows_are_those_that_their_replies_tell(tmp_path):
    """Null where these do not; an episode's and a run's are those that are known."""
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2, 3], [4])
    told = {"points": [], "reply": '{"usage": {"prompt_tokens": 7, "completion_tokens": 2}}'}
    writer.store.commit(msgspec.structs.replace(writer.call("c2"), **told))
    writer.store.commit(msgspec.structs.replace(writer.call("c3"), status=502))
    writer.store.roll()
    counts = writer.store.history.counts
    run = writer.close()
    assert run.columns("n_prompt", "n_completion").to_pydict() == {
        "n_prompt": [3, 7, None],
        "n_completion": [1, 2, None],
    }
    assert run.episodes.select(["n_prompt", "n_completion"]).to_pylist() == [{"n_prompt": 10, "n_completion": 3}]
    assert counts["tokens"] == 13 and (totals(run.layout).n_prompt, totals(run.layout).n_completion) == (10, 3)
    assert [repr(run.call(name)).split(", ")[3] for name in ("c1", "c2", "c3")] == [
        "3 + 1 tokens", "7 + 2 tokens", "? + ? tokens"
    ]  # fmt: skip
    assert list(problems(run)) == []


@pytest.mark.parametrize("rolled", [True, False])
def test_calls_that_lack_rows_are_counted(tmp_path, rolled):
    """Of each episode and of the run: those with a hole and those that lost all, but for what another call has."""
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2, 3], [4])
    known = [Sequence(0, [1, 2, 3], [4])]
    for name, said in {
        "c2": {"lost": "the worker died"},
        "c3": {"lost": "the worker died", "sequences": known},
        "c4": {"status": 404},
        "c5": {"points": []},
        "c6": {"role": "backfill", "lost": "the worker died"},
    }.items():
        writer.store.commit(msgspec.structs.replace(writer.call(name), **said))
    writer.commit("d1", [5, 6], [7], computed=1, episode="f")
    for episode in "ef":
        writer.store.seal(episode)
    if rolled:
        writer.store.roll()
    writer.store.link([Link("e", "tau-bench", "7", 0, 1.0, "transcript")])
    check_same(writer.layout, tmp_path / "whole")
    writer.store.roll()
    run = writer.close()
    rows = run.episodes.select(["episode", "n_calls", "n_missing", "n_incomplete"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [("e", 5, 0, 1), ("f", 1, 1, 1)]
    assert totals(run.layout).n_incomplete == 2
    lines = invoke("episodes", run.layout.root).output.splitlines()
    at = lines[0].index("incomplete") + len("incomplete")
    assert [line[:at].split()[-1] for line in lines if line.split()[0] in ("e", "f", "all")] == ["1", "1", "2"]


def test_an_episode_that_has_nothing_but_backfills_left_is_listed_without_times(tmp_path):
    """As where the line of its only call is damaged."""
    writer = Writer(tmp_path)
    writer.store.commit(msgspec.structs.replace(writer.call("c1", points=[]), role="backfill"))
    writer.close()
    assert invoke("episodes", writer.layout.root).exit_code == invoke("seal", writer.layout.root).exit_code == 0
    rows = open_run(writer.layout.root).episodes.select(["status", "n_calls", "started", "ended"]).to_pylist()
    assert rows == [{"status": "sealed", "n_calls": 0, "started": None, "ended": None}]


@pytest.mark.parametrize("column", CALLS.names)
def test_a_damaged_index_is_told_and_written_anew(tmp_path, column):
    """In whatever column it is; a reader that needs the column to find a call goes by the journal."""
    writer = Writer(tmp_path)
    talk(writer)
    for episode in "ef":
        writer.store.seal(episode)
    writer.store.roll()
    writer.close()
    path = writer.layout.calls
    with pq.ParquetFile(path) as file:
        columns = [file.metadata.row_group(0).column(i) for i in range(file.metadata.num_columns)]
    chunk = next(chunk for chunk in columns if chunk.path_in_schema.partition(".")[0] == column)
    flip(path, (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 2)
    run = open_run(writer.layout.root)
    assert run.names == ["e", "f"] and run.episodes["n_rows"].to_pylist() == [8, 1]
    assert any("`tautap seal` writes them anew" in problem for problem in problems(run))
    store = Store(writer.layout)
    store.roll()
    store.close()
    assert list(problems(open_run(writer.layout.root))) == [] and Index.of(writer.layout) is not None


def test_a_full_disk_is_no_reason_to_write_the_index_from_the_whole_journal(tmp_path, monkeypatch):
    """That takes longest, and there is no room for it either."""
    writer = Writer(tmp_path)
    talk(writer)
    writer.store.roll()
    began = []

    def full(roll, layout, n_bytes):
        began.append(roll)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("episodes.store.write_index", full)
        writer.store.roll()
    writer.close()
    assert len(began) == 1


@pytest.mark.parametrize("harm", [lambda path: flip(path, path.stat().st_size - 3), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("table", ["calls", "episodes"])
def test_an_index_that_cannot_be_read_at_all_is_told(tmp_path, table, harm):
    writer = Writer(tmp_path)
    talk(writer)
    writer.store.roll()
    assert list(problems(open_run(writer.layout.root))) == []
    writer.close()
    harm(getattr(writer.layout, table))
    (problem,) = problems(open_run(writer.layout.root))
    assert "calls.parquet, episodes.parquet: they cannot be read" in problem


def test_a_line_that_was_damaged_since_is_left_out_of_the_index_as_of_the_run(tmp_path):
    """Of a call that has to be read again; the others stay."""
    writer = Writer(tmp_path)
    steps = events(writer)
    for _ in range(3):
        next(steps)
    writer.store.roll()
    next(steps)
    at = writer.layout.journal.read_bytes().index(b"c2")
    flip(writer.layout.journal, at)
    assert open_run(writer.layout.root).calls["call"].to_pylist() == ["c1", "c3"]
    writer.store.roll()
    run = writer.close()
    assert run.calls["call"].to_pylist() == ["c1", "c3"] and run.names == ["e", "f"]
