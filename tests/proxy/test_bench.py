"""`tautap bench` as a command, with a tau-bench that the tests make: its own manner of speaking, in a few lines."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import venv
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from episodes.run import open_run
from episodes.tables import Totals
from episodes.taubench import Score, pass_hat
from proxy.__main__ import cli, settle
from proxy.__main__ import proxy as command
from proxy.bench import Eval, _lines
from proxy.flags import parse
from tests.conftest import free_port, until
from tests.proxy.test_server import check_rows
from tests.stub import MODEL

# The command with the stub in the worker's place.
BENCH = "import sys, proxy.__main__ as m; m.WORKER = [sys.executable, '-m', 'tests.stub']; m.main()"

TYPES = """
from pydantic import BaseModel
class RunConfig(BaseModel):
    model_provider: str
    user_model_provider: str
    model: str
    user_model: str = "gpt-4o"
    num_trials: int = 1
    env: str = "retail"
    agent_strategy: str = "tool-calling"
    temperature: float = 0.0
    task_split: str = "test"
    start_index: int = 0
    end_index: int = -1
    task_ids: list[int] | None = None
    log_dir: str = "results"
    max_concurrency: int = 1
    user_strategy: str = "llm"
"""
# Even tasks pass. Task 13 crashes, 31 ends the process, 99 never ends.
RUN = """
import json, os, sys, threading
import openai

def run(config):
    assert config.model_provider == config.user_model_provider == "openai"
    client, results = openai.OpenAI(max_retries=0), []
    model, user_model = config.model.split("/")[-1], config.user_model
    name = f"{config.agent_strategy}-{model}-{config.temperature}_range_0--1_user-{user_model}-{config.user_strategy}"
    path = f"{config.log_dir}/{name}_0101000000.json"
    os.makedirs(config.log_dir, exist_ok=True)

    def say(messages, model):
        message = client.chat.completions.create(model=model, messages=messages).choices[0].message
        messages.append({"role": "assistant", "content": message.content})
        return message.content

    def user(instruction):
        system = f"You are a user interacting with an agent.{instruction}\\nRules:\\n- Be brief."
        return [{"role": "system", "content": system}, {"role": "user", "content": "Hi! How can I help you today?"}]

    def attempt(task, trial):
        print(f"Running task {task}", flush=True)
        customer, agent = user(f"\\n\\nInstruction: You are customer {task}.\\n"), [
            {"role": "system", "content": f"# {config.env.capitalize()} agent policy\\nBe kind. " * 9}]
        for turn in range(2):
            agent.append({"role": "user", "content": say(customer, config.user_model)})
            customer.append({"role": "user", "content": say(agent, config.model)})
            if task == 13:
                raise ValueError("an odd reply")
            if task == 31:
                sys.exit(chr(27) + "[31mtold to end [/nope]")
            if task == 99:
                threading.Event().wait()
        agent.append({"role": "user", "content": say(customer, config.user_model)})
        info = {"task": {"instruction": f"You are customer {task}."}}
        return {"task_id": task, "reward": float(task % 2 == 0), "info": info, "traj": agent, "trial": trial}

    say(user(""), config.user_model)
    for trial in range(config.num_trials):
        for task in config.task_ids or range(3):
            try:
                result = attempt(task, trial)
            except Exception as e:
                result = {"task_id": task, "reward": 0.0, "info": {"error": str(e)}, "traj": [], "trial": trial}
            results.append(result)
            with open(path, "w") as f:
                json.dump(results, f)
"""
COMMAND_LINE = """
import argparse
from tau_bench.run import run
from tau_bench.types import RunConfig
parser = argparse.ArgumentParser()
for name in RunConfig.model_fields:
    parser.add_argument("--" + name.replace("_", "-"), nargs="+" if name == "task_ids" else None)
