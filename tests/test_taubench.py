"""tau-bench through the proxy: every call in its thread and episode, every episode with its result."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from itertools import chain, product
from pathlib import Path

import pytest
from click.testing import CliRunner

from episodes.cast import WARMUPS
from episodes.commands import link
from episodes.run import Run, open_run
from episodes.verify import problems
from tests.conftest import free_port
from tests.player import POLICY, Task, play
from tests.stub import MODEL, Running, Stub

ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("TAUTAP_SHARED", ROOT.parent / "shared")) / "data" / "tau-bench-airline-gpt-4o.json"


def real_tasks(path=REAL):
    """The trajectories in shared/data."""
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    results = json.loads(path.read_text())
    return [
        Task(r["task_id"], r["trial"], r["info"]["task"]["instruction"], r["traj"], info={"kept": True})
        for r in results
    ]


def make_task(number, trial, rng, **how):
    """A trajectory, out of few words. Openings are often the same; what comes later is not, so that it can be said of
    each call where it belongs. `test_cast.py` is about those that nobody can tell apart.
    """
    openings = ["Hi!", "Hello, it is about a flight."]
    words = [f"{word} ({number}, {trial})" for word in ("Yes.", "No.", "My id is 7.")]
    traj = [{"role": "system", "content": POLICY}, {"role": "user", "content": rng.choice(openings)}]
    for _ in range(rng.randint(1, 4)):
        for _ in range(rng.randint(0, 2)):
            function = {"name": "look", "arguments": json.dumps({"at": rng.choice("abc")})}
            calls = [{"id": f"call_{rng.randrange(99)}", "type": "function", "function": function}]
            traj += [{"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "{}"}]
        traj += [{"role": "assistant", "content": rng.choice(words)}, {"role": "user", "content": rng.choice(words)}]
    traj[-1]["content"] = "Bye. ###STOP###"
    return Task(number, trial, f"You are number {number}.", traj, **how)


@contextmanager
def proxy_process(backend: str, data: Path, *flags: str):
    """A proxy in a process of its own, as users run it; leaving it stops and seals. Yields its base URL."""
    port = free_port()
    command = [sys.executable, "-m", "proxy", "proxy", "--backend", backend, "--data", str(data), "--run", "r"]
    with subprocess.Popen([*command, "--port", str(port), *flags], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and f":{port}/v1" in process.stdout.readline()
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def check_places(run: Run) -> dict[str, str]:
    """Every call has its role, turn, attempt and kind; a thread is one conversation, an episode one task attempt.

    Returns episode → task attempt, as the requests tell it.
    """
    threads, episodes = defaultdict(list), defaultdict(set)
    for call in run.history.calls.values():
        truth = json.loads(call.request)["truth"]
        assert call.role == truth["role"]
        if truth["task"] == "warmup":
            assert call.episode == WARMUPS
        else:
            threads[truth["task"], truth["thread"]].append((call, truth))
            episodes[call.episode].add(truth["task"])
    for calls in threads.values():
        assert len({call.thread for call, _ in calls}) == 1
        check_turns(sorted(calls, key=lambda pair: (pair[0].turn, pair[0].attempt)))
    assert len({calls[0][0].thread for calls in threads.values()}) == len(threads)
    assert all(len(tasks) == 1 for tasks in episodes.values()) and WARMUPS not in episodes
    assert sorted(chain.from_iterable(episodes.values())) == sorted({task for task, _ in threads})
    return {episode: next(iter(tasks)) for episode, tasks in episodes.items()}


def check_turns(calls):
    """One thread's calls are what the player meant them to be; what an SDK sent again, it does not know of."""
    attempts, before = Counter(), None
    for call, truth in calls:
        again = truth == before
        assert (call.turn, call.attempt) == (truth["turn"], attempts[call.turn])
        assert call.kind == ("retry" if again else truth["kind"])
        attempts[call.turn] += 1
        before = truth if call.status != 200 else None


