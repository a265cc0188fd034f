"""Which positions lack a row, what has to be run for them, and where the rows of a re-run go."""

import ml_dtypes
import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from episodes.errors import CorruptFile
from episodes.holes import holes, unfillable
from episodes.run import open_run
from episodes.verify import problems
from episodes.wire import Sequence, join
from tests.episodes.test_store import MODEL, POINTS, Writer, expected, vector
from worker.spool import SpoolFile, spooled


def found(writer):
    return list(holes(writer.store.calls(), writer.store.history))


def run_again(writer, hole, name="b1", points=POINTS, prompt=None):
    """The claim of what a worker would compute for a hole."""
    prompt = hole.prompt() if prompt is None else prompt
    file = SpoolFile(writer.spool, name, 0, points, "BF16", MODEL.hidden_size, prompt)
    rows = np.array([[vector(prompt, p, point) for point in points] for p in range(len(prompt))], ml_dtypes.bfloat16)
    file.append(0, np.array(prompt, np.int32), rows.view(np.uint8))
    file.finish()
    claim = writer.store.draft(name)
    extents = join(name, [(Sequence(0, prompt, [1], "length"), spooled(writer.spool, name, 0))], points, hole.tokens)
    parts = (e.data if e.path is None else e.path.read_bytes()[e.offset : e.offset + e.nbytes] for e in extents)
    claim.write_bytes(b"".join(parts))
    return claim


def test_a_call_that_found_lost_rows_in_the_cache_has_a_hole_that_one_re_run_fills(tmp_path):
    """Only up to the last missing position is run; a second call with the same hole has none afterwards. The rows have
    the role `backfill`, though their thread is an agent's.
    """
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2, 3, 4, 5], [6, 7], computed=3)
    writer.commit("c2", [1, 2, 3, 9], [8], computed=3, episode="f")
    assert [(h.call.id, h.prompt(), h.n_missing, h.tokens) for h in found(writer)] == [
        ("c1", [1, 2, 3], 3, "prompt"),
        ("c2", [1, 2, 3], 3, "prompt"),
    ]
    assert found(writer)[0].prompt("steer.py:steer 0") == [1, 2, 3, 4, 5], "an edit may look at how long the prompt is"
    pending = holes(writer.store.calls(), writer.store.history)
    hole = next(pending)
    filler = writer.store.fill(hole.filler("b1", 3.0, 4.0), run_again(writer, hole))
    assert [(k.choice, k.start, k.stop) for k in filler.kept] == [(0, 0, 3)]
    assert list(pending) == [], "the second call's is gone by the time it is asked for"
    for seal in (False, True):
        if seal:
            writer.store.seal("e")
        run = open_run(writer.layout.root)
        assert list(problems(run)) == []
        assert np.array_equal(run.call("c1").activations(POINTS[0]), expected([1, 2, 3, 4, 5, 6], POINTS[0]))
        assert np.array_equal(run.call("c2").activations(POINTS[1]), expected([1, 2, 3, 9], POINTS[1]))
    rows = pq.read_table(writer.layout.shard("e"), columns=["role", "thread"]).to_pylist()
    assert [row["role"] for row in rows] == ["agent"] * 3 + ["backfill"] * 3
    assert {row["thread"] for row in rows} == {"t-e"}
    writer.close()


def test_a_sealed_episode_is_sealed_again_with_what_fills_it(tmp_path):
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2, 3, 4], [5, 6], computed=2)
    before = writer.store.seal("e")
    (hole,) = found(writer)
    writer.store.fill(hole.filler("b1", 3.0, 4.0), run_again(writer, hole))
    after = writer.store.seal("e")
    assert (before.n_rows, after.n_rows, after.calls) == (3, 5, ["c1", "b1"])
    run = writer.close()
    assert list(problems(run)) == [] and run.episodes["n_calls"].to_pylist() == [1]
    assert np.array_equal(run.call("c1").activations(POINTS[0]), expected([1, 2, 3, 4, 5], POINTS[0]))


def test_rows_of_other_tokens_or_points_fill_nothing(tmp_path):
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2, 3], [5], computed=2)
    (hole,) = found(writer)
    filler = hole.filler("b1", 3.0, 4.0)
    with pytest.raises(CorruptFile, match="not those asked for"):
        writer.store.fill(filler, run_again(writer, hole, prompt=[1, 9]))
    with pytest.raises(CorruptFile, match="not those asked for"):
        writer.store.fill(filler, run_again(writer, hole, points=POINTS[:1]))
    assert len(found(writer)) == 1
    writer.close()


def test_rows_of_another_adapter_fill_nothing(tmp_path):
    """As of a worker that was started with another one under the same name."""
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2, 3], [5], computed=2, adapter="tuned@/adapter")
    (hole,) = found(writer)
    with pytest.raises(CorruptFile, match="not those asked for"):
        writer.store.fill(hole.filler("b1", 3.0, 4.0), run_again(writer, hole))
    writer.close()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lost": "the worker was gone", "sequences": []}, "token ids are not known"),
        ({"request": '{"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}'}, "input_audio"),
        ({"request": '{"messages": [{"role": "user", "content": [{"image_url": "x"}]}]}'}, "image_url"),
        ({"request": '{"prompt_embeds": "x"}'}, "prompt_embeds"),
        ({"request": '{"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}'}, None),
        ({"request": "no JSON"}, None),
    ],
)
def test_what_its_token_ids_do_not_determine_cannot_be_filled(tmp_path, change, says):
    writer = Writer(tmp_path)
    call = msgspec.structs.replace(writer.commit("c1", [1, 2, 3], [5], computed=2), **change)
    reason = unfillable(call, writer.store.history)
    assert reason is None if says is None else says in reason
    whole = msgspec.structs.replace(writer.commit("c2", [7, 8], [9]), request=call.request)
    assert unfillable(whole, writer.store.history) is None, "nothing is missing"
    writer.close()


def test_what_was_generated_under_an_edit_cannot_be_filled_from_a_prompt(tmp_path):
    """An edit is told which tokens are the prompt's; the prompt itself is one either time."""
    writer = Writer(tmp_path)
    call = writer.commit("c1", [1, 2, 3], [5], computed=2)
    assert unfillable(call, writer.store.history, "steer.py:steer 1f") is None
    longer = msgspec.structs.replace(call, sequences=[Sequence(0, [1, 2, 3], [5, 6, 7], "stop")])
    assert "steer.py:steer 1f" in unfillable(longer, writer.store.history, "steer.py:steer 1f")
    writer.close()
