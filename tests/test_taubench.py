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

import httpx
import msgspec
import openai
import pytest
from click.testing import CliRunner

from episodes.cast import WARMUPS
from episodes.commands import link
from episodes.errors import BadInput, RunLocked
from episodes.layout import Layout
from episodes.records import Call
from episodes.run import Run, open_run
from episodes.store import Store
from episodes.taubench import Result, find_links, read_results, read_tasks
from episodes.verify import problems
from tests.conftest import free_port, until
from tests.player import HI, POLICY, Task, playing, simulator_prompt
from tests.proxy.test_metrics import read
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


@pytest.fixture(scope="module")
def play():
    with playing() as play:
        yield play


def make_task(number, trial, rng, **how):
    """A trajectory, out of few words. Openings are often the same; what comes later is not, so that it can be said of
    each call where it belongs. `test_cast.py` is about those that nobody can tell apart.
    """
    openings = ["Hi!", "Hello, it is about a flight."]
    words = [f"{word} ({number}, {trial})" for word in ("Yes.", "No.", "My id is 7.")]
    traj = [{"role": "system", "content": POLICY}, {"role": "user", "content": rng.choice(openings)}]
    for _ in range(rng.randint(1, 4)):
        for _ in range(rng.randint(0, 2)):
            function = {"name": "look", "arguments": json.dumps({"at": f"{number}/{trial}"})}
            calls = [{"id": f"call_{rng.randrange(99)}", "type": "function", "function": function}]
            traj += [{"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "{}"}]
        traj += [{"role": "assistant", "content": rng.choice(words)}, {"role": "user", "content": rng.choice(words)}]
    traj[-1]["content"] = "Bye. ###STOP###"
    return Task(number, trial, f"You are number {number}.", traj, **how)


@contextmanager
def proxy_process(backend: str, data: Path, *flags: str, stop: signal.Signals = signal.SIGTERM):
    """A proxy in a process of its own, as users run it; leaving it stops and seals. Yields its base URL."""
    port = free_port()
    command = [sys.executable, "-m", "proxy", "proxy", "--backend", backend, "--data", str(data), "--run", "r"]
    with subprocess.Popen([*command, "--port", str(port), *flags], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and f":{port}/v1" in process.stdout.readline()
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.send_signal(stop)
        assert process.wait(60) == (0 if stop is signal.SIGTERM else -stop)


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


def check_linked(run_dir, tmp_path, results, expected, *options):
    """`tautap link` gives every episode its own result, and the second time changes nothing."""
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    output = CliRunner().invoke(link, [str(run_dir), str(path), *options])
    assert output.exit_code == 0, output.output
    assert f"{len(results)} results joined, {len(results)} of them new" in output.output, output.output
    assert "0 results without an episode, 0 episodes without a result" in output.output
    again = CliRunner().invoke(link, [str(run_dir), str(path), *options])
    assert f"{len(results)} results joined, 0 of them new" in again.output
    rows = {row["episode"]: row for row in open_run(run_dir).episodes.to_pylist() if row["episode"] != WARMUPS}
    assert {e: f"{r['task_id']}/{r['trial']}" for e, r in rows.items()} == expected
    rewards = {f"{r['task_id']}/{r['trial']}": r["reward"] for r in results}
    assert {e: r["reward"] for e, r in rows.items()} == {e: rewards[task] for e, task in expected.items()}
    return rows


def apart(tasks: list[Task]) -> list[list[Task]]:
    """The tasks in rounds, so that no two that begin alike are played at once: nobody could tell those apart."""
    rounds: dict[int, list[Task]] = defaultdict(list)
    alike: Counter[tuple[str, str]] = Counter()
    for task in tasks:
        opening = task.instruction, task.traj[1]["content"]
        rounds[alike[opening]].append(task)
        alike[opening] += 1
    return list(rounds.values())


def test_real_trajectories_16_at_once_are_all_in_their_place_and_linked(play, tmp_path):
    """Trials of every task at once, in a random order, with warm-ups, failures and the SDK's retries."""
    tasks = real_tasks()
    random.Random(1).shuffle(tasks)
    rounds = apart(tasks)
    assert [len(tasks) for tasks in rounds] == [98, 1, 1]
    stub = Stub(tmp_path / "spool")
    stub.faults = ["500" if i % 97 == 50 else "" for i in range(2000)]
    with Running(stub, captures=False) as running, proxy_process(running.url, tmp_path / "data") as url:
        play(url, MODEL, *rounds)
    run = open_run(tmp_path / "data" / "r")
    expected = check_places(run)
    assert Counter(call.kind for call in run.history.calls.values())["retry"] == 21
    assert all(row["user_thread"] and not row["tied"] for row in run.episodes.to_pylist() if row["episode"] in expected)
    rows = check_linked(run.layout.root, tmp_path, json.loads(REAL.read_text()), expected)
    assert {(r["env"], r["strategy"], r["user_strategy"]) for r in rows.values()} == {
        ("airline", "tool-calling", "llm")
    }


def test_every_way_of_playing_is_recognised(play, tmp_path):
    """Each agent with each user, all at once, captured: all in place, paired, linked, and every row there."""
    rng = random.Random(3)
    ways = list(product(["tool-calling", "act", "react", "few-shot"], ["llm", "react", "verify", "reflection"]))
    tasks = [make_task(i, 0, rng, agent=agent, user=user) for i, (agent, user) in enumerate(ways * 2)]
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


def test_attempts_that_crashed_are_linked_by_their_instruction(play, tmp_path):
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


def make_checkout(home, env, instructions):
    """What of a tau-bench says its tasks."""
    path = home / "tau_bench" / "envs" / env / "tasks_test.py"
    path.parent.mkdir(parents=True)
    tasks = [f"Task(annotator='0', user_id='u', instruction={text!r}, actions=[], outputs=[])" for text in instructions]
    path.write_text(f"from tau_bench.types import Action, Task\n\nTASKS = [{', '.join(tasks)}]\n")
    return home


def test_tasks_that_crashed_in_another_order_than_theirs_are_told_apart_by_a_checkout(play, tmp_path):
    """Nothing in their results says which was which: without a checkout it is guessed, and said to be."""
    tasks = [make_task(number, 0, random.Random(number), crash_at=0) for number in range(3)]
    with Running(Stub(tmp_path / "spool"), captures=False) as stub, proxy_process(stub.url, tmp_path / "data") as url:
        results = sorted(play(url, MODEL, [tasks[2]], [tasks[0]], [tasks[1]]), key=lambda r: r["task_id"])
    run = open_run(tmp_path / "data" / "r")
    guessed = find_links(run.history, [msgspec.convert(r, Result) for r in results])
    assert len(list(guessed.doubts())) == 3 and all("by the order of tasks alone" in d for d in guessed.doubts())
    checkout = make_checkout(tmp_path / "tau-bench", "airline", [task.instruction for task in tasks])
    options = ("--tau-bench", str(checkout), "--env", "airline")
    rows = check_linked(run.layout.root, tmp_path, results, check_places(run), *options)
    assert {row["linked_by"] for row in rows.values()} == {"instruction"}
    again = CliRunner().invoke(link, [str(run.layout.root), str(tmp_path / "results.json"), *options[2:]])
    assert "3 results joined, 0 of them new" in again.output and "by the order" not in again.output, (
        "what is known stays"
    )


def test_a_crashed_result_of_another_run_takes_no_episode_from_its_own(play, tmp_path):
    """Not even the only one of whose task nothing is known."""
    tasks = [make_task(number, 0, random.Random(number)) for number in range(2)]
    with Running(Stub(tmp_path / "spool"), captures=False) as stub, proxy_process(stub.url, tmp_path / "data") as url:
        results = play(url, MODEL, tasks)
    run = open_run(tmp_path / "data" / "r")
    check_linked(run.layout.root, tmp_path, results, check_places(run))
    strangers = [{**results[0], "traj": [], "info": {"error": "odd"}}, {**results[1], "traj": [], "info": {}}]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(strangers))
    refused = CliRunner().invoke(link, [str(run.layout.root), str(other)]).exception
    assert isinstance(refused, BadInput) and "is it another run's?" in str(refused)


def test_a_checkout_that_does_not_have_the_tasks_is_refused(tmp_path):
    checkout = make_checkout(tmp_path / "tau-bench", "airline", ["Book a flight."])
    assert read_tasks(checkout / "tau_bench", "airline", "test") == {0: "Book a flight."}
    assert read_tasks(checkout / "tau_bench", "airline", "dev") == {}
    path = tmp_path / "results.json"
    path.write_text("[]")
    for options, says in ([("--env", "retail"), "no tasks of --env retail --split test"], [(), "say which tasks"]):
        command = [str(tmp_path), str(path), "--tau-bench", str(checkout), *options]
        assert says in str(CliRunner().invoke(link, command).exception)


def test_a_role_is_captured_as_it_is_told(play, tmp_path):
    """`--capture user=none` and the like: what is not captured is recorded all the same, without rows."""
    tasks = [make_task(i, 0, random.Random(i), user="verify") for i in range(2)]
    flags = ["--capture", "user=none", "--capture", "warmup=none", "--capture", "supervisor=last"]
    with Running(Stub(tmp_path / "spool")) as stub, proxy_process(stub.url, tmp_path / "data", *flags) as url:
        play(url, MODEL, tasks)
    run = open_run(tmp_path / "data" / "r")
    check_places(run)
    rows = Counter({role: 0 for role in ("user", "warmup")})
    for call in run.history.calls.values():
        rows[call.role] += call.n_kept
        assert call.reply and bool(call.points) == (call.role in ("agent", "supervisor"))
        assert call.tokens == ("last" if call.role == "supervisor" else "all")
    assert rows["user"] == rows["warmup"] == 0 < rows["supervisor"] < rows["agent"]
    assert list(problems(run)) == []


def test_episodes_are_counted_as_the_tables_have_them(play, tmp_path):
    """Each once, though it goes on after its seal; no user's conversation, and no warm-up."""
    tasks = [make_task(number, 0, random.Random(number)) for number in range(3)]

    def metered(name):
        return read(httpx.get(url.replace("/v1", "/metrics")).text, name)

    def seal():
        return httpx.post(url.replace("/v1", "/tautap/runs/r/seal")).json()

    with Running(Stub(tmp_path / "spool")) as stub, proxy_process(stub.url, tmp_path / "data") as url:
        play(url, MODEL, tasks)
        until(lambda: metered("queue") == 0, "all to be recorded")
        assert metered("episodes_live") == 3
        assert seal()["n_episodes"] == metered("episodes_sealed_total") == 3 and metered("episodes_live") == 0
        client = openai.OpenAI(base_url=url.replace("/v1", "/episodes/named/v1"), api_key="x", max_retries=0)
        for n_episodes in (4, 4):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
            until(lambda: metered("queue") == 0, "it to be recorded")
            assert metered("episodes_live") == 1
            assert seal()["n_episodes"] == metered("episodes_sealed_total") == n_episodes
    run = open_run(tmp_path / "data" / "r")
    turns = {
        name: {(call.thread, call.turn) for call in episode.calls if call.role == "agent"}
        for name, episode in run.history.episodes.items()
    }
    found = {row["episode"]: row["n_turns"] for row in run.episodes.to_pylist()}
    assert found == {name: len(of) for name, of in turns.items()} and found["named"] == 2


def test_what_a_killed_proxy_left_is_paired_and_linked(play, tmp_path):
    """No seal, no pairing in the journal: `tautap link` finds both from the calls."""
    tasks = [make_task(i, 0, random.Random(i), user="reflection") for i in range(4)]
    data = tmp_path / "data"
    with Running(Stub(tmp_path / "spool")) as stub, proxy_process(stub.url, data, stop=signal.SIGKILL) as url:
        results = play(url, MODEL, tasks)
        n_calls = len(stub.stub.bodies)
        until(lambda: len(open_run(data / "r").history.calls) == n_calls, "every call committed")
    run = open_run(tmp_path / "data" / "r")
    assert {episode.status for episode in run.history.episodes.values()} == {"live"}
    lines = run.layout.journal.read_bytes().splitlines(keepends=True)
    run.layout.journal.write_bytes(b"".join(line for line in lines if b'"type":"pair"' not in line))
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    assert CliRunner().invoke(link, [str(run.layout.root), str(path)]).exit_code == 0
    sealed = open_run(run.layout.root)
    expected = check_places(sealed)
    rows = {row["episode"]: row for row in sealed.episodes.to_pylist() if row["episode"] != WARMUPS}
    assert {episode: f"{row['task_id']}/{row['trial']}" for episode, row in rows.items()} == expected
    assert {row["status"] for row in rows.values()} == {"sealed"} and list(problems(sealed)) == []


def test_a_run_that_is_being_written_is_not_linked(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("[]")
    with Running(Stub(tmp_path / "spool")) as stub, proxy_process(stub.url, tmp_path / "data"):
        output = CliRunner().invoke(link, [str(tmp_path / "data" / "r"), str(path)])
        assert isinstance(output.exception, RunLocked)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "Expected `array`"),
        ('[{"task_id": 1}]', "missing required field"),
        ('[{"task_id": 1, "reward": 1, "info": {}, "traj": [], "trial": 2147483648}]', r"at `\$\[0\].trial`"),
        ("no", "truncated"),
        (None, "read"),
    ],
)
def test_a_file_that_is_no_results_file_is_refused(content, says, tmp_path):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput, match=says):
        read_results(path)


