"""Shards: an episode's rows gathered into row groups, and taken along when it is sealed again."""

import json

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest

from episodes import journal
from episodes.records import Model
from episodes.run import open_run
from episodes.shards import Block, Shard, Whose, count_nonfinite, write_shard
from episodes.verify import problems
from tests.episodes.test_store import POINTS, Writer, expected, flip

WIDE = Model("m", "bfloat16", 4096, 2, ["layers.0.output", "layers.1.output"], {})


def block(call, start, n_rows, points, seed=0):
    rows = np.random.default_rng(seed).standard_normal((n_rows, len(points), WIDE.hidden_size), np.float32)
    rows = rows.astype(ml_dtypes.bfloat16)
    whose = Whose(call, f"t-{call}", "agent", 3, 1, 0)
    vectors = {point: rows[:, i] for i, point in enumerate(points)}
    return Block(whose, start, start + 2, np.arange(n_rows, dtype=np.int32) + 100, vectors)


def test_wide_rows_make_small_row_groups_which_calls_share(tmp_path):
    """A row group is filled before the next is begun, and no column of one is more than 4 MB."""
    path = tmp_path / "e.parquet"
    blocks = [block("c1", 0, 700, WIDE.points), block("c2", 700, 500, WIDE.points, 1)]
    assert write_shard(path, WIDE.points, blocks, WIDE, "zstd") == 1200
    with pq.ParquetFile(path) as file:
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [512, 512, 176]
        table = file.read()
    assert table["call"].to_pylist() == ["c1"] * 700 + ["c2"] * 500
    assert table["position"].to_pylist() == list(range(1200))
    assert table["phase"].to_pylist() == (["prompt"] * 2 + ["completion"] * 698 + ["prompt"] * 2 + ["completion"] * 498)
    assert table["token_id"].to_pylist() == list(range(100, 800)) + list(range(100, 600))
    shard = Shard(path)
    for own in blocks:
        for point in WIDE.points:
            rows = np.empty((300, WIDE.hidden_size), ml_dtypes.bfloat16)
            shard.read((own.whose.call, 0), own.start + 100, own.start + 400, point, rows)
            assert rows.tobytes() == own.vectors[point][100:400].tobytes()


def test_a_point_that_a_call_did_not_record_is_null_in_its_rows(tmp_path):
    path = tmp_path / "e.parquet"
    first, second = WIDE.points
    blocks = [block("c1", 0, 3, [first]), block("c2", 0, 2, [second]), block("c3", 0, 4, WIDE.points)]
    write_shard(path, WIDE.points, blocks, WIDE, "none")
    table = pq.read_table(path)
    assert table[first].is_valid().to_pylist() == [True] * 3 + [False] * 2 + [True] * 4
    assert table[second].is_valid().to_pylist() == [False] * 3 + [True] * 6
    assert table[second][3].as_py() == blocks[1].vectors[second][0].tobytes()


@pytest.mark.parametrize("where", [0, 511, 512, 1023])
def test_every_element_that_is_not_finite_is_counted(tmp_path, where):
    """Wherever it lies: at the edges of a row group, and of the pieces that are looked at."""
    path = tmp_path / "e.parquet"
    own = block("c1", 0, 1024, WIDE.points)
    own.vectors[WIDE.points[1]][where, [0, -1]] = [np.nan, -np.inf]
    write_shard(path, WIDE.points, [own], WIDE, "none")
    assert json.loads(pq.read_metadata(path).metadata[b"nonfinite"]) == {WIDE.points[0]: 0, WIDE.points[1]: 2}


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_an_element_that_is_not_finite_is_counted_though_it_is_alone(dtype, value):
    """Negative ones too, as when a residual stream overflows downwards only."""
    assert count_nonfinite(np.array([[1, -2, value], [0, 4, -5]], dtype)) == 1


def test_rows_of_a_damaged_shard_are_not_sealed_again(tmp_path):
    """They would have a right checksum from then on."""
    writer = Writer(tmp_path, compression="none")
    writer.commit("c1", [1, 2, 3], [4])
    writer.store.seal("e")
    shard = writer.layout.shard("e")
    flip(shard, shard.read_bytes().index(expected([1], POINTS[0]).tobytes()))
    writer.commit("c2", [1, 2, 3, 4], [5], computed=3, turn=1)
    with pytest.raises(OSError, match="CRC"):
        writer.store.seal("e")
    writer.close()


def test_sealing_again_reads_the_shard_and_not_the_journal(tmp_path, monkeypatch):
    """Rows, choices and points that only some calls have come along as they were."""
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2, 3], [4, 5], choices=2)
    writer.commit("c2", [7], [8, 9], points=POINTS[1:], turn=1)
    writer.store.seal("e")
    writer.commit("c3", [1, 2, 3, 4, 6], [7], computed=4, turn=2)
    with monkeypatch.context() as patched:
        patched.setattr(journal, "placed", lambda *_: pytest.fail("the journal is read"))
        assert writer.store.seal("e").n_rows == 5 + 2 + 1
    run = writer.close()
    assert list(problems(run)) == []
    for choice in range(2):
        tokens = [1, 2, 3, 4 + choice]
        assert np.array_equal(run.call("c1").activations(POINTS[0], choice), expected(tokens, POINTS[0]))
    assert np.array_equal(run.call("c2").activations(POINTS[1]), expected([7, 8], POINTS[1]))
    table = pq.read_table(run.layout.shard("e"))
    assert table[POINTS[0]].null_count == 2 and table[POINTS[1]].null_count == 0
    assert table["turn"].to_pylist() == [0] * 5 + [1] * 2 + [2]
    assert open_run(writer.layout.root).call("c3").missing == 0