run(RunConfig(**{name: value for name, value in vars(parser.parse_args()).items() if value is not None}))
"""


@pytest.fixture
def checkout(tmp_path):
    """A directory as a checkout of tau-bench is."""
    home = tmp_path / "tau-bench"
    (home / "tau_bench").mkdir(parents=True)
    for name, text in {"run.py": COMMAND_LINE, "tau_bench/types.py": TYPES, "tau_bench/run.py": RUN}.items():
        (home / name).write_text(text)
    (home / "tau_bench" / "__init__.py").touch()
    return home


@pytest.fixture
def start(tmp_path):
    """Start `tautap bench` with the stub as its worker; returns the process."""
    started = []

    def run(checkout, *flags, options=(), env=None):
        ports = ["--port", str(free_port()), "--worker-port", str(free_port())]
        ours = ["--tau-bench", str(checkout), "--data", str(tmp_path / "data"), "--run", "r", *ports, *options]
        command = [sys.executable, "-c", BENCH, "bench", *ours, "--", *flags]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **(env or {})})
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def bench(*arguments):
    """`tautap bench` to its end."""
    command = [sys.executable, "-m", "proxy", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def watched(*arguments):
    """The same on a terminal of 80 columns; returns its exit code, its output and what the terminal was sent."""
    command = [sys.executable, "-m", "proxy", "bench", *map(str, arguments)]
    env = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    ours, theirs = os.openpty()
    with os.fdopen(ours, "rb") as terminal, tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=theirs, env=env)
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # how a terminal says that nobody is there any more
            while chunk := terminal.read1():
                shown += chunk
        code = process.wait(60)
        output.seek(0)
        return code, output.read(), shown.decode()


def results(directory):
    (path,) = directory.glob("*.json")
    return json.loads(path.read_text())


def rewards(run):
    """(task, trial) → reward, of the episodes that a results file tells of."""
    rows = [row for row in run.episodes.to_pylist() if row["task_id"] is not None]
    return {(int(row["task_id"]), row["trial"]): row["reward"] for row in rows}


# ---- what it is for


def test_everything_is_recorded_and_joined_with_one_command(start, checkout, tmp_path):
    """The stack starts and stops, every attempt is an episode with its reward, and both sides are printed."""
    process = start(checkout, "--platform", "openai", "--env", "airline", "--task-ids", "1,2,4", "--num-trials", "2")
    said, trouble = process.communicate(timeout=60)
    assert process.returncode == 0, trouble
    run = open_run(tmp_path / "data" / "r")
    check_rows(run)
    file = results(run.layout.root / "results")
    assert rewards(run) == {(r["task_id"], r["trial"]): r["reward"] for r in file} and len(file) == 6
    linked = [row for row in run.episodes.to_pylist() if row["task_id"] is not None]
    assert {(row["env"], row["split"], row["strategy"], row["user_strategy"], row["status"]) for row in linked} == {
        ("airline", "test", "tool-calling", "llm", "sealed")
    }
    assert "3 tasks, 6 attempts, 4 passed; pass^1 0.667, pass^2 0.667" in said
    assert f"recorded: 6 episodes, {len(run.history.calls)} calls" in said and ", 0 missing;" in said
    assert "joined: 6 of 6 results" in said and "no episode" not in said and "in no results file" not in said


def test_a_proxy_that_runs_already_is_used(proxy, checkout, tmp_path, monkeypatch):
    """Into the run that the base URL names; nothing is written where this command has no data."""
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.chdir(tmp_path)
    url = f"{proxy.url}/runs/elsewhere/v1"
    done = bench("--tau-bench", checkout, "--", "--task-ids", "1", "2", "--base-url", url)
    assert done.returncode == 0, done.stderr
    assert "joined: 2 of 2 results" in done.stdout
    run = open_run(proxy.config.data / "elsewhere")
    assert rewards(run) == {(1, 0): 0.0, (2, 0): 1.0}
    assert {e.status for e in run.history.episodes.values()} == {"sealed"}
    assert len(results(tmp_path / "results" / "elsewhere")) == 2


def test_benchmarks_that_start_in_one_second_get_runs_of_their_own(monkeypatch):
    """Unless they are named: at a proxy that runs already they would share results too."""
    monkeypatch.setattr(time, "strftime", lambda form: form.replace("%", ""))
    named = []
    for _ in range(2):
        options = command.make_context("proxy", ["--backend", "http://x"]).params
        named.append(settle(options.pop("backends"), options).run)
    assert named[0] != named[1] and {name[:-5] for name in named} == {"run-Ymd-HMS"}


def test_the_summary_says_what_had_not_come_by_then(tmp_path):
    flags = parse(["--model", "m", "--user-model", "u", "--log-dir", str(tmp_path)])
    totals = Totals(*range(len(Totals.__struct_fields__) - 1), n_waiting=12)
    said = "\n".join(_lines(Eval("r", flags, tmp_path, "data/r", totals=totals)))
    assert "waiting: 12 calls more" in said


def test_the_summary_says_how_many_calls_lost_rows(proxy, stub, checkout, tmp_path):
    """And nothing of the kind where none has."""
    ours = ["--tau-bench", checkout, "--base-url", proxy.url]
    theirs = ["--", "--task-ids", "1", "--log-dir", tmp_path / "logs"]
    good = bench(*ours, "--run", "good", *theirs)
    assert ", 0 missing;" in good.stdout and "incomplete" not in good.stdout
    stub.stub.engine.fail_captures = "the spool is full"
    lost = bench(*ours, "--run", "lost", *theirs)
    assert lost.returncode == 0, lost.stderr
    run = open_run(proxy.config.data / "lost")
    n_calls, n_missing = len(run.history.calls), sum(run.episodes["n_missing"].to_pylist())
    assert f" {n_missing:,} known to be missing;" in lost.stdout
    assert f"incomplete: {n_calls} of {n_calls} calls lack rows" in lost.stdout


def test_an_installed_package_is_run_too(proxy, checkout, tmp_path, monkeypatch):
    """One without a checkout's run.py; values become what its RunConfig wants."""
    (checkout / "run.py").unlink()
    monkeypatch.setenv("PYTHONPATH", f"{Path.cwd()}:{checkout}")
    done = bench("--base-url", proxy.url, "--run", "p", "--", "--task-ids", "2,4", "--log-dir", tmp_path / "logs")
    assert done.returncode == 0, done.stderr
    assert rewards(open_run(proxy.config.data / "p")) == {(2, 0): 1.0, (4, 0): 1.0}
    assert len(results(tmp_path / "logs")) == 2


