"""The proxy and its disk: killed after a reply, full, and told to reply only after the commit."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext

import openai
import pytest

from episodes.errors import WorkerFailed, WrongModel
from episodes.run import open_run
from episodes.store import Store, family
from episodes.verify import problems
from episodes.wire import CAPTURE_HEADER, Capture
from proxy.backend import Backend
from proxy.config import Timeouts
from servers import healthy
from tests.conftest import free_port, proxy_to, slowly, until
from tests.proxy.test_server import check_rows, committed, converse, user
from tests.stub import MODEL, Running, Stub


def waiting(stub, http):
    """The calls that the worker holds."""
    return {call["call"] for call in http.get(f"{stub.url}/v1/activations").json()["data"]}


class ProxyProcess:
    """A proxy in a process of its own, to be killed."""

    def __init__(self, stubs, data):
        self.port = free_port()
        backends = [word for stub in stubs for word in ("--backend", stub.url)]
        command = [sys.executable, "-m", "proxy", "proxy", *backends, "--data", str(data), "--run", "r"]
        self.process = subprocess.Popen([*command, "--port", str(self.port)], stderr=subprocess.DEVNULL)
        until(lambda: healthy(f"http://127.0.0.1:{self.port}", "/health/live"), "the proxy")

    def client(self):
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="x", max_retries=0)

    def end(self, how):
        self.process.send_signal(how)
        self.process.wait(30)


@pytest.mark.parametrize("stream", [False, True])
def test_a_proxy_killed_right_after_a_reply_has_named_the_call_and_the_next_one_records_it(
    stub, tmp_path, http, stream
):
    """With its rows, which the worker still has; nothing is left there or in the run's directory."""
    data, n_calls = tmp_path / "data", 0
    for _ in range(3):
        proxy = ProxyProcess([stub], data)
        try:
            converse(proxy.client(), "killed", 2, stream)
            n_calls += 2
        finally:
            proxy.end(signal.SIGKILL)
        run = open_run(data / "r")
        unrecorded = [problem for problem in problems(run) if "before it had recorded the call" in problem]
        assert len(run.history.calls) + len(unrecorded) == n_calls
    with proxy_to(stub.url, data) as proxy:
        committed(proxy, n_calls)
        until(lambda: not waiting(stub, http), "the worker to have been told to forget")
    run = proxy.open()
    assert len(run.history.calls) == n_calls and not [call for call in run.history.calls.values() if call.lost]
    check_rows(run)
    assert [path.name for path in run.layout.root.rglob(".*")] == [".lock"]
    assert run.layout.begun.stat().st_size == 0


def test_a_conversation_goes_on_where_it_was_when_its_proxy_was_killed(stub, tmp_path):
    """As one does whose SDK tries again until there is a proxy."""
    proxy = ProxyProcess([stub], tmp_path)
    try:
        messages = converse(proxy.client(), "talk", 2)
        until(lambda: len(open_run(tmp_path / "r").history.calls) == 2, "both calls in the journal")
    finally:
        proxy.end(signal.SIGKILL)
    with proxy_to(stub.url, tmp_path) as proxy:
        proxy.client().chat.completions.create(model=MODEL, messages=[*messages, user("And now?")])
    run = proxy.open()
    (episode,) = run.episodes.to_pylist()
    assert (episode["n_calls"], episode["n_turns"], episode["status"]) == (3, 3, "sealed")
    check_rows(run)


def test_a_worker_that_still_holds_what_is_recorded_is_told_to_forget_it(stub, tmp_path, http):
    """As after a proxy that died between the commit and the telling; other clients' calls are left alone."""
    with proxy_to(stub.url, tmp_path) as proxy:
        converse(proxy.client(), "talk", 1)
    run = proxy.open()
    (recorded,) = run.history.calls
    for call, salt in ((recorded, f"{family(run.layout, run.about)}before.0"), ("somebody-elses", "s")):
        body = {"model": MODEL, "messages": [user("Hi")]}
        http.post(f"{stub.url}/v1/chat/completions", json=body, headers={CAPTURE_HEADER: Capture(call, salt).header()})
    assert waiting(stub, http) == {recorded, "somebody-elses"}
    with proxy_to(stub.url, tmp_path):
        until(lambda: waiting(stub, http) == {"somebody-elses"}, "the recorded call to be forgotten")


def test_a_copy_of_a_run_has_a_worker_forget_nothing_of_the_first(stub, tmp_path, monkeypatch):
    with proxy_to(stub.url, tmp_path) as proxy:
        converse(proxy.client(), "before the copy", 1)
    shutil.copytree(tmp_path / "r", tmp_path / "copy")
    slowly(monkeypatch, (Backend, "claim"), 1)
    with proxy_to(stub.url, tmp_path) as proxy:
        converse(proxy.client(), "of the first", 1)
        converse(proxy.client("/runs/copy/v1"), "of the copy", 1)
    for name in ("r", "copy"):
        run = open_run(tmp_path / name)
        assert [call.lost for call in run.history.calls.values()] == [None, None]
        check_rows(run)


