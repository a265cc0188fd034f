"""Every hook point on every family that we name, against transformers in float32."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.conftest import tune
from tests.test_readme import BLOCKS as README_BLOCKS
from tests.worker.record import N_GENERATED, PROMPT

pytestmark = pytest.mark.engine

TINY = {"vocab_size": 256, "initializer_range": 0.2}
DENSE = TINY | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "max_position_embeddings": 256,
    "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
FAMILIES = {
    "llama": ("LlamaConfig", DENSE),
    "mistral": ("MistralConfig", DENSE | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", DENSE),
    "qwen3": ("Qwen3Config", DENSE | {"head_dim": 32}),
    "phi3": ("Phi3Config", DENSE),
    "gemma3": ("Gemma3TextConfig", DENSE | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 128}),
    "olmo2": ("Olmo2Config", DENSE),
    "gpt2": ("GPT2Config", TINY | {"n_embd": 64, "n_layer": 3, "n_head": 2, "n_positions": 256, "eos_token_id": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", DENSE | {"head_dim": 32} | EXPERTS),
    # Their blocks return the residual stream whole in vLLM, and what is beside it is not to be added.
    "cohere": ("CohereConfig", DENSE),
    "exaone4": ("Exaone4Config", DENSE | {"head_dim": 32, "sliding_window": 128, "sliding_window_pattern": 4}),
}
# Scaled outside of the modules.
GRANITE = {"granite": ("GraniteConfig", DENSE | {"residual_multiplier": 0.5})}
INSIDE = [f"layers.{n}.{hook}" for n in (0, 2) for hook in ("input", "attn", "mlp", "output")]
OUTPUTS = [f"layers.{n}.output" for n in (0, 1, 2)]
POINTS = ["embed.output", *INSIDE, "final.output"]


# Heads for two ranks, whose parts of what `o_proj` takes and `gate_up_proj` gives are as wide as the residual stream.
SPLIT = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}


def make(family, home, **sizes):
    """A tiny random model in a directory, and in transformers."""
    import transformers

    kind, fields = (FAMILIES | GRANITE)[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**fields | sizes)).float().eval()
    model.save_pretrained(home)
    return model


def reference(model, tokens):
    """point → [tokens, hidden], read off transformers' own modules."""
    body = model.get_decoder() if hasattr(model, "get_decoder") else model.transformer
    blocks, norm = (body.h, body.ln_f) if hasattr(body, "h") else (body.layers, body.norm)
    found = {}

    def keep(point, value):
        value = value[0] if isinstance(value, tuple) else value
        found[point] = value.detach().reshape(len(tokens), -1).numpy().copy()

    def after(module, point):
        module.register_forward_hook(lambda m, args, value: keep(point, value))

    def before(module, point):
        module.register_forward_pre_hook(
            lambda m, args, kwargs: keep(point, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )

    for n, block in enumerate(blocks):
        sandwiched = hasattr(block, "post_feedforward_layernorm")
        plain = "attn" if hasattr(block, "attn") else "self_attn"
        after(getattr(block, "post_attention_layernorm" if sandwiched else plain), f"layers.{n}.attn")
        after(block.post_feedforward_layernorm if sandwiched else block.mlp, f"layers.{n}.mlp")
        after(block, f"layers.{n}.output")
        before(block, f"layers.{n}.input")
    after(norm, "final.output")
    with torch.no_grad():
        model(torch.tensor([tokens]))
    return found | {"embed.output": found["layers.0.input"]}


class Recorded(NamedTuple):
    """Of a captured request the tokens, the rows and how many steps were replayed; of the same one without a capture
    what it generated; and the points that the probe refused, with the reason.
    """

    tokens: list[int]
    rows: np.ndarray
    uncaptured: list[int]
    n_replays: int
    wrong: dict[str, str]


class Recording:
    """`tests.worker.record` in a process of its own, begun anew if it has died."""

    def __init__(self, log):
        self._log = log
        self._process = None

    def __call__(self, home, points, adapter=None, ranks=1, flags=None, stop=None, **asked):
        """What our worker recorded in vLLM, or what it said when it refused."""
        out = home / "recorded.npz"
        job = {
            "model": str(home),
            "out": str(out),
            "asked": asked | {"points": points},
            "adapter": adapter and str(adapter),
            "ranks": ranks,
            "flags": flags or {},
            "stop": stop,
        }
        if self._process is None or self._process.poll() is not None:
            self._start()
        print(json.dumps(job), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            return self._log.read_text(errors="replace")[-4000:]
        if "error" in (said := json.loads(answer)):
            return said["error"]
        with np.load(out) as found:
            lists = {name: found[name].tolist() for name in ("tokens", "uncaptured", "n_replays")}
            return Recorded(rows=found["rows"], wrong=json.loads(str(found["wrong"])), **lists)

    def _start(self):
        env = {name: value for name, value in os.environ.items() if name != "NNSIGHT_CONFIG"}
        command, pipe = [sys.executable, "-m", "tests.worker.record"], subprocess.PIPE
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=env)

    def close(self):
        if self._process is not None:
            self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def record(engines, tmp_path_factory):
    """A function that records what a model computes. One vLLM at a time."""
    engines.stop()
    recording = Recording(tmp_path_factory.mktemp("record") / "log")
    yield recording
    recording.close()


def check(recorded, model, points, n_generated=N_GENERATED - 1):
    """Every row is what the model computes for the tokens that were recorded."""
    assert not isinstance(recorded, str), recorded[-3000:]
    tokens, rows = recorded.tokens, recorded.rows
    assert tokens[: len(PROMPT)] == PROMPT and len(tokens) == len(PROMPT) + n_generated
    expected = reference(model, tokens)
    for i, point in enumerate(points):
        error = np.linalg.norm(rows[:, i] - expected[point], axis=1) / np.linalg.norm(expected[point], axis=1)
        assert error.max() <= 1e-4, f"{point}: {error.max()}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_point_holds_what_its_name_says(record, family, tmp_path):
    """Prompt in chunks and generated tokens, first and last layer, embeddings and final norm: relative error ≤ 1e-4.
    In eager steps, and where graphs, which on a CPU are `replay.Graph`, do the decode steps that have no prompt beside
    them, planned ahead.
    """
    model = make(family, tmp_path)
    eager, graphs = record(tmp_path, POINTS), record(tmp_path, POINTS, source="graphs")
    check(eager, model, POINTS)
    check(graphs, model, POINTS)
    assert (eager.n_replays, graphs.n_replays) == (0, N_GENERATED - 2)
    assert eager.wrong == graphs.wrong == {}, "every point of every layer can be had"
    assert graphs.uncaptured == eager.uncaptured


@pytest.mark.parametrize("source", ["nnsight", "graphs"])
def test_a_step_that_was_planned_before_the_reply_ended_leaves_one_row_too_many(record, source, tmp_path, observed):
    """Asynchronous scheduling has the token that ends a reply fed in; its row is right, and nobody else's."""
    model = make("llama", tmp_path)
    *reply, _ = observed.tokens
    recorded = record(tmp_path, OUTPUTS, source=source, stop=reply[-1])
    check(recorded, model, OUTPUTS, N_GENERATED - 2)
    assert recorded.tokens == reply


def test_a_family_that_does_not_fit_is_refused_at_start_by_name(record, tmp_path):
    """What can be had of it all the same is right."""
    model = make("granite", tmp_path)
    refused = record(tmp_path, ["layers.1.output", "layers.1.attn"])
    says = "layers.1.attn: GraniteForCausalLM: attn and mlp are not what joins the residual stream at layer 1"
    assert isinstance(refused, str) and says in refused
    recorded = record(tmp_path, OUTPUTS)
    check(recorded, model, OUTPUTS)
    assert {point.rpartition(".")[2] for point in recorded.wrong} == {"attn", "mlp"}


def test_a_module_of_ones_own_is_a_point(record, tmp_path):
    """The output projection's output is what the attention block adds."""
    make("llama", tmp_path)
    points = ["layers.1.attn", "layers.1.mine"]
    rows = record(tmp_path, points, custom={"mine": "model.layers.*.self_attn.o_proj.output"}).rows
    assert np.array_equal(rows[:, 0], rows[:, 1]) and rows.any()


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("model.layers.*.self_attn.qkv_proj.output", "LlamaForCausalLM has (1, 128) there, needed (1, 64)"),
        ("model.layers.*.self_attn.nothing.output", "model.layers.0.self_attn has"),
    ],
)
def test_a_location_that_does_not_fit_is_refused_at_start_by_name(record, tmp_path, location, says):
    make("llama", tmp_path)
    refused = record(tmp_path, ["layers.0.mine"], custom={"mine": location})
    assert isinstance(refused, str) and "UnknownPoint" in refused and says in refused


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config: rows",
        ),
        ({"offload_group_size": 2}, "--offload-group-size: to move a block's weights"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill: a layer would see"),
    ],
)
def test_what_cannot_be_recorded_is_refused_by_the_engine_however_it_was_asked_for(record, tmp_path, flags, says):
    make("llama", tmp_path)
    refused = record(tmp_path, OUTPUTS, flags=flags)
    assert isinstance(refused, str) and "BadInput" in refused and says in refused, refused


