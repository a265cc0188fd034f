"""What a reader of a run asks for is what is read, and what cannot be had is named."""

import shutil

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from episodes import tables
from episodes.errors import BadInput, MissingRows, UnknownPoint
from episodes.run import Run, open_run
from episodes.shards import Shard
from episodes.wire import CallFile, Sequence
from tests.episodes.test_store import POINTS, Writer, expected, talk

C2 = [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.fixture(params=["live", "sealed"])
def run(tmp_path, request):
    writer = Writer(tmp_path)
    talk(writer)
    if request.param == "sealed":
        writer.store.seal("e")
        writer.store.seal("f")
    return writer.close()


@pytest.mark.parametrize(
    ("positions", "found"),
    [
        ([4], [4]),
        ([3, 4, 5, 6], [3, 4, 5, 6]),
        ([7, 0, 0, -1, -8], [7, 0, 0, 7, 0]),
        (np.array([6, 5], np.uint64), [6, 5]),
        (range(2, 8, 2), [2, 4, 6]),
        ([], []),
    ],
)
def test_some_of_a_calls_rows_are_read_in_the_order_asked_for(run, positions, found):
    """From whichever call stored them: positions 0 to 5 are another's."""
    rows = run.call("c2").activations(POINTS[1], positions=positions)
    assert rows.shape == (len(found), 4) and np.array_equal(rows, expected(C2, POINTS[1])[found])


@pytest.mark.parametrize(
    ("positions", "found"),
    [
        (np.array([100, -1, -128], np.int8), [100, 299, 172]),
        (np.array([255, 0], np.uint8), [255, 0]),
        (np.array([299, 2**64 - 1], np.uint64), None),
        (np.array([2**63 + 7], np.uint64), None),
    ],
)
def test_positions_are_numbers_of_any_width(tmp_path, positions, found):
    """Of a call that is longer than they count, too; of none what no row can be at."""
    writer = Writer(tmp_path)
    tokens = list(range(300))
    writer.commit("c1", tokens, [1], points=POINTS[:1])
    call = writer.close().call("c1")
    if found:
        assert np.array_equal(call.activations(POINTS[0], positions=positions), expected(tokens, POINTS[0])[found])
    else:
        with pytest.raises(BadInput, match=f"no row at position {positions[-1]}: it has 0 to 299"):
            call.activations(POINTS[0], positions=positions)


def test_a_file_is_opened_once_and_a_stretch_of_it_read_once_however_positions_are_ordered(run, monkeypatch):
    """And however scattered they are: to open a file takes longer than to read a row of it."""
    opened, read = [], []
    monkeypatch.setattr(CallFile, "_check", lambda file: opened.append(file.path.stem))
    monkeypatch.setattr(run, "read", lambda *about: read.append(about[:3]) or Run.read(run, *about))
    rows = run.call("c2").activations(POINTS[0], positions=[7, 0, 4, 2, 6, 0, 3, -2])
    assert np.array_equal(rows, expected(C2, POINTS[0])[[7, 0, 4, 2, 6, 0, 3, 6]])
    assert read == [(("c1", 0), 0, 1), (("c1", 0), 2, 5), (("c2", 0), 6, 8)]
    assert opened in (["c1", "c2"], []), "live, or sealed"


def test_no_other_rows_are_read(tmp_path, monkeypatch):
    """Nor another call's shard, where they do not lie there."""
    writer = Writer(tmp_path)
    talk(writer)
    writer.store.seal("e")
    writer.store.seal("f")
    run = writer.close()
    asked = []
    monkeypatch.setattr(Shard, "read", lambda self, *about: asked.append((self._path.stem, *about[:4])))
    run.call("c3").activations(POINTS[0], positions=[2])
    run.call("c2").activations(POINTS[0], positions=[1, 2, 6])
    assert asked == [
        ("f", ("c3", 0), 2, 3, POINTS[0]),
        ("e", ("c1", 0), 1, 3, POINTS[0]),
        ("e", ("c2", 0), 6, 7, POINTS[0]),
    ]


@pytest.mark.parametrize("tokens", ["all", "prompt", "completion", "last"])
def test_negative_positions_count_from_the_end_of_those_that_have_a_row(tmp_path, tokens):
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2, 3], [4, 5, 6], tokens=tokens)
    call = writer.close().call("c1")
    last = call.positions()[-1]
    assert np.array_equal(call.activations(POINTS[0], positions=[-1]), call.activations(POINTS[0], positions=[last]))