def test_a_worker_is_not_told_to_forget_what_is_being_claimed_for_a_proxy_that_died(
    stub, tmp_path, left_behind, monkeypatch
):
    """However long the claim takes, beside the question what the worker still holds for that proxy."""
    slowly(monkeypatch, (Backend, "claim"), 1)
    with proxy_to(stub.url, tmp_path) as proxy:
        committed(proxy, 2)
    found = proxy.open().history.calls["c-left"]
    assert found.lost is None and found.n_positions > 0


@pytest.mark.parametrize("wrong", ["model", "key", "port"])
def test_a_start_that_fails_leaves_what_a_proxy_that_died_left(stub, tmp_path, left_behind, wrong):
    """One with another worker, with a key that this one does not know, or without any: the right one has it later."""
    other = Stub(tmp_path / "other", api_key="right" if wrong == "key" else None)
    other.engine.vllm_config.model_config.model = "tests/another"
    with Running(other) as another:
        url = f"http://127.0.0.1:{free_port()}" if wrong == "port" else another.url
        refused = {"model": pytest.raises(WrongModel), "key": pytest.raises(WorkerFailed)}
        with refused.get(wrong, nullcontext()), proxy_to(url, tmp_path, backend_key="wrong"):
            pass
    run = open_run(left_behind.root)
    assert "c-left" not in run.history.calls and any("c-left: its proxy was stopped" in said for said in problems(run))
    with proxy_to(stub.url, tmp_path):
        pass
    run = open_run(left_behind.root)
    assert run.history.calls["c-left"].n_kept > 0 and list(problems(run)) == []


def test_what_was_claimed_already_is_recorded_without_a_worker(stub, tmp_path, http, left_behind):
    left_behind.claim("c-left").write_bytes(http.get(f"{stub.url}/v1/activations/c-left").content)
    with proxy_to(f"http://127.0.0.1:{free_port()}", tmp_path):
        pass
    run = open_run(left_behind.root)
    assert run.history.calls["c-left"].n_kept > 0 and list(problems(run)) == []


def test_a_worker_that_does_not_answer_may_be_the_one_that_has_it(stub, tmp_path, left_behind, monkeypatch):
    """Rather than another, which knows nothing of the call."""

    async def holds(self, call):
        return None if self.url == stub.url else False

    monkeypatch.setattr(Backend, "holds", holds)
    with Running(Stub(tmp_path / "other")) as other, proxy_to((stub.url, other.url), tmp_path):
        pass
    assert open_run(left_behind.root).history.calls["c-left"].n_kept > 0


def test_what_a_worker_forgot_that_died_with_its_proxy_is_lost_by_name(tmp_path, left_behind):
    """Its client may have had the reply: so `verify` may not say that all is there. The worker that comes after the
    proxy is asked without waiting for a client to send something.
    """
    port = free_port()
    with (
        proxy_to(f"http://127.0.0.1:{port}", tmp_path, episode_idle_s=0.4),
        Running(Stub(tmp_path / "anew"), port=port),
    ):
        until(lambda: "c-left" in open_run(left_behind.root).history.calls, "the call in the journal")
    run = open_run(left_behind.root)
    assert run.history.calls["c-left"].lost
    assert [said for said in problems(run) if "c-left: no activations: " in said]


def test_new_calls_are_refused_while_too_many_wait_to_be_recorded(stub, tmp_path, http, monkeypatch):
    """As where claims take longer than replies: what waits is held in memory."""
    monkeypatch.setattr("proxy.recorder.PENDING_LIMIT", 2)
    slowly(monkeypatch, (Backend, "claim"), 2)
    body, replies = {"model": MODEL, "messages": [user("Hi")]}, []
    with proxy_to(stub.url, tmp_path, room_wait_s=0) as proxy:
        url = f"{proxy.url}/v1/chat/completions"
        until(lambda: replies.append(http.post(url, json=body)) or replies[-1].status_code != 200, "a refusal")
        assert replies[-1].status_code == 503 and "too many calls wait" in replies[-1].json()["error"]["message"]
    assert len(proxy.open().history.calls) == len(replies) - 1 < 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_ends_after_its_commit_if_that_is_asked_for(stub, tmp_path, stream):
    with proxy_to(stub.url, tmp_path, durability="sync") as proxy:
        for turns in (1, 2):
            converse(proxy.client(), f"sync {turns}", turns, stream)
            run = proxy.open()
            assert len(run.history.calls) == 2 * turns - 1
            check_rows(run)


def test_a_call_that_cannot_be_noted_is_recorded_as_what_its_client_got(stub, tmp_path, http, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Store, "begin", full)
    with proxy_to(stub.url, tmp_path, durability="sync") as proxy:
        body = {"model": MODEL, "messages": [user("Hi")]}
        assert http.post(f"{proxy.url}/v1/chat/completions", json=body).status_code == 503
    (call,) = proxy.open().history.calls.values()
    assert call.status == 503 and "could not be noted" in call.error


