"""A run on disk: what is committed is read back, live and sealed, and what is damaged is found."""

import errno
import gc
import json
import os
import shutil
import tracemalloc
import weakref
from contextlib import nullcontext
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from episodes.cast import WARMUPS, Group
from episodes.commands import COMMANDS
from episodes.errors import (
    BadInput,
    BadName,
    BadRun,
    CorruptFile,
    MissingRows,
    RunLocked,
    UnknownPoint,
    WrongFormat,
    WrongModel,
)
from episodes.journal import encode, read
from episodes.layout import Layout, check_name, crc32, whole
from episodes.records import Call, Model
from episodes.run import open_run
from episodes.shards import count_nonfinite
from episodes.store import Store, being_written
from episodes.tables import totals
from episodes.verify import problems
from episodes.wire import Sequence, join
from worker.spool import SpoolFile, spooled

POINTS = ["layers.1.output", "layers.3.output"]
MODEL = Model("m", "bfloat16", 4, 6, POINTS, {})


def vector(tokens, position, point):
    """The row of a token prefix, the same whoever computes it."""
    seed = abs(hash((tuple(tokens[: position + 1]), point))) % 2**32
    return np.random.default_rng(seed).standard_normal(MODEL.hidden_size).astype(ml_dtypes.bfloat16)


def expected(tokens, point):
    return np.array([vector(tokens, p, point) for p in range(len(tokens))])


class Writer:
    """A run in a directory, and calls put into it as a proxy would."""

    def __init__(self, tmp_path, **options):
        self.spool = tmp_path / "spool"
        self.spool.mkdir(exist_ok=True)
        self.layout = Layout(tmp_path / "run")
        self.store = Store(self.layout, **options)
        self.store.describe(MODEL)

    def commit(
        self, name, prompt, completion, computed=0, episode="e", points=POINTS, turn=0, choices=1, tokens="all",
        adapter="", ran=None,
    ):  # fmt: skip
        """A call that computed the rows from `computed` on; its other rows came out of the cache. ran: position → the
        token that was run there, if it was another than its sequence has.
        """
        asked = tokens
        sequences = []
        for choice in range(choices):
            sequence = Sequence(choice, prompt, [t + choice for t in completion], "stop", computed, adapter)
            tokens = sequence.tokens.tolist()
            file = SpoolFile(self.spool, name, choice, points, "BF16", MODEL.hidden_size, prompt)
            rows = [[vector(tokens, p, point) for point in points] for p in range(computed, len(tokens))]
            first, stop = sequence.wanted(asked)
            first = max(first, computed)
            if first < stop:
                rows = rows[first - computed : stop - computed]
                fed = [(ran or {}).get(p, tokens[p]) for p in range(first, stop)]
                file.append(first, np.array(fed, np.int32), np.array(rows).view(np.uint8))
            file.finish()
            sequences.append((sequence, spooled(self.spool, name, choice)))
        claim = self.store.draft(name)
        extents = join(name, sequences, points, asked)
        claim.write_bytes(
            b"".join(e.data if e.path is None else e.path.read_bytes()[e.offset : e.offset + e.nbytes] for e in extents)
        )
        return self.store.commit(self.call(name, episode, turn, points), claim)

    @staticmethod
    def call(name, episode="e", turn=0, points=POINTS):
        request = json.dumps({"messages": [{"role": "user", "content": f"say {turn}"}] * (2 * turn + 1)})
        reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": "ok"}}]})
        return Call(
            id=name, thread=f"t-{episode}", episode=episode, turn=turn, attempt=0, endpoint="/v1/chat/completions",
            model="m", started=1.0, ended=2.0, status=200, request=request, reply=reply, points=points,
        )  # fmt: skip

    def close(self):
        self.store.close()
        return open_run(self.layout.root)


def talk(writer):
    """Three calls: the second goes on from the first, the third shares the first's beginning in another episode."""
    writer.commit("c1", [1, 2, 3, 4], [5, 6])
    writer.commit("c2", [1, 2, 3, 4, 5, 6, 7], [8, 9], computed=4, turn=1)
    writer.commit("c3", [1, 2, 9], [8], computed=2, episode="f")


def check_talk(run):
    for name, tokens in {"c1": [1, 2, 3, 4, 5], "c2": [1, 2, 3, 4, 5, 6, 7, 8], "c3": [1, 2, 9]}.items():
        call = run.call(name)
        assert call.token_ids().tolist() == tokens
        for point in POINTS:
            found = call.activations(point)
            assert found.dtype == ml_dtypes.bfloat16 and np.array_equal(found, expected(tokens, point))
    assert list(problems(run)) == []


def test_a_row_of_a_token_that_did_not_stay_is_missing(tmp_path):
    """It is the row of no token of the sequence."""
    writer = Writer(tmp_path)
    writer.commit("a", [1, 2, 3], [4, 5], ran={3: 9})
    writer.commit("b", [1, 2, 3, 4, 5], [6], computed=4, turn=1)
    run = writer.close()
    owners = {
        name: [(s.start, s.stop, s.owner and s.owner.call) for s in run.call(name).spans()] for name in ("a", "b")
    }
    assert owners == {"a": [(0, 3, "a"), (3, 4, None)], "b": [(0, 3, "a"), (3, 4, None), (4, 5, "b")]}
    with pytest.raises(MissingRows, match="positions 3 to 4"):
        run.call("a").activations(POINTS[0])
    assert list(problems(run)) == [f"call {name}, choice 0: no rows for positions 3 to 4" for name in "ab"]


def test_a_run_that_is_made_is_there_after_a_power_cut(tmp_path, monkeypatch):
    """The directories in which the names of its own and of its journal stand are synced."""
    synced, fsync = {}, os.fsync

    def sync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced[path] = {entry.name for entry in path.iterdir()} if path.is_dir() else None
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    Store(Layout(tmp_path / "data" / "r")).close()
    assert synced[tmp_path] == {"data"} and synced[tmp_path / "data"] == {"r"}
    assert {"run.json", "journal.jsonl", "begun.jsonl", "live"} <= synced[tmp_path / "data" / "r"]