@pytest.fixture(scope="module")
def observed(record, tmp_path_factory):
    """What the observers record of every layer's output of the tiny Llama."""
    home = tmp_path_factory.mktemp("observed")
    make("llama", home)
    return record(home, OUTPUTS)


def test_a_compiled_model_gives_the_same_rows_by_its_auxiliary_hidden_states(record, tmp_path, observed):
    """In vLLM's compiled graph, first, middle and last layer, against transformers and against the observers."""
    model = make("llama", tmp_path)
    compiled = record(tmp_path, OUTPUTS, source="aux")
    check(compiled, model, OUTPUTS)
    assert compiled.tokens == observed.tokens
    error = np.linalg.norm(compiled.rows - observed.rows, axis=2) / np.linalg.norm(observed.rows, axis=2)
    assert error.max() <= 1e-4


def test_a_model_without_auxiliary_hidden_states_is_refused_at_start_by_name(record, tmp_path):
    make("gpt2", tmp_path)
    refused = record(tmp_path, ["layers.0.output"], source="aux")
    assert isinstance(refused, str) and "GPT2LMHeadModel has no auxiliary hidden states" in refused


STEER = f"""
{README_BLOCKS[-1].replace("layers[12]", "layers[1]")}

def told(model, rows):
    steer(model)
    assert model.model.layers[2].output[0].shape[0] == rows.n_rows and rows.n_prompt in (40, 2)  # 2: the trial at start

def replace(model):
    hidden, residual = model.model.layers[1].output
    model.model.layers[1].output = (torch.zeros_like(hidden), torch.ones_like(residual))

def late(model):
    model.model.layers[1].output
    model.model.layers[0].output
"""


