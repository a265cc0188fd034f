"""`kill -9` at random instants under load."""

import random

from tests.faults.conftest import tally
from tests.faults.stack import Load


def test_a_proxy_that_is_killed_under_load_loses_no_answered_call(stack, times):
    """It is started again on the same run and goes on."""
    chance = random.Random(0)
    for _ in range(times):
        with tally("kill -9 of the proxy", stack):
            with Load(stack) as load:
                load.wait(chance.uniform(0.05, 0.6))
                stack.proxy.kill()
            stack.proxy.start()
    stack.finish()


def test_a_worker_that_is_killed_under_load_loses_no_call_unnamed(stack, times):
    """The proxy goes on; what only the worker had is in the journal as lost."""
    chance = random.Random(1)
    for _ in range(times):
        with tally("kill -9 of the worker", stack):
            with Load(stack) as load:
                load.wait(chance.uniform(0.05, 0.6))
                stack.worker.kill()
                load.wait(0.1)
            stack.worker.start()
    stack.finish()
