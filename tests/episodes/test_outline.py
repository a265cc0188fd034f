"""An outline: the history without what was said."""

import json

import msgspec
from click.testing import CliRunner

from episodes.commands import link
from episodes.history import History
from episodes.journal import sound
from episodes.outline import Outline
from episodes.run import open_run
from episodes.verify import problems
from tests.episodes.test_store import Writer, flip, talk
from tests.episodes.test_tables import events


def test_an_outline_says_what_the_history_says_and_keeps_nothing_of_what_was_said(tmp_path):
    """Calls that were moved, and sealed ones, included; a call's words and tokens are read when asked for."""
    writer = Writer(tmp_path)
    for _ in events(writer):
        pass
    writer.close()
    outline, history = Outline(writer.layout), History(record for _, record in sound(writer.layout.journal))
    assert {id: outline.whole(call) for id, call in outline.calls.items()} == history.calls
    assert not any(call.sequences or call.request or call.reply for call in outline.calls.values())
    assert (outline.counts, outline.held) == (history.counts, history.held)
    for name, episode in history.episodes.items():
        found = outline.episodes[name]
        assert [outline.whole(call) for call in found.calls] == episode.calls
        assert (found.sealed, found.pair, found.link) == (episode.sealed, episode.pair, episode.link)
    assert [outline.spans(call) for call in history.calls.values()] == list(map(history.spans, history.calls.values()))


def test_an_outline_is_of_the_journal_as_it_was(tmp_path):
    """Of the lines that can be read; a call that comes meanwhile is in none of its parts."""
    writer = Writer(tmp_path)
    talk(writer)
    flip(writer.layout.journal, 30)
    outline = Outline(writer.layout)
    writer.commit("c4", [5], [6])
    assert [record.id for _, record in outline.lines()] == list(outline.calls) == ["c2", "c3"]
    assert [line.line for line in outline.broken] == [1]
    writer.close()


def test_neither_opening_a_run_nor_verify_nor_link_reads_all_that_was_said_into_memory(tmp_path, monkeypatch):
    writer = Writer(tmp_path)
    talk(writer)
    writer.store.commit(msgspec.structs.replace(writer.call("c4", "g"), points=[]))
    monkeypatch.setattr("episodes.run.History", None)
    run = writer.close()
    assert list(problems(run)) == []
    results = tmp_path / "results.json"
    said = [{"role": role, "content": text} for role, text in (("user", "say 0"), ("assistant", "ok"), ("user", "bye"))]
    results.write_text(json.dumps([{"task_id": 3, "reward": 1.0, "info": {}, "trial": 0, "traj": said}]))
    assert "1 results joined" in CliRunner().invoke(link, [str(run.layout.root), str(results)]).output
    assert open_run(run.layout.root).episodes["task_id"].to_pylist().count("3") == 1