def test_the_capture_sees_what_an_edit_leaves(record, tmp_path, observed):
    """Steering by a vector, in chunks and decode steps: rows and reply are those of a model with the vector added.

    A request that is not captured is not steered, nor finds what a steered one left in the cache.
    """
    model = make("llama", tmp_path)
    (tmp_path / "steer.py").write_text(STEER)
    vector = torch.linspace(-3, 3, 64)
    model.model.layers[1].register_forward_hook(lambda m, args, value: value + vector)
    steered = record(tmp_path, OUTPUTS, edit=f"{tmp_path}/steer.py:told")
    check(steered, model, OUTPUTS)
    assert steered.tokens != observed.tokens
    assert steered.uncaptured == observed.uncaptured


def test_an_edit_can_replace_a_value(record, tmp_path):
    make("llama", tmp_path)
    (tmp_path / "steer.py").write_text(STEER)
    rows = record(tmp_path, OUTPUTS[:2], edit=f"{tmp_path}/steer.py:replace").rows
    assert np.all(rows[:, 1] == 1) and not np.any(rows[:, 0] == 1)


def test_an_edit_that_fails_on_a_row_is_refused_at_start(record, tmp_path):
    make("llama", tmp_path)
    (tmp_path / "steer.py").write_text(STEER)
    refused = record(tmp_path, ["layers.0.output"], edit=f"{tmp_path}/steer.py:late")
    assert isinstance(refused, str) and "steer.py:late" in refused and "model.model.layers.0.output" in refused


def test_a_model_that_is_fed_embeddings_is_recorded_all_the_same(record, tmp_path, observed):
    """As one that takes images is, and one of any kind where embeddings are taken for prompts."""
    model = make("llama", tmp_path)
    (tmp_path / "steer.py").write_text(STEER)
    fed = record(tmp_path, OUTPUTS, flags={"enable_prompt_embeds": True})
    check(fed, model, OUTPUTS)
    assert fed.tokens == observed.tokens
    edited = record(tmp_path, OUTPUTS[:2], flags={"enable_prompt_embeds": True}, edit=f"{tmp_path}/steer.py:replace")
    assert np.all(edited.rows[:, 1] == 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's kernels for adapters take no float32 on CUDA")
def test_a_lora_adapters_rows_are_those_of_the_merged_weights(record, tmp_path, observed):
    model = make("llama", tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    tune(model, adapter)
    tuned = record(tmp_path, POINTS, adapter)
    check(tuned, model, POINTS)
    assert tuned.tokens != observed.tokens and tuned.uncaptured == observed.uncaptured


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks want two devices")
def test_a_model_split_over_two_ranks_gives_whole_rows(record, tmp_path):
    """The first rank records; what each has a part of until they are added up is whole, error ≤ 1e-4. A location
    of which each has a part for good is refused by name.
    """
    model = make("qwen3", tmp_path, **SPLIT)
    parts = {
        "qkv": ("self_attn.qkv_proj.output", "has (1, 128) there, needed (1, 64)"),
        "heads": ("self_attn.attn.output", "has a part of it on each rank"),
        "into": ("self_attn.o_proj.input", "has a part of it on each rank"),
        "gate": ("mlp.gate_up_proj.output", "has a part of it on each rank"),
    }
    whole = {"o_proj": "self_attn.o_proj.output", "down": "mlp.down_proj.output"}
    locations = whole | {name: location for name, (location, _) in parts.items()}
    custom = {name: f"model.layers.*.{location}" for name, location in locations.items()}
    same = {"layers.0.attn": "layers.0.o_proj", "layers.2.mlp": "layers.2.down"}
    recorded = record(tmp_path, [*POINTS, *same.values()], ranks=2, custom=custom)
    check(recorded, model, POINTS)
    for point, (named, own) in enumerate(same.items(), len(POINTS)):
        assert np.array_equal(recorded.rows[:, point], recorded.rows[:, POINTS.index(named)]), own
    assert recorded.wrong.keys() == {f"layers.{n}.{name}" for n in range(3) for name in parts}
    for name, (_, says) in parts.items():
        assert f"layers.0.{name}: Qwen3ForCausalLM {says}" in recorded.wrong[f"layers.0.{name}"]
