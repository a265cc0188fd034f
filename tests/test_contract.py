"""The worker's HTTP contract, held against the stub and against the real vLLM worker alike."""

import json
import re
import uuid
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest

from episodes.handover import Recipe, take
from episodes.wire import CAPTURE_HEADER, CallFile, Capture
from tests.stub import MODEL as STUB_MODEL
from worker.smollm import NAME as REAL_MODEL

FILLER = "You are a clerk. " * 20


@pytest.fixture(params=["stub", pytest.param("engine", marks=pytest.mark.engine)])
def worker(request, tmp_path):
    """A client of the worker, with the name of its model."""
    if request.param == "stub":
        stub = request.getfixturevalue("stub")
        url, model = stub.url, STUB_MODEL
    else:
        url, model = request.getfixturevalue("engines").get("float32"), REAL_MODEL
    with httpx.Client(base_url=url, timeout=120) as client:
        yield Worker(client, model, tmp_path, stub.stub if request.param == "stub" else None)


class Worker:
    def __init__(self, client, model, tmp_path, stub):
        self.client, self.model, self.tmp_path, self._stub = client, model, tmp_path, stub

    def slow(self):
        """Make the stub take its time, as the real one does."""
        if self._stub is not None:
            self._stub.token_s, self._stub.prompt_s = 0.05, 0.0002

    def run_prompt(self, lines):
        """Wait until the stub has run a stream's prompt, of which it has all or nothing; the real one has chunks."""
        while self._stub is not None and not re.search('"text": ?"[^"]', next(lines)):
            pass

    def ask(self, text, capture=None, path="/v1/chat/completions", **fields):
        prompt = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
        headers = {CAPTURE_HEADER: capture.header()} if capture else {}
        body = {"model": self.model, "max_tokens": 6, "temperature": 0, **prompt, **fields}
        return self.client.post(path, json=body, headers=headers)

    def begin(self, text, capture):
        """A completion's stream, which the client may leave."""
        body = {"model": self.model, "stream": True, "prompt": text, "max_tokens": 40}
        return self.client.stream("POST", "/v1/completions", json=body, headers={CAPTURE_HEADER: capture.header()})

    def claim(self, call, wait_s=20, **headers):
        return self.client.get(f"/v1/activations/{call}", params={"wait_s": wait_s}, headers=headers)

    def file(self, call):
        reply = self.claim(call)
        assert reply.status_code == 200, reply.text
        path = self.tmp_path / f"{call}.safetensors"
        path.write_bytes(reply.content)
        return CallFile(path)


def new(salt="", points=None):
    return Capture(f"c-{uuid.uuid4().hex}", salt or uuid.uuid4().hex, points)


def check(file, choices=1):
    """Every choice has consecutive rows, from what the cache had to the token before the last."""
    assert len(file.sequences) == choices
    for sequence in file.sequences:
        own = file.choice == sequence.choice
        position = file.position[own]
        assert position.tolist() == list(range(sequence.n_cached, sequence.n_cached + len(position)))
        n = sequence.n_positions
        assert len(position) + sequence.n_cached >= n
        assert file.token_id[own][: n - sequence.n_cached].tolist() == sequence.tokens[sequence.n_cached :].tolist()
        assert sequence.finish_reason in ("stop", "length") and sequence.completion_token_ids
    assert np.isfinite(file.rows.astype(np.float32)).all() and file.rows.shape[1:] == (
        len(file.points),
        file.hidden_size,
    )


