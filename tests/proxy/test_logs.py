"""The proxy's log for machines: one JSON object a line, with the ids of the calls it is about."""

import json
import logging
import signal
import subprocess
import sys

import openai

from episodes.run import open_run
from proxy.logs import JSONLines
from tests.conftest import free_port
from tests.proxy.test_server import converse


def test_a_line_is_an_object_whatever_was_said():
    try:
        raise ValueError('a "quoted"\nreason')
    except ValueError:
        record = logging.LogRecord("tautap.proxy", logging.ERROR, "", 1, "call %s\nfailed", ("c-1",), sys.exc_info())
    record.fields = {"call": "c-1"}
    line = JSONLines().format(record)
    said = json.loads(line)
    assert "\n" not in line and said["message"] == "call c-1\nfailed" and said["call"] == "c-1"
    assert (said["level"], said["logger"]) == ("error", "tautap.proxy") and said["time"].endswith("Z")
    assert 'a "quoted"\nreason' in said["exception"]


def test_every_recorded_call_is_told_with_its_place_and_its_rows(stub, tmp_path):
    """And one whose activations were lost with the reason, in a line of its own too."""
    port = free_port()
    command = [sys.executable, "-m", "proxy", "proxy", "--backend", stub.url, "--data", str(tmp_path), "--run", "r"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--port", str(port), "--log-format", "json"], **pipes) as process:
        assert f":{port}/v1" in process.stdout.readline()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)
        converse(client, "kept", 2)
        stub.stub.engine.fail_captures = "the spool is full"
        converse(client, "lost", 1)
        process.send_signal(signal.SIGTERM)
        _, output = process.communicate(timeout=30)
    said = [json.loads(line) for line in output.splitlines()]
    calls = open_run(tmp_path / "r").history.calls
    told = {line["call"]: line for line in said if line["logger"] == "tautap.calls"}
    assert told.keys() == calls.keys() and len(calls) == 3
    for line in told.values():
        call = calls[line["call"]]
        assert (line["thread"], line["turn"], line["run"]) == (call.thread, call.turn, "r")
        assert line["rows"].get("stored", 0) == call.n_kept and line["lost"] == call.lost
        assert line["seconds"] >= line["first_byte_s"] > 0
    (warned,) = [line for line in said if line["level"] == "warning"]
    assert calls[warned["call"]].lost == "the spool is full"
