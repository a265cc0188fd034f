"""Backfill: whatever was lost, and however, every position has its row afterwards, in every place that is asked."""

import asyncio
import json
import subprocess
import sys
import threading
import time

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from episodes import journal
from episodes.errors import BadInput, BadRun, NotClaimed, RunLocked, WrongModel
from episodes.layout import Layout, existing
from episodes.records import BACKFILL
from episodes.run import open_run
from episodes.store import Store, being_written
from episodes.verify import problems
from proxy.backend import Backend
from proxy.backfill import backfill
from proxy.config import Config
from tests.conftest import free_port, proxy_to, slowly, until
from tests.proxy.test_durability import waiting
from tests.proxy.test_server import committed, converse, user
from tests.stub import MODEL, POINTS, Running, Stub, rows

REASON = "the spool is full"
CUT = {"stub_fault": "cut"}


def lose(stub, proxy, turn=1, **fields):
    """A conversation of two turns, with the capture of one failing, which is known before the other begins."""
    client = proxy.client()
    messages = [user("You are a clerk. " * 10)]
    for i, text in enumerate(("first", "second")):
        stub.engine.fail_captures = REASON if i == turn else None
        reply = client.chat.completions.create(model=MODEL, messages=messages, **fields)
        messages += [{"role": "assistant", "content": reply.choices[0].message.content}, user(text)]
        committed(proxy, i + 1)
    stub.engine.fail_captures = None


def fill(proxy, **options):
    layout = Layout(proxy.run_dir)
    settings = {"backends": proxy.config.backends, "data": layout.root.parent, "run": "r", "claim_timeout_s": 5}
    return asyncio.run(backfill(layout, Config(**settings | options)))


def check_filled(run):
    """Every position that was asked for has the row that its tokens make, and nothing is reported wrong."""
    assert list(problems(run)) == []
    assert run.calls["n_missing"].to_pylist() == [0] * len(run.calls)
    for record in run.history.calls.values():
        call = run.call(record.id)
        assert call.missing == 0
        for sequence in record.sequences:
            expected = rows(sequence.tokens.tolist(), record.points)[call.positions(sequence.choice)]
            for i, point in enumerate(record.points):
                assert np.array_equal(call.activations(point, sequence.choice), expected[:, i])


def fillers(run):
    return [call for call in run.history.calls.values() if call.role == BACKFILL]


@pytest.mark.parametrize(
    ("tokens", "turn"), [("all", 0), ("all", 1), ("prompt", 1), ("completion", 0), ("completion", 1), ("last", 1)]
)
def test_what_was_lost_is_computed_again(stub, tmp_path, tokens, turn):
    """Rows, spans, tables, shard and verify agree, whichever tokens were asked for; nothing is stored twice."""
    with proxy_to(stub.url, tmp_path) as proxy:
        lose(stub.stub, proxy, turn, extra_body={"collect_activations": {"tokens": tokens}})
    before = open_run(proxy.run_dir)
    (lost,) = [call for call in before.history.calls.values() if call.lost]
    assert (lost.lost, lost.turn) == (REASON, turn) and lost.sequences[0].prompt_token_ids
    n_missing = before.call(lost.id).missing
    assert 0 < n_missing == sum(before.calls["n_missing"].to_pylist())
    assert f"call {lost.id}: no activations: {REASON}" in problems(before)
    done = fill(proxy)
    assert (done.n_rows, done.n_calls, done.left) == (n_missing, 1, {})
    run = proxy.open()
    check_filled(run)
    (filler,) = fillers(run)
    assert (filler.thread, filler.episode, filler.tokens) == (lost.thread, lost.episode, tokens)
    (episode,) = run.episodes.to_pylist()
    assert (episode["status"], episode["n_calls"], episode["n_turns"]) == ("sealed", 2, 2)
    assert episode["n_rows"] == sum(c.n_kept for c in run.history.calls.values())
    assert [call.record.role for call in run.episode(episode["episode"])] == ["agent", "agent"]
    assert pq.read_table(run.layout.calls).equals(run.calls)
    shard = pq.read_table(run.layout.root / episode["shard"]).to_pylist()
    n_prompt = len(lost.sequences[0].prompt_token_ids)
    stored = [(row["position"], row["phase"]) for row in shard if row["role"] == BACKFILL]
    assert len(stored) == n_missing
    assert all(phase == ("prompt" if position < n_prompt else "completion") for position, phase in stored)
    assert fill(proxy).n_rows == 0 and len(proxy.open().history.calls) == 3, "a second time there is nothing to do"


