"""`tautap up`: two processes that start and stop as one."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from functools import partial

import httpx
import pytest
from click.testing import CliRunner

from episodes.errors import BadInput, RunLocked
from episodes.run import open_run
from proxy.__main__ import cli
from proxy.config import TLS, Config
from proxy.up import greet, run_stack
from servers import healthy
from tests.conftest import free_port, proxy_to, until
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


def test_it_serves_and_stops_both_and_seals(start, tmp_path):
    """Ready when both are; on Ctrl-C everything is sealed and no process is left."""
    process, url, worker_port = start()
    until(lambda: healthy(url, "/health/ready") or process.poll() is not None, "the stack")
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
    assert not healthy(f"http://127.0.0.1:{worker_port}")


def test_a_worker_that_cannot_start_ends_it_with_what_the_worker_said(start):
    process, _, _ = start("--fail", "a \x1b[31mreason\x1b[0m\x07 [/nope]")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "told to fail with a reason [/nope]\n" in output and "worker.log" in output


def test_a_log_that_was_a_link_is_written_in_its_place(start, tmp_path):
    """The run may be from elsewhere, and what its files lead to is somebody else's."""
    mine, log = tmp_path / "mine", tmp_path / "r" / "worker.log"
    mine.write_text("mine")
    log.parent.mkdir()
    log.symlink_to(mine)
    process, _, _ = start("--fail", "a reason")
    process.communicate(timeout=30)
    assert mine.read_text() == "mine" and "a reason" in log.read_text()


def test_a_worker_that_dies_ends_it(start, tmp_path):
    process, url, worker_port = start()
    until(lambda: healthy(url, "/health/ready") or process.poll() is not None, "the stack")
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


def test_an_alias_that_is_none_is_refused():
    done = CliRunner().invoke(cli, ["up", "--alias", "gpt-4o"])
    assert done.exit_code == 2 and "NAME=SERVED" in done.stderr


def test_a_run_that_cannot_be_named_so_is_refused_before_anything_is_written(tmp_path):
    done = CliRunner().invoke(cli, ["up", "--data", str(tmp_path / "data"), "--run", "../escaped"])
    assert done.exit_code == 2 and "run '../escaped': use letters" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "says"), [("port", "cannot listen on 127.0.0.1"), ("tls", "--tls-cert"), ("run", "is being written")]
)
def test_what_would_stop_the_proxy_is_found_before_the_worker_is_started(stub, tmp_path, wrong, says):
    """Which may take minutes to load. The log of a run that another `up` has stays."""
    with proxy_to(stub.url, tmp_path) as other:
        log = other.run_dir / "worker.log"
        log.write_text("the other's")
        settings = {"run": other.config.run if wrong == "run" else "mine", "port": free_port()}
        settings |= {"port": other.config.port} if wrong == "port" else {}
        settings |= {"tls": TLS(log, log)} if wrong == "tls" else {}
        config = Config((f"http://127.0.0.1:{free_port()}",), tmp_path, **settings)
        with pytest.raises((BadInput, RunLocked), match=says):
            asyncio.run(run_stack(config, ["/no/worker/is/started"], os.environ, partial(greet, config)))
        assert log.read_text() == "the other's" and not (tmp_path / "mine").exists()
