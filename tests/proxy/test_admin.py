"""The proxy's own routes: what a run holds, sealing it, joining results to it."""

import asyncio
import threading

import pytest

from episodes.run import open_run
from proxy.backend import Backend
from proxy.recorder import Recording
from tests.conftest import proxy_to, until
from tests.proxy.test_server import check_rows, committed, converse, user
from tests.stub import HIDDEN, MODEL, POINTS


def attempt(client, task):
    """An agent and a user speak twice, in tau-bench's manner; returns the entry of a results file."""

    def say(messages):
        text = client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content
        messages.append({"role": "assistant", "content": text})
        return text

    instruction = f"You are customer {task}."
    system = f"You are a user interacting with an agent.\n\nInstruction: {instruction}\n\nRules:\n- Be brief."
    customer = [{"role": "system", "content": system}, user("Hi! How can I help you today?")]
    agent = [{"role": "system", "content": "# Retail agent policy\nBe kind."}]
    for _ in range(2):
        agent.append(user(say(customer)))
        customer.append(user(say(agent)))
    agent.append(user(say(customer)))
    return {"task_id": task, "trial": 0, "reward": 1.0, "info": {"task": {"instruction": instruction}}, "traj": agent}


def test_what_is_recorded_is_counted_as_it_comes(proxy, http):
    """Counts of a run are what its journal adds up to; one that nobody opened is not made by asking."""
    path = f"{proxy.url}/tautap/runs/counted"
    asked = http.get(path)
    assert asked.status_code == 400 and "POST /tautap/runs/<run> opens one" in asked.json()["error"]["message"]
    assert not (proxy.config.data / "counted").exists()
    assert http.post(path).json() == {"calls": 0, "tokens": 0, "rows": 0, "bytes": 0}
    converse(proxy.client("/runs/counted/v1"), "counted", 3)
    until(lambda: http.get(path).json()["calls"] == 3, "three calls")
    calls = open_run(proxy.config.data / "counted").history.calls.values()
    n_rows = sum(call.n_kept for call in calls)
    tokens = sum(call.n_prompt + call.n_completion for call in calls)
    expected = {"calls": 3, "tokens": tokens, "rows": n_rows, "bytes": n_rows * len(POINTS) * HIDDEN * 2}
    assert http.get(path).json() == expected


def test_a_run_that_goes_on_is_counted_whole(stub, tmp_path, http):
    """What an earlier proxy recorded counts, sealed as it is."""
    held = []
    for n_calls in (2, 1):
        with proxy_to(stub.url, tmp_path) as proxy:
            held.append(http.post(f"{proxy.url}/tautap/runs/r").json())
            converse(proxy.client(), f"begun with {n_calls}", n_calls)
    calls = open_run(proxy.run_dir).history.calls.values()
    n_rows = sum(call.n_kept for call in calls if "begun with 2" in call.request)
    assert [before["calls"] for before in held] == [0, 2]
    assert held[1]["rows"] == n_rows > 0 and held[1]["bytes"] == n_rows * len(POINTS) * HIDDEN * 2


def test_sealing_waits_for_what_is_under_way(proxy, stub, http):
    """A call that has no reply yet is in its shard when the seal is answered, and the conversation may go on."""
    stub.stub.token_s = 0.05
    talking = threading.Thread(target=converse, args=(proxy.client(), "slow", 1))
    talking.start()
    until(lambda: stub.stub.bodies, "a call that is under way")
    sealed = http.post(f"{proxy.url}/tautap/runs/r/seal").json()
    talking.join()
    run = proxy.open()
    assert {e.status for e in run.history.episodes.values()} == {"sealed"}
    (row,) = run.episodes.to_pylist()
    assert sealed == {name: row[name] for name in sealed if name in row} | {"n_episodes": 1, "n_waiting": 0}
    assert sealed["n_calls"] == 1 and sealed["n_rows"] == row["n_rows"] > 0
    converse(proxy.client(), "slow", 2)
    committed(proxy, 3)
    proxy.stop()
    check_rows(proxy.open())


def test_a_seal_says_what_it_did_not_wait_for(proxy, stub, http, monkeypatch):
    """A call whose rows do not come: the worker has died, or is slow."""
    come, claim, seal = threading.Event(), Backend.claim, Recording.seal

    async def held(self, *args):
        await asyncio.to_thread(come.wait, 20)
        await claim(self, *args)

    async def late(self, idle_s):
        come.set()
        await self._under_way.over()
        await seal(self, idle_s)

    monkeypatch.setattr("proxy.recorder.SETTLE_S", 0.2)
    converse(proxy.client(), "quick", 1)
    committed(proxy, 1)
    monkeypatch.setattr(Backend, "claim", held)
    converse(proxy.client(), "slow", 1)
    sealed = http.post(f"{proxy.url}/tautap/runs/r/seal").json()
    assert (sealed["n_calls"], sealed["n_waiting"]) == (1, 1)
    monkeypatch.setattr(Recording, "seal", late)  # the call is recorded meanwhile, and counted once
    sealed = http.post(f"{proxy.url}/tautap/runs/r/seal").json()
    assert (sealed["n_calls"], sealed["n_waiting"]) == (2, 0)
    committed(proxy, 2)
    sealed = http.post(f"{proxy.url}/tautap/runs/r/seal").json()
    assert (sealed["n_calls"], sealed["n_waiting"]) == (2, 0)


def test_results_are_joined_while_the_proxy_runs(proxy, http):
    """Once; joining them again changes nothing, and what belongs to nobody is said."""
    results = [attempt(proxy.client(), task) for task in (1, 2)]
    converse(proxy.client(), "somebody else", 1)
    assert http.post(f"{proxy.url}/tautap/runs/r/seal").json()["n_episodes"] == 3
    stranger = {**results[0], "task_id": 7, "traj": [user("never said")]}
    link = f"{proxy.url}/tautap/runs/r/link?name=act-m-0.0_range_0--1_user-m-llm_0101000000.json&env=retail&split=test"
    said = http.post(link, json={"results": [*results, stranger]}).json()
    assert (said["joined"], said["new"], said["results"]) == (2, 2, ["task 7, trial 0"]) and len(said["episodes"]) == 1
    assert http.post(link, json={"results": results}).json()["new"] == 0
    for _ in range(2):
        rows = {row["task_id"]: row for row in proxy.open().episodes.to_pylist() if row["task_id"]}
        assert {task: (row["reward"], row["env"], row["split"]) for task, row in rows.items()} == {
            "1": (1.0, "retail", "test"),
            "2": (1.0, "retail", "test"),
        }
        proxy.stop()


@pytest.mark.parametrize("results", [[{"task_id": 1}], {}, None])
def test_a_results_file_of_another_shape_is_refused(proxy, http, results):
    said = http.post(f"{proxy.url}/tautap/runs/r/link?name=odd.json", json={"results": results})
    assert said.status_code == 400
    assert "odd.json is not a results file of tau-bench, a JSON list of task_id" in said.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"[{", b"[]", b"{}", b'{"results": [], "tasks": {"one": ""}}', b"[" * 9999])
def test_a_body_that_holds_no_results_is_refused(proxy, http, body):
    said = http.post(f"{proxy.url}/tautap/runs/r/link", content=body)
    assert said.status_code == 400 and "the body is not results" in said.json()["error"]["message"]


def test_a_run_whose_name_is_none_is_refused(proxy, http):
    said = http.post(f"{proxy.url}/tautap/runs/.hidden")
    assert said.status_code == 400 and ".hidden" in said.json()["error"]["message"]