def recorded(tmp_path, *talks):
    """A run with an agent's call per (user says, agent replies); of (…, …, instruction) also its user's last one."""
    store = Store(Layout(tmp_path / "r"))

    def commit(number, role, messages, reply):
        place = {"id": f"{role}{number}", "thread": f"t-{role}{number}", "episode": f"t-c{number}", "role": role}
        texts = {
            "request": json.dumps({"messages": messages}),
            "reply": json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}),
        }
        times = {"started": float(number), "ended": number + 0.5}
        store.commit(Call(**place, **texts, **times, turn=0, attempt=0, endpoint="/v1", model="m", status=200))

    for i, (said, reply, *instruction) in enumerate(talks):
        commit(i, "agent", [{"role": "system", "content": POLICY}, {"role": "user", "content": said}], reply)
        if any(instruction):
            prompt = {"role": "system", "content": simulator_prompt(*instruction, "llm")}
            heard = [{"role": "assistant", "content": said}, {"role": "user", "content": reply}]
            commit(i, "user", [prompt, HI, *heard], "###STOP###")
    store.close()
    return open_run(tmp_path / "r")


def result(said, reply, task_id=0, trial=0, source="a.json", instruction=None):
    traj = [("system", POLICY), ("user", said), ("assistant", reply), ("user", "###STOP###")]
    messages = [{"role": role, "content": text} for role, text in traj]
    info = {"task": {"instruction": instruction}} if instruction else {}
    return Result(task_id, 1.0, info, messages, trial, source)


