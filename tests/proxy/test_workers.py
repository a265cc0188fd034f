"""Several workers behind one proxy: stubs, and real ones of which one is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack, suppress

import httpx
import msgspec
import openai
import pytest
from click.testing import CliRunner

from episodes.errors import WrongModel
from episodes.verify import problems
from proxy import workers
from proxy.__main__ import cli
from proxy.backend import Backend
from proxy.server import Proxy
from proxy.top import Sample
from servers import healthy
from tests.conftest import free_port, proxy_to, until
from tests.proxy.test_durability import ProxyProcess, waiting
from tests.proxy.test_server import SYSTEM, check_rows, committed, converse, user
from tests.stub import MODEL, Running, Stub
from worker.orders import XARG
from worker.smollm import NAME


@pytest.fixture
def two(tmp_path):
    with Running(Stub(tmp_path / "a")) as a, Running(Stub(tmp_path / "b")) as b:
        yield [a, b]


def fleet(stubs, data, **options):
    return proxy_to(tuple(stub.url for stub in stubs), data, **options)


def served(stub):
    """The conversations of which a worker has run calls, by their first message."""
    return {body["messages"][1]["content"].partition(",")[0] for body in stub.stub.bodies}


def step(client, messages, text):
    """One more turn of a conversation."""
    messages.append(user(text))
    reply = client.chat.completions.create(model=MODEL, messages=messages)
    messages.append({"role": "assistant", "content": reply.choices[0].message.content})


def metered(proxy, name, worker=None):
    """What the proxy says of itself, or of one of its workers."""
    labels = {"worker": worker.url} if worker else {}
    with urllib.request.urlopen(f"{proxy.url}/metrics") as said:  # an httpx client takes 20 ms to make
        return Sample.parse(said.read().decode(), 0).total(name, **labels)


def test_each_conversation_is_served_by_one_worker_and_claimed_from_it(two, tmp_path, http):
    """Four at once, three turns each: two at home with each, every row there, and both told to forget."""
    with fleet(two, tmp_path) as proxy:
        client, talks = proxy.client(), {f"talk {i}": [SYSTEM] for i in range(4)}
        for turn in range(3):
            for name, messages in talks.items():
                step(client, messages, f"{name}, turn {turn}")
        until(lambda: not any(waiting(stub, http) for stub in two), "the workers to have been told to forget")
    homes = [served(stub) for stub in two]
    assert [len(home) for home in homes] == [2, 2] and homes[0].isdisjoint(homes[1])
    check_rows(proxy.open())
    assert len(proxy.open().history.calls) == 12


def test_calls_at_the_same_time_go_to_different_workers(two, tmp_path):
    for stub in two:
        stub.stub.token_s = 0.1
    with fleet(two, tmp_path) as proxy:
        threads = [threading.Thread(target=converse, args=(proxy.client(), f"talk {i}", 1)) for i in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: [metered(proxy, "worker_calls", stub) for stub in two] == [1, 1], "a call at each")
        for thread in threads:
            thread.join()
    check_rows(proxy.open())


def test_a_worker_that_is_gone_is_passed_over_and_taken_back(two, tmp_path, http):
    """Its conversation goes on at the other without an error, computed again; new ones come to it once it is back."""
    a, b = two
    with fleet(two, tmp_path / "data") as proxy, ExitStack() as stack:
        client, messages = proxy.client(), [SYSTEM]
        step(client, messages, "moves, turn 0")
        committed(proxy, 1)
        home, other = (a, b) if a.stub.bodies else (b, a)
        home.__exit__()
        step(client, messages, "moves, turn 1")
        step(client, messages, "moves, turn 2")
        assert len(home.stub.bodies) == 1 and len(other.stub.bodies) == 2
        assert [metered(proxy, "worker_up", stub) for stub in (home, other)] == [0, 1]
        said = http.get(f"{proxy.url}/health/ready")
        assert said.status_code == 200
        assert said.json()["workers"] == {home.url: "the worker does not answer", other.url: "ready"}
        port = int(home.url.rpartition(":")[2])
        again = stack.enter_context(Running(Stub(tmp_path / "again"), port=port))
        until(lambda: metered(proxy, "worker_up", again) == 1, "it to be taken back")
        converse(client, "new", 2)
        step(client, messages, "moves, turn 3")
        assert served(again) == {"new"} and len(other.stub.bodies) == 3
    run = proxy.open()
    check_rows(run)
    assert [call.status for call in run.history.calls.values()] == [200] * 6


def test_without_any_worker_a_call_is_502_and_readiness_503(two, tmp_path, http):
    with fleet(two, tmp_path) as proxy:
        for stub in two:
            stub.__exit__()
        reply = http.post(f"{proxy.url}/v1/chat/completions", json={"model": MODEL, "messages": [user("Hi")]})
        assert reply.status_code == 502 and "cannot be reached" in reply.json()["error"]["message"]
        assert http.get(f"{proxy.url}/health/ready").status_code == 503


def test_a_proxy_that_died_leaves_each_worker_its_calls_and_the_next_one_claims_them_there(two, tmp_path, http):
    data = tmp_path / "data"
    proxy = ProxyProcess(two, data)
    try:
        for i in range(4):
            converse(proxy.client(), f"talk {i}", 1)
    finally:
        proxy.end(signal.SIGKILL)
    assert [len(served(stub)) for stub in two] == [2, 2]
    with fleet(two, data) as proxy:
        committed(proxy, 4)
        until(lambda: not any(waiting(stub, http) for stub in two), "the workers to have been told to forget")
    run = proxy.open()
    assert not [call for call in run.history.calls.values() if call.lost]
    check_rows(run)


def other_model(spool):
    stub = Stub(spool)
    stub.engine.vllm_config.model_config.dtype = "torch.float32"
    return stub


def test_workers_that_are_not_alike_are_refused_at_start(tmp_path, stub):
    says = "it has dtype (float32, not bfloat16|bfloat16, not float32) as another has: all must be alike"
    with Running(other_model(tmp_path / "other")) as other, pytest.raises(WrongModel, match=says):
        fleet([stub, other], tmp_path / "data").__enter__()
    tuned = Stub(tmp_path / "tuned")
    tuned.engine.vllm_config.model_config.model = "tests/tuned"
    with Running(tuned) as other, pytest.raises(WrongModel, match="it has checkpoint tests/"):
        fleet([stub, other], tmp_path / "data").__enter__()
    with Running(Stub(tmp_path / "plain"), captures=False) as plain, pytest.raises(WrongModel, match="no worker of"):
        fleet([stub, plain], tmp_path / "data").__enter__()


def test_one_that_joins_later_and_is_not_alike_is_given_no_call(tmp_path, stub, http):
    """Not even when there is no other."""
    port = free_port()
    with proxy_to((stub.url, f"http://127.0.0.1:{port}"), tmp_path / "data") as proxy:
        converse(proxy.client(), "alone", 1)
        with Running(other_model(tmp_path / "other"), port=port) as other:
            said = {}
            until(lambda: "dtype" in str(said.update(ready(proxy)) or said.get(other.url)), "it to be looked at")
            converse(proxy.client(), "still alone", 1)
            until(lambda: len(proxy.open().history.calls) == 2, "their rows to be claimed")
            stub.__exit__()
            reply = http.post(f"{proxy.url}/v1/chat/completions", json={"model": MODEL, "messages": [user("Hi")]})
            assert reply.status_code == 502 and not other.stub.bodies
    check_rows(proxy.open())


def edited(spool):
    """A worker that steers."""
    stub, path = Stub(spool), spool.with_name("steer.py")
    path.write_text("def steer(model): pass")
    stub.engine.config = msgspec.structs.replace(stub.engine.config, edit=f"{path}:steer")
    stub.engine.vllm_config.additional_config = {XARG: msgspec.to_builtins(stub.engine.config)}
    return stub


@pytest.mark.parametrize("looked_after", [False, True])
def test_one_that_comes_back_as_something_else_is_given_no_call_of_the_run(
    tmp_path, stub, http, monkeypatch, looked_after
):
    """Whether a call or a look has found it gone; another run takes it as it is. Back as it was, it goes on."""
    for name in ("DOWN_S", "UP_S"):
        monkeypatch.setattr(workers, name, 0.02 if looked_after else 3600)
    port, body = int(stub.url.rpartition(":")[2]), {"model": MODEL, "messages": [user("Hi")]}
    with proxy_to(stub.url, tmp_path / "data") as proxy, ExitStack() as stack:

        def leave(worker):
            until(lambda: metered(proxy, "queue") == 0, "what it holds to be claimed")
            worker.__exit__()
            if looked_after:
                until(lambda: metered(proxy, "worker_up", stub) == 0, "it to be missed")
            else:
                assert http.get(f"{proxy.url}/v1/models").status_code == 502

        def ask(run="r"):
            return http.post(f"{proxy.url}/runs/{run}/v1/chat/completions", json=body).status_code

        def comes(as_what):
            worker = stack.enter_context(Running(as_what, port=port))
            if looked_after:
                until(lambda: metered(proxy, "worker_up", stub) == 1, "it to be found")
            return worker

        assert ask() == 200
        leave(stub)
        steered = comes(edited(tmp_path / "steered"))
        assert [ask(), ask("other"), ask()] == [409, 200, 409] and len(steered.stub.bodies) == 1
        leave(steered)
        comes(Stub(tmp_path / "again"))
        assert [ask(), ask("other")] == [200, 409]
    check_rows(proxy.open())


def ready(proxy):
    return httpx.get(f"{proxy.url}/health/ready").json()["workers"]


def test_a_backend_without_a_health_route_is_not_called_sick(tmp_path, http, monkeypatch, caplog):
    """As of one that is not ours: that it answers is enough."""
    for name in ("DOWN_S", "UP_S"):
        monkeypatch.setattr(workers, name, 0.02)
    stub = Stub(tmp_path / "spool")
    stub.app.router.routes = [route for route in stub.app.router.routes if route.path != "/health"]
    with Running(stub, captures=False) as backend, proxy_to(backend.url, tmp_path / "data") as proxy:
        until(lambda: caplog.messages != [], "it to be looked at")
        assert http.get(f"{proxy.url}/health/ready").status_code == 200
        assert metered(proxy, "worker_up", backend) == 1
    (said,) = caplog.messages
    assert "no worker of tautap's" in said


def test_a_look_that_fails_is_not_the_last(two, tmp_path, monkeypatch):
    """Whatever it is: a worker that goes is missed all the same."""
    look, failed = workers.Workers._look, []

    async def fails_once(self, worker):
        if metered_by_now and not failed:
            failed.append(worker)
            raise MemoryError("told to fail")
        await look(self, worker)

    metered_by_now = []
    for name in ("DOWN_S", "UP_S"):
        monkeypatch.setattr(workers, name, 0.02)
    monkeypatch.setattr(workers.Workers, "_look", fails_once)
    with fleet(two, tmp_path) as proxy:
        metered_by_now.append(metered(proxy, "worker_up", two[0]))
        until(lambda: bool(failed), "a look that fails")
        two[0].__exit__()
        until(lambda: metered(proxy, "worker_up", two[0]) == 0, "it to be missed")


def test_a_worker_is_named_once(tmp_path):
    named = ["--backend", "http://127.0.0.1:1"]
    done = CliRunner().invoke(cli, ["proxy", *named, *named, "--data", str(tmp_path)])
    assert done.exit_code == 2 and "--backend http://127.0.0.1:1 is given twice" in done.stderr


@pytest.mark.parametrize("heard", [True, False])
def test_a_call_is_sent_to_no_other_worker_than_there_was_when_it_began(stub, tmp_path, http, monkeypatch, heard):
    """Nor to one that nobody had heard of then: without a capture, which the call would not be known to lack."""
    begin, capabilities = Proxy._begin, Backend.capabilities

    async def other(self):
        return msgspec.structs.replace(await capabilities(self), checkpoint="another")

    def meanwhile(self, *call):
        if heard:
            monkeypatch.setattr(Backend, "capabilities", other)
        else:
            self._workers.model = None
        self._workers.known.clear()
        return begin(self, *call)

    body = {"model": MODEL, "messages": [user("Hi")]}
    with proxy_to(stub.url, tmp_path) as proxy:
        monkeypatch.setattr(Proxy, "_begin", meanwhile)
        reply = http.post(f"{proxy.url}/v1/chat/completions", json=body)
        says = "the worker was started anew since" if heard else "the worker has come up since"
        assert reply.status_code == 502 and says in reply.json()["error"]["message"]
        assert stub.stub.bodies == []
        monkeypatch.undo()
        assert http.post(f"{proxy.url}/v1/chat/completions", json=body).status_code == 200
    made = sorted(proxy.open().history.calls.values(), key=lambda call: call.started)
    assert [bool(call.points) for call in made] == [heard, True]


class RealWorker:
    """The embedded model on one core."""

    def __init__(self, core, logs):
        port = free_port()
        self.url, self._log = f"http://127.0.0.1:{port}", logs / f"{core}.log"
        flags = ["--layers", "0,15", "--max-model-len", "2048", "--port", str(port), "--spool-dir", str(logs)]
        flags += ["--kv-cache-memory-bytes", "256M"]
        # The model in the engine's own process, as in `Engines`.
        env = {"VLLM_CPU_OMP_THREADS_BIND": str(core), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        kept = {name: value for name, value in os.environ.items() if name != "NNSIGHT_CONFIG"}
        command = [sys.executable, "-m", "worker", *flags]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=kept | env, start_new_session=True)

    def there(self):
        assert self._process.poll() is None, self._log.read_text(errors="replace")[-4000:]
        return healthy(self.url)

    def tell(self, signal_):
        """The server and its engine."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal_)

    def kill(self):
        self.tell(signal.SIGKILL)
        self._process.wait(30)


