"""The real worker, killed under load: its API server, its engine core, what has the model, the proxy before it."""

import random
from functools import cached_property
from typing import ClassVar

import psutil
import pytest
from tokenizers import Tokenizer

import servers
from episodes.messages import chat, parse_object
from episodes.recovery import STOPPED
from tests.conftest import until
from tests.faults.conftest import running, tally
from tests.faults.stack import CLIENTS, Load, Stack

pytestmark = pytest.mark.engine


class RealStack(Stack):
    """The embedded model behind the proxy."""

    model = "SmolLM2-135M-Instruct"
    fields: ClassVar = {"max_tokens": 12, "temperature": 0}

    @cached_property
    def tokenizer(self):
        return Tokenizer.from_file(f"{servers.model_home()}/tokenizer.json")

    def _worker(self):
        self.spool = self.home / f"tautap-spool-{self.worker_port}"
        where = ["--port", f"{self.worker_port}", "--spool-dir", f"{self.home}"]
        # Blocks of 32 tokens, for the prompts here to share some.
        engine = ["--max-model-len", "1024", "--kv-cache-memory-bytes", "256M"]
        return ["-m", "worker", "--layers", "0,15,29", *where, *engine]

    def check_call(self, call, text):
        """Whether the rows are the right ones is for the tests of the engine: here, none may be missing. Of a call that
        the next proxy took up, its own having been killed, there are the tokens, and no reply.
        """
        (sequence,) = call.record.sequences
        assert self.tokenizer.decode(sequence.completion_token_ids) == text
        if call.record.error != STOPPED:
            (reply,) = parse_object(call.record.reply)["choices"]
            assert (reply["message"]["content"] or "") == text
        for point in call.record.points:
            assert len(call.activations(point)) == sequence.n_positions

    def explains(self, lost, call, stop):
        """The two began with the same words."""
        return chat(parse_object(lost.request))[0] == chat(parse_object(call.request))[0]


def proxy(stack):
    return psutil.Process(stack.proxy.pid)


def api_server(stack):
    return psutil.Process(stack.worker.pid)


def engine_core(stack):
    """The process that schedules, by the name that vLLM gives it."""
    (core,) = (process for process in started(stack) if "EngineCore" in process.cmdline()[0])
    return core


def model(stack):
    """The process that has the model, the largest."""
    return max(started(stack), key=lambda process: process.memory_info().rss)


def started(stack):
    """All processes that the worker started."""
    return api_server(stack).children(recursive=True)


# fault → whom it kills, and whether no call may be lost by it
KILLS = {
    "kill -9 of the proxy, real worker": (proxy, True),
    "kill -9 of the engine core": (engine_core, False),
    "kill -9 of the model's process": (model, False),
    "kill -9 of the API server": (api_server, False),
}


def test_the_real_worker_and_the_proxy_before_it_are_killed_and_no_answered_call_is_lost_unnamed(
    engines, tmp_path, times
):
    """Each is started again, and the next call works. Where each fault is injected once, the model's process is not
    killed by itself, but ends with the engine core: that is one start less.
    """
    kills = {fault: kill for fault, kill in KILLS.items() if times > 1 or kill[0] is not model}
    engines.stop()  # one engine at a time
    chance = random.Random(2)
    stack = RealStack(tmp_path)
    for _ in running(stack):
        for _ in range(max(times // 10, 1)):
            for fault, (whom, lossless) in kills.items():
                with tally(fault, stack, lossless=lossless):
                    begun = len(stack.answered)
                    with Load(stack) as load:
                        until(lambda begun=begun: len(stack.answered) >= begun + CLIENTS, "replies", 60)
                        load.wait(chance.uniform(0, 2))
                        whom(stack).kill()
                        until(lambda: not (stack.proxy.alive and stack.worker.alive), "the end", 60)
                        load.wait(0.2)
                    restart(stack)
        stack.finish()


def restart(stack):
    """Start what does not run any more, and nothing that it started before either."""
    for process in (stack.worker, stack.proxy):
        if not process.alive:
            process.kill()
            process.start()
