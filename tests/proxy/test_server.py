"""The proxy in front of the stub: what clients see, and what is recorded of it."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from starlette.responses import JSONResponse, Response

from episodes.errors import BadInput, RunLocked, WrongFormat, WrongModel
from episodes.layout import Layout
from episodes.run import open_run
from episodes.store import Store, being_written
from episodes.verify import problems
from episodes.wire import CAPTURE_HEADER, Capture
from proxy.__main__ import cli, settle
from proxy.__main__ import proxy as command
from proxy.backend import Backend
from proxy.config import Config, Limits
from proxy.recorder import Recording
from proxy.server import serve
from servers import healthy
from tests.conftest import free_port, proxy_to, until
from tests.stub import BLOCK, HIDDEN, MODEL, POINTS, Running, Stub, render, rows
from worker.ledger import ABORT_GRACE_S
from worker.server import Routes

SYSTEM = {"role": "system", "content": "You are a clerk. " * 10}


def user(text):
    return {"role": "user", "content": text}


def converse(client, name, turns=3, stream=False, system=SYSTEM):
    """A conversation of so many turns; returns its messages."""
    messages = [system]
    for turn in range(turns):
        messages.append(user(f"{name}, turn {turn}"))
        reply = client.chat.completions.create(model=MODEL, messages=messages, stream=stream)
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
        else:
            text = reply.choices[0].message.content
        messages.append({"role": "assistant", "content": text})
    return messages


def check_rows(run):
    """Every call that was captured has every row, and every row is the one that its tokens make."""
    assert list(problems(run)) == []
    for call_id in run.history.calls:
        call = run.call(call_id)
        for sequence in call.record.sequences:
            tokens = sequence.tokens.tolist()
            expected = rows(tokens, call.record.points)
            for i, point in enumerate(call.record.points):
                assert np.array_equal(call.activations(point, sequence.choice), expected[:, i])


def committed(proxy, n):
    until(lambda: len(proxy.open().history.calls) >= n, f"{n} calls in the journal")
    return proxy.open()


# ---- the main job


@pytest.mark.parametrize("stream", [False, True])
def test_conversations_at_once_become_sealed_episodes(proxy, stream):
    """Four conversations in flight: four episodes of three turns, every row once, shared ones shared."""
    threads = [threading.Thread(target=converse, args=(proxy.client(), f"talk {i}", 3, stream)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    proxy.stop()
    run = proxy.open()
    check_rows(run)
    episodes = run.episodes.to_pylist()
    assert [e["status"] for e in episodes] == ["sealed"] * 4
    assert [(e["n_calls"], e["n_turns"]) for e in episodes] == [(3, 3)] * 4
    assert all(e["n_missing"] == 0 for e in episodes)
    assert sum(e["n_shared"] for e in episodes) > sum(e["n_rows"] for e in episodes)
    stored = [(c.id, k.choice, p) for c in run.history.calls.values() for k in c.kept for p in range(k.start, k.stop)]
    assert len(stored) == len(set(stored)) == sum(e["n_rows"] for e in episodes)
    assert pq.read_table(run.layout.episodes)["n_rows"].to_pylist() == [e["n_rows"] for e in episodes]


def test_what_the_engine_saw_is_what_is_recorded(proxy):
    messages = [user("Hi")]
    reply = proxy.client().chat.completions.create(model=MODEL, messages=messages)
    proxy.stop()
    (call,) = proxy.open().history.calls.values()
    assert call.sequences[0].prompt_token_ids == render(messages)
    assert bytes(call.sequences[0].completion_token_ids).decode() == reply.choices[0].message.content
    assert json.loads(call.request)["messages"] == messages
    assert json.loads(call.reply)["choices"][0]["message"]["content"] == reply.choices[0].message.content
    assert call.started <= call.first_byte <= call.ended and call.status == 200 and call.finish_reason == "stop"


def test_choices_of_one_call_are_all_recorded(proxy):
    proxy.client().chat.completions.create(model=MODEL, messages=[user("Hi")], n=3)
    proxy.client().completions.create(model=MODEL, prompt=["one", "two"], n=2)
    proxy.stop()
    run = proxy.open()
    check_rows(run)
    assert [len(c.sequences) for c in run.history.calls.values()] == [3, 4]


def test_no_more_runs_are_open_than_may_be(stub, tmp_path, http):
    """Each holds files and threads: one that is too many is refused by name, and those that are open go on."""
    ask = {"model": MODEL, "messages": [user("Hi")]}
    with proxy_to(stub.url, tmp_path, limits=Limits(runs=2)) as proxy:
        assert http.post(f"{proxy.url}/tautap/runs/second").status_code == 200
        for url, body in (("/tautap/runs/third", None), ("/runs/third/v1/chat/completions", ask)):
            refused = http.post(f"{proxy.url}{url}", json=body)
            said = "run third: 2 runs are open, which is all that may be (--max-runs): use one"
            assert refused.status_code == 409 and refused.json()["error"]["message"] == said
        for url in ("/v1", "/runs/second/v1"):
            assert http.post(f"{proxy.url}{url}/chat/completions", json=ask).status_code == 200
    assert not (tmp_path / "third").exists() and len(stub.stub.bodies) == 2


def test_an_episode_is_sealed_when_it_has_been_quiet(stub, tmp_path):
    with proxy_to(stub.url, tmp_path, episode_idle_s=0.2) as proxy:
        converse(proxy.client(), "quiet", 2)
        until(lambda: [e.status for e in proxy.open().history.episodes.values()] == ["sealed"], "a seal")
        check_rows(proxy.open())


def test_live_calls_are_readable_before_any_seal(proxy):
    converse(proxy.client(), "live", 2)
    run = committed(proxy, 2)
    assert [e.status for e in run.history.episodes.values()] == ["live"]
    check_rows(run)


def test_a_run_goes_on_after_a_restart(stub, tmp_path):
    """The second proxy appends to the run; what the engine still has cached is not relied upon."""
    for _ in range(2):
        with proxy_to(stub.url, tmp_path) as proxy:
            converse(proxy.client(), "again", 2)
    run = proxy.open()
    assert len(run.history.calls) == 4
    check_rows(run)
    assert {c.n_kept for c in list(run.history.calls.values())[2:]} == {0}


# ---- transparency


def test_the_client_sees_the_workers_own_bytes(stub, proxy, http):
    """Body and status as the worker sent them, but for id and time; of ours only the price header."""
    body = {"model": MODEL, "messages": [user("Hi")]}
    ours = http.post(f"{proxy.url}/v1/chat/completions", json=body)
    plain = http.post(f"{stub.url}/v1/chat/completions", json=body)
    off = http.post(f"{proxy.url}/v1/chat/completions", json=body | {"collect_activations": False})
    replies = [{k: v for k, v in r.json().items() if k not in ("id", "created")} for r in (ours, plain, off)]
    assert replies[0] == replies[1] == replies[2]
    assert ours.headers["x-litellm-response-cost"] == "0"
    assert not [name for name in ours.headers if "tautap" in name]
    assert b"cache_salt" not in ours.content and "activations" not in ours.text


def test_a_stream_is_passed_on_event_by_event(stub, proxy):
    """Each event reaches the client before the next one is made."""
    stub.stub.token_s = 0.05
    times = []
    for _ in proxy.client().chat.completions.create(model=MODEL, messages=[user("Hi")], stream=True):
        times.append(time.monotonic())
    gaps = np.diff(times[1:])
    assert len(gaps) >= 5 and np.median(gaps) > 0.03


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models?x=1"])
def test_everything_else_under_v1_passes_through(proxy, stub, http, path):
    assert http.get(f"{proxy.url}{path}").json() == http.get(f"{stub.url}{path}").json()


def test_the_workers_store_is_not_reachable_through_the_proxy(proxy, http):
    for path in ("/v1/activations", "/v1/activations/c-1", "/nowhere"):
        reply = http.get(f"{proxy.url}{path}")
        assert reply.status_code == 404 and set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_clients_credentials_stay_with_the_proxy(stub, proxy, http):
    headers = {"Authorization": "Bearer secret", "Cookie": "a=b", "X-Custom": "y"}
    http.post(f"{proxy.url}/v1/chat/completions", json={"model": MODEL, "messages": [user("Hi")]}, headers=headers)
    seen = stub.stub.headers[-1]
    assert not {"cookie", "authorization", "x-custom"} & set(seen)


@pytest.mark.parametrize("body", [b"{", b"[1]", b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}'])
def test_the_workers_errors_come_through_unchanged(stub, proxy, http, body):
    headers = {"content-type": "application/json"}
    ours = http.post(f"{proxy.url}/v1/chat/completions", content=body, headers=headers)
    plain = http.post(f"{stub.url}/v1/chat/completions", content=body, headers=headers)
    assert (ours.status_code, ours.content) == (plain.status_code, plain.content)
    assert ours.status_code in (400, 404)
    assert [c.status for c in committed(proxy, 1).history.calls.values()] == [ours.status_code]


def test_an_alias_names_a_served_model(stub, tmp_path):
    with proxy_to(stub.url, tmp_path, aliases={"gpt-4o": MODEL}) as proxy:
        proxy.client().chat.completions.create(model="gpt-4o", messages=[user("Hi")])
    assert stub.stub.bodies[-1]["model"] == MODEL
    check_rows(proxy.open())


# ---- what a call asks for itself


def test_a_call_can_choose_its_own_points(proxy, http):
    body = {"model": MODEL, "messages": [user("Hi")], "collect_activations": {"layers": [0], "hook_points": ["output"]}}
    reply = http.post(f"{proxy.url}/v1/chat/completions", json=body)
    assert "activations" not in reply.text and reply.status_code == 200
    proxy.stop()
    run = proxy.open()
    (call,) = run.history.calls.values()
    assert call.points == ["layers.0.output"]
    check_rows(run)


def test_a_call_can_choose_its_tokens(proxy, http):
    body = {"model": MODEL, "messages": [user("Hi")], "collect_activations": {"tokens": "last"}}
    assert http.post(f"{proxy.url}/v1/chat/completions", json=body).status_code == 200
    proxy.stop()
    run = proxy.open()
    (call,) = run.history.calls.values()
    assert (call.tokens, call.n_kept, call.points) == ("last", 1, POINTS)
    found = run.call(call.id)
    tokens = call.sequences[0].prompt_token_ids
    assert found.positions().tolist() == [len(tokens) - 1]
    assert np.array_equal(found.activations(POINTS[0]), rows(tokens, POINTS[:1])[-1:, 0])


def test_a_call_can_ask_not_to_be_captured(proxy, http):
    body = {"model": MODEL, "messages": [user("Hi")], "collect_activations": False}
    http.post(f"{proxy.url}/v1/chat/completions", json=body)
    proxy.stop()
    (call,) = proxy.open().history.calls.values()
    assert call.points == [] and call.lost is None and call.status == 200


def test_a_call_that_asks_is_captured_though_its_role_is_not(stub, tmp_path, http):
    body = {"model": MODEL, "messages": [user("Hi")]}
    with proxy_to(stub.url, tmp_path, capture={"agent": "none"}) as proxy:
        for asks in ({}, {"collect_activations": {"layers": [0]}}):
            assert http.post(f"{proxy.url}/v1/chat/completions", json=body | asks).status_code == 200
    calls = sorted(proxy.open().history.calls.values(), key=lambda call: call.started)
    assert [(call.points, call.tokens, call.n_kept > 0) for call in calls] == [
        ([], "all", False),
        (["layers.0.output"], "all", True),
    ]


@pytest.mark.parametrize(("asked", "says"), [({"layers": [77]}, "layers 0 to 5"), ("x", "collect_activations")])
def test_a_wrong_wish_is_refused_in_openais_shape(proxy, http, asked, says):
    body = {"model": MODEL, "messages": [user("Hi")], "collect_activations": asked}
    reply = http.post(f"{proxy.url}/v1/chat/completions", json=body)
    assert reply.status_code == 400 and says in reply.json()["error"]["message"]


def test_episodes_and_runs_can_be_named(proxy, http):
    """By header, by base URL, by both kinds of path at once."""
    client = proxy.client()
    create = client.chat.completions.create
    create(model=MODEL, messages=[user("a")], extra_headers={"X-Episode-Id": "mine"})
    converse(proxy.client("/episodes/mine/v1"), "b", 2)
    converse(proxy.client("/runs/other/v1"), "c", 1)
    converse(proxy.client("/runs/other/episodes/theirs/v1"), "d", 1)
    proxy.stop()
    mine, other = proxy.open(), open_run(proxy.config.data / "other")
    assert list(mine.history.episodes) == ["mine"] and len(mine.history.calls) == 3
    assert len(other.history.episodes) == 2 and "theirs" in other.history.episodes
    for run in (mine, other):
        check_rows(run)


@pytest.mark.parametrize(("path", "n_turns"), [("/episodes/named/v1", [3]), ("/v1", [2, 1])])
def test_a_conversation_that_goes_on_after_a_seal_is_of_the_same_episode_if_it_is_named(proxy, http, path, n_turns):
    """Which is sealed again, whole; else of another."""
    said = converse(proxy.client(path), "paused", 2)
    assert http.post(f"{proxy.url}/tautap/runs/r/seal").json()["n_waiting"] == 0
    assert [e.status for e in proxy.open().history.episodes.values()] == ["sealed"]
    proxy.client(path).chat.completions.create(model=MODEL, messages=[*said, user("Still there?")])
    proxy.stop()
    run = proxy.open()
    assert [(e["n_turns"], e["status"]) for e in run.episodes.to_pylist()] == [(n, "sealed") for n in n_turns]
    assert len({call.thread for call in run.history.calls.values()}) == 2
    check_rows(run)


@pytest.mark.parametrize("path", ["/runs/..%2Fx/v1", "/episodes/.hidden/v1", "/runs/a%00b/v1", "/episodes/a%20b/v1"])
def test_a_name_cannot_leave_the_data_directory(proxy, http, path):
    body = {"model": MODEL, "messages": [user("Hi")]}
    reply = http.post(f"{proxy.url}{path}/chat/completions", json=body)
    assert reply.status_code in (400, 404) and "error" in reply.json()
    assert {p.name for p in proxy.config.data.iterdir()} == {"r"}


@pytest.mark.parametrize("name", ["../x", "..", ".hidden", "a b", "x" * 129])
def test_an_episode_that_a_header_names_is_a_plain_name(stub, proxy, http, name):
    """Its shard is named by it."""
    body = {"model": MODEL, "messages": [user("Hi")]}
    reply = http.post(f"{proxy.url}/v1/chat/completions", json=body, headers={"X-Episode-Id": name})
    assert reply.status_code == 400 and "episode " in reply.json()["error"]["message"] and not stub.stub.bodies


@pytest.mark.parametrize(("path", "headers"), [("/v1", {"X-Episode-Id": "warmups"}), ("/episodes/warmups/v1", {})])
def test_an_episode_is_not_named_as_the_calls_before_there_is_a_task_are(stub, proxy, http, path, headers):
    """Those are neither counted nor linked."""
    body = {"model": MODEL, "messages": [user("Hi")]}
    reply = http.post(f"{proxy.url}{path}/chat/completions", json=body, headers=headers)
    assert reply.status_code == 400 and "any other name" in reply.json()["error"]["message"] and not stub.stub.bodies


# ---- when things go wrong


def test_a_worker_that_is_down_is_502_and_in_the_journal(tmp_path, http):
    with proxy_to(f"http://127.0.0.1:{free_port()}", tmp_path) as proxy:
        body = {"model": MODEL, "messages": [user("Hi")]}
        reply = http.post(f"{proxy.url}/v1/chat/completions", json=body)
        assert reply.status_code == 502 and "worker" in reply.json()["error"]["message"]
        assert http.get(f"{proxy.url}/v1/models").status_code == 502
        assert http.get(f"{proxy.url}/health/ready").status_code == 503
        assert http.get(f"{proxy.url}/health/live").status_code == 200
    (call,) = proxy.open().history.calls.values()
    assert call.status == 502 and "worker" in call.error


def test_a_retry_after_a_failure_is_the_same_turn(stub, proxy):
    stub.stub.faults = ["500"]
    client = proxy.client()
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=MODEL, messages=[user("Hi")])
    client.chat.completions.create(model=MODEL, messages=[user("Hi")])
    proxy.stop()
    run = proxy.open()
    calls = sorted(run.history.calls.values(), key=lambda c: c.attempt)
    assert [(c.status, c.turn, c.attempt) for c in calls] == [(500, 0, 0), (200, 0, 1)]
    assert len({c.thread for c in calls}) == 1
    check_rows(run)


class Late(Stub):
    """Its first reply fails when the engine has run, as vLLM's does where it cannot make sense of what came out."""

    late = True

    async def _serve(self, request, kind):
        reply = await super()._serve(request, kind)
        if not self.late:
            return reply
        self.late = False
        return JSONResponse({"error": {"message": "told to"}}, 500)


