"""`tautap top`: a running proxy, seen from a terminal."""

import io
import os
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from episodes.errors import BadInput
from proxy.top import Sample, view
from tests.conftest import free_port, until
from tests.proxy.test_server import converse


def look(url, *flags):
    command = [sys.executable, "-m", "proxy", "top", url, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_one_look_is_printed_where_there_is_no_terminal(proxy, http):
    converse(proxy.client(), "seen", 2)
    until(lambda: "commit_seconds_count 2.0" in http.get(f"{proxy.url}/metrics").text, "two calls on disk")
    done = look(f"{proxy.url}/v1", "--every-s", "0.1")
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0].strip(): line.split()[-1] for line in done.stdout.splitlines()}
    n_rows = sum(call.n_kept for call in proxy.open().history.calls.values())
    assert (lines["turns of agents"], lines["rows stored"], lines["calls of agent"]) == ("2", f"{n_rows:,}", "2")


def test_a_terminal_is_kept_up_to_date_until_ctrl_c(proxy):
    ours, theirs = os.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "40"}
    command = [sys.executable, "-m", "proxy", "top", proxy.url, "--every-s", "0.1"]
    with os.fdopen(ours, "rb") as terminal:
        process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env)
        os.close(theirs)
        shown = b""
        while shown.count(b"rows stored") < 3:
            shown += terminal.read1()
        process.send_signal(signal.SIGINT)
        with pytest.raises(OSError):  # how a terminal says that nobody is there any more
            while chunk := terminal.read1():
                shown += chunk
        assert process.wait(30) == 0
    assert shown.count(b"\x1b[?25l") == shown.count(b"\x1b[?25h") == 1 and b"Traceback" not in shown


@pytest.mark.parametrize("there", [True, False])
def test_where_no_proxy_is_it_says_so(stub, there):
    url = stub.url if there else f"http://127.0.0.1:{free_port()}"
    done = look(url)
    assert done.returncode == (2 if there else 1)
    assert done.stderr.startswith(f"tautap top: {url}") and len(done.stderr.splitlines()) == 1


def test_rates_are_of_the_time_between_two_samples():
    head = "# TYPE tautap_proxy_row_bytes counter\n# TYPE tautap_proxy_claim_seconds histogram\n"
    text = "tautap_proxy_row_bytes_total {}e6\ntautap_proxy_claim_seconds_count {}\ntautap_proxy_claim_seconds_sum {}\n"
    before, now = (Sample.parse(head + text.format(*n), at) for n, at in (((3, 1, 9.0), 10.0), ((13, 5, 9.2), 14.0)))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(view("u", before, now))
    lines = {line[:20].strip(): line[20:].split() for line in console.export_text().splitlines()}
    assert lines["MB stored"][-2:] == ["2.5/s", "13.0"]
    assert lines["claim"][-4:] == ["50.0", "ms", "1,840.0", "ms"]


@pytest.mark.parametrize("text", ["", "<html>", "stub_up 1\n"])
def test_what_is_no_proxys_is_refused(text):
    with pytest.raises(BadInput, match="no metrics of a proxy"):
        Sample.parse(text, 0.0)