def test_a_conversation_that_went_on_in_another_thread_is_found_by_how_it_ended(tmp_path):
    """As one of an episode that the client named does when that was sealed meanwhile."""
    run = recorded(tmp_path, ("Hi", "a"))
    (first,) = run.history.calls.values()
    later = msgspec.structs.replace(first, id="later", thread="t-later", started=1.0, turn=0)
    chat = json.loads(first.request)["messages"] + [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    ]
    store = Store(run.layout)
    store.commit(msgspec.structs.replace(first, id="second", turn=1, started=0.5))
    store.commit(msgspec.structs.replace(later, request=json.dumps({"messages": chat})))
    store.close()
    told = msgspec.structs.replace(result("Hi", "a"), traj=[*chat, {"role": "assistant", "content": "a"}, HI])
    (found,) = find_links(open_run(run.layout.root).history, [told]).links
    assert (found.episode, found.by) == (first.episode, "transcript")


def test_trials_that_went_the_same_way_are_told_apart_by_their_order_and_no_tie(tmp_path):
    run = recorded(tmp_path, ("Hi", "a"), ("Hi", "a"))
    found = find_links(run.history, [result("Hi", "a", trial=1), result("Hi", "a", trial=0)])
    assert [(link.episode, link.trial, link.tied) for link in found.links] == [("t-c0", 0, []), ("t-c1", 1, [])]


