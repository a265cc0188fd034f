"""The ledger: what is waited for, what is given up, and that nothing is left in the spool."""

import asyncio
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from episodes.errors import CaptureLost
from episodes.handover import TOKEN, Recipe, take
from episodes.wire import CallFile, Sequence
from worker import ledger as module
from worker.ledger import Ledger
from worker.orders import XARG
from worker.spool import PART, SpoolFile, refuse, spooled

POINTS = ["layers.0.output"]


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path)


def begin(ledger, call="c", n=1):
    opened = ledger.open(call, POINTS, "all")
    opened.order(n)
    return opened


def spool(ledger, call="c", choice=0, finish=True, generated=()):
    file, tokens = SpoolFile(ledger.spool, call, choice, POINTS, "F32", 1, [1, 2]), [1, 2, *generated]
    file.append(0, np.array(tokens, np.int32), np.zeros((len(tokens), 1, 1), np.float32))
    return file.finish() if finish else file


def output(text, reason=None, index=0, stop=None):
    part = SimpleNamespace(index=index, token_ids=list(text), finish_reason=reason, stop_reason=stop)
    return SimpleNamespace(prompt_token_ids=[1, 2], num_cached_tokens=0, outputs=[part])


def collect(ledger, call, wait_s=0.0):
    return asyncio.run(ledger.wait_for(call, wait_s))


def test_a_call_is_there_once_it_has_ended_and_every_sequence_is_spooled(ledger):
    call = begin(ledger, n=2)
    for index in (0, 1):
        call.note(0, output([5], "stop", index), delta=True)
    spool(ledger)
    assert collect(ledger, call) is None
    ledger.close(call)
    assert collect(ledger, call) is None
    spool(ledger, choice=1)
    assert collect(ledger, call)


def test_a_hand_over_that_was_killed_is_begun_again(ledger, tmp_path):
    """Whoever takes the spool file over by a link writes into it: torn at any byte of that, it is taken over again."""
    (ledger.spool / TOKEN).write_text("token")
    call = begin(ledger)
    call.note(0, output([5], "stop"), delta=True)
    spool(ledger)
    ledger.close(call)
    into, spooled_file = tmp_path / "claim", spooled(ledger.spool, "c", 0)
    before = spooled_file.read_bytes()
    assert take(Recipe.of(collect(ledger, call), ledger.spool, "token"), ledger.spool, into)
    whole = into.read_bytes()
    assert into.samefile(spooled_file) and before != whole
    for cut in [*range(0, len(whole), 100), len(whole)]:
        spooled_file.write_bytes(whole[:cut] + before[cut:])
        assert take(Recipe.of(collect(ledger, call), ledger.spool, "token"), ledger.spool, into)
        assert into.read_bytes() == whole and CallFile(into).sequences == call.known


@pytest.mark.parametrize(("delta", "tokens"), [(True, [5, 6, 7]), (False, [6, 7])])
def test_outputs_add_up_as_vllm_means_them(ledger, delta, tokens):
    """Streamed outputs bring what is new, others all there is so far."""
    call = begin(ledger)
    call.note(0, output([5]), delta)
    call.note(0, output([6, 7], "length"), delta)
    assert call.sequences[0].completion_token_ids == tokens and call.sequences[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("reason", "stop", "ran", "fed"),
    [
        ("stop", None, [5, 6], False),
        ("stop", 6, [5, 6], False),
        ("length", None, [5, 6], False),
        ("repetition", "repetition_detected", [5, 6], False),  # vLLM's own words
        ("stop", "six", [5], False),
        ("stop", "six", [5, 6], True),
        ("stop", "six", [5, 6, 7], True),
        (None, None, [5, 6, 7], True),
        (None, None, [5], False),
        (None, None, [], False),
    ],
)
def test_a_token_that_was_run_before_the_engine_knew_of_the_end_has_its_row(ledger, reason, stop, ran, fed):
    """Its block may be cached. What the engine itself ends is cached up to the last token but one."""
    call = begin(ledger)
    call.note(0, output([5, 6], reason, stop=stop), delta=True)
    spool(ledger, generated=ran)
    ledger.close(call)
    collect(ledger, call)
    (sequence,) = call.known
    assert (sequence.completion_token_ids, sequence.last_fed, sequence.n_positions) == ([5, 6], fed, 3 + fed)
    assert sequence.tokens.tolist() == [1, 2, 5, 6][: 3 + fed]


def test_a_reply_that_was_never_given_out_is_known_by_what_the_engine_ran(ledger):
    """As one that is no stream, and whose client left; however long it had become."""
    call, ran = begin(ledger), list(range(5000))
    spool(ledger, generated=ran)
    ledger.close(call)
    collect(ledger, call)
    (sequence,) = call.known
    assert sequence.prompt_token_ids == [1, 2] and sequence.completion_token_ids == ran and sequence.n_positions == 5002


def test_a_dropped_call_is_waited_for_while_the_engine_writes_it(ledger, monkeypatch):
    monkeypatch.setattr(module, "ABORT_GRACE_S", 0.0)
    call = begin(ledger)
    ledger.close(call)
    file = spool(ledger, finish=False)
    assert collect(ledger, call) is None
    file.finish()
    assert collect(ledger, call)


def test_a_call_that_never_ran_is_given_up(ledger, monkeypatch):
    call = begin(ledger)
    ledger.close(call)
    assert collect(ledger, call) is None
    monkeypatch.setattr(module, "ABORT_GRACE_S", 0.0)
    with pytest.raises(CaptureLost, match="dropped before the engine ran it"):
        collect(ledger, call)