def test_every_choice_of_a_call_is_filled(stub, tmp_path):
    with proxy_to(stub.url, tmp_path) as proxy:
        lose(stub.stub, proxy, n=3)
    assert fill(proxy).left == {}
    run = proxy.open()
    check_filled(run)
    assert len(fillers(run)) == 3


def test_a_worker_on_a_socket_fills_too(tmp_path):
    path = tmp_path / "worker.sock"
    with Running(Stub(tmp_path / "spool"), uds=path) as worker:
        with proxy_to(f"unix:{path}", tmp_path / "data") as proxy:
            lose(worker.stub, proxy)
        assert fill(proxy).left == {}
    check_filled(proxy.open())


@pytest.mark.parametrize("idle_s", [0.2, 300.0])
def test_a_proxy_fills_before_it_seals_if_told_to(stub, tmp_path, idle_s):
    """When the episode has been quiet, and when the proxy stops."""
    with proxy_to(stub.url, tmp_path, backfill=True, episode_idle_s=idle_s) as proxy:
        lose(stub.stub, proxy)
        if idle_s < 1:
            until(lambda: [e.status for e in proxy.open().history.episodes.values()] == ["sealed"], "a seal")
    run = proxy.open()
    check_filled(run)
    assert len(fillers(run)) == 1 and len([r for r in journal.read(run.layout.journal) if not hasattr(r, "role")]) == 1


def test_a_proxy_that_cannot_fill_seals_what_there_is(stub, tmp_path):
    with proxy_to(stub.url, tmp_path, backfill=True) as proxy:
        lose(stub.stub, proxy)
        stub.stub.engine.fail_captures = REASON
    run = proxy.open()
    assert [e.status for e in run.history.episodes.values()] == ["sealed"] and fillers(run) == []
    assert any("no rows for positions" in problem for problem in problems(run))


def test_a_proxy_that_fills_is_stopped_in_the_time_that_it_was_given(stub, tmp_path, monkeypatch):
    with proxy_to(stub.url, tmp_path, backfill=True, drain_s=0.5) as proxy:
        lose(stub.stub, proxy)
        slowly(monkeypatch, (Backend, "compute"), 20)
        begun = time.monotonic()
        proxy.stop()
    assert time.monotonic() - begun < 10 and fillers(proxy.open()) == []


def test_a_run_that_a_proxy_writes_is_left_to_it(stub, tmp_path):
    with proxy_to(stub.url, tmp_path) as proxy:
        lose(stub.stub, proxy)
        with pytest.raises(RunLocked, match="is being written by process"):
            fill(proxy)


