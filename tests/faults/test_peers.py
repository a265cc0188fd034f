"""Clients that leave or dawdle, workers that answer wrongly or not at all, a clock that jumps."""

import json
from collections.abc import Iterator

import httpx
import pytest

from episodes.run import open_run
from tests.faults.conftest import running, tally
from tests.faults.stack import TROUBLE, Load, Stack
from tests.stub import MODEL

# The proxy with a clock that is as many seconds ahead as a file says: Python's own, which is all that it reads.
OFF_TIME = """
import pathlib, sys, time
right, offset = time.time, pathlib.Path(sys.argv.pop(1))
time.time = lambda: right() + float(offset.read_text())
from proxy.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One stack for all of these: none of these faults ends a process."""
    stack = Stack(tmp_path_factory.mktemp("patient"))
    for _ in running(stack):
        yield stack
        stack.finish()


def body(text: str, **fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def chat(stack: Stack) -> str:
    return f"{stack.url}/v1/chat/completions"


@pytest.mark.parametrize("fault", [{"stub_fault": "silence"}, {}], ids=["silent", "busy"])
def test_a_client_that_leaves_before_the_first_byte_costs_nothing(patient, fault, times):
    patience = httpx.Timeout(30, read=0.01)
    with tally("client leaves before the first byte", patient, times), httpx.Client(timeout=patience) as client:
        for n in range(times):
            with pytest.raises(httpx.ReadTimeout):
                client.post(chat(patient), json=body(f"left {n} {fault}", **fault))


def test_a_client_that_leaves_in_a_stream_costs_nothing(patient, times):
    with tally("client leaves in a stream", patient, times), httpx.Client(timeout=30) as client:
        for n in range(times):
            with client.stream("POST", chat(patient), json=body(f"leaving {n}", stream=True)) as reply:
                next(reply.iter_raw())


def test_a_client_that_leaves_at_the_last_event_has_its_call_on_disk(patient, times):
    """It has read all that it wants, and does not wait for the connection's end."""
    with tally("client leaves at the end", patient, times, lossless=True), httpx.Client(timeout=30) as client:
        for n in range(times):
            with client.stream("POST", chat(patient), json=body(f"reading {n}", stream=True)) as reply:
                events = []
                for line in reply.iter_lines():
                    if line == "data: [DONE]":
                        break
                    events += [json.loads(line.removeprefix("data: "))] if line else []
            text = "".join(event["choices"][0]["delta"]["content"] for event in events)
            patient.answered[events[0]["id"].removeprefix("chatcmpl-")] = text


def test_a_slow_client_gets_all_and_holds_nobody_up(patient, times):
    """It takes an event every tenth of a second; the others talk on."""
    for n in range(times):
        with tally("slow client", patient, lossless=True), patient.client() as client, Load(patient) as load:
            before = len(patient.answered)
            made = client.chat.completions.create(**body(f"slow {n}", stream=True))
            text, name = "", ""
            for chunk in made:
                name, text = chunk.id.removeprefix("chatcmpl-"), text + (chunk.choices[0].delta.content or "")
                load.wait(0.1)
            patient.answered[name] = text
            assert len(patient.answered) > before + 4 and not load.failures


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", ["garbage", "cut", "stall", "silence", "429", "500"])
def test_a_worker_that_fails_fails_that_call_alone(patient, fault, stream, times):
    """The client sees it, here after half a second of patience, and what is answered beside it is on disk."""
    with tally(f"worker: {fault}", patient, times):
        for n in range(times):
            with pytest.raises((*TROUBLE, ValueError, AttributeError, TypeError)):
                patient.ask(f"{fault} {n}", timeout_s=0.5, stream=stream, stub_fault=fault)
            patient.ask(f"beside {fault} {n}")


def test_a_clock_that_jumps_by_an_hour_moves_no_call(tmp_path, times):
    """To and fro, under load."""
    stack = Stack(tmp_path)
    offset = tmp_path / "offset"
    offset.write_text("0")
    stack.proxy.command[1:3] = ["-c", OFF_TIME, str(offset)]
    for _ in running(stack):
        for seconds in [3600, -3600, 0] * times:
            with tally("the clock jumps by an hour", stack, lossless=True), Load(stack) as load:
                load.wait(0.1)
                draft = tmp_path / "next"
                draft.write_text(str(seconds))
                draft.rename(offset)
                load.wait(0.2)
            assert not load.failures
        stack.finish()
        started = [call.started for call in open_run(stack.run_dir).history.calls.values()]
        assert max(started) - min(started) > 7000