def check_linked(run_dir, tmp_path, results, expected, name="results.json"):
    """`tautap link` gives every episode its own result, and the second time changes nothing."""
    path = tmp_path / name
    path.write_text(json.dumps(results))
    output = CliRunner().invoke(link, [str(run_dir), str(path)])
    assert output.exit_code == 0, output.output
    assert f"{len(results)} results joined, {len(results)} of them new" in output.output, output.output
    assert "0 results without an episode, 0 episodes without a result" in output.output
    again = CliRunner().invoke(link, [str(run_dir), str(path)])
    assert f"{len(results)} results joined, 0 of them new" in again.output
    rows = {row["episode"]: row for row in open_run(run_dir).episodes.to_pylist() if row["episode"] != WARMUPS}
    assert {e: f"{r['task_id']}/{r['trial']}" for e, r in rows.items()} == expected
    rewards = {f"{r['task_id']}/{r['trial']}": r["reward"] for r in results}
    assert {e: r["reward"] for e, r in rows.items()} == {e: rewards[task] for e, task in expected.items()}
    return rows


def test_real_trajectories_16_at_once_are_all_in_their_place_and_linked(tmp_path):
    """All four trials of every task at once, in a random order, with warm-ups, failures and the SDK's retries."""
    tasks = real_tasks()
    random.Random(1).shuffle(tasks)
    stub = Stub(tmp_path / "spool")
    stub.faults = ["500" if i % 97 == 50 else "" for i in range(2000)]
    with Running(stub, captures=False) as running, proxy_process(running.url, tmp_path / "data") as url:
        play(url, MODEL, tasks)
    run = open_run(tmp_path / "data" / "r")
    expected = check_places(run)
    assert Counter(call.kind for call in run.history.calls.values())["retry"] == 21
    assert all(row["user_thread"] and not row["tied"] for row in run.episodes.to_pylist() if row["episode"] in expected)
    rows = check_linked(run.layout.root, tmp_path, json.loads(REAL.read_text()), expected)
    assert {(r["env"], r["strategy"], r["user_strategy"]) for r in rows.values()} == {
        ("airline", "tool-calling", "llm")
    }


def test_every_way_of_playing_is_recognised(tmp_path):
    """Each agent with each user, all at once, captured: all in place, paired, linked, and every row there."""
    rng = random.Random(3)
    ways = list(product(["tool-calling", "act", "react"], ["llm", "react", "verify", "reflection"]))
    tasks = [make_task(i, 0, rng, agent=agent, user=user) for i, (agent, user) in enumerate(ways * 3)]
    with Running(Stub(tmp_path / "spool")) as stub, proxy_process(stub.url, tmp_path / "data") as url:
        results = play(url, MODEL, tasks)
    run = open_run(tmp_path / "data" / "r")
    expected = check_places(run)
    assert {call.kind for call in run.history.calls.values()} == {"turn", "reask", "branch"}
    rows = check_linked(run.layout.root, tmp_path, results, expected)
    for row in rows.values():
        agent, user = ways[int(row["task_id"]) % len(ways)]
        assert (row["benchmark"], row["strategy"], row["user_strategy"]) == ("tau-bench", agent, user)
    assert {row["status"] for row in rows.values()} == {"sealed"}
    assert list(problems(open_run(run.layout.root))) == []


def test_attempts_that_crashed_are_linked_by_their_instruction(tmp_path):
    """Trials one after another, some of which end in an exception: with no transcript, each still gets its result."""
    rng = random.Random(5)
    trials = [[make_task(i, trial, rng) for i in range(4)] for trial in range(3)]
    for trial, number, at in ((0, 1, 0), (1, 2, 2), (2, 1, 0), (2, 3, 0)):
        trials[trial][number].crash_at = at
    with Running(Stub(tmp_path / "spool"), captures=False) as stub, proxy_process(stub.url, tmp_path / "data") as url:
        results = play(url, MODEL, *trials)
    expected = check_places(open_run(tmp_path / "data" / "r"))
    rows = check_linked(tmp_path / "data" / "r", tmp_path, results, expected)
    crashed = {f"{row['task_id']}/{row['trial']}" for row in rows.values() if row["error"] == "told to crash"}
    assert crashed == {"1/0", "2/1", "1/2", "3/2"}
    assert {row["linked_by"] for row in rows.values()} == {"transcript", "instruction"}
