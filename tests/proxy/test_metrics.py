"""What a proxy counts of what it does, as Prometheus would read it."""

import asyncio
import errno
import json
import math
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from episodes.errors import CorruptFile
from episodes.store import Store
from episodes.wire import CAPTURE_HEADER, Capture
from proxy.backend import Backend
from proxy.config import Limits
from proxy.metrics import N_REASONS, OTHER, Metrics
from proxy.recorder import Recording
from tests.conftest import free_port, proxy_to, slowly, until
from tests.proxy.test_server import committed, converse, user
from tests.stub import HIDDEN, MODEL, POINTS


class Metered:
    """The metrics of a proxy: name and label values → value, looked up anew each time."""

    def __init__(self, http, proxy):
        self._http, self._url = http, f"{proxy.url}/metrics"

    def __call__(self, name, **labels):
        reply = self._http.get(self._url)
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        return read(reply.text, name, **labels)


def read(text, name, **labels):
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return sum(s.value for s in samples if s.name == f"tautap_proxy_{name}" and labels.items() <= s.labels.items())


@pytest.fixture
def metered(http, proxy):
    return Metered(http, proxy)


def test_episodes_are_counted_while_the_disks_thread_adds_one():
    """Calls are committed on that thread, at any moment."""
    episodes = {}

    class Episode:
        @property
        def calls(self):
            episodes[str(len(episodes))] = self
            return [SimpleNamespace(role="agent")]

    episodes["first"] = Episode()
    recording = SimpleNamespace(_store=SimpleNamespace(history=SimpleNamespace(episodes=episodes)))
    assert [Recording.n_live.fget(recording) for _ in range(3)] == [1, 2, 4]


def test_calls_tokens_and_rows_are_counted_as_the_journal_has_them(proxy, metered):
    """What one conversation of three turns stores and shares, and how long each step took."""
    converse(proxy.client(), "counted", 3)
    until(lambda: metered("commit_seconds_count") == 3 and metered("queue") == 0, "three calls on disk")
    run = proxy.open()
    calls = [run.call(call) for call in run.history.calls]
    n_rows = sum(call.record.n_kept for call in calls)
    n_positions = sum(call.record.n_positions for call in calls)
    until(lambda: metered("rows_total") == n_positions, "each position to be counted")
    assert metered("calls_total", role="agent", status="200") == metered("turns_total") == 3
    assert metered("tokens_total", kind="prompt") == sum(call.record.n_prompt for call in calls)
    assert metered("tokens_total", kind="completion") == sum(call.record.n_completion for call in calls)
    assert metered("rows_total", kind="stored") == n_rows > 0
    assert metered("rows_total", kind="shared") == n_positions - n_rows > 0
    assert metered("rows_total", kind="missing") == 0
    assert metered("row_bytes_total") == n_rows * len(POINTS) * HIDDEN * 2
    for name in ("added", "first_byte", "call", "claim"):
        assert metered(f"{name}_seconds_count") == 3
    assert 0 < metered("added_seconds_sum") < metered("call_seconds_sum")
    assert metered("episodes_live") == metered("runs") == 1 and metered("disk_free_bytes") > 0
    until(lambda: metered("spool_bytes") == 0, "the worker to forget them")
    assert metered("spool_limit_bytes") > 0


def test_rows_of_a_call_that_is_not_over_are_shared_and_not_missing(proxy, stub, metered):
    """The second call finds the first one's prompt in the cache, and is on disk before it."""
    stub.stub.token_s = 0.3
    slow = threading.Thread(target=converse, args=(proxy.client(), "first", 1))
    slow.start()
    until(lambda: metered("in_flight") == 1 and stub.stub.engine.cached, "its prompt to be cached")
    stub.stub.token_s = 0
    converse(proxy.client(), "second", 1)
    until(lambda: metered("commit_seconds_count") == 1, "the second call on disk")
    assert metered("in_flight") == 1
    (second,) = proxy.open().history.calls
    missing = proxy.open().call(second).missing
    until(lambda: metered("rows_total", kind="stored"), "what it has to be counted")
    assert missing and metered("rows_total", kind="missing") == metered("rows_total", kind="shared") == 0
    assert proxy.open().call(second).record.n_positions == metered("rows_total") + missing
    slow.join()
    run = committed(proxy, 2)
    n_positions = sum(run.call(call).record.n_positions for call in run.history.calls)
    until(lambda: metered("rows_total") == n_positions, "each position to be counted")
    assert metered("rows_total", kind="shared") > 0 and metered("rows_total", kind="missing") == 0


