"""The worker's middleware: who is let in, and what a client cannot pretend."""

import re

import httpx
import msgspec
import numpy as np
import pytest

from episodes.wire import CAPTURE_HEADER, CallFile, Capture
from tests.proxy.test_keys import FOREIGN, HERE
from tests.stub import MODEL, Running, Stub, rows
from worker.orders import XARG
from worker.server import About
from worker.spool import WRONG

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


@pytest.mark.parametrize("sent", FOREIGN)
def test_without_a_key_no_web_page_is_served(stub, http, sent):
    """Not even what a page may send without asking first, as a form."""
    for method, path in [*ROUTES, ("GET", "/health")]:
        reply = http.request(method, f"{stub.url}{path}", headers=sent)
        assert reply.status_code == 403 and reply.json()["error"]["type"] == "PermissionDeniedError", (method, path)
        assert "only this machine is served" in reply.json()["error"]["message"]
    assert not stub.stub.bodies


def test_with_a_key_or_on_a_socket_it_does_not_matter_by_what_name_one_comes(guarded, tmp_path, http):
    admitted = {"Authorization": f"Bearer {KEY}"}
    inside = httpx.Client(transport=httpx.HTTPTransport(uds=str(tmp_path / "socket")))
    with Running(Stub(tmp_path / "other"), uds=tmp_path / "socket"), inside:
        for sent in FOREIGN:
            assert http.get(f"{guarded.url}/v1/activations", headers=sent | admitted).status_code == 200
            assert inside.get("http://worker/v1/activations", headers=sent).status_code == 200


@pytest.mark.parametrize("sent", HERE)
def test_without_a_key_whoever_is_on_this_machine_is_served(stub, http, sent):
    assert http.get(f"{stub.url}/v1/activations", headers=sent).status_code == 200


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


def test_a_calls_id_is_its_own(stub, tmp_path):
    """Two calls of one name would share files: of the proxy's the second is refused, a direct one gets another name."""
    headers, url = {CAPTURE_HEADER: Capture("c-mine").header()}, f"{stub.url}/v1/chat/completions"
    assert httpx.post(url, json=BODY, headers=headers).status_code == 200
    again = httpx.post(url, json=BODY, headers=headers)
    assert again.status_code == 400 and "there is a call c-mine already" in again.json()["error"]["message"]
    direct = BODY | {"stream": True, "collect_activations": True}
    other = httpx.post(url, json=direct, headers={"X-Request-Id": "c-mine"})
    assert other.status_code == 200
    calls = [call["call"] for call in httpx.get(f"{stub.url}/v1/activations").json()["data"]]
    assert len(set(calls)) == 2 and "c-mine" in calls


@pytest.mark.parametrize("wait_s", ["nan", "inf", "-1", "soon", ""])
def test_a_wait_that_is_no_number_of_seconds_is_400(stub, wait_s):
    headers = {CAPTURE_HEADER: Capture("c-mine").header()}
    httpx.post(f"{stub.url}/v1/chat/completions", json=BODY, headers=headers)
    reply = httpx.get(f"{stub.url}/v1/activations/c-mine", params={"wait_s": wait_s})
    assert reply.status_code == 400 and "give seconds" in reply.json()["error"]["message"]


def test_a_reply_comes_also_where_its_activations_cannot_be_put_together(stub, monkeypatch):
    """No room in the temporary directory: the completion is there, and the reason."""
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    reply = httpx.post(f"{stub.url}/v1/chat/completions", json=BODY | {"collect_activations": True})
    assert reply.status_code == 200 and reply.json()["choices"]
    assert "No such file" in str(reply.json()["activation_collection_status"])


def test_a_point_that_the_probe_refused_is_offered_to_no_call(tmp_path):
    """The reason is the probe's; what no layer has is no hook of the model's."""
    stub = Stub(tmp_path / "spool")
    wrong = {f"layers.{n}.attn": f"layers.{n}.attn: scaled" for n in range(100)}
    (tmp_path / "spool" / WRONG).write_bytes(msgspec.json.encode(wrong))
    with Running(stub) as running:
        said = httpx.get(f"{running.url}/v1/capabilities").json()
        headers = {CAPTURE_HEADER: Capture("c-mine", points=("layers.0.attn",)).header()}
        asked = httpx.post(f"{running.url}/v1/chat/completions", json=BODY, headers=headers)
        direct = {"collect_activations": {"layers": [0], "hook_points": ["attn"]}}
        also = httpx.post(f"{running.url}/v1/chat/completions", json=BODY | direct)
    assert "attn" not in said["supported_hook_points"] and "mlp" in said["supported_hook_points"]
    assert asked.status_code == 400 and asked.json()["error"]["message"] == "layers.0.attn: scaled"
    assert also.status_code == 400 and "'attn' does not exist" in also.json()["error"]["message"]


def known(stub, checkpoint):
    stub.stub.engine.vllm_config.model_config.model = str(checkpoint)
    return About(stub.stub.engine.vllm_config).capabilities()["checkpoint"]