def test_a_reply_that_fails_after_the_engine_ran_loses_no_rows(tmp_path, http):
    """They are cached, so that the next call has none of its own; and nothing is left in the spool."""
    body = {"model": MODEL, "messages": [user("Hi there " * 20)]}
    with Running(Late(tmp_path / "spool")) as worker, proxy_to(worker.url, tmp_path / "data") as proxy:
        said = [http.post(f"{proxy.url}/v1/chat/completions", json=body).status_code for _ in range(2)]
    assert said == [500, 200]
    run = proxy.open()
    check_rows(run)
    assert sorted((call.status, call.lost, len(call.sequences)) for call in run.history.calls.values()) == [
        (200, None, 1),
        (500, None, 1),
    ]
    assert run.calls["n_missing"].to_pylist() == [0, 0]
    assert not list((tmp_path / "spool").glob("*.safetensors"))


@pytest.mark.parametrize(("fields", "status"), [({"stub_fault": "429"}, 429), ({"cache_salt": 7}, 400)])
def test_a_call_that_the_worker_refuses_costs_the_others_nothing(stub, proxy, http, fields, status):
    """It ran nothing, so nothing is lost, which is known at once; what is cached stays in use."""
    body = {"model": MODEL, "messages": [user("Hi there " * 20)]}
    said = [http.post(f"{proxy.url}/v1/chat/completions", json=body | more).status_code for more in ({}, fields)]
    assert said == [200, status]
    until(lambda: len(proxy.open().history.calls) == 2, "the refused call in the journal", limit_s=ABORT_GRACE_S / 2)
    proxy.client().chat.completions.create(**body)
    proxy.stop()
    run = proxy.open()
    check_rows(run)
    first, refused, third = sorted(run.history.calls.values(), key=lambda call: call.started)
    assert (refused.status, refused.lost, refused.sequences) == (status, None, [])
    assert first.n_kept > 100 and third.n_kept < BLOCK