def test_capabilities_describe_what_is_recorded(worker):
    about = worker.client.get("/v1/capabilities").json()
    assert about["activation_collection"] is True and about["model"] == worker.model
    assert about["supported_layers"] == list(range(about["n_layers"])) and about["points"]
    assert {"hidden_size", "dtype", "limits", "versions", "max_tokens", "revision"} <= set(about)
    assert re.fullmatch(r"[^ ]+( [0-9a-f]{16})?", about["checkpoint"]) and about["quantization"] == "none"
    capture = new()
    assert worker.ask("Hi", capture).status_code == 200
    file = worker.file(capture.call)
    assert file.points == about["points"] and file.hidden_size == about["hidden_size"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_captured_call_is_claimed_and_forgotten(worker, stream):
    """200 with the call file, listed until deleted, 404 afterwards."""
    capture = new()
    assert worker.ask("Name a colour.", capture, stream=stream).status_code == 200
    file = worker.file(capture.call)
    check(file)
    listed = worker.client.get("/v1/activations").json()["data"]
    (entry,) = [entry for entry in listed if entry["call"] == capture.call]
    assert entry["bytes"] > 0 and entry["salt"] == capture.salt
    assert worker.client.delete(f"/v1/activations/{capture.call}").status_code == 204
    assert worker.claim(capture.call).status_code == 404
    assert worker.client.delete(f"/v1/activations/{capture.call}").status_code == 404


def test_the_rows_come_as_zstd_to_those_who_accept_it(worker):
    import zstandard

    capture = new()
    worker.ask("Hi", capture)
    plain = worker.claim(capture.call, **{"accept-encoding": "identity"})
    with worker.client.stream("GET", f"/v1/activations/{capture.call}", headers={"accept-encoding": "zstd"}) as reply:
        packed = b"".join(reply.iter_raw())
        assert reply.headers["content-encoding"] == "zstd"
    assert zstandard.ZstdDecompressor().decompressobj().decompress(packed) == plain.content


@pytest.mark.parametrize(
    ("accepted", "packed"), [("zstd;q=0", False), ("gzip", False), ("gzip, zstd;q=0.5", True), ("ZSTD", True)]
)
def test_nobody_gets_zstd_who_did_not_ask(worker, accepted, packed):
    capture = new()
    worker.ask("Hi", capture)
    reply = worker.claim(capture.call, **{"accept-encoding": accepted})
    assert (reply.headers.get("content-encoding") == "zstd") == packed
    assert packed or int(reply.headers["content-length"]) == len(reply.content)


def test_whoever_shares_the_spool_makes_the_same_file_from_a_recipe(worker):
    capture = new()
    worker.ask("Hi", capture, path="/v1/completions", n=2, temperature=1, seed=1)
    whole = worker.claim(capture.call, **{"accept-encoding": "identity"}).content
    reply = worker.client.get(f"/v1/activations/{capture.call}", params={"wait_s": 20, "as": "recipe"})
    recipe = msgspec.json.decode(reply.content, type=Recipe)
    made = worker.tmp_path / "made"
    assert take(recipe, Path(recipe.directory), made) and made.read_bytes() == whole
    refused = worker.client.get(f"/v1/activations/{capture.call}", params={"as": "pickle"})
    assert refused.status_code == 400 and "as=recipe" in refused.json()["error"]["message"]


def test_a_prefix_is_computed_once_under_one_salt(worker):
    """The second call brings only what the first did not have; under another salt, everything."""
    salt = uuid.uuid4().hex
    first, second, other = new(salt), new(salt), new()
    for capture in (first, second, other):
        worker.ask(FILLER, capture)
    files = [worker.file(c.call) for c in (first, second, other)]
    for file in files:
        check(file)
    n_cached = [file.sequences[0].n_cached for file in files]
    assert n_cached[0] == n_cached[2] == 0 < n_cached[1] < files[1].sequences[0].n_positions


def test_the_prompt_of_a_call_that_is_not_over_is_shared(worker):
    """So a call may be stored before the one that has its rows."""
    salt = uuid.uuid4().hex
    slow, second = new(salt), new(salt)
    worker.slow()
    with worker.begin(FILLER, slow) as reply:
        lines = reply.iter_lines()
        while not re.search('"text": ?"[^"]', next(lines)):
            pass
        assert worker.ask(FILLER, second, path="/v1/completions").status_code == 200
        assert "data: [DONE]" in lines
    files = [worker.file(c.call) for c in (slow, second)]
    for file in files:
        check(file)
    assert files[0].sequences[0].n_cached == 0 < files[1].sequences[0].n_cached


def test_calls_without_capture_share_nothing_with_captured_ones(worker):
    worker.ask(FILLER + "x", None)
    capture = new()
    worker.ask(FILLER + "x", capture)
    assert worker.file(capture.call).sequences[0].n_cached == 0


def test_points_can_be_chosen_per_call(worker):
    capture = new(points=("layers.2.output", "layers.0.mlp", "final.output", "embed.output"))
    assert worker.ask("Hi", capture).status_code == 200
    file = worker.file(capture.call)
    assert file.points == ["layers.2.output", "layers.0.mlp", "final.output", "embed.output"]
    check(file)


def test_only_the_tokens_that_were_asked_for_are_recorded(worker):
    """Also where the prompt was cached: what `prompt` asks for is computed, whatever others left."""
    salt = uuid.uuid4().hex
    for tokens in ("completion", "last", "prompt", "prompt"):
        capture = Capture(f"c-{uuid.uuid4().hex}", salt, None, tokens)
        assert worker.ask(FILLER, capture).status_code == 200
        file = worker.file(capture.call)
        (sequence,) = file.sequences
        first, stop = sequence.wanted(tokens)
        kept = file.position < sequence.n_positions
        assert file.tokens == tokens and file.position[kept].tolist() == list(range(first, stop))
        assert file.token_id[kept].tolist() == sequence.tokens[first:stop].tolist()


def test_choices_and_prompts_are_sequences_of_their_own(worker):
    capture = new()
    prompts = ["One fish", "Two fish, red fish"]
    reply = worker.ask(prompts, capture, path="/v1/completions", n=2, temperature=1, seed=1)
    assert reply.status_code == 200
    file = worker.file(capture.call)
    check(file, choices=4)
    lengths = [len(s.prompt_token_ids) for s in file.sequences]
    assert lengths[0] == lengths[1] != lengths[2] == lengths[3]


def test_a_client_that_leaves_leaves_the_rows_that_were_computed(worker):
    """What was computed is there, and the sequence says that it did not end."""
    capture = new()
    worker.slow()
    with worker.begin("Once upon a time", capture) as reply:
        lines = reply.iter_lines()
        while "text" not in next(lines):
            pass
    file = worker.file(capture.call)
    (sequence,) = file.sequences
    assert sequence.finish_reason is None
    assert file.n_rows >= len(sequence.prompt_token_ids)
    assert file.position.tolist() == list(range(file.n_rows))


def test_a_client_that_leaves_before_its_turn_leaves_nothing(worker, monkeypatch):
    """Another's long prompt has all of the engine: who claims is told that nothing was run."""
    running, queued = new(), new()
    worker.slow()
    with worker.begin(FILLER * 40, running) as reply:
        with worker.begin("Hi", queued):
            pass
        with monkeypatch.context() as patch:
            patch.setattr("worker.ledger.ABORT_GRACE_S", 0.5)  # the stub's, which is in this process
            gone = worker.claim(queued.call)
        assert gone.status_code == 410 and gone.json()["ran"] is False, gone.text
        assert reply.status_code == 200
        worker.run_prompt(reply.iter_lines())
    assert worker.file(running.call).n_rows > 0  # it is over, too


def test_a_refused_request_has_no_activations(worker):
    """The worker's own error, and 410 with a reason for whoever claims, who is told that nothing was run."""
    capture = new()
    reply = worker.ask("Hi", capture, model="nobody")
    assert reply.status_code == 404 and "nobody" in reply.json()["error"]["message"]
    gone = worker.claim(capture.call)
    assert gone.status_code == 410 and gone.json()["error"]["message"]
    assert gone.json()["sequences"] == [] and gone.json()["ran"] is False


def test_the_recorders_metrics_stand_behind_the_servers_own(worker):
    """In plain text, also for those who would take it packed or in another format."""

    def metrics():
        headers = {"accept": "application/openmetrics-text", "accept-encoding": "gzip"}
        reply = worker.client.get("/metrics", headers=headers)
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/plain")
        assert int(reply.headers["content-length"]) == len(reply.content)
        lines = [line for line in reply.text.splitlines() if not line.startswith("#")]
        return {name: float(number) for name, _, number in (line.rpartition(" ") for line in lines)}

    before = metrics()
    assert any(not name.startswith("tautap_") for name in before)
    capture = new()
    assert worker.ask("Hi", capture).status_code == 200
    file = worker.file(capture.call)
    after = metrics()
    assert after["tautap_rows_total"] - before["tautap_rows_total"] == file.n_rows
    assert after["tautap_captures_total"] - before["tautap_captures_total"] == 1
    assert after["tautap_spool_bytes"] > file.rows.nbytes
    limits = worker.client.get("/v1/capabilities").json()["limits"]
    assert after["tautap_buffer_limit_bytes"] == limits["buffer_bytes"] >= after["tautap_buffer_bytes"]
    assert {"tautap_buffer_waits_total", "tautap_buffer_wait_seconds_total", "tautap_captures_failed_total"} <= set(
        after
    )


def test_an_unknown_call_is_404_in_openais_shape(worker):
    reply = worker.claim("c-nobody", wait_s=0)
    assert reply.status_code == 404
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("{", "X-Tautap-Capture"),
        ('{"call": "../x"}', "letters, digits"),
        ('{"call": "c", "points": ["layers.99.output"]}', "layers 0 to"),
        ('{"call": "c", "points": ["nonsense"]}', "layers.<n>.<hook>"),
    ],
)
def test_a_bad_capture_is_refused_before_the_model_runs(worker, header, says):
    body = {"model": worker.model, "messages": [{"role": "user", "content": "Hi"}]}
    reply = worker.client.post("/v1/chat/completions", json=body, headers={CAPTURE_HEADER: header})
    assert reply.status_code == 400 and says in reply.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"model": 3}', b'"x"'])