@pytest.mark.parametrize(
    ("instructions", "links"),
    [
        (["Be one.", "Be zero."], {"t-c0": "1", "t-c1": "0"}),
        (["Be one.", None], {"t-c0": "1", "t-c1": "0"}),
        (["Be one."], {"t-c0": "1"}),
        (["Be two."], {"t-c0": "0"}),
    ],
    ids=["both known", "a user that is not there", "an episode that is not there", "another's user"],
)
def test_tasks_that_went_the_same_way_are_told_apart_by_their_instructions_and_no_tie(tmp_path, instructions, links):
    """Whatever the order in which they began; a transcript that only one episode has is joined all the same."""
    run = recorded(tmp_path, *(("Hi", "a", instruction) for instruction in instructions))
    results = [result("Hi", "a", 0, instruction="Be zero."), result("Hi", "a", 1, instruction="Be one.")]
    found = find_links(run.history, results)
    assert {link.episode: link.task_id for link in found.links} == links
    assert not any(link.tied for link in found.links)


def test_results_of_two_files_that_fit_the_same_episodes_are_tied(tmp_path):
    run = recorded(tmp_path, ("Hi", "a"), ("Hi", "a"))
    found = find_links(run.history, [result("Hi", "a"), result("Hi", "a", 7, source="b.json")])
    assert [link.tied for link in found.links] == [["t-c1"], ["t-c0"]]


