"""tau-bench itself, unmodified, against a stub that plays its tasks: a checkout that TAUTAP_TAU_BENCH names.

Its interpreter, the checkout's own or this one, has to have its packages and mcp.
"""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from episodes.cast import WARMUPS
from episodes.run import open_run
from episodes.verify import problems
from tests.conftest import free_port
from tests.solver import CRASHES, LEAVES, SOLUTIONS

CHECKOUT = Path(os.environ.get("TAUTAP_TAU_BENCH", "/nowhere")).absolute()
BENCH = "import sys, proxy.__main__ as m; m.WORKER = [sys.executable, '-m', 'tests.solver']; m.main()"
TASKS = """
import json, sys
from tau_bench.envs import get_env
from tau_bench.envs.user import LLMUserSimulationEnv
LLMUserSimulationEnv.reset = lambda self, instruction=None: ""  # it would speak to its model
tasks = get_env(sys.argv[1], "llm", "none", "test", "none", 0).tasks
print(json.dumps([task.model_dump() for task in tasks]))
"""
AGENTS = ["tool-calling", "act", "react", "few-shot"]
USERS = ["llm", "react", "verify", "reflection"]

pytestmark = pytest.mark.skipif(not CHECKOUT.exists(), reason="TAUTAP_TAU_BENCH names no checkout of tau-bench")


def play(env, matrix, tmp_path, *flags):
    """Run tau-bench's first tasks of an environment in the ways of a matrix; returns the runs by their names."""
    own = CHECKOUT / ".venv" / "bin" / "python"
    python = str(own if own.exists() else sys.executable)
    offline = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    tasks = subprocess.run([python, "-c", TASKS, env], cwd=CHECKOUT, env=offline, capture_output=True, check=True)
    solutions = tmp_path / "solutions.json"
    solutions.write_bytes(tasks.stdout)
    (tmp_path / "evals.toml").write_text("[matrix]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in matrix.items()))
    stack = ["--port", free_port(), "--worker-port", free_port(), "--data", tmp_path / "data", "--run", "r"]
    shots = f"few_shot_data/Mock{env.capitalize()}DomainEnv-few_shot.jsonl"
    command = [sys.executable, "-c", BENCH, "bench", "--tau-bench", CHECKOUT, "--python", python, *stack]
    command += ["--matrix", tmp_path / "evals.toml", "--", "--env", env, "--few-shot-displays-path", shots, *flags]
    words = [str(word) for word in command]
    done = subprocess.run(words, env=offline | {SOLUTIONS: str(solutions)}, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "no episode for" not in done.stdout and "in no results file" not in done.stdout
    return {path.parent.name.removeprefix("r-"): path.parent for path in (tmp_path / "data").glob("r-*/run.json")}


def check(path, env, agent, user, n_attempts):
    """Every attempt is one sealed episode with tau-bench's own reward, and nothing else is there."""
    run = open_run(path)
    (file,) = (path / "results").glob("*.json")
    results = {(r["task_id"], r["trial"]): r for r in json.loads(file.read_text())}
    rows = [row for row in run.episodes.to_pylist() if row["episode"] != WARMUPS]
    assert len(rows) == len(results) == n_attempts
    told = {(int(row["task_id"]), row["trial"]): (row["reward"], row["error"]) for row in rows}
    assert told == {key: (r["reward"], r["info"].get("error")) for key, r in results.items()}
    assert {(row["status"], row["env"], row["strategy"], row["user_strategy"]) for row in rows} == {
        ("sealed", env, agent, user)
    }
    assert all(row["agent_thread"] and row["user_thread"] for row in rows)
    for row in rows:
        number = int(row["task_id"])
        assert (row["error"] is not None) == (number % 4 == CRASHES)
        assert (row["reward"] == 1.0) == (number % 4 not in (LEAVES, CRASHES)), row["task_id"]
        calls = [call for call in run.history.calls.values() if call.episode == row["episode"]]
        assert {n for call in calls for n in re.findall(r"I am customer (\d+)\.", call.request)} == {row["task_id"]}
    assert list(problems(run)) == []


@pytest.mark.parametrize("env", ["airline", "retail"])
def test_all_ways_of_playing_are_recorded_and_joined(env, tmp_path):
    """Each agent with each user, four tasks at once: some pass, some fail, one crashes."""
    runs = play(
        env,
        {"agent-strategy": AGENTS, "user-strategy": USERS},
        tmp_path,
        *("--task-ids", "0,1,2,3", "--max-concurrency", "4"),
    )
    assert len(runs) == 16
    for agent, user in product(AGENTS, USERS):
        check(runs[f"{agent}-{user}"], env, agent, user, 4)


def test_any_concurrency_and_repeated_trials(tmp_path):
    """One after another and sixteen at once, each task four times over: attempts that went the same way included."""
    runs = play(
        "airline",
        {"max-concurrency": [1, 16]},
        tmp_path,
        *("--task-ids", "0,1,2,3,4,5,6,7", "--num-trials", "4", "--user-strategy", "verify"),
    )
    for path in runs.values():
        check(path, "airline", "tool-calling", "verify", 32)