def test_a_matrix_runs_each_configuration_into_its_own_run(proxy, checkout, tmp_path):
    """And a terminal shows how far each is, in a table that is gone at the end."""
    matrix = tmp_path / "evals.toml"
    matrix.write_text(
        """
        [defaults]
        task-ids = [1, 2]
        [matrix]
        env = ["retail", "airline"]
        [[eval]]
        name = "act"
        agent-strategy = "act"
        """
    )
    logs = tmp_path / "logs"
    shared = ("--tau-bench", checkout, "--base-url", proxy.url, "--run", "m", "--matrix", matrix, "--at-once", 1)
    code, said, shown = watched(*shared, "--", "--log-dir", logs)
    assert code == 0, shown
    for env in ("retail", "airline"):
        run = open_run(proxy.config.data / f"m-act-{env}")
        assert rewards(run) == {(1, 0): 0.0, (2, 0): 1.0}
        assert {row["env"] for row in run.episodes.to_pylist() if row["task_id"]} == {env}
        assert len(results(logs / f"m-act-{env}")) == 2
    assert said.count("joined: 2 of 2 results") == 2
    assert [line.split()[:4] for line in said.splitlines()[-2:]] == [
        ["m-act-retail", "2/2", "50", "%"],
        ["m-act-airline", "2/2", "50", "%"],
    ]
    assert "m-act-retail" in shown and "0/2" in shown and "2/2" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor is given back"


