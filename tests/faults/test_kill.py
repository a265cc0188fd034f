"""`kill -9`: at random instants under load, and at one system call after the other."""

import random
from contextlib import suppress

from tests.faults.conftest import tally
from tests.faults.stack import TROUBLE, Load
from tests.faults.syscalls import injected

# What changes the run's directory, or makes it last.
STEPS = "fsync,ftruncate,link,linkat,mkdir,rename,rmdir,unlink,unlinkat"


def test_a_proxy_that_is_killed_under_load_loses_no_answered_call(stack, times):
    """It is started again on the same run, claims what the one before had not, and goes on."""
    chance = random.Random(0)
    for _ in range(times):
        with tally("kill -9 of the proxy", stack, lossless=True):
            with Load(stack) as load:
                load.wait(chance.uniform(0.05, 1))
                stack.proxy.kill()
            stack.proxy.start()
    stack.finish()


def test_a_proxy_that_is_killed_at_any_step_of_a_commit_or_a_seal_loses_no_answered_call(stack, tmp_path, times):
    """Before its first step, its second, and so on, until there are no more: two calls, then SIGTERM, which seals."""
    for step in range(1, times + 1):
        with tally("kill -9 of the proxy, step by step", stack, lossless=True):
            with injected(stack.proxy.pid, STEPS, f"signal=KILL:when={step}", tmp_path / "strace.log"):
                with suppress(*TROUBLE):
                    stack.ask(f"at step {step}")
                    stack.ask(f"at step {step}, again", stream=True)
                code = stack.proxy.stop()
            stack.proxy.start()
        if code == 0:
            break
    stack.finish()


def test_a_worker_that_is_killed_under_load_loses_no_call_unnamed(stack, times):
    """The proxy goes on; what only the worker had is in the journal as lost."""
    chance = random.Random(1)
    for _ in range(times):
        with tally("kill -9 of the worker", stack):
            with Load(stack) as load:
                load.wait(chance.uniform(0.05, 1))
                stack.worker.kill()
                load.wait(0.1)
            stack.worker.start()
    stack.finish()