def test_what_is_committed_is_there_after_a_power_cut(tmp_path, monkeypatch):
    """The note, the rows, the line, in this order; each was synced as long as it is."""
    synced, fsync = [], os.fsync

    def sync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_file():
            synced.append((path.name, os.fstat(descriptor).st_size))
        fsync(descriptor)

    writer = Writer(tmp_path)
    monkeypatch.setattr(os, "fsync", sync)
    writer.store.begin([writer.call("c1")])
    begun = writer.layout.begun.stat().st_size
    writer.store.sync_begun()
    writer.commit("c1", [1, 2], [3])
    sizes = [path.stat().st_size for path in (writer.layout.live_file("t-e", "c1"), writer.layout.journal)]
    assert synced == [("begun.jsonl", begun), (".c1.claim", sizes[0]), ("journal.jsonl", sizes[1])] and begun
    writer.close()


def test_a_claim_whose_line_the_disk_does_not_take_is_there_to_be_tried_again(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = Writer(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("episodes.journal.Journal.append", full)
        writer.commit("c1", [1, 2, 3], [4])
    assert not list(writer.layout.accounted())
    assert writer.store.commit(writer.call("c1"), writer.store.draft("c1")).n_kept == 3
    run = writer.close()
    assert np.array_equal(run.call("c1").activations(POINTS[0]), expected([1, 2, 3], POINTS[0]))


def test_a_call_that_the_disk_does_not_take_for_long_takes_no_more_memory_each_time(tmp_path, monkeypatch):
    """A proxy tries it again every second."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = Writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("episodes.journal.Journal.append", full)
        with pytest.raises(OSError, match="No space left"):
            writer.commit("c1", [1, 2, 3], [4, 5], choices=2)
        for _ in range(3):
            with pytest.raises(OSError, match="No space left"):
                writer.store.commit(writer.call("c1"), writer.store.draft("c1"))
    (rows,) = writer.store.history.rows.values()
    assert rows._owners == []
    writer.close()


def test_a_call_is_read_back_stitched_live_and_sealed_and_after_a_restart(tmp_path):
    """The same arrays come out wherever the rows lie: all live, one episode sealed, all sealed."""
    writer = Writer(tmp_path)
    talk(writer)
    check_talk(open_run(writer.layout.root))
    writer.store.seal("e")
    check_talk(open_run(writer.layout.root))
    assert not (writer.layout.live / "t-e").exists()
    writer.close()
    writer = Writer(tmp_path)
    assert writer.store.seal("e") is None and writer.store.seal("f").n_rows == 1
    check_talk(writer.close())


def test_each_token_is_stored_once(tmp_path):
    """A row that was recomputed is not stored again; the call refers to the one that is there."""
    writer = Writer(tmp_path)
    talk(writer)
    assert [(k.start, k.stop) for k in writer.store.history.calls["c2"].kept] == [(5, 8)]
    writer.store.seal("e")
    again = writer.commit("c4", [1, 2, 3, 4], [5, 6], episode="g")
    assert again.kept == [] and not writer.layout.live_file("t-g", "c4").exists()
    writer.store.seal("g")
    assert not writer.layout.shard("g").exists()
    run = writer.close()
    assert np.array_equal(run.call("c4").activations(POINTS[0]), expected([1, 2, 3, 4, 5], POINTS[0]))
    assert [(s.owner.call, s.start, s.stop) for s in run.call("c2").spans()] == [("c1", 0, 5), ("c2", 5, 8)]


def test_rows_of_another_spec_are_another_matter(tmp_path):
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2], [3])
    other = writer.commit("c2", [1, 2], [3], points=["layers.0.output"])
    assert other.n_kept == 2
    writer.store.seal("e")
    run = writer.close()
    assert run.call("c2").activations("layers.0.output").shape == (2, 4)
    with pytest.raises(UnknownPoint, match=r"layers\.0\.output.*recorded"):
        run.call("c1").activations("layers.0.output")
    assert list(problems(run)) == []


def test_rows_of_another_adapter_are_another_matter(tmp_path):
    """The same tokens through the base model, an adapter, and the adapter again: stored, stored, shared."""
    writer = Writer(tmp_path)
    for name, adapter in (("a", ""), ("b", "tuned@/adapter"), ("c", "tuned@/adapter")):
        writer.commit(name, [1, 2, 3], [4, 5], adapter=adapter)
    run = writer.close()
    assert [run.call(name).record.n_kept for name in "abc"] == [4, 4, 0]
    assert [span.owner.call for name in "abc" for span in run.call(name).spans()] == ["a", "b", "b"]


def test_an_episode_that_goes_on_after_its_seal_is_sealed_again_whole(tmp_path):
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2, 3], [4, 5])
    writer.store.seal("e")
    writer.commit("c2", [1, 2, 3, 4, 5, 6], [7], computed=3, turn=1)
    assert writer.store.seal("e").n_rows == 6
    run = writer.close()
    assert np.array_equal(run.call("c2").activations(POINTS[1]), expected([1, 2, 3, 4, 5, 6], POINTS[1]))
    assert list(problems(run)) == []


def test_choices_are_kept_apart(tmp_path):
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2], [10, 20, 30], choices=3)
    writer.store.seal("e")
    run = writer.close()
    for choice in range(3):
        tokens = [1, 2, 10 + choice, 20 + choice]
        assert np.array_equal(run.call("c1").activations(POINTS[0], choice), expected(tokens, POINTS[0]))
    assert run.history.calls["c1"].n_kept == 2 + 3 * 2


@pytest.mark.parametrize(
    ("tokens", "positions"), [("prompt", [0, 1, 2]), ("completion", [3, 4]), ("last", [2]), ("all", [0, 1, 2, 3, 4])]
)
def test_a_call_has_a_row_for_each_token_that_was_asked_for(tmp_path, tokens, positions):
    """What was not asked for is not missing; rows of one wish are not rows of another."""
    writer = Writer(tmp_path)
    writer.commit("c0", [1, 2, 3], [7, 8, 9], episode="f")
    call = writer.commit("c1", [1, 2, 3], [4, 5, 6], tokens=tokens)
    assert call.n_kept == len(positions) - (3 if tokens == "all" else 0) and call.n_positions == len(positions)
    for sealed in (False, True):
        if sealed:
            writer.store.seal("e")
        run = open_run(writer.layout.root)
        found = run.call("c1")
        assert found.positions().tolist() == positions
        assert found.token_ids().tolist() == [[1, 2, 3, 4, 5][p] for p in positions]
        assert np.array_equal(found.activations(POINTS[1]), expected([1, 2, 3, 4, 5], POINTS[1])[positions])
        assert list(problems(run)) == []
    assert [row["n_missing"] for row in run.episodes.to_pylist()] == [0, 0]
    writer.close()


def test_a_call_that_generated_one_token_has_no_completion_rows(tmp_path):
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2, 3], [4], tokens="completion")
    run = writer.close()
    assert run.call("c1").activations(POINTS[0]).shape == (0, 4) and list(problems(run)) == []


def test_many_rows_make_several_row_groups(tmp_path):
    writer = Writer(tmp_path)
    prompt = list(range(5000))
    writer.commit("c1", prompt, [1, 2])
    writer.store.seal("e")
    with pq.ParquetFile(writer.layout.shard("e")) as file:
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4096, 905]
        assert file.metadata.row_group(0).column(9).statistics is None
    rows = writer.close().call("c1").activations(POINTS[0])
    assert np.array_equal(rows[[0, 4095, 4096, 5000]], expected([*prompt, 1], POINTS[0])[[0, 4095, 4096, 5000]])


def test_missing_rows_are_said_to_be_missing(tmp_path):
    """A call that hit the cache for rows nobody stored has a hole, and everyone is told where."""
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2, 3, 4], [5], computed=2)
    writer.store.roll()
    run = writer.close()
    with pytest.raises(MissingRows, match="0 to 2"):
        run.call("c1").activations(POINTS[0])
    assert [p for p in problems(run) if "no rows for positions 0 to 2" in p]
    row = pq.read_table(run.layout.calls).to_pylist()[0]
    assert row["n_missing"] == 2 and row["spans"][0]["call"] is None


def test_a_call_without_token_ids_has_no_activations_and_says_why(tmp_path):
    """Not an empty array: one whose capture was lost, one that failed, and a choice that no call has."""
    writer = Writer(tmp_path)
    talk(writer)
    writer.store.commit(msgspec.structs.replace(writer.call("lost"), lost="the worker died"))
    writer.store.commit(msgspec.structs.replace(writer.call("failed"), status=502, error="no reply"))
    run = writer.close()
    asks = [lambda call: call.positions(), lambda call: call.token_ids(), lambda call: call.activations(POINTS[0])]
    for name, why in {"lost": "the worker died", "failed": "no reply"}.items():
        for ask in asks:
            with pytest.raises(MissingRows, match=f"call {name}: no activations: {why}"):
                ask(run.call(name))
    with pytest.raises(BadInput, match="call c1 has no choice 7: it has 0"):
        run.call("c1").activations(POINTS[0], choice=7)


def test_nonfinite_elements_are_counted(tmp_path):
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float32):
        values = np.array([[1, np.nan, -np.inf], [np.inf, 0, 65504]], dtype)
        assert count_nonfinite(values) == 3
    writer = Writer(tmp_path)
    writer.commit("c1", [1], [2])
    writer.store.seal("e")
    writer.close()
    about = pq.read_metadata(writer.layout.shard("e")).metadata
    assert json.loads(about[b"nonfinite"]) == {p: 0 for p in POINTS}


def test_the_index_tables_say_what_the_run_holds(tmp_path):
    writer = Writer(tmp_path)
    talk(writer)
    writer.store.seal("e")
    writer.store.roll()
    writer.close()
    calls = pq.read_table(writer.layout.calls)
    assert calls["call"].to_pylist() == ["c1", "c2", "c3"] and calls["n_rows"].to_pylist() == [5, 3, 1]
    assert calls["n_missing"].to_pylist() == [0, 0, 0]
    episodes = {row["episode"]: row for row in pq.read_table(writer.layout.episodes).to_pylist()}
    assert (episodes["e"]["status"], episodes["f"]["status"]) == ("sealed", "live")
    assert (episodes["e"]["n_rows"], episodes["e"]["n_shared"], episodes["e"]["n_turns"]) == (8, 5, 2)


def test_a_run_is_read_by_its_index_where_that_stands_for_the_whole_journal(tmp_path):
    """The same calls, rows and tables come out with and without it, and with it the journal is not read through."""
    writer = Writer(tmp_path)
    talk(writer)
    writer.commit("c4", [1, 2, 3, 9], [8, 7], computed=3, turn=2)  # position 2 of these tokens is c1's
    writer.store.seal("e")
    writer.close()
    whole = open_run(writer.layout.root)
    writer = Writer(tmp_path)
    writer.store.roll()
    run = writer.close()
    assert [call.record for call in run.episode("e")] == [call.record for call in whole.episode("e")]
    assert [call.spans() for call in run.episode("e")] == [call.spans() for call in whole.episode("e")]
    for name, tokens in {"c2": [1, 2, 3, 4, 5, 6, 7, 8], "c3": [1, 2, 9], "c4": [1, 2, 3, 9, 8]}.items():
        assert np.array_equal(run.call(name).activations(POINTS[1]), expected(tokens, POINTS[1]))
    assert run.episodes.equals(whole.episodes) and run.calls.equals(whole.calls) and run.names == ["e", "f"]
    assert not vars(run).keys() & {"history", "outline"}
    with pytest.raises(BadName, match="no call"):
        run.call("c9")
    writer = Writer(tmp_path)
    writer.commit("c5", [5], [6])  # the journal is ahead now
    assert [call.record.id for call in writer.close().episode("e")] == ["c1", "c2", "c4", "c5"]


def test_a_run_that_nobody_holds_any_more_takes_no_memory(tmp_path):
    """What it has read goes with it, at once: the rows of an episode are many."""
    writer = Writer(tmp_path)
    talk(writer)
    writer.store.seal("e")
    writer.store.roll()
    run = writer.close()
    for call in run.episode("e"):
        call.activations(POINTS[0])
    shard, index = weakref.ref(run._shard("e")), weakref.ref(run.index)
    gc.disable()
    try:
        del run, call
        assert shard() is None and index() is None
    finally:
        gc.enable()


def test_a_shard_is_compressed_or_not_as_the_run_says(tmp_path):
    sizes = {}
    for compression in ("zstd", "none"):
        (tmp_path / compression).mkdir()
        writer = Writer(tmp_path / compression, compression=compression)
        writer.commit("c1", [1] * 500, [2])
        writer.store.seal("e")
        with pq.ParquetFile(writer.layout.shard("e")) as file:
            sizes[compression] = file.metadata.row_group(0).column(9).compression
        writer.close()
    assert sizes == {"zstd": "ZSTD", "none": "UNCOMPRESSED"}


def test_a_writer_lets_go_of_what_is_sealed_and_still_knows_every_row(tmp_path):
    """What a run for weeks keeps in memory are token ids and owners, not calls; also after a restart."""
    writer = Writer(tmp_path)
    talk(writer)
    writer.store.seal("e")
    for store in (writer.store, None):
        if store is None:
            writer.close()
            writer = Writer(tmp_path)
        assert list(writer.store.history.calls) == ["c3"] and writer.store.history.episodes["e"].calls == []
    assert writer.commit("c4", [1, 2, 3, 4], [5, 6], episode="g").kept == []
    writer.store.roll()
    run = writer.close()
    assert pq.read_table(run.layout.calls).equals(run.calls) and pq.read_table(run.layout.episodes).equals(run.episodes)
    assert run.calls["call"].to_pylist() == ["c1", "c2", "c3", "c4"]


# ---- what cannot be


def test_a_new_directory_is_on_disk_before_its_file_is(tmp_path, monkeypatch):
    """Else a shard could be lost with its directory after the live files of its rows are gone."""
    synced = []
    monkeypatch.setattr("episodes.layout.sync_directory", synced.append)
    with whole(tmp_path / "shards" / "e.parquet") as draft:
        draft.write_bytes(b"")
    assert synced == [tmp_path, tmp_path / "shards"]


def test_a_run_has_one_writer(tmp_path):
    writer = Writer(tmp_path)
    with pytest.raises(RunLocked, match="process"):
        Store(writer.layout)
    writer.close()
    Store(writer.layout).close()


def test_whether_a_run_is_being_written_is_told_without_touching_it(tmp_path):
    writer = Writer(tmp_path)
    assert being_written(writer.layout)
    writer.close()
    before = writer.layout.lock.read_bytes()
    assert not being_written(writer.layout) and writer.layout.lock.read_bytes() == before
    writer.layout.lock.unlink()
    assert not being_written(writer.layout) and not writer.layout.lock.exists()


def test_another_format_is_refused_by_name(tmp_path):
    Writer(tmp_path).close()
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(WrongFormat, match="format 2"):
        open_run(tmp_path / "run")
    with pytest.raises(WrongFormat, match="format 2"):
        Store(Layout(tmp_path / "run"))


def test_another_model_is_refused(tmp_path):
    writer = Writer(tmp_path)
    with pytest.raises(WrongModel, match=r"hidden_size 4.*8"):
        writer.store.describe(msgspec.structs.replace(MODEL, hidden_size=8))
    with pytest.raises(WrongModel, match=r"edit none.*steer.py:steer 1f"):
        writer.store.describe(msgspec.structs.replace(MODEL, edit="steer.py:steer 1f"))
    writer.close()


KNOWN = msgspec.structs.replace(
    MODEL, custom={"mine": "model.norm.output"}, checkpoint="org/m", revision="v1", quantization="none"
)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"custom": {"mine": "model.layers.0.output"}}, r"custom .*model\.norm.*model\.layers\.0"),
        ({"source": "graphs"}, "source nnsight, the worker has graphs"),
        ({"n_layers": 7}, "n_layers 6, the worker has 7"),
        ({"checkpoint": "org/m-tuned"}, "checkpoint org/m, the worker has org/m-tuned"),
        ({"revision": "v2"}, "revision v1, the worker has v2"),
        ({"quantization": "fp8"}, "quantization none, the worker has fp8"),
        ({"points": POINTS[:1], "tokens": "prompt", "versions": {"vllm": "2"}}, None),
        ({"checkpoint": "", "revision": "", "quantization": ""}, None),
    ],
)
def test_a_run_is_gone_on_with_only_where_its_rows_mean_the_same(tmp_path, changed, says):
    """A point of the same name read elsewhere, or other weights under the same name, are another matter; the points
    that are recorded may be others, and what one of both does not say is not held against it.
    """
    store = Store(Layout(tmp_path / "run"))
    store.describe(KNOWN)
    with nullcontext() if says is None else pytest.raises(WrongModel, match=says):
        store.describe(msgspec.structs.replace(KNOWN, **changed))
    store.close()


def test_a_run_that_was_recorded_before_its_checkpoint_was_noted_is_gone_on_with(tmp_path):
    Writer(tmp_path).close()
    path = tmp_path / "run" / "run.json"
    about = json.loads(path.read_text())
    for name in ("checkpoint", "revision", "quantization"):
        del about["recorded"][name]
    path.write_text(json.dumps(about))
    store = Store(Layout(tmp_path / "run"))
    store.describe(msgspec.structs.replace(MODEL, checkpoint="org/m", revision="v1", quantization="none"))
    store.close()


def test_rows_of_another_model_are_refused(tmp_path):
    writer = Writer(tmp_path)
    file = SpoolFile(writer.spool, "c1", 0, POINTS, "F32", 4, [1])
    file.append(0, np.array([1], np.int32), np.zeros((1, 2, 4), np.float32))
    file.finish()
    claim = writer.store.draft("c1")
    extents = join("c1", [(Sequence(0, [1], [2]), spooled(writer.spool, "c1", 0))], POINTS)
    claim.write_bytes(b"".join(e.data or e.path.read_bytes()[e.offset : e.offset + e.nbytes] for e in extents))
    call = Call(
        id="c1", thread="t", episode="e", turn=0, attempt=0, endpoint="", model="m", started=0, ended=0, status=200
    )
    with pytest.raises(CorruptFile, match="rows of call c1, F32, hidden size 4; expected call c1, BF16, hidden size 4"):
        writer.store.commit(call, claim)
    writer.close()


@pytest.mark.parametrize("name", ["", "..", ".x", "a/b", "a\\b", "a b", "x" * 200, "a\0"])
def test_a_name_that_could_leave_the_directory_is_refused(name):
    with pytest.raises(BadName, match="letters, digits"):
        check_name("episode", name)


def test_what_is_not_a_run_says_so(tmp_path):
    with pytest.raises(BadRun, match=r"run\.json"):
        open_run(tmp_path)
    Writer(tmp_path).close()
    with pytest.raises(BadName, match="no call"):
        open_run(tmp_path / "run").call("c9")


def refused(root, left):
    """Neither read nor written, and nothing written on the way."""
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for opened in (open_run, lambda root: Store(Layout(root))):
        with pytest.raises(BadRun, match=rf"lacks its journal\.jsonl.* such as {left}.*: copy the run whole"):
            opened(root)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.parametrize("journal", ["none", "empty", "torn"])
@pytest.mark.parametrize("kept", ["live", "shards", "foreign", "calls.parquet", "rows.parquet"])
def test_a_copy_without_its_journal_is_no_empty_run(tmp_path, kept, journal):
    """It is neither read nor written, which would delete what the journal does not account for."""
    writer = Writer(tmp_path)
    talk(writer)
    writer.store.commit(writer.call("c4"), foreign=b"{}")
    if kept != "live":
        writer.store.seal("e")
        writer.store.roll()
    writer.close()
    copy = Layout(tmp_path / "copy")
    copy.root.mkdir()
    for name in ("run.json", kept):
        path = writer.layout.root / name
        shutil.copytree(path, copy.root / name) if path.is_dir() else shutil.copy(path, copy.root)
    if journal != "none":
        copy.journal.write_bytes(writer.layout.journal.read_bytes()[: 30 if journal == "torn" else 0])
    refused(copy.root, kept)


@pytest.mark.parametrize("index", ["calls.parquet", "rows.parquet"])
def test_a_copy_without_the_end_of_its_journal_is_no_run(tmp_path, index):
    """Which the index tells, or the checkpoint, where that is ahead: the journal never is behind either."""
    writer = Writer(tmp_path)
    talk(writer)
    writer.store.roll()
    writer.close()
    layout = writer.layout
    lines = layout.journal.read_bytes()
    if index == "rows.parquet":
        layout.calls.unlink()
    for n_bytes in (len(lines) - 1, lines.index(b"\n") + 1):
        layout.journal.write_bytes(lines[:n_bytes])
        refused(layout.root, index)
    layout.journal.write_bytes(lines)
    check_talk(open_run(layout.root))


def test_a_directory_of_files_without_a_journal_does_not_become_a_run(tmp_path):
    """Those of a run; other tables are no concern of it."""
    root = tmp_path / "r"
    (root / "shards").mkdir(parents=True)
    (root / "shards" / "e.parquet").write_bytes(b"")
    with pytest.raises(BadRun, match=r"such as shards/e\.parquet"):
        Store(Layout(root))
    assert [path.name for path in root.iterdir()] == ["shards"]
    (root / "shards" / "e.parquet").rename(root / "mine.parquet")
    Store(Layout(root)).close()
    assert open_run(root).names == []


def test_an_empty_journal_is_that_of_a_run_without_calls_or_whose_first_ones_have_begun(tmp_path):
    """With an index, too, and with what a crash leaves of a call that was not recorded yet."""
    writer = Writer(tmp_path)
    writer.store.roll()
    assert writer.close().names == []
    writer = Writer(tmp_path)
    writer.store.begin([writer.call("c1")])
    writer.commit("c1", [1, 2], [3])
    rows = writer.layout.live_file("t-e", "c1").read_bytes()
    writer.store.begin([writer.call("c1")])
    writer.close()
    writer.layout.journal.write_bytes(b"")
    assert open_run(writer.layout.root).names == []
    writer = Writer(tmp_path)
    assert [call.id for call in writer.store.left] == ["c1"] and writer.store.draft("c1").read_bytes() == rows
    writer.close()


# ---- damage


def damaged(tmp_path, harm, sealed=True):
    writer = Writer(tmp_path)
    talk(writer)
    if sealed:
        writer.store.seal("e")
    writer.store.roll()
    writer.close()
    harm(writer.layout)
    return "\n".join(problems(open_run(writer.layout.root)))


def again(layout, n, **changed):
    """Append a record of the journal once more, changed."""
    record = list(read(layout.journal))[n]
    with layout.journal.open("ab") as file:
        file.write(encode(msgspec.structs.replace(record, **changed)))


def whole_file(path):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")


def other_index(layout):
    """An index that stands for the whole journal and says something else."""
    table = pq.read_table(layout.calls)
    pq.write_table(table.set_column(0, "call", pa.array(["c1", "c2", "c0"])), layout.calls)


def shorter_index(layout):
    """An index that stands for the whole journal and lacks its last call."""
    pq.write_table(pq.read_table(layout.calls)[:2], layout.calls)


def longer_index(layout):
    """An index that stands for the whole journal and has a call more."""
    table = pq.read_table(layout.calls)
    pq.write_table(pa.concat_tables([table, table[:1]]), layout.calls)


def other_rewards(layout):
    """An index whose episodes say something else."""
    table = pq.read_table(layout.episodes)
    pq.write_table(with_column(table, "reward", [0.5] * len(table)), layout.episodes)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("harm", "sealed", "says"),
    [
        (lambda lo: flip(lo.shard("e"), lo.shard("e").stat().st_size // 3), True, "shards/e.parquet"),
        (lambda lo: lo.shard("e").unlink(), True, "shards/e.parquet"),
        (lambda lo: lo.live_file("t-f", "c3").unlink(), True, "call c3"),
        (lambda lo: lo.live_file("t-e", "c1").write_bytes(b"x"), False, "not a whole safetensors file"),
        (lambda lo: flip(lo.journal, 30), True, "journal.jsonl, line 1"),
        (lambda lo: (lo.shards / "z.parquet").write_bytes(b""), True, "shards/z.parquet: no sealed episode"),
        (lambda lo: (lo.live / ".c.claim").write_bytes(b""), True, "not finished"),
        (lambda lo: lo.live_file("t-f", "c3").rename(lo.live_file("t-f", "c9")), True, "no call in the journal"),
        (lambda lo: again(lo, 0), True, "call c1: in the journal 2 times"),
        (lambda lo: again(lo, 0, id="c0"), True, "call c0, choice 0: another stores rows of 0 to 5 too"),
        (lambda lo: again(lo, 3, calls=["c0"]), True, "episode e: sealed with call c0, which the journal lacks"),
        (lambda lo: again(lo, 2, id="c0", kept=[], foreign=True), True, "foreign/c0.json.zst"),
        (lambda lo: flip(lo.calls, 2000), True, "calls.parquet"),
        (other_index, True, "calls.parquet: not what the journal says"),
        (shorter_index, True, "calls.parquet: not what the journal says"),
        (longer_index, True, "calls.parquet: not what the journal says"),
        (other_rewards, True, "episodes.parquet: not what the journal says"),
        (lambda lo: whole_file(lo.foreign_file("c9")), True, "foreign/c9.json.zst: no call in the journal"),
        (lambda lo: lo.begun.write_bytes(encode(Writer.call("c9"))), True, "call c9: its proxy was stopped before"),
    ],
)
def test_verify_finds_what_is_damaged(tmp_path, harm, sealed, says):
    assert says in damaged(tmp_path, harm, sealed)


def changed_shard(layout, change, **seal):
    """A shard and its seal that agree with each other, and not with the calls."""
    shard = layout.shard("e")
    pq.write_table(change(pq.read_table(shard)), shard)
    n_rows = pq.read_metadata(shard).num_rows
    again(layout, 3, **{"n_rows": n_rows, "n_bytes": shard.stat().st_size, "crc32": crc32(shard)} | seal)


def with_column(table, name, values):
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))


@pytest.mark.parametrize(
    ("change", "seal", "says"),
    [
        (lambda t: t, {"n_rows": 7}, "shards/e.parquet: 8 rows where the journal says 7"),
        (lambda t: pa.concat_tables([t, t[:1]]), {}, "shards/e.parquet: position 0 of c1, choice 0 is there twice"),
        (lambda t: pa.concat_tables([t, with_column(t[:1], "position", [99])]), {}, "episode e: 1 rows that no call"),
        (lambda t: with_column(t, "token_id", [7] * len(t)), {}, "call c2, choice 0: rows 5 to 8 are not its tokens'"),
    ],
)
def test_verify_finds_rows_that_are_not_those_of_the_calls(tmp_path, change, seal, says):
    """Though the file is as it was sealed."""
    assert says in damaged(tmp_path, lambda layout: changed_shard(layout, change, **seal))


def test_of_a_run_that_is_written_a_line_may_be_cut_short_and_no_other_be_damaged(tmp_path):
    writer = Writer(tmp_path)
    talk(writer)
    with writer.layout.journal.open("ab") as file:
        file.write(b"half a line")
    assert list(problems(open_run(writer.layout.root))) == []
    flip(writer.layout.journal, 30)
    assert any("journal.jsonl, line 1: the checksum" in problem for problem in problems(open_run(writer.layout.root)))
    writer.close()


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda packed: packed, None),
        (lambda packed: packed[:-6], "ends too early"),
        (lambda packed: packed[:9] + b"x" + packed[10:], "foreign/c1.json.zst: "),
        (lambda packed: b"", "ends too early"),
    ],
)
def test_verify_unpacks_foreign_activations_without_holding_them(tmp_path, harm, says):
    """A quarter of a gigabyte of zeros in a file of kilobytes does not take a quarter of a gigabyte."""
    writer = Writer(tmp_path)
    writer.store.commit(msgspec.structs.replace(writer.call("c1"), points=[]), foreign=bytes(256 << 20))
    run = writer.close()
    path = run.layout.foreign_file("c1")
    path.write_bytes(harm(path.read_bytes()))
    tracemalloc.start()
    try:
        found = list(problems(run))
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert says in found[0] if says else found == []


def test_a_flipped_bit_anywhere_in_a_shard_is_found(tmp_path):
    """By `verify` wherever it is, and by a reader whose page it hits: nothing wrong is ever returned."""
    writer = Writer(tmp_path, compression="none")
    talk(writer)
    writer.store.seal("e")
    writer.close()
    shard = writer.layout.shard("e")
    whole = shard.read_bytes()
    for at in range(0, len(whole), 97):
        flip(shard, at)
        assert list(problems(open_run(writer.layout.root))), at
        shard.write_bytes(whole)
    flip(shard, whole.index(expected([1], POINTS[0]).tobytes()))
    with pytest.raises(OSError, match="CRC"):
        open_run(writer.layout.root).call("c1").activations(POINTS[0])


def test_a_run_that_is_sealed_while_it_is_verified_is_not_called_damaged(tmp_path):
    """Its rows have moved and its index knows more than was read; what is damaged is still found."""
    writer = Writer(tmp_path)
    talk(writer)
    before, damaged = open_run(writer.layout.root), open_run(writer.layout.root)
    assert before.outline.unsealed() and damaged.outline.unsealed()
    for episode in list(writer.store.history.episodes):
        writer.store.seal(episode)
    writer.store.roll()
    assert list(problems(before)) == []
    writer.layout.shard("e").unlink()
    assert [problem for problem in problems(damaged) if "shards/e.parquet" in problem]
    writer.close()


def test_a_reader_finds_rows_that_have_moved_since_it_opened_the_run(tmp_path):
    """Into the shard of another episode, or into a shard that the reader has open and that is written anew."""
    writer = Writer(tmp_path)
    writer.call = lambda *about: msgspec.structs.replace(Writer.call(*about), thread=about[1])
    writer.commit("c1", [1, 2, 3], [4])
    writer.store.seal("e")
    writer.commit("c2", [1, 2, 3, 4], [5], computed=3, turn=1)
    writer.commit("c3", [9, 9], [9], episode="f")
    opened = {"c2": open_run(writer.layout.root), "c3": open_run(writer.layout.root)}
    for run in opened.values():
        assert np.array_equal(run.call("c1").activations(POINTS[0]), expected([1, 2, 3], POINTS[0]))
    writer.store.pair(Group("e", ["f"], ["f"], None, None, []), None)
    writer.store.seal("e")
    for name, tokens in {"c2": [1, 2, 3, 4], "c3": [9, 9]}.items():
        assert np.array_equal(opened[name].call(name).activations(POINTS[0]), expected(tokens, POINTS[0]))
    writer.layout.shard("e").unlink()
    with pytest.raises(MissingRows, match=r"shards/e\.parquet is not there"):
        open_run(writer.layout.root).call("c3").activations(POINTS[0])
    writer.close()


def test_a_run_is_not_opened_again_for_rows_that_are_gone(tmp_path, monkeypatch):
    """Unless its journal has grown, which alone can tell where else they are."""
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2, 3], [4])
    writer.store.seal("e")
    run = writer.close()
    writer.layout.shard("e").unlink()
    monkeypatch.setattr("episodes.run.Run", None)
    with pytest.raises(MissingRows, match=r"shards/e\.parquet is not there"):
        run.call("c1").activations(POINTS[0])


# ---- commands


def invoke(name, *args):
    command = next(c for c in COMMANDS if c.name == name)
    return CliRunner().invoke(command, [str(a) for a in args])


def test_the_commands_read_a_run(tmp_path):
    writer = Writer(tmp_path)
    talk(writer)
    writer.close()
    run = writer.layout.root
    assert "layers.1.output" in invoke("runs", tmp_path).output
    listed = invoke("episodes", run).output
    assert "live" in listed and "2.6" not in listed.splitlines()[0]
    sealed = invoke("seal", run)
    assert sealed.exit_code == 0 and sealed.output == "sealed 2 episodes, 9 rows\n"
    assert "sealed" in invoke("episodes", run).output
    shown = invoke("show", run, "e").output
    assert "say 0" in shown and "0–5 of c1, 5–8 stored here" in shown.replace("\n", " ").replace("  ", " ")
    good = invoke("verify", run)
    assert good.exit_code == 0 and good.output == "2 episodes, 3 calls, 9 rows: all there\n"
    writer.layout.shard("e").unlink()
    assert invoke("verify", run).exit_code == 1


def test_warmups_are_no_episode_wherever_episodes_are_counted(tmp_path):
    """Their calls are counted, and they are listed as if they were one."""
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2, 3], [4])
    writer.commit("c2", [5, 6], [7], episode=WARMUPS)
    assert repr(writer.close()) == f"<Run {writer.layout.root}: 1 episodes, 2 calls>"
    assert invoke("runs", tmp_path).output.splitlines()[1].split()[-5:-2] == ["1", "2", "5"]
    assert invoke("verify", writer.layout.root).output == "1 episodes, 2 calls, 5 rows: all there\n"
    assert invoke("seal", writer.layout.root).output == "sealed 1 episodes, 5 rows\n"
    assert (totals(writer.layout).n_episodes, totals(writer.layout).n_calls) == (1, 2)
    assert WARMUPS in invoke("episodes", writer.layout.root).output


@pytest.mark.parametrize(
    ("sealed", "harm"),
    [
        (False, lambda lo: lo.live_file("t-e", "c1").write_bytes(b"x")),
        (False, lambda lo: lo.live_file("t-e", "c1").unlink()),
        (True, lambda lo: flip(lo.shard("e"), lo.shard("e").stat().st_size // 3)),
    ],
)
def test_an_episode_that_cannot_be_sealed_does_not_keep_the_others_from_it(tmp_path, sealed, harm):
    """Nor from being linked: `seal` and `link` say which it is and why, do the rest, and exit with 1."""
    writer = Writer(tmp_path)
    talk(writer)
    if sealed:
        writer.store.seal("e")
        writer.commit("c4", [1, 2, 3, 4, 5, 6, 7, 8, 9], [8], computed=8, turn=2)
    writer.close()
    harm(writer.layout)
    said = [("user", "say 0"), ("assistant", "ok"), ("user", "bye")]
    said = [{"role": role, "content": text} for role, text in said]
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"task_id": 3, "reward": 1.0, "info": {}, "trial": 0, "traj": said}]))
    for command in (["seal"], ["link", results]):
        done = invoke(command[0], writer.layout.root, *command[1:])
        assert isinstance(done.exception, BadRun) and "episode e is not sealed: " in str(done.exception)
        episodes = {row["episode"]: row for row in pq.read_table(writer.layout.episodes).to_pylist()}
        assert (episodes["e"]["status"], episodes["f"]["status"]) == ("live", "sealed")
    assert "1 results joined" in done.output and episodes["f"]["task_id"] == "3"


def test_what_a_call_adds_to_its_conversation_is_shown_and_of_a_branch_too(tmp_path):
    """It asks beside the turn, without its reply; then the one that the conversation goes on from is said again."""
    writer = Writer(tmp_path)
    for number, said in enumerate(
        [
            ["user one", "assistant two"],
            ["user one", "assistant two"],
            ["user one", "user reflect", "assistant better"],
            ["user one", "assistant better", "user three", "assistant four"],
            ["user one", "assistant better", "user three", "assistant four", "user five", "assistant six"],
        ]
    ):
        *asked, reply = [dict(zip(("role", "content"), line.split(), strict=True)) for line in said]
        texts = {"request": {"messages": asked}, "reply": {"choices": [{"message": reply}]}}
        texts = {name: json.dumps(text) for name, text in texts.items()}
        writer.store.commit(msgspec.structs.replace(writer.call(f"c{number}", points=[]), **texts))
    writer.close()
    shown = [line for line in invoke("show", writer.layout.root).output.splitlines() if "·" not in line]
    assert [line.rstrip() for line in shown] == [
        "user one", "assistant two", "assistant two", "user reflect", "assistant better", "assistant better",
        "user three", "assistant four", "user five", "assistant six",
    ]  # fmt: skip


def test_prompts_of_completions_are_shown_whatever_they_are(tmp_path):
    writer = Writer(tmp_path)
    for name, prompt in {"c1": [1, 2], "c2": [3], "c3": "text"}.items():
        request = json.dumps({"prompt": prompt})
        writer.store.commit(msgspec.structs.replace(writer.call(name, points=[]), request=request, reply=""))
    writer.close()
    lines = invoke("show", writer.layout.root).output.splitlines()
    assert [line for line in lines if line.startswith("prompt")] == ["prompt [1,2]", "prompt [3]", "prompt text"]


def test_why_a_reply_broke_off_is_shown_though_its_status_was_good(tmp_path):
    writer = Writer(tmp_path)
    error = "the worker failed: told to fail"
    writer.store.commit(msgspec.structs.replace(writer.call("c1", points=[]), error=error))
    writer.close()
    assert f"  HTTP 200: {error}\n" in invoke("show", writer.layout.root).output


@pytest.mark.parametrize(
    "said",
    [
        '{"messages": 5}',
        '{"messages": ["a", {"role": "user", "tool_calls": ["a", {"function": "f"}]}, {"tool_calls": 7}]}',
        '{"choices": 7}',
        '{"choices": ["a", {"text": 5}, {"message": "m"}]}',
        "[]",
    ],
)
def test_what_a_client_sent_is_shown_whatever_it_is(tmp_path, said):
    writer = Writer(tmp_path)
    writer.store.commit(msgspec.structs.replace(writer.call("c1"), request=said, reply=said))
    writer.close()
    shown = invoke("show", writer.layout.root)
    assert shown.exit_code == 0 and "turn 0, c1" in shown.output


def test_what_is_shown_steers_no_terminal(tmp_path):
    """Whatever a client called its roles, and whatever was said or went wrong."""
    evil = "x[/nope]\x1b]52;c;aGk=\x07\x9b2J"
    tools = [{"function": {"name": evil, "arguments": evil}}]
    request = {"messages": [{"role": evil, "content": evil, "tool_calls": tools}, {"role": "user", "content": [evil]}]}
    reply = {"choices": [{"message": {"role": "assistant", "content": evil}}, {"text": evil}]}
    writer = Writer(tmp_path)
    call = msgspec.structs.replace(
        writer.call("c1"), request=json.dumps(request), reply=json.dumps(reply), status=500, error=evil, lost=evil
    )
    writer.store.commit(call)
    writer.close()
    for command in ("show", "verify", "runs", "episodes"):
        done = invoke(command, tmp_path if command == "runs" else writer.layout.root)
        assert done.exit_code == (command == "verify")
        assert all(character == "\n" or character.isprintable() for character in done.output)
        if command == "show":
            assert done.output.count("x[/nope]") == 9


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b'{"format": "\xff"}', b'{"format": 1}', b"[" * 9999])
def test_a_run_whose_description_is_damaged_does_not_hide_the_others(tmp_path, text):
    for name in "ab":
        Writer(tmp_path).close()
        writer = (tmp_path / "run").rename(tmp_path / name)
    (writer / "run.json").write_bytes(text)
    with pytest.raises(CorruptFile, match=r"run\.json: "):
        open_run(writer)
    listed = invoke("runs", tmp_path)
    assert "m      layers.1.output" in listed.output and f"{writer}/run.json: " in listed.output


def test_seal_says_what_is_no_run(tmp_path):
    result = invoke("seal", tmp_path)
    assert isinstance(result.exception, BadRun)