@pytest.mark.parametrize("status", [401, 503])
def test_an_error_reply_waits_for_no_claim(tmp_path, http, monkeypatch, status):
    """Not with `--durability sync` either: it has mostly no rows. What a worker is asked in vain is lost."""

    async def refuse(routes, request):
        return Response(status_code=status)

    monkeypatch.setattr("proxy.recorder.REFUSED_S", 1.0)
    monkeypatch.setattr(Routes, "claim", refuse)
    body = {"model": MODEL, "messages": [user("Hi")]}
    with Running(Stub(tmp_path / "spool")) as stub, proxy_to(stub.url, tmp_path, durability="sync") as proxy:
        stub.stub.faults = ["500"]
        assert http.post(f"{proxy.url}/v1/chat/completions", json=body, timeout=0.8).status_code == 500
        (call,) = committed(proxy, 1).history.calls.values()
    assert call.lost.startswith("not claimed in 1 s: the worker could not be")


def test_a_stream_that_says_that_it_failed_is_recorded_as_failed(stub, proxy, http):
    """vLLM ends it as any other, with status 200. Sent again it is the same turn."""
    stub.stub.faults = ["error"]
    body = {"model": MODEL, "messages": [user("Hi")], "stream": True}
    failed, good = (http.post(f"{proxy.url}/v1/chat/completions", json=body) for _ in range(2))
    assert "told to fail" in failed.text and failed.text.endswith("data: [DONE]\n\n")
    assert "told to fail" not in good.text
    calls = sorted(committed(proxy, 2).history.calls.values(), key=lambda call: call.started)
    assert [call.error for call in calls] == ["the worker failed: told to fail", None]
    assert [(call.turn, call.attempt) for call in calls] == [(0, 0), (0, 1)]
    assert len({call.thread for call in calls}) == 1