@pytest.mark.parametrize(("n_outputs", "error"), [(0, ValueError), (1, ValueError), (0, RuntimeError)])
def test_a_request_that_the_engine_does_not_take_is_known_at_once_to_have_run_nothing(ledger, n_outputs, error):
    """As one that is not valid, or one too many; not one that fails when some of it came out, nor one whose engine
    fails: of a reply that is no stream nothing comes out before its end.
    """

    async def generate(prompt, params):
        for _ in range(n_outputs):
            yield output([5])
        raise error("too many wait")

    async def asking():
        params = SimpleNamespace(n=2, output_kind=SimpleNamespace(name="DELTA"), extra_args={XARG: ledger.ticket("c")})
        async for _ in ledger.follow(generate)({}, params):
            pass

    call = ledger.open("c", POINTS, "all")
    with pytest.raises(error, match="too many wait"):
        asyncio.run(asking())
    ledger.close(call)
    assert call.ran == bool(n_outputs or error is RuntimeError)
    if call.ran:
        assert collect(ledger, call) is None
    else:
        with pytest.raises(CaptureLost, match="the engine ran no sequence"):
            collect(ledger, call)


def asked(ledger, n=1, **more):
    """What a captured request of the API server asks the engine for."""
    extra_args = {XARG: ledger.ticket("c")} | more
    return SimpleNamespace(n=n, output_kind=SimpleNamespace(name="DELTA"), extra_args=extra_args)


def test_a_prompt_that_is_not_taken_says_nothing_of_the_one_before(ledger):
    """Of one request: what the first has run may be cached."""

    async def generate(prompt, params):
        if prompt:
            raise ValueError("too long")
        yield output([5])

    async def asking():
        follow = ledger.follow(generate)
        for prompt in ({}, {"too": "long"}):
            async for _ in follow(prompt, asked(ledger)):
                pass

    call = ledger.open("c", POINTS, "all")
    with pytest.raises(ValueError, match="too long"):
        asyncio.run(asking())
    assert [growing.refused for growing in call.sequences] == [False, True] and call.ran


def test_the_engine_is_told_of_the_capture_beside_what_the_client_asked_and_once_it_has_left(ledger):
    """By which adapter it runs is noted, for rows of another are other rows."""
    told, ended = [], []

    async def generate(prompt, params, lora_request=None):
        told.append(params.extra_args)
        try:
            yield output([5])
            yield output([6])
        finally:
            ended.append(True)

    async def leaving():
        adapter = SimpleNamespace(lora_name="tuned", lora_path="/adapter")
        outputs = ledger.follow(generate)({}, asked(ledger, other=1), lora_request=adapter)
        async for _ in outputs:
            break
        await outputs.aclose()
        assert ended, "at once, not when somebody collects garbage"

    call = ledger.open("c", POINTS, "all")
    asyncio.run(leaving())
    assert told[0]["other"] == 1 and told[0][XARG]["call"] == "c"
    assert [growing.adapter for growing in call.sequences] == ["tuned@/adapter"]


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_a_call_that_failed_before_it_ran_is_given_up(ledger, monkeypatch, reason):
    """As one whose grammar does not compile, which vLLM ends while it is queued."""
    call = begin(ledger)
    call.note(0, output([], reason), delta=True)
    ledger.close(call)
    assert collect(ledger, call) is None
    monkeypatch.setattr(module, "ABORT_GRACE_S", 0.0)
    with pytest.raises(CaptureLost, match="dropped before the engine ran it"):
        collect(ledger, call)


def test_a_failed_capture_says_why(ledger):
    call = begin(ledger)
    call.note(0, output([5], "stop"), delta=True)
    refuse(ledger.spool, "c.0", "the spool is full")
    ledger.close(call)
    assert call.known == [Sequence(0, [1, 2], [5], "stop")], "the tokens are known all the same"
    with pytest.raises(CaptureLost, match="the spool is full"):
        collect(ledger, call)


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "not begun"])
def test_files_that_come_after_their_call_was_forgotten_are_cleared(ledger, monkeypatch, begun):
    """A client that leaves a direct call: the engine spools it later, and nobody will ever ask for it. Also where the
    engine's step took so long that the call had been given up.
    """
    monkeypatch.setattr(module, "SWEEP_S", 0.0)
    monkeypatch.setattr(module, "ABORT_GRACE_S", 0.0)
    call = begin(ledger)
    file = spool(ledger, finish=False) if begun else None
    ledger.close(call)
    assert ledger.forget("c") and not ledger.forget("c")
    begin(ledger, "d")
    (file or spool(ledger, finish=False)).finish()
    assert spooled(ledger.spool, "c", 0).exists()
    begin(ledger, "e")
    assert list(ledger.spool.iterdir()) == []
    assert not spooled(ledger.spool, "c", 0, PART).exists()


def test_the_oldest_ended_call_makes_room(ledger, monkeypatch):
    monkeypatch.setattr(module, "CALL_LIMIT", 2)
    running, ended = begin(ledger, "a"), begin(ledger, "b")
    spool(ledger, "b")
    ledger.close(ended)
    begin(ledger, "c")
    assert ledger.find("b") is None and ledger.find("a") is running and not spooled(ledger.spool, "b", 0).exists()


def test_what_waits_is_told_while_calls_are_forgotten(ledger):
    """On a thread beside the loop, as the worker does; not one listing fails of it."""
    names = [f"c-{n}" for n in range(300)]
    for name in names:
        begin(ledger, name)
        spool(ledger, name)
    forgetting = threading.Thread(target=lambda: [ledger.forget(name) for name in names])
    forgetting.start()
    while listed := ledger.waiting():
        assert {call["call"] for call in listed} <= set(names)
    forgetting.join()
    assert not list(ledger.spool.glob("*.safetensors"))