@pytest.mark.parametrize(
    ("positions", "says"),
    [
        ([0, 8], "call c2, choice 0 has no row at position 8: it has 0 to 7"),
        ([-9], "no row at position -9"),
        (3, "give a list of token positions"),
        ([True] * 8, r"with a mask, `call\.positions\(\)\[mask\]`"),
        ([0.0], "give a list"),
    ],
)
def test_positions_that_a_call_does_not_have_are_refused(run, positions, says):
    with pytest.raises(BadInput, match=says):
        run.call("c2").activations(POINTS[0], positions=positions)


def test_a_position_whose_row_was_not_asked_for_is_refused(tmp_path):
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2, 3], [4, 5, 6], tokens="last")
    writer.commit("c2", [1, 2, 3], [4], tokens="completion")
    run = writer.close()
    with pytest.raises(BadInput, match="no row at position 0: it has 2 to 2"):
        run.call("c1").activations(POINTS[0], positions=[0])
    with pytest.raises(BadInput, match="no row at position 2: it has none"):
        run.call("c2").activations(POINTS[0], positions=[2])


def test_a_hole_is_in_the_way_of_its_own_positions_only(tmp_path):
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2, 3, 4], [5, 6], computed=2)
    call = writer.close().call("c1")
    assert np.array_equal(call.activations(POINTS[0], positions=[3, 4]), expected([1, 2, 3, 4, 5], POINTS[0])[3:])
    with pytest.raises(MissingRows, match=r"call c1, choice 0: no rows for positions 1 to 2$"):
        call.activations(POINTS[0], positions=[1, 3])
    assert call.missing == 2 and not call.whole


@pytest.mark.parametrize("rolled", [True, False])
def test_how_many_rows_a_call_lacks_is_not_known_where_its_token_ids_are_not(tmp_path, rolled):
    """And only there: none is missing of a call that was refused, or that was not to be recorded."""
    writer = Writer(tmp_path)
    writer.commit("whole", [1, 2], [3])
    for name, said in {
        "lost": {"lost": "the worker died"},
        "told": {"lost": "the spool is full", "sequences": [Sequence(0, [5, 6], [7])]},
        "refused": {"status": 404},
        "unasked": {"points": []},
    }.items():
        writer.store.commit(msgspec.structs.replace(writer.call(name), **said))
    if rolled:
        writer.store.roll()
    run = writer.close()
    n_missing = {"whole": 0, "lost": None, "told": 2, "refused": 0, "unasked": 0}
    assert {row["call"]: row["n_missing"] for row in run.columns("call", "n_missing").to_pylist()} == n_missing
    assert {name: run.call(name).missing for name in n_missing} == n_missing
    whole = run.calls.filter(pc.field("n_missing") == 0)["call"].to_pylist()
    assert whole == ["whole", "refused", "unasked"] and not run.call("lost").whole


def test_a_call_is_whole_that_was_answered_and_lacks_no_row(tmp_path):
    """Though its rows were lost once, if others have them now: a backfill, or calls with the same beginning."""
    writer = Writer(tmp_path)
    talk(writer)
    known = [Sequence(0, [1, 2, 3], [4])]
    for name, said in {
        "lost": {"lost": "the worker died"},
        "mended": {"lost": "the worker died", "sequences": known},
        "left": {"error": "the client left", "sequences": known},
        "failed": {"status": 500, "sequences": known},
        "unasked": {"points": [], "sequences": known},
        "refused": {"status": 404},
        "silent": {"points": []},
    }.items():
        writer.store.commit(msgspec.structs.replace(writer.call(name), **said))
    run = writer.close()
    calls = {call.record.id: call for name in run.names for call in run.episode(name)}
    assert [name for name, call in calls.items() if call.whole] == ["c1", "c2", "mended", "c3"]
    assert np.array_equal(calls["mended"].activations(POINTS[0]), expected([1, 2, 3], POINTS[0]))