@pytest.mark.parametrize("kind", ["NaN", "byte order mark", "lone surrogate"])
def test_a_body_that_a_worker_reads_and_we_do_not_is_a_call_that_lost_its_rows(proxy, http, kind):
    """Python's JSON takes more than JSON is; what it does not take either has lost nothing."""
    said = {"model": MODEL, "messages": [user("\ud800" if kind == "lone surrogate" else "Hi")]}
    text = json.dumps(said | ({"extra": float("nan")} if kind == "NaN" else {}))
    body = text.encode("utf-8-sig" if kind == "byte order mark" else "utf-8")
    headers = {"Content-Type": "application/json"}
    replies = [http.post(f"{proxy.url}/v1/chat/completions", content=b, headers=headers) for b in (body, body[:-1])]
    assert [reply.status_code for reply in replies] == [200, 400]
    run = committed(proxy, 2)
    read, refused = sorted(run.history.calls.values(), key=lambda call: call.started)
    assert "no captured call has this id" in read.lost and refused.lost is None
    assert {e["episode"]: e["n_incomplete"] for e in run.episodes.to_pylist()} == {read.episode: 1, refused.episode: 0}
    assert [problem for problem in problems(run) if read.id in problem]


def test_activations_that_are_lost_are_journalled_with_the_reason(stub, proxy):
    """The client is not disturbed, and what the lost call computed is computed again for the next."""
    stub.stub.engine.fail_captures = "the spool is full"
    first = converse(proxy.client(), "lost", 1)
    committed(proxy, 1)
    stub.stub.engine.fail_captures = None
    messages = [*first, user("more")]
    proxy.client().chat.completions.create(model=MODEL, messages=messages)
    proxy.stop()
    run = proxy.open()
    lost, good = run.history.calls.values()
    assert lost.lost == "the spool is full" and lost.kept == [] and lost.thread == good.thread
    assert good.n_kept == good.n_positions
    found = list(problems(run))
    assert found[0] == f"call {lost.id}: no activations: the spool is full"
    # The prompt's rows are the next call's by now; what this call generated, that one read in another form.
    assert len(found) == 2 and f"no rows for positions {len(lost.sequences[0].prompt_token_ids)}" in found[1]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_a_call_that_records_nothing_are_counted_as_its_reply_tells_them(stub, proxy, http, stream):
    stub.stub.foreign = {"usage": {"prompt_tokens": 7, "completion_tokens": 3}}
    body = {"model": MODEL, "messages": [user("Hi")], "stream": stream, "collect_activations": False}
    assert http.post(f"{proxy.url}/v1/chat/completions", json=body).status_code == 200
    run = committed(proxy, 1)
    assert run.columns("n_prompt", "n_completion", "points").to_pylist() == [
        {"n_prompt": 7, "n_completion": 3, "points": []}
    ]
    until(lambda: 'tokens_total{kind="prompt"} 7.0' in http.get(f"{proxy.url}/metrics").text, "them to be counted")


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_breaks_off_is_recorded_as_broken(stub, proxy, http, stream):
    stub.stub.faults = ["cut"]
    body = {"model": MODEL, "messages": [user("Hi")], "stream": stream}
    if stream:
        with pytest.raises(httpx.RemoteProtocolError):
            http.post(f"{proxy.url}/v1/chat/completions", json=body)
    else:
        assert http.post(f"{proxy.url}/v1/chat/completions", json=body).status_code == 502
    converse(proxy.client(), "next", 1)
    calls = committed(proxy, 2).history.calls.values()
    assert sorted(call.error or "" for call in calls)[0] == ""
    assert [call for call in calls if call.error and "worker failed" in call.error]