def test_a_malformed_body_gets_the_servers_own_error(worker, body):
    """With a capture or without, the answer is the same."""
    headers = {"content-type": "application/json"}
    plain = worker.client.post("/v1/chat/completions", content=body, headers=headers)
    captured = worker.client.post(
        "/v1/chat/completions", content=body, headers=headers | {CAPTURE_HEADER: new().header()}
    )
    assert plain.status_code == captured.status_code == 400
    assert plain.json()["error"]["type"] == captured.json()["error"]["type"]


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], [-1], ["a", [1]], None, {}], ids=repr)
def test_a_prompt_of_nothing_or_of_no_tokens_is_refused(worker, prompt):
    for capture in (None, new()):
        assert worker.ask(prompt, capture, "/v1/completions").status_code == 400
        assert worker.ask("Hi", capture, messages=[]).status_code == 400
    assert worker.ask("Hi", path="/v1/completions").status_code == 200


# ---- direct use


def test_a_reply_carries_the_activations_that_its_request_asked_for(worker):
    asked = {"layers": [1, 3], "hook_points": ["output"]}
    reply = worker.ask("Hi", collect_activations=asked).json()
    assert reply["choices"][0]["message"]["content"]
    assert set(reply["activations"]) == {"layer_1_output", "layer_3_output"}
    status = reply["activation_collection_status"]
    assert status["successful"] and status["requested_layers"] == [1, 3] and not status["failed_keys"]
    for field in reply["activations"].values():
        n_rows, hidden = field["shape"]
        assert field["positions"] == list(range(n_rows)) and len(field["token_ids"]) == n_rows
        assert np.array(field["data"]).shape == (n_rows, hidden) and field["total_elements"] == n_rows * hidden
        assert set(field["statistics"]) == {"mean", "std", "min", "max", "norm"} and field["format"] == "full"
    call = reply["id"].removeprefix("chatcmpl-")
    assert worker.claim(call, wait_s=0).status_code == 404, "what was returned is not kept"