@pytest.mark.parametrize("stream", [False, True])
def test_a_worker_is_not_blamed_for_the_time_that_its_calls_are_recorded_in(stub, tmp_path, monkeypatch, stream):
    slowly(monkeypatch, (Backend, "claim"), 1)
    with proxy_to(stub.url, tmp_path, durability="sync", timeouts=Timeouts(idle_s=0.5)) as proxy:
        converse(proxy.client(), "slow", 1, stream)
    check_rows(proxy.open())
    assert [call.error for call in proxy.open().history.calls.values()] == [None]


# ---- a disk that is full


@pytest.fixture
def small_disk(tmp_path):
    """A directory on a file system of 4 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk, leave=0):
    """Fill a disk but for so many bytes; returns the file that does."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize) - leave)
    return filler


def test_new_calls_wait_for_room_and_are_refused_if_there_is_none_soon(stub, small_disk, http):
    """A 503 with Retry-After, before the worker has heard of the call; with room again a waiting call goes on."""
    options = {"min_free_bytes": 1 << 20, "room_wait_s": 2, "episode_idle_s": 300}
    body = {"model": MODEL, "messages": [user("Hi")]}
    with proxy_to(stub.url, small_disk, **options) as proxy:
        url = f"{proxy.url}/v1/chat/completions"
        assert http.post(url, json=body).status_code == 200
        filler = fill(small_disk, leave=1 << 19)
        replies = []
        until(lambda: replies.append(http.post(url, json=body)) or replies[-1].status_code != 200, "a refusal")
        assert replies[-1].status_code == 503 and int(replies[-1].headers["Retry-After"]) > 0
        assert "--min-free-bytes is 1,048,576" in replies[-1].json()["error"]["message"]
        assert len(stub.stub.bodies) == len(replies), "the worker has not heard of the last one"
        threading.Timer(0.2, filler.unlink).start()
        assert http.post(url, json=body).status_code == 200
    check_rows(proxy.open())
    assert len(proxy.open().history.calls) == len(replies) + 1


@pytest.mark.parametrize("least", [0, 1 << 20])
def test_what_is_in_flight_when_the_disk_fills_up_is_recorded_when_there_is_room(stub, small_disk, http, least):
    """Nothing half-written stays, the reply is whole, and the rows wait at the worker. A disk is full, too, where it
    would have less left than it is to have.
    """
    stub.stub.token_s = 0.05
    replies = []
    with proxy_to(stub.url, small_disk, min_free_bytes=least, room_wait_s=0.5) as proxy:
        talking = threading.Thread(target=lambda: replies.append(converse(proxy.client(), "full", 1)))
        talking.start()
        until(lambda: (proxy.run_dir / "begun.jsonl").stat().st_size > 0, "the call to have begun")
        filler = fill(small_disk, leave=least // 2)
        talking.join()
        assert replies and replies[0][-1]["content"]
        body = {"model": MODEL, "messages": [user("Hi")]}
        until(lambda: http.post(f"{proxy.url}/v1/chat/completions", json=body).status_code == 503, "a refusal")
        assert len(open_run(proxy.run_dir).history.calls) == 0 and waiting(stub, http)
        filler.unlink()
        committed(proxy, 1)
    run = proxy.open()
    check_rows(run)
    assert [path.name for path in run.layout.root.rglob(".*")] == [".lock"]


def test_what_is_kept_free_takes_the_last_calls_when_the_proxy_stops(stub, small_disk):
    stub.stub.token_s = 0.05
    with proxy_to(stub.url, small_disk, min_free_bytes=2 << 20, room_wait_s=0.5) as proxy:
        talking = threading.Thread(target=converse, args=(proxy.client(), "full", 1))
        talking.start()
        until(lambda: (proxy.run_dir / "begun.jsonl").stat().st_size > 0, "the call to have begun")
        fill(small_disk, leave=1 << 20)
        talking.join()
    run = proxy.open()
    assert run.columns("n_missing", "status").to_pylist() == [{"n_missing": 0, "status": 200}]
    assert list(problems(run)) == []


def test_a_proxy_that_stops_with_its_disk_full_has_named_what_it_could_not_record(stub, small_disk):
    """And the next one records it."""
    stub.stub.token_s = 0.05
    with proxy_to(stub.url, small_disk, min_free_bytes=0) as proxy:
        talking = threading.Thread(target=converse, args=(proxy.client(), "full", 1))
        talking.start()
        until(lambda: (proxy.run_dir / "begun.jsonl").stat().st_size > 0, "the call to have begun")
        filler = fill(small_disk)
        talking.join()
    run = proxy.open()
    assert not run.history.calls and ["before it had recorded" in said for said in problems(run)] == [True]
    filler.unlink()
    with proxy_to(stub.url, small_disk, min_free_bytes=0) as proxy:
        committed(proxy, 1)
    check_rows(proxy.open())