def test_a_reply_that_is_no_json_is_passed_on_and_recorded(stub, proxy, http):
    stub.stub.faults = ["garbage"]
    reply = http.post(f"{proxy.url}/v1/chat/completions", json={"model": MODEL, "messages": [user("Hi")]})
    assert reply.content == b"<html>"
    assert len(committed(proxy, 1).history.calls) == 1


def test_a_client_that_leaves_is_recorded(stub, proxy):
    """The call is in the journal with what it had, and the next call works."""
    stub.stub.token_s = 0.05
    reply = proxy.client().chat.completions.create(model=MODEL, messages=[user("Hi")], stream=True)
    next(iter(reply))
    reply.close()
    (call,) = committed(proxy, 1).history.calls.values()
    assert "client left" in call.error and call.lost is None
    assert 0 < call.n_kept == call.n_positions and len(call.sequences[0].completion_token_ids) < 5
    stub.stub.token_s = 0
    converse(proxy.client(), "next", 1)
    committed(proxy, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_engine_ran_its_call_has_lost_nothing(stub, proxy, http, monkeypatch, stream):
    """As one that waited too long in the worker's queue; of a stream it had the head already."""
    monkeypatch.setattr("worker.ledger.ABORT_GRACE_S", 0.5)
    stub.stub.prompt_s = 0.1
    body = {"model": MODEL, "messages": [user("Hi")], "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        http.post(f"{proxy.url}/v1/chat/completions", json=body, timeout=0.3)
    (call,) = committed(proxy, 1).history.calls.values()
    assert "client left" in call.error and (call.status, call.lost) == (200 if stream else 0, None)
    check_rows(proxy.open())
    stub.stub.prompt_s = 0
    converse(proxy.client(), "next", 1)
    assert Capture.parse(stub.stub.headers[-1][CAPTURE_HEADER.lower()]).salt.endswith(".0")


def test_a_call_that_nobody_foresaw_is_recorded_as_what_its_client_got(proxy, http, monkeypatch):
    monkeypatch.setattr("proxy.generation.messages.without_activations", lambda _: 1 / 0)
    reply = http.post(f"{proxy.url}/v1/chat/completions", json={"model": MODEL, "messages": [user("Hi")]})
    (call,) = committed(proxy, 1).history.calls.values()
    assert call.status == reply.status_code == 500 and "division by zero" in call.error


class Talkative(Stub):
    """Something comes after the last event, in a piece of its own."""

    async def _events(self, *args):
        async for event in super()._events(*args):
            yield event
        await asyncio.sleep(0.1)
        yield b": that was all\n\n"


@pytest.mark.parametrize("durability", ["async", "sync"])
def test_what_comes_after_the_last_event_is_passed_on(tmp_path, http, durability):
    with (
        Running(Talkative(tmp_path / "spool")) as worker,
        proxy_to(worker.url, tmp_path / "data", durability=durability) as proxy,
    ):
        body = {"model": MODEL, "messages": [user("Hi")], "stream": True}
        reply = http.post(f"{proxy.url}/v1/chat/completions", json=body)
        assert reply.status_code == 200 and reply.text.endswith("data: [DONE]\n\n: that was all\n\n")
    run = proxy.open()
    assert [(call.status, call.error) for call in run.history.calls.values()] == [(200, None)]
    check_rows(run)


def test_a_stream_that_nobody_foresaw_to_fail_breaks_off(proxy, http, monkeypatch):
    """No second reply is written into it."""
    monkeypatch.setattr("proxy.generation.Transcript.take", lambda *_: 1 / 0)
    body = {"model": MODEL, "messages": [user("Hi")], "stream": True}
    with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
        http.post(f"{proxy.url}/v1/chat/completions", json=body)
    (call,) = committed(proxy, 1).history.calls.values()
    assert call.status == 200 and "division by zero" in call.error


class Lingering(Stub):
    """The end of a stream comes a while after its last event, as over a network."""

    async def _events(self, *args):
        async for event in super()._events(*args):
            yield event
        await asyncio.sleep(0.3)


def test_a_client_that_leaves_at_the_last_event_has_heard_the_reply(tmp_path):
    """As the openai SDK does."""
    with Running(Lingering(tmp_path / "spool")) as worker, proxy_to(worker.url, tmp_path / "data") as proxy:
        converse(proxy.client(), "hasty", 2, stream=True)
    run = proxy.open()
    assert [(call.error, call.status) for call in run.history.calls.values()] == [(None, 200)] * 2
    assert [(e["n_calls"], e["n_turns"]) for e in run.episodes.to_pylist()] == [(2, 2)]
    check_rows(run)


def test_a_conversation_may_go_on_at_the_last_event_of_a_reply(tmp_path, http):
    """While the stream has not ended yet."""
    with Running(Lingering(tmp_path / "spool")) as worker, proxy_to(worker.url, tmp_path / "data") as proxy:
        url, said, text = f"{proxy.url}/v1/chat/completions", [user("Hi")], ""
        with http.stream("POST", url, json={"model": MODEL, "messages": said, "stream": True}) as reply:
            lines = filter(None, reply.iter_lines())
            while (line := next(lines)) != "data: [DONE]":
                text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
            said += [{"role": "assistant", "content": text}, user("And now?")]
            assert http.post(url, json={"model": MODEL, "messages": said}).status_code == 200
    assert [(e["n_calls"], e["n_turns"]) for e in proxy.open().episodes.to_pylist()] == [(2, 2)]


def test_a_stream_over_http_1_0_ends_with_its_connection(proxy):
    """Though its client would keep that: nothing else tells it that no more comes."""
    body = json.dumps({"model": MODEL, "messages": [user("Hi")], "stream": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.0\r\nHost: 127.0.0.1\r\nConnection: keep-alive\r\n"
    with socket.create_connection(("127.0.0.1", proxy.config.port), timeout=10) as client:
        client.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        with client.makefile("rb") as reply:
            assert reply.read().endswith(b"data: [DONE]\n\n")


def test_a_backend_that_is_not_ours_has_its_activations_kept(tmp_path, http, caplog):
    """Taken out of the reply, streamed or not, and stored with the call. That there are no others is said once."""
    import zstandard

    foreign = Stub(tmp_path / "spool")
    foreign.foreign = {
        "activations": {"layer_8_output": {"data": [1.5]}},
        "activation_collection_status": {"requested": True},
    }
    with Running(foreign, captures=False) as backend, proxy_to(backend.url, tmp_path / "data") as proxy:
        body = {"model": MODEL, "messages": [user("Hi")], "collect_activations": {"layers": [8]}}
        plain = http.post(f"{proxy.url}/v1/chat/completions", json=body)
        streamed = http.post(f"{proxy.url}/v1/chat/completions", json=body | {"stream": True})
        assert "activation" not in plain.text and "activation" not in streamed.text
        assert plain.json()["choices"] and "[DONE]" in streamed.text
    assert foreign.bodies[-1]["collect_activations"] == {"layers": [8]}
    run = proxy.open()
    for call in run.history.calls.values():
        assert call.foreign and call.points == []
        kept = json.loads(zstandard.decompress(run.layout.foreign_file(call.id).read_bytes()))
        assert kept == foreign.foreign
    assert [backend.url in said for said in caplog.messages if "no worker of tautap's" in said] == [True]


# ---- start and stop


def test_a_data_directory_that_cannot_be_written_stops_the_proxy(stub, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(BadInput, match="cannot be written"), proxy_to(stub.url, blocked):
        pass


def test_a_port_in_use_stops_the_proxy(stub, proxy, tmp_path):
    taken = proxy.config.port
    with (
        pytest.raises(BadInput, match=f"cannot listen on 127.0.0.1:{taken}"),
        proxy_to(stub.url, tmp_path / "x", port=taken),
    ):
        pass


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_address_of_ipv6_stands_in_brackets_in_the_url_alone(host):
    options = command.make_context("proxy", ["--backend", "http://x", "--host", host]).params
    config = settle(options.pop("backends"), options)
    assert (config.host, config.url) == ("::1", "http://[::1]:8000")


def test_a_second_proxy_on_a_run_is_refused(stub, proxy):
    with pytest.raises(RunLocked), proxy_to(stub.url, proxy.config.data):
        pass


def test_a_run_of_another_format_or_model_is_refused(stub, tmp_path):
    with proxy_to(stub.url, tmp_path):
        pass
    path = tmp_path / "r" / "run.json"
    text = path.read_text()
    path.write_text(text.replace('"format": 1', '"format": 7'))
    with pytest.raises(WrongFormat, match="format 7"), proxy_to(stub.url, tmp_path):
        pass
    path.write_text(text.replace(f'"hidden_size": {HIDDEN}', '"hidden_size": 4'))
    with pytest.raises(WrongModel, match="hidden_size"), proxy_to(stub.url, tmp_path):
        pass


def test_the_command_drains_and_seals_on_sigterm(stub, tmp_path):
    """A call still under way when the signal comes is answered, recorded and sealed."""
    stub.stub.token_s = 0.1
    port = free_port()
    command = [sys.executable, "-m", "proxy", "proxy", "--backend", stub.url, "--data", str(tmp_path), "--run", "r"]
    with subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        url = f"http://127.0.0.1:{port}"
        until(lambda: healthy(url, "/health/live"), "the proxy")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        replies = []
        talking = threading.Thread(target=lambda: replies.append(converse(client, "last", 1)))
        talking.start()
        until(lambda: bool(stub.stub.bodies), "the call at the worker")
        os.kill(process.pid, signal.SIGTERM)
        talking.join()
        assert process.wait(30) == 0, process.stdout.read()
    assert replies and replies[0][-1]["content"]
    run = open_run(tmp_path / "r")
    assert [e.status for e in run.history.episodes.values()] == ["sealed"]
    check_rows(run)


def test_a_proxy_that_is_to_stop_waits_no_longer_than_it_was_told(stub, tmp_path, monkeypatch):
    """For a claim that never comes: the call is left to the next proxy, with its reply; the worker keeps its rows."""

    async def never(self, call, into, *limits):
        await asyncio.Event().wait()

    with monkeypatch.context() as patch, proxy_to(stub.url, tmp_path, drain_s=0.2) as proxy:
        patch.setattr(Backend, "claim", never)
        converse(proxy.client(), "kept waiting", 1)
        begun = time.monotonic()
        proxy.stop()
    assert 0.2 < time.monotonic() - begun < 10
    (said,) = problems(proxy.open())
    assert "before it had recorded the call: start a proxy on the run" in said
    with proxy_to(stub.url, tmp_path) as proxy:
        pass
    run = proxy.open()
    check_rows(run)
    (call,) = run.history.calls.values()
    assert call.answered and call.finish_reason == "stop" and list(problems(run)) == []
    assert [e.status for e in run.history.episodes.values()] == ["sealed"]


def _statuses(data, *names):
    """What has become of the episodes of these runs."""
    return [[e.status for e in open_run(data / name).history.episodes.values()] for name in names]


def test_a_claim_that_hangs_keeps_no_other_run_from_being_sealed(stub, tmp_path, monkeypatch):
    claim, hung = Backend.claim, []

    async def first_hangs(self, call, into, *limits):
        if not hung:
            hung.append(call)
            await asyncio.Event().wait()
        await claim(self, call, into, *limits)

    monkeypatch.setattr(Backend, "claim", first_hangs)
    with proxy_to(stub.url, tmp_path, drain_s=0.5) as proxy:
        converse(proxy.client("/runs/a/v1"), "kept waiting", 1)
        until(lambda: bool(hung), "the claim")
        converse(proxy.client("/runs/b/v1"), "quiet", 1)
        until(lambda: len(open_run(tmp_path / "b").history.calls) == 1, "the other call in the journal")
    assert _statuses(tmp_path, "a", "b") == [[], ["sealed"]]


def test_a_run_that_cannot_be_closed_is_told_of_when_the_others_are(stub, tmp_path, monkeypatch):
    """It is not locked, either."""
    seal = Recording.seal

    async def fails(self, idle_s):
        if self.salt.startswith("a/"):
            raise MemoryError("told to fail")
        await seal(self, idle_s)

    monkeypatch.setattr(Recording, "seal", fails)
    with pytest.raises(MemoryError, match="told to fail"), proxy_to(stub.url, tmp_path) as proxy:
        for name in "abc":
            converse(proxy.client(f"/runs/{name}/v1"), name, 1)
    assert _statuses(tmp_path, "a", "b", "c") == [["live"], ["sealed"], ["sealed"]]
    assert not being_written(Layout(tmp_path / "a"))


@pytest.mark.parametrize("kind", [MemoryError, pa.ArrowInvalid])
def test_what_goes_wrong_once_ends_neither_the_sealing_nor_the_draining(stub, tmp_path, monkeypatch, caplog, kind):
    """Whatever it is, it is logged, and tried again."""
    pair, roll, failed = Recording._pair, Store.roll, []

    def fails_once(name, real):
        def method(self, *args):
            if name not in failed:
                failed.append(name)
                raise kind(f"told to fail: {name}")
            return real(self, *args)

        return method

    monkeypatch.setattr(Recording, "_pair", fails_once("pair", pair))
    monkeypatch.setattr(Store, "roll", fails_once("roll", roll))
    with proxy_to(stub.url, tmp_path, episode_idle_s=0.2) as proxy:
        converse(proxy.client(), "quiet", 1)
        until(lambda: _statuses(tmp_path, "r") == [["sealed"]], "a seal")
    assert failed == ["pair", "roll"]
    assert [message for message in caplog.messages if "could not be" in message] == [
        "run r could not be sealed",
        f"the index of {tmp_path / 'r'} could not be written",
    ]
    check_rows(proxy.open())


def test_a_worker_that_is_not_heard_to_forget_keeps_nothing_waiting(stub, tmp_path, monkeypatch):
    """Neither a reply that ends when its call is recorded, nor the sealing, nor the end."""

    async def never(self, call):
        await asyncio.Event().wait()

    monkeypatch.setattr(Backend, "forget", never)
    with proxy_to(stub.url, tmp_path, drain_s=0.2, episode_idle_s=0.1, durability="sync") as proxy:
        converse(proxy.client(), "forgotten", 1)
        until(lambda: [e.status for e in proxy.open().history.episodes.values()] == ["sealed"], "a seal")
        begun = time.monotonic()
        proxy.stop()
    assert time.monotonic() - begun < 10
    check_rows(proxy.open())


def test_a_proxy_can_be_stopped_while_it_waits_for_its_worker_to_say_what_it_is(tmp_path):
    async def starting():
        with socket.create_server(("127.0.0.1", 0)) as worker:
            worker.setblocking(False)
            config = Config((f"http://127.0.0.1:{worker.getsockname()[1]}",), tmp_path, "r", port=free_port())
            stop, told = asyncio.Event(), []
            serving = asyncio.create_task(serve(config, stop, lambda: told.append("serves")))
            connection, _ = await asyncio.get_running_loop().sock_accept(worker)
            stop.set()
            with connection:
                await asyncio.wait_for(serving, 5)
            assert not told

    asyncio.run(starting())
    assert open_run(tmp_path / "r").history.calls == {}


@pytest.mark.parametrize(("stream", "status"), [(False, 0), (True, 200)])
def test_a_call_that_outlasts_the_draining_is_broken_off_and_named(stub, tmp_path, stream, status):
    """In the time that was given, not later; the next proxy records it, and does not blame the client."""
    stub.stub.token_s = 0.3
    with proxy_to(stub.url, tmp_path, drain_s=1) as proxy:
        talking = threading.Thread(target=_fails, args=(proxy.client(), stream))
        talking.start()
        until(lambda: bool(stub.stub.bodies), "the call at the worker")
        begun = time.monotonic()
        proxy.stop()
        talking.join()
    assert 1 < time.monotonic() - begun < 1.8
    with proxy_to(stub.url, tmp_path) as proxy:
        committed(proxy, 1)
    (call,) = proxy.open().history.calls.values()
    assert (call.error, call.status) == ("the proxy had to stop before the end of the reply", status)


def test_without_any_time_to_drain_calls_are_broken_off_at_once_and_recorded(stub, tmp_path):
    stub.stub.faults = ["silence"] * 8
    with proxy_to(stub.url, tmp_path, drain_s=0) as proxy:
        talking = [threading.Thread(target=_fails, args=(proxy.client(), False)) for _ in range(8)]
        for thread in talking:
            thread.start()
        until(lambda: len(stub.stub.bodies) == 8, "the calls at the worker")
        begun = time.monotonic()
        proxy.stop()
        for thread in talking:
            thread.join()
    assert time.monotonic() - begun < 5
    errors = [call.error for call in proxy.open().history.calls.values()]
    assert errors == ["the proxy had to stop before the end of the reply"] * 8


def _fails(client, stream):
    with pytest.raises((openai.APIConnectionError, httpx.TransportError)):
        converse(client, "too long", 1, stream)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["proxy"], 2, "--backend"),
        (["episodes", "/nowhere"], 1, "not a run"),
        (["runs", "/nowhere"], 1, "no run"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(args, code, says):
    done = CliRunner().invoke(cli, args, prog_name="tautap")
    assert done.exit_code == code and says in done.stderr and isinstance(done.exception, SystemExit)


def test_a_proxy_that_cannot_start_says_so_in_one_line():
    args = ["proxy", "--backend", "http://127.0.0.1:9", "--data", "/dev/null"]
    done = subprocess.run([sys.executable, "-m", "proxy", *args], capture_output=True, text=True, timeout=60)
    (said,) = done.stderr.splitlines()
    assert done.returncode == 2 and "cannot be written" in said


@pytest.mark.parametrize("command", [[], *([name] for name in cli.commands if name != "worker")])  # which has its own
def test_every_command_has_help(command):
    done = CliRunner().invoke(cli, [*command, "--help"], prog_name="tautap")
    assert done.exit_code == 0 and "Usage: tautap" in done.stdout and len(done.stdout.splitlines()) > 5


def test_points_of_the_stub_are_its_default(proxy):
    converse(proxy.client(), "p", 1)
    proxy.stop()
    (call,) = proxy.open().history.calls.values()
    assert call.points == POINTS and proxy.open().about.recorded.points == POINTS