@pytest.fixture
def real(engines, tmp_path):
    engines.stop()
    workers = [RealWorker(core, tmp_path) for core in (0, 1)]
    try:
        until(lambda: all(worker.there() for worker in workers), "both workers", 200)
        yield workers
    finally:
        for worker in workers:
            worker.kill()


class Talk(threading.Thread):
    """A conversation whose client asks again when a call fails. replies: what it was answered, turn by turn."""

    def __init__(self, client, name, turns, length):
        super().__init__()
        self._client, self._name, self._turns, self._length = client, name, turns, length
        self.replies = []

    def run(self):
        messages = [{"role": "system", "content": "You are a clerk of a library. Be brief. " * 8}]
        while len(self.replies) < self._turns:
            messages.append(user(f"Tell me about {self._name}, part {len(self.replies)}."))
            text = self._ask(messages)
            self.replies.append(text)
            messages.append({"role": "assistant", "content": text})

    def _ask(self, messages):
        for _ in range(10):
            try:
                reply = self._client.chat.completions.create(
                    model=NAME, messages=messages, temperature=0, max_tokens=self._length, extra_body={"min_tokens": 8}
                )
                return reply.choices[0].message.content
            except openai.APIError:
                time.sleep(0.2)
        raise AssertionError(f"{self._name}: no answer")