def test_what_is_under_way_and_what_was_sealed_can_be_seen(proxy, stub, metered, http):
    stub.stub.token_s = 0.2
    talking = threading.Thread(target=converse, args=(proxy.client(), "slow", 1))
    talking.start()
    until(lambda: metered("in_flight") == 1, "a call under way")
    stub.stub.token_s = 0
    talking.join()
    http.post(f"{proxy.url}/tautap/runs/r/seal")
    assert metered("in_flight") == metered("queue") == metered("episodes_live") == 0
    assert metered("episodes_sealed_total") == 1


def refuse(monkeypatch, n, corrupt=False):
    """Have the disk refuse the first n commits. corrupt: and every call file be damaged."""
    commit, left = Store.commit, iter(range(n))

    def refused(store, call, claim, foreign):
        if corrupt and claim is not None:
            raise CorruptFile("a bit fell over")
        if next(left, None) is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return commit(store, call, claim, foreign)

    monkeypatch.setattr(Store, "commit", refused)
    monkeypatch.setattr("proxy.recorder.AGAIN_S", 0.1)


def test_a_call_is_timed_once_however_often_the_disk_refuses_it(proxy, metered, monkeypatch):
    """With all the time that it took until it was there."""
    refuse(monkeypatch, 3)
    converse(proxy.client(), "refused", 1)
    until(lambda: metered("rows_total"), "it to be counted")
    assert metered("claim_seconds_count") == metered("commit_seconds_count") == 1
    assert metered("commit_seconds_sum") > 0.3 > metered("claim_seconds_sum")


@pytest.mark.parametrize("corrupt", [False, True])
def test_a_capture_is_lost_once_however_often_the_disk_refuses_it(proxy, stub, metered, monkeypatch, corrupt):
    """That is one reason, and one epoch more. What was never there was not claimed."""
    refuse(monkeypatch, 3, corrupt)
    stub.stub.engine.fail_captures = None if corrupt else "no room"
    converse(proxy.client(), "lost", 1)
    (call,) = committed(proxy, 1).history.calls.values()
    assert call.lost == ("a bit fell over" if corrupt else "no room")
    until(lambda: metered("queue") == 0, "it to be counted")
    assert (metered("captures_failed_total"), metered("claim_seconds_count")) == (1, corrupt)
    assert metered("commit_seconds_count") == 1
    converse(proxy.client(), "next", 1)
    assert Capture.parse(stub.stub.headers[-1][CAPTURE_HEADER.lower()]).salt.endswith(".1")


def test_what_a_client_waits_for_is_counted(stub, tmp_path, http, monkeypatch):
    """Room for the call; and with `sync`, that it is recorded. Its body is the client's own doing."""
    slowly(monkeypatch, (Recording, "room"), 0.3)
    slowly(monkeypatch, (Backend, "claim"), 0.5)
    with proxy_to(stub.url, tmp_path, durability="sync") as proxy:
        metered = Metered(http, proxy)
        converse(proxy.client(), "held", 1)
        assert metered("calls_total", status="200") == 1
        assert metered("added_seconds_sum") > 0.8 and metered("call_seconds_sum") > 0.5


