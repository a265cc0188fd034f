"""`tautap up`: two processes that start and stop as one."""

import json
import os
import signal
import subprocess
import sys

import httpx
import pytest

from episodes.run import open_run
from tests.conftest import free_port, until
from tests.proxy.test_server import check_rows, converse

# `up` with the stub in the worker's place: its command line is the only thing that is not real.
UP = "import sys, proxy.__main__ as m; m.WORKER = [sys.executable, '-m', 'tests.stub']; m.main()"


@pytest.fixture
def start(tmp_path):
    started = []

    def run(*arguments, script=UP, last=False):
        port, worker_port = free_port(), free_port()
        flags = ["--data", str(tmp_path), "--run", "r", "--port", str(port), "--worker-port", str(worker_port)]
        command = [sys.executable, "-c", script, "up", *(flags if last else ()), *arguments, *(() if last else flags)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process, f"http://127.0.0.1:{port}", worker_port

    yield run
    for process in started:
        process.kill()
        process.communicate()


def answers(url):
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


def test_it_serves_and_stops_both_and_seals(start, tmp_path):
    """Ready when both are; on Ctrl-C everything is sealed and no process is left."""
    process, url, worker_port = start()
    until(lambda: answers(f"{url}/health/ready") or process.poll() is not None, "the stack")
    import openai

    converse(openai.OpenAI(base_url=f"{url}/v1", api_key="x"), "up", 2)
    for path in ("/v1/activations", "/v1/models", "/metrics"):  # nobody but this proxy talks to the worker
        assert httpx.get(f"http://127.0.0.1:{worker_port}{path}").status_code == 401
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert f"{url}/v1 is ready" in output and "OPENAI_BASE_URL" in output and "loading" not in output
    run = open_run(tmp_path / "r")
    assert [e.status for e in run.history.episodes.values()] == ["sealed"]
    check_rows(run)
    assert not answers(f"http://127.0.0.1:{worker_port}/health")


def test_a_worker_that_cannot_start_ends_it_with_what_the_worker_said(start):
    process, _, _ = start("--fail", "a reason")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "told to fail with a reason" in output and "worker.log" in output


def test_a_worker_that_dies_ends_it(start, tmp_path):
    process, url, worker_port = start()
    until(lambda: answers(f"{url}/health/ready") or process.poll() is not None, "the stack")
    found = subprocess.run(["pgrep", "-f", f"tests.stub.*--port {worker_port}"], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "the worker ended" in output


def test_bad_input_of_the_worker_is_one_line(start, tmp_path):
    """The real worker's command line, which refuses the layer before it loads anything."""
    home = tmp_path / "model"
    home.mkdir()
    (home / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    process, _, _ = start(str(home), "--layers", "9", script="import proxy.__main__ as m; m.main()")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "tautap worker: layer 9 does not exist: this model has layers 0 to 3" in output


def test_a_worker_that_runs_already_is_not_taken_for_ours(start, stub, tmp_path):
    """Its activations would be claimed from under whoever started it."""
    process, _, _ = start("--worker-port", stub.url.rpartition(":")[2], last=True)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2 and "something else answers" in output


def test_an_alias_that_is_none_is_refused(start):
    process, _, _ = start("--alias", "gpt-4o")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2 and "NAME=SERVED" in output