def die_half_way(worker, proxy):
    """Kill a worker with calls under way, if what it has answered is all claimed: else its rows would go with it."""
    if metered(proxy, "worker_calls", worker) < 2:
        return False
    worker.tell(signal.SIGSTOP)
    for _ in range(20):
        time.sleep(0.1)  # what it sent before it stopped arrives
        if metered(proxy, "queue") == 0 and metered(proxy, "worker_calls", worker):
            worker.kill()
            return True
    worker.tell(signal.SIGCONT)
    return False


@pytest.mark.engine
def test_a_real_worker_is_killed_half_way_and_nothing_that_was_answered_is_lost(real, tmp_path):
    """Eight conversations on two workers, of which one dies with calls under way. All come to their end, and every
    reply that a client got is on disk with all its rows; only the calls that broke off are said to have none.
    """
    with fleet(real, tmp_path / "data", durability="sync", claim_timeout_s=3) as proxy:
        talks = [
            Talk(proxy.client(), name, 3, 16) for name in ("tea", "rain", "iron", "bees", "salt", "ink", "oak", "wool")
        ]
        for talk in talks:
            talk.start()
        until(lambda: min(len(talk.replies) for talk in talks) >= 1, "an answer for each", 120)
        until(lambda: die_half_way(real[0], proxy), "calls under way at the first", 60)
        for talk in talks:
            talk.join(120)
        assert [len(talk.replies) for talk in talks] == [3] * 8
        assert [metered(proxy, "worker_up", worker) for worker in real] == [0, 1]
    run = proxy.open()
    calls = list(run.history.calls.values())
    answered = [call for call in calls if call.status == 200 and call.error is None]
    said = sorted(json.loads(call.reply)["choices"][0]["message"]["content"] for call in answered)
    assert said == sorted(text for talk in talks for text in talk.replies)
    broken = {call.id for call in calls} - {call.id for call in answered}
    print(f"{len(answered)} calls answered, {len(broken)} broken off")
    assert broken and {problem.split()[1].rstrip(":,") for problem in problems(run)} <= broken
    for call in answered:
        (sequence,) = call.sequences
        assert len(run.call(call.id).activations("layers.15.output")) == sequence.n_positions > 40