def test_a_users_model_with_a_slash_in_its_name_gets_the_directory_that_tau_bench_needs(start, checkout, tmp_path):
    """tau-bench puts the name into its results file's path as it is, and fails when that directory is not there."""
    flags = ["--user-model", "org/user", "--task-ids", "2"]
    process = start(checkout, *flags, options=["--alias", f"org/user={MODEL}"])
    said, trouble = process.communicate(timeout=60)
    assert process.returncode == 0, trouble
    assert "joined: 1 of 1 results" in said
    assert rewards(open_run(tmp_path / "data" / "r")) == {(2, 0): 1.0}


def test_a_task_that_crashed_has_its_calls_and_its_error(start, checkout, tmp_path):
    process = start(checkout, "--task-ids", "13", "2")
    said, trouble = process.communicate(timeout=60)
    assert process.returncode == 0, trouble
    assert "joined: 2 of 2 results" in said
    (crashed,) = [row for row in open_run(tmp_path / "data" / "r").episodes.to_pylist() if row["task_id"] == "13"]
    assert (crashed["error"], crashed["reward"], crashed["n_calls"]) == ("an odd reply", 0.0, 2)


# ---- a tau-bench that does not end well


def test_a_tau_bench_that_fails_leaves_a_sealed_and_joined_run(start, checkout, tmp_path):
    process = start(checkout, "--task-ids", "2", "31", "4")
    said, trouble = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "\ntold to end [/nope]\n" in trouble, "a log's colours are left out of what is printed of it"
    assert "tau-bench ended with exit code 1" in trouble and "tau-bench.log" in trouble
    run = open_run(tmp_path / "data" / "r")
    assert rewards(run) == {(2, 0): 1.0} and "joined: 1 of 1 results" in said
    assert {e.status for e in run.history.episodes.values()} == {"sealed"}
    (nobodys,) = [row["episode"] for row in run.episodes.to_pylist() if not row["task_id"] and row["agent_thread"]]
    assert f"in no results file: episode {nobodys}" in said
    check_rows(run)


def test_ctrl_c_ends_tau_bench_and_seals_and_joins(start, checkout, tmp_path):
    """Its process is gone, and what it had done is there."""
    process = start(checkout, "--task-ids", "2", "99")
    log = tmp_path / "data" / "r" / "results" / "tau-bench.log"
    until(lambda: log.exists() and "Running task 99" in log.read_text(), "the task that never ends")
    until(lambda: len(open_run(tmp_path / "data" / "r").history.calls) >= 8, "its calls")
    process.send_signal(signal.SIGINT)
    said, trouble = process.communicate(timeout=60)
    assert process.returncode == 1 and "tau-bench was stopped" in trouble, trouble
    run = open_run(tmp_path / "data" / "r")
    assert rewards(run) == {(2, 0): 1.0} and "joined: 1 of 1 results" in said
    assert {e.status for e in run.history.episodes.values()} == {"sealed"}
    assert subprocess.run(["pgrep", "-f", str(log.parent)], capture_output=True).returncode == 1


def test_a_worker_that_dies_ends_it_with_what_was_recorded(start, checkout, tmp_path):
    process = start(checkout, "--task-ids", "2", "99")
    run = tmp_path / "data" / "r"
    until(lambda: (run / "run.json").exists() and len(open_run(run).history.calls) >= 8, "the task that never ends")
    (worker,) = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "tests.stub"], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(worker), signal.SIGKILL)
    said, trouble = process.communicate(timeout=60)
    assert process.returncode == 1 and "the worker ended" in trouble
    assert "joined: 1 of 1 results" in said


# ---- bad input


def refused(*arguments):
    """What `tautap bench` says that is refused before anything is started or asked."""
    done = CliRunner().invoke(cli, ["bench", *map(str, arguments)])
    return only_line(done.exit_code, done)


