"""What several of the proxy's tests begin with."""

import msgspec
import pytest

from episodes.store import Store, family
from episodes.wire import CAPTURE_HEADER, Capture
from tests.conftest import proxy_to
from tests.proxy.test_server import converse, user
from tests.stub import MODEL


@pytest.fixture
def left_behind(stub, tmp_path, http):
    """A run whose proxy was killed before it had claimed `c-left`, which its worker holds."""
    with proxy_to(stub.url, tmp_path) as proxy:
        converse(proxy.client(), "talk", 1)
    run = proxy.open()
    (call,) = run.history.calls.values()
    capture = Capture("c-left", f"{family(run.layout, run.about)}before.0")
    body = {"model": MODEL, "messages": [user("Hi")]}
    http.post(f"{stub.url}/v1/chat/completions", json=body, headers={CAPTURE_HEADER: capture.header()})
    store = Store(run.layout)
    begun = {"thread": "t-left", "episode": "t-left", "status": 0, "reply": "", "sequences": [], "kept": []}
    store.begin([msgspec.structs.replace(call, id="c-left", **begun)])
    store.close()
    return run.layout