def test_what_fits_nothing_is_listed(tmp_path):
    run = recorded(tmp_path, ("Hi", "a"), ("Hi", "b"))
    found = find_links(run.history, [result("Hi", "a"), result("Hi", "c", 5)])
    assert [link.episode for link in found.links] == ["t-c0"]
    assert ([r.task_id for r in found.results], found.episodes) == ([5], ["t-c1"])


@pytest.mark.parametrize(("policy", "env"), [(POLICY, "airline"), ("Help with orders.", "retail")])
def test_the_environment_is_the_one_that_was_given_where_the_conversations_do_not_tell_it(
    tmp_path, monkeypatch, policy, env
):
    monkeypatch.setitem(globals(), "POLICY", policy)
    run = recorded(tmp_path, ("Hi", "a"))
    assert [link.env for link in find_links(run.history, [result("Hi", "a")], env="retail").links] == [env]


def test_an_instruction_that_is_no_text_is_none(tmp_path):
    """Of an attempt that failed, which is found by its instruction."""
    run = recorded(tmp_path, ("Hi", "a"))
    failed = Result(0, 0.0, {"task": {"instruction": ["x"]}, "error": "e"}, [], 0, "a.json")
    assert find_links(run.history, [result("Hi", "a", 1), failed]).results == [failed]


def test_results_of_another_run_are_refused(tmp_path):
    run = recorded(tmp_path, ("Hi", "a"))
    path = tmp_path / "other.json"
    path.write_text(json.dumps([msgspec.to_builtins(result("Hi", "c"))]))
    output = CliRunner().invoke(link, [str(run.layout.root), str(path)])
    assert isinstance(output.exception, BadInput) and "another run" in str(output.exception)