def refused_by_what_answers(*arguments):
    """The same once it has asked whether a proxy is there."""
    done = bench(*arguments)
    return only_line(done.returncode, done)


def only_line(code, done):
    assert code == 2 and done.stdout == "", done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_directory_that_is_no_tau_bench_is_refused(tmp_path):
    said = refused("--tau-bench", tmp_path)
    assert said == (
        f"tautap bench: --tau-bench {tmp_path}: no tau_bench/run.py there; give a checkout of "
        "github.com/sierra-research/tau-bench"
    )


def test_no_tau_bench_at_all_is_refused():
    assert "has no tau_bench: give --tau-bench DIR" in refused()


def test_an_interpreter_that_is_none_is_refused(checkout):
    said = refused("--tau-bench", checkout, "--python", "/nowhere/python")
    assert "--python /nowhere/python does not run" in said


@pytest.mark.parametrize(("strategy", "names"), [("tool-calling", "litellm pydantic mcp"), ("act", "litellm pydantic")])
def test_packages_that_its_interpreter_lacks_are_named(checkout, strategy, names):
    """The checkout's own .venv is its interpreter; mcp is needed by agents that send tools alone."""
    venv.create(checkout / ".venv", symlinks=True)
    python = checkout / ".venv" / "bin" / "python"
    said = refused("--tau-bench", checkout, "--", "--agent-strategy", strategy)
    assert f"{python} -m pip install {names}, or" in said


def test_a_flag_that_tau_bench_does_not_have_is_refused(checkout):
    said = refused("--tau-bench", checkout, "--python", sys.executable, "--", "--tasks", "1")
    assert "--tasks: tau-bench has no such flag; it takes --agent-strategy, --end-index" in said


def test_a_model_that_is_not_served_is_refused(proxy, checkout):
    ours = ["--tau-bench", checkout, "--base-url", proxy.url]
    said = refused_by_what_answers(*ours, "--", "--user-model", "gpt-4o")
    assert f"--user-model gpt-4o: {proxy.url} serves {MODEL}: give one of these" in said


def test_a_base_url_where_no_proxy_is_is_refused(stub, checkout):
    """Nobody, and a server that is no proxy of ours."""
    nobody = f"http://127.0.0.1:{free_port()}"
    for url in (nobody, stub.url):
        said = refused_by_what_answers("--tau-bench", checkout, "--base-url", url)
        assert f"is a proxy of tautap's running at {url}?" in said


def test_a_run_that_cannot_be_written_is_refused(checkout):
    said = refused("--tau-bench", checkout, "--base-url", "http://127.0.0.1:9/runs/.x/v1")
    assert "run '.x': use letters" in said


def test_what_starts_a_stack_is_refused_where_one_runs(checkout):
    said = refused("--tau-bench", checkout, "--base-url", "http://127.0.0.1:9", "--port", "9000", "a-model")
    assert "--port a-model: not with --base-url" in said


def test_a_matrix_that_is_not_there_is_refused(checkout, tmp_path):
    assert "--matrix" in refused("--tau-bench", checkout, "--matrix", tmp_path / "none.toml")


# ---- numbers


@pytest.mark.parametrize(
    ("passed", "expected"),
    [
        ([], {}),
        ([[1], [0]], {1: 0.5}),
        ([[1, 1, 0, 0], [1, 1, 1, 1]], {1: 0.75, 2: (1 / 6 + 1) / 2, 3: 0.5, 4: 0.5}),
        ([[1, 1], [0]], {1: 0.5, 2: 1.0}),
    ],
)
def test_pass_hat_k_is_the_chance_that_k_attempts_all_pass(passed, expected):
    """As tau-bench prints it; a task that was attempted less often does not count for a k above that."""
    scores = [Score(task, trial, float(p)) for task, ps in enumerate(passed) for trial, p in enumerate(ps)]
    found = pass_hat(scores)
    assert found.keys() == expected.keys() and all(math.isclose(found[k], expected[k]) for k in expected)