def test_positions_count_from_the_end_too_and_base64_holds_the_same_values(worker):
    import base64

    asked = {"layers": [1], "positions": [0, -1]}
    plain = worker.ask("Hi", collect_activations=asked).json()["activations"]["layer_1_output"]
    packed = worker.ask("Hi", collect_activations=asked | {"encoding_format": "base64"}).json()
    field = packed["activations"]["layer_1_output"]
    assert plain["positions"] == field["positions"] and plain["positions"][0] == 0 and len(plain["positions"]) == 2
    data = base64.b64decode(field["data_base64"])
    import ml_dtypes

    dtype = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[field["dtype"]]
    assert np.array_equal(np.frombuffer(data, dtype).astype(np.float32), np.array(plain["data"], np.float32).ravel())


def test_a_large_point_is_sampled_and_says_so(worker):
    asked = {"layers": [1]}
    hidden = worker.client.get("/v1/capabilities").json()["hidden_size"]
    reply = worker.ask("word " * (130_000 // hidden), collect_activations=asked).json()
    field = reply["activations"]["layer_1_output"]
    every = field["sampled"]["every"]
    assert field["format"] == "sampled" and every > 1 and field["total_elements"] > 100_000
    assert len(field["sample_data"]) == -(-field["total_elements"] // every) <= 100_000


def test_a_streamed_reply_is_claimed_under_its_id(worker):
    reply = worker.ask("Hi", stream=True, collect_activations=True)
    first = json.loads(reply.text.split("\n\n")[0].removeprefix("data: "))
    assert "activations" not in reply.text
    call = first["id"].removeprefix("chatcmpl-")
    check(worker.file(call))
    worker.client.delete(f"/v1/activations/{call}")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"layers": [99]}, "layers 0 to"),
        ({"hook_points": ["x"]}, "output, input, attn, mlp"),
        ({"layers": 8}, "layers"),
    ],
)
def test_a_wrong_collect_activations_is_refused(worker, asked, says):
    reply = worker.ask("Hi", collect_activations=asked)
    assert reply.status_code == 400 and says in reply.json()["error"]["message"]
