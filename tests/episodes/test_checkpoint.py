"""The checkpoint: a writer knows the same with it and without, and with it reads only what came after it."""

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from episodes import checkpoint, journal
from episodes.cast import Group
from episodes.history import History
from episodes.layout import Layout
from episodes.rows import Owner, Rows
from episodes.run import open_run
from episodes.verify import problems
from tests.episodes.test_store import POINTS, Writer, flip, talk


def known(state):
    """All that a writer knows of a run."""
    history = state.history
    return {
        "calls": history.calls,
        "episodes": history.episodes,
        "counts": history.counts,
        "homes": {thread: history.home(thread) for thread in ("t-e", "t-x", "t-y", "t-h")},
        "rows": {spec: [(d, o, t.tolist()) for d, o, t in rows.stretches()] for spec, rows in history.rows.items()},
        "lines": state.lines.places,
        "damaged": state.damaged,
    }


def without(layout):
    """As `checkpoint.state`, from the journal alone."""
    aside = layout.rows.with_name("aside")
    layout.rows.rename(aside)
    try:
        found = checkpoint.state(layout)
        assert found.read_from == 0
        return found
    finally:
        aside.rename(layout.rows)


def a_run(tmp_path):
    """Sealed and live episodes, a hole, other specs, a thread that moves, one sealed again; a checkpoint amid them."""
    writer = Writer(tmp_path)
    talk(writer)
    writer.commit("c4", [1, 2, 3, 9], [8, 7], computed=3, turn=2)
    writer.commit("c5", [50, 51, 52], [53], computed=2, episode="g")
    writer.commit("c6", [1, 2, 3], [4], episode="g", points=POINTS[:1], choices=2, turn=1)
    writer.store.seal("e")
    for thread in ("t-x", "t-y"):
        writer.store.commit(msgspec.structs.replace(writer.call(f"c-{thread}", thread), thread=thread))
    writer.store.pair(Group("h", ["t-x", "t-y"], ["t-x", "t-y"], None, None, []), None)
    writer.store.roll()
    behind = writer.layout.journal.stat().st_size
    writer.commit("c7", [1, 2, 3, 4, 5, 6, 7, 8], [9], computed=7, turn=3)
    assert writer.store.seal("h").calls == ["c-t-x", "c-t-y"]
    writer.store.seal("e")
    writer.commit("c8", [1, 2, 3], [4], tokens="last", episode="h")
    writer.close()
    return writer.layout, behind


def test_a_writer_knows_the_same_with_a_checkpoint_and_without(tmp_path):
    layout, behind = a_run(tmp_path)
    found = checkpoint.state(layout)
    assert found.read_from == behind and 0 < behind < layout.journal.stat().st_size
    assert known(found) == known(without(layout))
    assert list(found.history.calls) == ["c3", "c5", "c6", "c8"]
    assert not [problem for problem in problems_of(layout) if "rows.parquet" in problem]


def test_a_checkpoint_of_many_stretches_has_them_all(tmp_path, monkeypatch):
    """More than are written at once."""
    monkeypatch.setattr("episodes.checkpoint.BATCH", 2)
    layout, _ = a_run(tmp_path)
    assert len(pq.read_table(layout.rows)) > 4 and known(checkpoint.state(layout)) == known(without(layout))


def problems_of(layout):
    return list(problems(open_run(layout.root)))


def test_only_the_lines_that_still_count_are_read_again(tmp_path, monkeypatch):
    """Of the journal before the checkpoint: unsealed calls, pairs, and each episode's last seal."""
    layout, _ = a_run(tmp_path)
    read = []
    decode = journal.decode
    monkeypatch.setattr(journal, "decode", lambda line: read.append(line) or decode(line))
    checkpoint.state(layout)
    said = [decode(line) for line in read]
    assert [getattr(record, "id", None) or type(record).__name__ for record in said] == [
        *("c3", "c5", "c6", "Seal", "c-t-x", "c-t-y", "Pair"),
        *("c7", "Seal", "Seal", "c8"),
    ]


@pytest.mark.parametrize(
    "harm",
    [
        lambda lo: lo.rows.unlink(),
        lambda lo: lo.rows.write_bytes(b"PAR1"),
        lambda lo: flip(lo.rows, lo.rows.read_bytes().index(b"PAR1", 4) - 60),
        lambda lo: pq.write_table(pq.read_table(lo.calls), lo.rows),
        lambda lo: flip(lo.journal, lo.journal.read_bytes().index(b"\n") + 50),
    ],
)
def test_a_checkpoint_that_cannot_be_relied_upon_is_not(tmp_path, harm):
    """None, torn, damaged, something else, or of a journal that is not the same: all of the journal is read."""
    layout, _ = a_run(tmp_path)
    harm(layout)
    found = checkpoint.state(layout)
    assert found.read_from == 0
    assert found.history.calls.keys() <= {"c3", "c5", "c6", "c8"}


def test_what_could_not_be_read_before_a_checkpoint_is_not_forgotten(tmp_path):
    """Else the next writer would take the live file of a damaged line for nobody's, and delete it."""
    writer = Writer(tmp_path)
    talk(writer)
    writer.close()
    flip(writer.layout.journal, 30)  # of c1
    for _ in range(2):
        writer = Writer(tmp_path)
        writer.store.roll()
        writer.close()
    assert checkpoint.state(writer.layout).damaged
    assert writer.layout.live_file("t-e", "c1").exists()


def test_a_writer_that_is_never_stopped_writes_checkpoints_too(tmp_path, monkeypatch):
    """When the journal has grown by much since the last one."""
    monkeypatch.setattr("episodes.store.CHECKPOINT_BYTES", 1500)
    writer = Writer(tmp_path)
    read_from = []
    for i in range(12):
        writer.commit(f"c{i}", [i, 2, 3], [4], episode=f"e{i}")
        writer.store.seal(f"e{i}")
        read_from.append(checkpoint.state(writer.layout).read_from)
    size = writer.layout.journal.stat().st_size
    assert 2 < len(set(read_from)) < 9 and size - read_from[-1] < 2500
    writer.close()


def test_verify_names_a_checkpoint_that_says_something_else(tmp_path):
    layout, _ = a_run(tmp_path)
    now = checkpoint.state(layout)
    now.history.rows = {spec: Rows() for spec in now.history.rows}
    checkpoint.save(layout, now, layout.journal.stat().st_size)
    assert "rows.parquet: not what the journal says; delete it" in "\n".join(problems_of(layout))
    layout.rows.write_bytes(b"PAR1")
    assert "rows.parquet: it cannot be read" in "\n".join(problems_of(layout))


def test_a_tree_is_the_same_again(tmp_path):
    """Sequences that end amid others, of several owners, with holes: also when more is stored afterwards."""
    random = np.random.default_rng(0)
    rows, others = Rows(), []
    for number in range(300):
        tokens = random.integers(0, 3, random.integers(1, 12)).astype(np.int32)
        first = int(random.integers(0, len(tokens)))
        rows.store(Owner(f"c{number}", number % 2), tokens, [(first, len(tokens))])
        others.append(tokens)
        if number % 50 == 0:
            again = Rows.of(rows.stretches())
            assert str(list(again.stretches())) == str(list(rows.stretches()))
            assert all(again.spans(tokens) == rows.spans(tokens) for tokens in others)
            rows = again


def test_a_run_without_a_call_has_a_checkpoint(tmp_path):
    writer = Writer(tmp_path)
    writer.store.roll()
    writer.close()
    assert known(checkpoint.state(Layout(tmp_path / "run")))["rows"] == {} == History().rows