def test_a_client_that_is_slow_to_send_its_request_is_not_the_proxys_doing(proxy, metered):
    body = json.dumps({"model": MODEL, "messages": [user("Hi")]}).encode()
    with socket.create_connection(("127.0.0.1", proxy.config.port), timeout=20) as out:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        out.sendall(head.encode() + body[:5])
        time.sleep(0.8)
        out.sendall(body[5:])
        assert out.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert metered("added_seconds_count") == 1 and metered("added_seconds_sum") < 0.6


def test_a_streams_first_byte_is_one_of_its_body(proxy, stub, metered):
    """The head says that there will be one, and comes long before it."""
    stub.stub.token_s = 0.2
    converse(proxy.client(), "late", 1, stream=True)
    (call,) = committed(proxy, 1).history.calls.values()
    assert call.first_byte - call.started > 0.2 and metered("first_byte_seconds_sum") > 0.2


def test_no_call_is_under_way_twice_or_less_than_never(proxy, monkeypatch):
    """Looked at in the turn of the loop in which a call's task ends."""
    seen, record = [], Recording._record

    async def seen_at_its_end(self, *args):
        try:
            return await record(self, *args)
        finally:
            asyncio.get_running_loop().call_soon(lambda: seen.append((self.n_in_flight, self.n_queued)))

    monkeypatch.setattr(Recording, "_record", seen_at_its_end)
    converse(proxy.client(), "seen", 3)
    until(lambda: len(seen) == 3, "the calls to be recorded")
    assert seen[-1] == (0, 0) and min(seen) == (0, 0)


def test_lost_activations_are_counted_by_reason(proxy, stub, metered):
    """Whatever numbers the reason names; the positions that have no row are missing."""
    client = proxy.client()
    for n_bytes in (1200, 34):
        stub.stub.engine.fail_captures = f"the spool is full: {n_bytes} bytes more"
        client.chat.completions.create(model=MODEL, messages=[user(f"Hi {n_bytes}")])
    calls = committed(proxy, 2).history.calls.values()
    until(lambda: metered("queue") == 0, "both to be counted")
    assert metered("captures_failed_total", reason="the spool is full: N bytes more") == 2
    assert metered("rows_total", kind="missing") == sum(call.n_positions for call in calls) > 0


def test_reasons_that_never_repeat_do_not_fill_the_memory():
    metrics = Metrics()
    for first in "abcdefgh":
        for second in "stuvwxyz":
            metrics.failed(f"no {first}{second}")
    text = metrics.exposition(b"").decode()
    assert text.count("tautap_proxy_captures_failed_total{") == N_REASONS + 1
    assert read(text, "captures_failed_total", reason=OTHER) == 64 - N_REASONS


def test_a_worker_that_does_not_answer_leaves_the_rest(tmp_path, http):
    with proxy_to(f"http://127.0.0.1:{free_port()}", tmp_path) as proxy:
        metered = Metered(http, proxy)
        assert http.post(f"{proxy.url}/v1/chat/completions", json={"messages": []}).status_code == 502
        assert metered("calls_total", status="502") == 1 and math.isnan(metered("spool_bytes"))


def test_what_the_proxy_refuses_itself_is_counted_by_status(stub, tmp_path, http):
    """Also what is no call yet. An error of the worker's is none of its own."""
    with proxy_to(stub.url, tmp_path / "data", limits=Limits(in_flight=1)) as proxy:
        metered, url = Metered(http, proxy), f"{proxy.url}/v1/chat/completions"
        body = {"model": MODEL, "messages": [user("Hi")]}
        assert http.get(f"{proxy.url}/nowhere").status_code == 404
        assert http.post(url, json=body | {"model": "nobody"}).status_code == 404
        assert http.post(url, json=body | {"collect_activations": {"layers": [99]}}).status_code == 400
        stub.stub.token_s = 0.2
        with http.stream("POST", url, json=body | {"stream": True}):
            assert http.post(url, json=body).status_code == 429
        assert [metered("refusals_total", status=status) for status in ("404", "400", "429")] == [1, 1, 1]
        assert metered("refusals_total") == 3