def test_why_there_is_nothing_to_read_is_said(tmp_path):
    writer = Writer(tmp_path)
    writer.store.commit(msgspec.structs.replace(writer.call("refused"), status=404))
    writer.store.commit(msgspec.structs.replace(writer.call("unasked"), points=[]))
    run = writer.close()
    with pytest.raises(MissingRows, match="call refused: no activations: the client got HTTP 404"):
        run.call("refused").activations(POINTS[0])
    with pytest.raises(UnknownPoint, match="call unasked recorded no points: not asked for"):
        run.call("unasked").activations(POINTS[0])


def test_columns_are_those_of_calls_and_the_others_are_not_read(tmp_path, monkeypatch):
    """Of a live run, of one with an index, and of one that has gone on since it was written."""
    names, runs = ["status", "call", "points"], []
    writer = Writer(tmp_path)
    talk(writer)
    runs.append(open_run(writer.layout.root))
    writer.store.roll()
    runs.append(open_run(writer.layout.root))
    writer.commit("c4", [9], [9], episode="g")
    runs.append(writer.close())
    for run, n_calls in zip(runs, (3, 3, 4), strict=True):
        assert run.columns(*names).equals(run.calls.select(names)) and run.columns("call").num_rows == n_calls
        with pytest.raises(BadInput, match="no column statsu: they have call, "):
            run.columns("call", "statsu")
    read = []
    file = runs[1].index._file
    monkeypatch.setattr(file, "read", lambda columns: read.append(columns) or pa.table({name: [] for name in columns}))
    runs[1].columns("call", "status")
    assert read == [["call", "status"]]


def test_a_run_may_be_moved_whole_and_of_a_part_the_shard_that_is_not_there_is_named(tmp_path):
    writer = Writer(tmp_path)
    talk(writer)
    writer.store.seal("e")
    writer.store.seal("f")
    writer.close()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(writer.layout.root, elsewhere)
    shutil.rmtree(writer.layout.root)
    call = open_run(elsewhere).call("c3")
    assert np.array_equal(call.activations(POINTS[0]), expected([1, 2, 9], POINTS[0]))
    (elsewhere / "shards" / "e.parquet").unlink()
    call = open_run(elsewhere).call("c3")
    with pytest.raises(MissingRows, match=r"elsewhere/shards/e\.parquet is not there"):
        call.activations(POINTS[0])
    assert np.array_equal(call.activations(POINTS[0], positions=[2]), expected([1, 2, 9], POINTS[0])[2:])


@pytest.mark.parametrize("rolled", [True, False])
def test_a_live_file_that_is_not_there_is_named_and_no_shard_that_never_was(tmp_path, rolled):
    writer = Writer(tmp_path)
    talk(writer)
    writer.store.seal("f")
    if rolled:
        writer.store.roll()
    run = writer.close()
    live = run.layout.live_file("t-e", "c1")
    live.unlink()
    with pytest.raises(MissingRows, match=rf"^{live} is not there: move runs whole$"):
        run.call("c3").activations(POINTS[0])


def test_runs_and_calls_say_what_they_are(run):
    assert repr(run) == f"<Run {run.layout.root}: 2 episodes, 3 calls>"
    assert repr(run.call("c2")) == "<Call c2 of e: agent, turn 1, HTTP 200, 7 + 2 tokens, 2 points>"


@pytest.mark.parametrize("table", ["CALLS", "EPISODES"])
def test_every_column_of_the_tables_is_described(table):
    """By its name, in the docstring that the README points to."""
    words = set(tables.__doc__.split())
    assert set(getattr(tables, table).names) <= words