def checkpoint(path, weights=bytes(200_000)):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_a_checkpoint_has_one_name_however_it_was_given_and_wherever_it_lies(stub, tmp_path, monkeypatch):
    """The Hub's its name there, though vLLM, offline, puts the Hub's cache in its place."""
    monkeypatch.chdir(tmp_path)
    cached = checkpoint(tmp_path / "hub" / "models--org--m-7b" / "snapshots" / "1f2e")
    assert known(stub, "org/m-7b") == known(stub, cached) == "org/m-7b"
    tuned = checkpoint(tmp_path / "tuned")
    (tmp_path / "latest").symlink_to("tuned")
    found = {known(stub, given) for given in ("tuned", tuned, "latest", checkpoint(tmp_path / "elsewhere" / "tuned"))}
    assert len(found) == 1 and re.fullmatch("tuned [0-9a-f]{16}", found.pop())


def test_other_weights_of_the_same_name_are_another_checkpoint(stub, tmp_path):
    """Of one size too, as a fine-tune's are, and another `config.json` beside the same ones."""
    tuned = bytearray(2_000_000)
    tuned[1_900_000:1_910_000] = b"1" * 10_000  # the last layer's alone
    kept, *others = (checkpoint(tmp_path / str(i) / "tuned", bytes(2_000_000)) for i in range(4))
    (others[0] / "model.safetensors").write_bytes(tuned)
    (others[1] / "config.json").write_text('{"rope_theta": 1}')
    (others[2] / "model.safetensors").rename(others[2] / "model.gguf")
    small = checkpoint(tmp_path / "small" / "tuned", b"1")
    found = [known(stub, path) for path in (kept, *others, small, small / "model.safetensors")]
    assert len(set(found)) == 6 and found[5].startswith("model.safetensors ")
    (kept / "training_args.bin").write_text("no weights")
    (kept / "pytorch_model.bin").write_text("which nobody loads")
    assert known(stub, kept) == found[0]


def test_a_file_of_weights_has_the_name_that_it_was_given_by(stub, tmp_path):
    """As the Hub's cache links to it."""
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "m.gguf").symlink_to("blob")
    assert known(stub, tmp_path / "m.gguf").startswith("m.gguf ")


@pytest.mark.parametrize("fault", ["config.json", "model.safetensors", "x" * 300])
def test_of_a_checkpoint_that_cannot_be_read_nothing_is_said(stub, tmp_path, fault):
    path = checkpoint(tmp_path / "tuned")
    if len(fault) > 255:  # longer than a file's name may be
        path = fault
    else:
        (path / fault).unlink()
        (path / fault).symlink_to(fault)
    assert known(stub, path) == ""


def test_what_is_not_recorded_shares_its_cache_with_nobody(tmp_path):
    """Of a prompt with images in it the text before them neither; and beam search, which asks the engine for tokens one
    by one, in requests that are not the client's.
    """
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with Running(stub := Stub(tmp_path / "spool")) as running:
        for number, content in enumerate(["Hi", "Hi", [image], [image], "Hi", "Hi"]):
            beams = {"use_beam_search": True} if number > 3 else {}
            body = BODY | {"messages": [{"role": "user", "content": content}]} | beams
            headers = {CAPTURE_HEADER: Capture(f"c-{number}", "run").header()}
            httpx.post(f"{running.url}/v1/chat/completions", json=body, headers=headers)
    first, second, *alone = [body["cache_salt"] for body in stub.bodies]
    assert first == second and len({first, *alone}) == 5


def test_calls_that_do_not_record_the_same_share_no_cache(tmp_path):
    """Else one would find there what the other has no rows of. A client's own salt keeps its calls apart as it says."""
    captures = [
        (Capture("c-0", "run"), None),
        (Capture("c-1", "run"), None),
        (Capture("c-2", "other"), None),
        (Capture("c-3", "run", ("layers.0.output",)), None),
        (Capture("c-4", "run", tokens="completion"), None),
        (Capture("c-5", "run"), "mine"),
    ]
    with Running(stub := Stub(tmp_path / "spool")) as running:
        for capture, salt in captures:
            headers = {CAPTURE_HEADER: capture.header()}
            httpx.post(f"{running.url}/v1/chat/completions", json=BODY | {"cache_salt": salt}, headers=headers)
    first, second, *others = [body["cache_salt"] for body in stub.bodies]
    assert first == second and len({first, *others}) == 5


def test_what_else_a_captured_request_tells_the_engine_reaches_it(stub):
    headers, more = {CAPTURE_HEADER: Capture("c-mine").header()}, {"vllm_xargs": {"other": 1}}
    assert httpx.post(f"{stub.url}/v1/chat/completions", json=BODY | more, headers=headers).status_code == 200
    assert stub.stub.bodies[-1]["vllm_xargs"].keys() == {"other", XARG}


def test_a_call_file_that_is_sent_in_pieces_comes_whole(stub, tmp_path, monkeypatch):
    monkeypatch.setattr("worker.server.CHUNK", 100)
    headers = {CAPTURE_HEADER: Capture("c-mine").header()}
    assert httpx.post(f"{stub.url}/v1/chat/completions", json=BODY, headers=headers).status_code == 200
    whole = tmp_path / "whole"
    whole.write_bytes(httpx.get(f"{stub.url}/v1/activations/c-mine", params={"wait_s": 5}).content)
    file = CallFile(whole)
    assert np.array_equal(file.rows, rows(file.sequences[0].tokens.tolist(), file.points)) and file.rows.nbytes > 1000
