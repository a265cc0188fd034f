"""A connection that is cut at every stage of a call, between client and proxy and between proxy and worker."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.faults.conftest import running, tally
from tests.faults.stack import TROUBLE, Stack
from tests.faults.tcp import Cut, Wire

HEAD = b"\r\n\r\n"
CHAT, CLAIM, DELETE = b"POST /v1/chat/completions", b"GET /v1/activations/", b"DELETE /v1/activations/"

# stage → where, whether the reply is streamed, and whether the client has it whole all the same
REPLY = {
    "before the request": (Cut(CHAT, "request"), False, False),
    "after the request's head": (Cut(CHAT, "request", HEAD), False, False),
    "in the request's body": (Cut(CHAT, "request", HEAD, 20), False, False),
    "before the reply": (Cut(CHAT, "reply"), False, False),
    "after the reply's head": (Cut(CHAT, "reply", HEAD), False, False),
    "in the reply's body": (Cut(CHAT, "reply", HEAD, 60), False, False),
    "after a stream's head": (Cut(CHAT, "reply", HEAD), True, False),
    "in a stream": (Cut(CHAT, "reply", b"data: ", 900), True, False),
    "at a stream's end": (Cut(CHAT, "reply", b"data: [DONE]\n\n"), True, True),
}
HANDOVER = {
    "between reply and claim": Cut(CLAIM, "request"),
    "before the claim's reply": Cut(CLAIM, "reply"),
    "after the claim's head": Cut(CLAIM, "reply", HEAD),
    "in the claim's body": Cut(CLAIM, "reply", HEAD, 500),
    "before DELETE": Cut(DELETE, "request"),
    "before DELETE's reply": Cut(DELETE, "reply"),
}


@dataclass
class Wired:
    """A stack with a wire on either side of the proxy."""

    stack: Stack
    to_proxy: Wire
    to_worker: Wire


@pytest.fixture(scope="module", params=["spool", "http"])
def wired(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wired]:
    """Activations are taken out of the spool, or come over HTTP because the proxy does not see it."""
    stack = Stack(tmp_path_factory.mktemp("wired"))
    with Wire(stack.worker_port) as to_worker, Wire(stack.port) as to_proxy:
        elsewhere = ["--spool-dir", f"{stack.home}/elsewhere"] if request.param == "http" else []
        stack.proxy_to(f"http://127.0.0.1:{to_worker.port}", *elsewhere)
        for _ in running(stack):
            yield Wired(stack, to_proxy, to_worker)
            stack.finish()


@pytest.mark.parametrize("stage", REPLY)
@pytest.mark.parametrize("where", ["client", "worker"])
def test_a_cut_in_the_exchange_leaves_nothing_behind(wired, where, stage, times):
    """Whatever the client did not get whole fails where it is; what it got is on disk."""
    cut, stream, whole = REPLY[stage]
    wire = wired.to_proxy if where == "client" else wired.to_worker
    cuts_before = wire.n_cut
    with tally(f"cut {stage}, {where} side", wired.stack, times):
        for n in range(times):
            wire.cuts.append(cut)
            if whole:
                wired.stack.ask(f"{stage} {where} {n}", wired.to_proxy.port, stream=stream)
            else:
                with pytest.raises(TROUBLE):
                    wired.stack.ask(f"{stage} {where} {n}", wired.to_proxy.port, stream=stream)
    assert wire.n_cut == cuts_before + times and not wire.cuts


@pytest.mark.parametrize("stage", HANDOVER)
def test_a_cut_in_the_hand_over_is_not_noticed(wired, stage, times):
    """The proxy asks again: every call is on disk, and the worker has forgotten it."""
    before = wired.to_worker.n_cut
    with tally(f"cut {stage}", wired.stack, times, lossless=True):
        for n in range(times):
            wired.to_worker.cuts.append(HANDOVER[stage])
            wired.stack.ask(f"{stage} {n}")
    assert wired.to_worker.n_cut == before + times