def test_what_cannot_be_filled_is_left_with_the_reason(stub, tmp_path):
    """Pictures, a worker that forgot the tokens, and a capture that fails again."""
    with proxy_to(stub.url, tmp_path) as proxy:
        stub.stub.engine.fail_captures = REASON
        converse(proxy.client(), "plain", 1)
        picture = [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": "What is it?"}]
        proxy.client().chat.completions.create(model=MODEL, messages=[{"role": "user", "content": picture}])
        plain, seen = committed(proxy, 2).history.calls
    forget = [msgspec.structs.replace(proxy.open().history.calls[plain], id="c-forgot", sequences=[])]
    with proxy.open().layout.journal.open("ab") as file:
        file.writelines(map(journal.encode, forget))
    left = fill(proxy).left
    assert left[plain] == REASON and "image_url" in left[seen] and "token ids are not known" in left["c-forgot"]
    assert fillers(proxy.open()) == []


def test_a_worker_that_is_not_there_or_runs_another_model_is_refused(stub, tmp_path):
    with proxy_to(stub.url, tmp_path) as proxy:
        lose(stub.stub, proxy)
    with pytest.raises(BadInput, match=r"--backend .*: no worker"):
        fill(proxy, backends=(f"http://127.0.0.1:{free_port()}",))
    about = json.loads(proxy.open().layout.run.read_text())
    about["recorded"]["model"] = "other"
    proxy.open().layout.run.write_text(json.dumps(about))
    with pytest.raises(WrongModel, match="other"):
        fill(proxy)
    with pytest.raises(BadRun, match="not a run"):
        asyncio.run(backfill(existing(tmp_path / "nothing"), proxy.config))


def test_a_backfill_that_is_broken_off_writes_with_one_thread_and_lets_the_run_go_last(stub, tmp_path, monkeypatch):
    """What it was at goes on to its end, the run locked, before anything else is done."""
    with proxy_to(stub.url, tmp_path) as proxy:
        lose(stub.stub, proxy)
    layout, sealing, notes = Layout(proxy.run_dir), threading.Event(), []

    def seal_all(store, dialect):
        sealing.set()
        time.sleep(0.3)
        notes.append(being_written(layout))

    async def breaking_off():
        filling = asyncio.create_task(backfill(layout, proxy.config))
        await asyncio.to_thread(sealing.wait, 20)
        filling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await filling

    monkeypatch.setattr(Store, "seal_all", seal_all)
    monkeypatch.setattr(Store, "roll", lambda store: notes.append("roll"))
    asyncio.run(breaking_off())
    assert notes == [True, "roll"] and not being_written(layout)


@pytest.mark.parametrize("by_itself", [True, False])
def test_rows_of_a_backfill_that_died_are_forgotten_by_the_next_proxy(stub, tmp_path, http, monkeypatch, by_itself):
    """Between having them computed and telling the worker to forget them."""
    forget = Backend.forget

    async def dies(self, call):
        pass

    with proxy_to(stub.url, tmp_path, backfill=not by_itself) as proxy:
        lose(stub.stub, proxy)
        until(lambda: not waiting(stub, http), "the calls themselves to be forgotten")
        monkeypatch.setattr(Backend, "forget", dies)
    if by_itself:
        fill(proxy)
    (filler,) = fillers(proxy.open())
    assert waiting(stub, http) == {filler.id}
    monkeypatch.setattr(Backend, "forget", forget)
    with proxy_to(stub.url, tmp_path):
        until(lambda: not waiting(stub, http), "the worker to have been told to forget")


def test_a_worker_that_runs_something_else_by_now_fills_nothing(stub, tmp_path, http, monkeypatch):
    """Its rows would lie beside the first one's, as if they were."""
    capabilities = Backend.capabilities

    async def other(self):
        return msgspec.structs.replace(await capabilities(self), checkpoint="another")

    with proxy_to(stub.url, tmp_path, backfill=True, episode_idle_s=300) as proxy:
        lose(stub.stub, proxy)
        monkeypatch.setattr(Backend, "capabilities", other)
        body = {"model": MODEL, "messages": [user("Hi")]}
        statuses = [http.post(f"{proxy.url}/v1/chat/completions", json=body | f).status_code for f in (CUT, {})]
        assert statuses == [502, 409]
    run = proxy.open()
    assert fillers(run) == [] and run.episodes["n_incomplete"].to_pylist()[0] > 0


def test_what_cannot_be_asked_for_now_is_left(stub, tmp_path, left_behind, monkeypatch):
    async def hangs(self, call, into, *limits):
        raise NotClaimed("told to hang")

    with monkeypatch.context() as patch, pytest.raises(NotClaimed):
        patch.setattr(Backend, "claim", hangs)
        asyncio.run(backfill(left_behind, Config((stub.url,), tmp_path, "r")))
    assert "c-left" not in open_run(left_behind.root).history.calls
    assert asyncio.run(backfill(left_behind, Config((stub.url,), tmp_path, "r"))).left == {}
    check_filled(open_run(left_behind.root))


def test_what_a_proxy_that_died_left_is_recorded_first(stub, tmp_path, left_behind):
    """With the rows that the worker still has; those that it has not are lost by name, and cannot be filled."""
    assert asyncio.run(backfill(left_behind, Config((stub.url,), tmp_path, "r"))).left == {}
    run = open_run(left_behind.root)
    check_filled(run)
    assert run.history.calls["c-left"].n_kept > 0


def test_what_the_worker_does_not_have_either_is_not_filled(tmp_path, left_behind):
    with Running(Stub(tmp_path / "anew")) as stub:
        done = asyncio.run(backfill(left_behind, Config((stub.url,), tmp_path, "r")))
    assert "c-left" in done.left
    assert ["c-left" in said for said in problems(open_run(left_behind.root))] == [True]


def test_the_command_says_what_it_filled_and_what_is_left(stub, tmp_path):
    with proxy_to(stub.url, tmp_path) as proxy:
        lose(stub.stub, proxy)
    command = [sys.executable, "-m", "proxy", "backfill", str(proxy.run_dir), "--backend", stub.url]
    stub.stub.engine.fail_captures = REASON
    failed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1 and f"{REASON}\n0 rows of 0 calls filled, 1 calls left" in failed.stdout
    stub.stub.engine.fail_captures = None
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "rows of 1 calls filled, 0 calls left" in done.stdout
    check_filled(proxy.open())
    assert {p for c in fillers(proxy.open()) for p in c.points} == set(POINTS)
