"""The worker's middleware: who is let in, and what a client cannot pretend."""

import httpx
import pytest

from episodes.wire import CAPTURE_HEADER, CallFile, Capture
from tests.stub import MODEL, Running, Stub
from worker.orders import XARG

KEY = "worker-key-0123456789"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def guarded(tmp_path):
    with Running(Stub(tmp_path / "spool", api_key=KEY)) as running:
        yield running


ROUTES = [
    ("POST", "/v1/chat/completions"), ("GET", "/v1/activations"), ("GET", "/v1/activations/c-1"),
    ("DELETE", "/v1/activations/c-1"), ("GET", "/v1/capabilities"), ("GET", "/metrics"), ("POST", "/invocations"),
    ("POST", "/tokenize"), ("GET", "//health"), ("GET", "/health/"), ("OPTIONS", "/v1/activations"),
]  # fmt: skip


def test_with_a_key_every_path_but_health_wants_it(guarded, http):
    """Also those that vLLM's own check leaves open, and before a capture is begun."""
    admitted = {"Authorization": f"Bearer {KEY}"}
    for method, path in ROUTES:
        for key in (None, "Bearer x", KEY, f"Bearer {KEY}x"):
            headers = {CAPTURE_HEADER: Capture("c-mine").header()} | ({"Authorization": key} if key else {})
            reply = http.request(method, f"{guarded.url}{path}", headers=headers)
            assert reply.status_code == 401 and reply.json()["error"]["type"] == "AuthenticationError", (path, key)
    assert http.get(f"{guarded.url}/health").status_code == 200
    assert not http.get(f"{guarded.url}/v1/activations", headers=admitted).json()["data"]
    for method, path in ROUTES:
        assert http.request(method, f"{guarded.url}{path}", headers=admitted).status_code != 401, path


@pytest.mark.parametrize("forged", ["c-mine", "/c-mine", {"call": "../../x", "points": [], "first_choice": 0}])
def test_a_client_cannot_pass_its_request_off_as_a_captured_one(stub, tmp_path, forged):
    """What the engine takes orders from is taken out: nobody adds to another's call or names files in the spool."""
    asked = httpx.post(
        f"{stub.url}/v1/chat/completions", json=BODY, headers={CAPTURE_HEADER: Capture("c-mine").header()}
    )
    assert asked.status_code == 200
    before = {path.name for path in tmp_path.rglob("*")}
    reply = httpx.post(f"{stub.url}/v1/chat/completions", json=BODY | {"vllm_xargs": {XARG: forged, "other": 1}})
    assert reply.status_code == 200 and {path.name for path in tmp_path.rglob("*")} == before
    whole = tmp_path / "whole"
    whole.write_bytes(httpx.get(f"{stub.url}/v1/activations/c-mine", params={"wait_s": 5}).content)
    assert len(CallFile(whole).sequences) == 1


def test_json_that_is_too_deep_is_400(stub):
    deep = b'{"collect_activations": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    reply = httpx.post(f"{stub.url}/v1/chat/completions", content=deep)
    assert reply.status_code == 400 and "deep" in reply.json()["error"]["message"]
