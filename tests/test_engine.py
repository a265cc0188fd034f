"""The real engine: right numbers, complete rows, and a client that notices nothing.

Ordered so that each kind of engine starts once: float32, then stock vLLM, then bfloat16.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from episodes.errors import CaptureLost
from episodes.run import open_run
from episodes.verify import problems
from episodes.wire import CallFile
from proxy.backend import Backend
from proxy.backfill import backfill
from proxy.config import Config
from servers import model_home
from tests.conftest import proxy_to
from worker.smollm import NAME as MODEL

pytestmark = pytest.mark.engine

POINTS = ["layers.0.output", "layers.15.output", "layers.29.output"]
BLOCK = 32  # tokens of a block in the cache, as the embedded model is run
POLICY = {"role": "system", "content": "You are a clerk of a library. Be brief. " * 12}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_book",
            "description": "Find a book by its title.",
            "parameters": {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]},
        },
    }
]


@pytest.fixture(scope="session")
def reference():
    """transformers on the embedded model in float32: token ids → point → [positions, hidden]."""
    return Reference("float32")


class Reference:
    def __init__(self, dtype):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        home = model_home()
        self.model = AutoModelForCausalLM.from_pretrained(home, dtype=getattr(torch, dtype))
        self.tokenizer = AutoTokenizer.from_pretrained(home)
        self._known = []

    def __call__(self, token_ids):
        """The residual stream after each block. Of what longer ones begin with that were run before, it is theirs: a
        state depends on nothing that comes after it.
        """
        alike = (states for tokens, states in self._known if np.array_equal(tokens[: len(token_ids)], token_ids))
        states = next(alike, None)
        if states is None:
            states = self._run(token_ids)
            self._known.append((token_ids, states))
        return {point: rows[: len(token_ids)] for point, rows in states.items()}

    def _run(self, token_ids):
        """transformers' last hidden state has the final norm behind it, so it is taken from the last block itself;
        `output_hidden_states` gives the others.
        """
        last = []
        hook = self.model.model.layers[-1].register_forward_hook(
            lambda module, args, output: last.append(output[0] if isinstance(output, tuple) else output)
        )
        with self.torch.no_grad():
            states = self.model(self.torch.tensor([token_ids.tolist()]), output_hidden_states=True).hidden_states
        hook.remove()
        by_layer = {
            k: state[0].float().numpy() for k, state in enumerate([*states[1:-1], last[0].reshape(states[1].shape)])
        }
        return {point: by_layer[int(point.split(".")[1])] for point in POINTS}


def talk(client, subject, stream, tools=None, turns=2):
    """A conversation of two turns, the second of which finds the first in the prefix cache."""
    messages = [POLICY, {"role": "user", "content": f"Tell me about {subject}."}]
    for _ in range(turns):
        extra = {"tools": tools} if tools else {}
        reply = client.chat.completions.create(
            model=MODEL, messages=messages, stream=stream, temperature=0, seed=1, max_tokens=24, **extra
        )
        if stream:
            text = "".join(c.choices[0].delta.content or "" for c in reply if c.choices)
        else:
            text = reply.choices[0].message.content or ""
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]


KINDS = [
    ("whales", False, None),
    ("tea and how it is made", True, None),
    ("rivers", False, TOOLS),
    ("a " * 300, True, TOOLS),
]


def record(url, tmp_path, kinds=KINDS):
    """Different conversations in flight: streamed and not, with tools and without; the run they leave."""
    with proxy_to(url, tmp_path) as proxy:
        client = proxy.client()
        threads = [threading.Thread(target=talk, args=(client, *kind)) for kind in kinds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return proxy.open()


def check_complete(run, reference):
    """Stitched spans cover 0 … prompt + generated - 2 exactly once, with the token ids that the engine saw."""
    assert list(problems(run)) == []
    calls = [run.call(c) for c in run.history.calls]
    assert len(calls) == 8 and {e.status for e in run.history.episodes.values()} == {"sealed"}
    for call in calls:
        (sequence,) = call.record.sequences
        edges = [(s.start, s.stop) for s in call.spans()]
        assert (
            edges[0][0] == 0 and edges[-1][1] == len(sequence.prompt_token_ids) + len(sequence.completion_token_ids) - 1
        )
        assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))
        request = json.loads(call.record.request)
        template = {"add_generation_prompt": True, "return_dict": False, "tools": request.get("tools")}
        assert sequence.prompt_token_ids == list(
            reference.tokenizer.apply_chat_template(request["messages"], **template)
        )
        said = json.loads(call.record.reply)["choices"][0]["message"]["content"]
        text = reference.tokenizer.decode(sequence.completion_token_ids, skip_special_tokens=True)
        assert text.strip() == (said or "").strip()
    second = [c for c in calls if c.record.turn == 1]
    assert len(second) == 4 and all(c.record.sequences[0].n_cached > 0 for c in second)
    stored = [(c.record.id, k.choice, p) for c in calls for k in c.record.kept for p in range(k.start, k.stop)]
    assert len(stored) == len(set(stored))


def longest_first(run):
    """The calls of a run, in the order in which `Reference` has the least to run."""
    return sorted(map(run.call, run.history.calls), key=lambda call: -len(call.token_ids()))


def test_every_row_is_what_transformers_computes(engines, reference, tmp_path):
    """In float32, prompt and generated tokens, layers 0, middle and last: relative error of the worst row ≤ 1e-4."""
    run = record(engines.get("float32"), tmp_path)
    check_complete(run, reference)
    worst = 0.0
    for call in longest_first(run):
        expected = reference(call.token_ids())
        for point in POINTS:
            found = call.activations(point)
            assert found.shape == expected[point].shape
            error = np.linalg.norm(found - expected[point], axis=1) / np.linalg.norm(expected[point], axis=1)
            worst = max(worst, float(error.max()))
    print(f"worst relative error of a row: {worst:.1e}")
    assert worst <= 1e-4


def test_plain_pyarrow_reads_what_the_api_reads(engines, tmp_path):
    run = record(engines.get("float32"), tmp_path, KINDS[:1])
    longest = max(run.history.calls.values(), key=lambda record: record.n_kept)
    call = run.call(longest.id)
    shard = pq.read_table(run.layout.shard(longest.episode), filters=[("call", "=", longest.id)])
    positions = shard["position"].to_pylist()
    assert positions == [p for kept in longest.kept for p in range(kept.start, kept.stop)]
    column = shard["layers.15.output"].combine_chunks()
    rows = np.frombuffer(column.buffers()[1], "<f4").reshape(len(column), -1)
    assert np.array_equal(rows, call.activations("layers.15.output", positions=positions))
    assert shard["token_id"].to_pylist() == call.token_ids()[positions].tolist()


def test_a_backfill_computes_the_rows_that_were_lost(engines, reference, tmp_path, monkeypatch):
    """Every call's rows are lost after it ran; filled, the run is whole and its rows are transformers'."""
    claim = Backend.claim

    async def lose(self, call, into, *limits):
        await claim(self, call, into, *limits)
        sequences = CallFile(into).sequences
        into.unlink()
        raise CaptureLost("told to lose it", sequences)

    url = engines.get("float32")
    with monkeypatch.context() as patch:
        patch.setattr(Backend, "claim", lose)
        run = record(url, tmp_path)
    assert sum(call.n_kept for call in run.history.calls.values()) == 0 and len(run.history.calls) == 8
    done = asyncio.run(backfill(run.layout, Config((url,), tmp_path, "r")))
    filled = open_run(run.layout.root)
    assert done.left == {} and done.n_rows == sum(filled.calls["n_rows"].to_pylist()) and list(problems(filled)) == []
    for call in longest_first(filled):
        expected = reference(call.token_ids())
        for point in POINTS:
            error = np.linalg.norm(call.activations(point) - expected[point], axis=1)
            assert (error <= 1e-4 * np.linalg.norm(expected[point], axis=1)).all()


def test_a_call_that_goes_on_from_a_stop_string_finds_all_its_rows(engines, tmp_path):
    """The engine hears late of one, and caches the block that the last token fills: the next call begins behind it."""

    def go_on(n):
        prompt = [*range(100, 100 + BLOCK // 2), *range(300 + n, 300 + BLOCK // 2 + 2 * n)]
        body = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 30, "return_token_ids": True}
        (choice,) = client.post("/v1/completions", json=body | {"stop": ["e", "a"]}).json()["choices"]
        prompt += choice["token_ids"]
        if len(prompt) % BLOCK == 0:
            client.post("/v1/completions", json=body | {"prompt": [*prompt, 1], "max_tokens": 1})

    with (
        proxy_to(engines.get("float32"), tmp_path) as proxy,
        httpx.Client(base_url=proxy.url, timeout=120) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        list(pool.map(go_on, range(BLOCK)))
    run = proxy.open()
    calls = list(run.history.calls.values())
    at_a_blocks_end = [c for c in calls if c.sequences[0].last_fed and c.n_positions % BLOCK == 0]
    assert at_a_blocks_end and list(problems(run)) == []


def requests():
    """Requests of every kind, all of which give the same reply whenever they are sent."""
    chat = {"model": MODEL, "temperature": 0, "seed": 1, "max_tokens": 8}
    user = {"role": "user", "content": "Name three colours."}
    path = "/v1/chat/completions"
    yield path, chat | {"messages": [user]}
    yield path, chat | {"messages": [POLICY, user], "tools": TOOLS}
    yield path, chat | {"messages": [user], "stream": True, "stream_options": {"include_usage": True}}
    yield path, chat | {"messages": [user], "logprobs": True, "top_logprobs": 2}
    yield path, chat | {"messages": [user], "n": 2, "temperature": 0.7}
    yield "/v1/completions", chat | {"prompt": "Once upon a time"}
    yield "/v1/completions", chat | {"prompt": ["One fish", "Two fish"], "echo": True}
    yield path, chat | {"messages": [user], "max_tokens": -1}
    yield path, chat | {"messages": "no list"}
    yield path, {"model": "nobody", "messages": [user]}


def replies(url, **extra):
    """(status, content type, body) of each request, without what differs from one server or call to the next."""
    found = []
    with httpx.Client(timeout=120) as client:
        for path, body in requests():
            reply = client.post(f"{url}{path}", json=body | extra)
            assert not [name for name in reply.headers if "tautap" in name.lower()]
            found.append((reply.status_code, reply.headers["content-type"], _timeless(reply.text)))
    return found


def _timeless(text):
    lines = []
    for line in text.splitlines():
        data = line.removeprefix("data: ")
        if not data.startswith("{"):
            lines.append(line)
            continue
        fields = json.loads(data)
        # The fingerprint is an id too: a hash of the server's configuration, which names our spool.
        for name in ("id", "created", "system_fingerprint"):
            fields.pop(name, None)
        lines.append(fields)
    return lines


def test_the_client_cannot_tell(engines, tmp_path):
    """The same replies through the proxy with capture on, with capture off, from the worker, and from stock vLLM."""
    url = engines.get("float32")
    with proxy_to(url, tmp_path) as proxy:
        on = replies(proxy.url)
        off = replies(proxy.url, collect_activations=False)
    direct = replies(url)
    calls = list(proxy.open().history.calls.values())
    assert sum(call.n_kept > 0 for call in calls) >= 5 and all(not c.kept for c in calls[len(on) :])
    stock = replies(engines.get("stock"))
    assert [status for status, _, _ in stock] == [200] * 7 + [400, 400, 404]
    for ours in (on, off, direct):
        assert ours == stock


def test_bfloat16_rows_are_as_near_to_float32_as_transformers_own(engines, reference, tmp_path):
    """Against float32 rows: cosine ≥ 0.999 but for one row in 500 (a few have entries in the thousands, whose rounding
    turns them further; transformers in bfloat16 has more such rows), and no further off on average than transformers.
    """
    run = record(engines.get("bfloat16"), tmp_path)
    check_complete(run, reference)
    theirs = Reference("bfloat16")
    angles = {"ours": [], "transformers": []}
    for call in longest_first(run):
        expected, rounded = reference(call.token_ids()), theirs(call.token_ids())
        for point in POINTS:
            found = call.activations(point).astype(np.float32)
            angles["ours"].append(cosine(found, expected[point]))
            angles["transformers"].append(cosine(rounded[point], expected[point]))
    ours, transformers = (np.concatenate(found) for found in angles.values())
    for name, found in (("ours", ours), ("transformers", transformers)):
        below = np.mean(found < 0.999)
        print(f"{name}: cosine lowest {found.min():.6f}, mean {found.mean():.6f}, {below:.4%} of rows below 0.999")
    assert np.mean(ours < 0.999) <= 1 / 500
    assert np.mean(1 - ours) <= 1.25 * np.mean(1 - transformers)


def cosine(a, b):
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
