"""The README's code runs as it is printed, and its commands are commands of ours."""

import re
import shlex
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch

from episodes.records import Link
from episodes.shards import Block, Whose, write_shard
from proxy.__main__ import cli
from proxy.flags import n_attempts, parse, read_matrix, translate
from tests.episodes.test_store import MODEL, Writer, expected
from tests.test_compose import vllm_fields
from worker.__main__ import _parser

README = (Path(__file__).parent.parent / "README.md").read_text()
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
BLOCKS = [block for language, block in FENCED if language == "python"]
# The words behind each `tautap` of a block of shell, without what the line sets before it.
COMMANDS = [
    shlex.split(line.partition("tautap ")[2], comments=True)
    for language, block in FENCED
    if not language
    for line in block.replace("\\\n", "").splitlines()
    if re.match(r"([A-Z_]+=\S*( [\w.]+\))? )?tautap ", line)
]
POINT = "layers.8.output"
OPENING, FIRST, SECOND = [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 9, 8]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run at data/RUN. EPISODE is an airline task that was passed; of its calls one was lost, one refused, one
    recorded another point and one nothing. OTHER is the same task failed, with a call whose reply alone was recorded,
    and DOUBTFUL may be another one.
    """
    (tmp_path / "data").mkdir()
    writer = Writer(tmp_path)
    writer.commit("c1", OPENING, [5, 6, 7], episode="EPISODE", points=[POINT])
    writer.commit("c2", [7, 7], [7], episode="EPISODE", points=["layers.4.output"])
    for name, said in {
        "c3": {"lost": "the worker died"}, "c4": {"status": 404}, "c5": {"points": []}, "c6": {"role": "user"},
    }.items():  # fmt: skip
        writer.store.commit(msgspec.structs.replace(writer.call(name, "EPISODE", 1, [POINT]), **said))
    writer.commit("c7", FIRST, [8, 8], computed=6, episode="EPISODE", points=[POINT])
    writer.commit("d1", OPENING, [9, 9], computed=3, episode="OTHER", points=[POINT])
    writer.commit("d2", SECOND, [7, 7, 7], computed=4, episode="OTHER", points=[POINT])
    writer.commit("d3", [6, 6], [5, 5], episode="OTHER", points=[POINT], tokens="completion")
    writer.commit("e1", [3], [3], episode="DOUBTFUL", points=[POINT])
    writer.commit("f1", [4], [4], episode="UNLINKED", points=[POINT])
    for episode in ("EPISODE", "OTHER", "DOUBTFUL"):
        writer.store.seal(episode)
    link = {"env": "airline", "info": "{}"}
    writer.store.link(
        [
            Link("EPISODE", "tau-bench", "1", 0, 1.0, "transcript", **link),
            Link("OTHER", "tau-bench", "1", 1, 0.0, "transcript", **link),
            Link("DOUBTFUL", "tau-bench", "2", 0, 0.0, "order", **link),
        ]
    )
    writer.close()
    (tmp_path / "run").rename(tmp_path / "data" / "RUN")
    monkeypatch.chdir(tmp_path)


def test_seven_lines_of_pyarrow_and_numpy_read_one_layer_of_one_episode(run):
    """Without the rows of calls that recorded another point."""
    lines, scope = BLOCKS[0], {}
    assert len(lines.strip().splitlines()) == 7 and "episodes" not in lines
    exec(lines, scope)
    tokens = [*OPENING, 5, 6, 7, 8]
    assert scope["rows"].dtype == np.float32
    assert np.array_equal(scope["rows"].astype(ml_dtypes.bfloat16), expected(tokens, POINT))
    assert scope["shard"].num_rows == len(tokens)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_they_read_what_the_engine_computed_whatever_its_dtype(tmp_path, monkeypatch, dtype):
    model = msgspec.structs.replace(MODEL, dtype=np.dtype(dtype).name)
    values = np.arange(20_000, dtype=np.float32).reshape(5_000, 4).astype(dtype)  # two row groups
    tokens = np.zeros(5_000, np.int32)
    blocks = [
        Block(Whose("c1", "t", "agent", 0, 0, 0), 0, 3, tokens[:7], {"layers.4.output": values[:7]}),
        Block(Whose("c2", "t", "agent", 1, 0, 0), 0, 3, tokens, {POINT: values}),
    ]
    write_shard(tmp_path / "data/RUN/shards/EPISODE.parquet", ["layers.4.output", POINT], blocks, model, "zstd")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(BLOCKS[0], scope)
    assert np.array_equal(scope["rows"], values.astype(np.float32))
    assert scope["shard"]["call"].unique().to_pylist() == ["c2"]


def test_the_api_reads_it_too_and_tells_of_what_was_lost(run, capsys):
    """And passes over calls that were not asked for, or not for this."""
    scope = {}
    exec(BLOCKS[1], scope)
    assert np.array_equal(scope["rows"], expected([*FIRST, 8], POINT)) and scope["tokens"].tolist() == [*FIRST, 8]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == [
        "call c3: no activations: the worker died",
        "call c4: no activations: the client got HTTP 404",
    ]


def test_the_recipes_take_the_rows_that_they_say(run):
    scope = {}
    for block in BLOCKS[1:4]:
        exec(block, scope)
    prompts = [OPENING, FIRST, OPENING, SECOND]
    assert {x.dtype.name for x in scope["X"]} == {"float32"}
    assert np.array_equal(scope["X"], [expected(tokens, POINT)[-1] for tokens in prompts])
    assert scope["y"] == [True, True, False, False] and set(scope["tasks"]) == {("airline", "1")}
    assert torch.equal(scope["tensor"], torch.tensor(scope["reply"].astype(np.float32)).bfloat16())
    assert np.array_equal(scope["reply"], expected([*OPENING, 5, 6], POINT)[-2:])
    labels = {row["episode"]: row["label"] for row in scope["labelled"].to_pylist()}
    assert labels == {"EPISODE": True, "OTHER": True, "DOUBTFUL": None, "UNLINKED": None}
    assert scope["calls"].num_rows == scope["run"].calls.num_rows == 12
    lacking = {row["call"]: row["n_missing"] for row in scope["calls"].to_pylist() if row["n_missing"] != 0}
    assert lacking == {"c3": None}


def test_the_last_recipe_needs_the_api_alone(run):
    """And not the call that a loop above it happened to end with."""
    scope = {}
    exec(BLOCKS[1], scope)
    scope["call"] = None
    exec(BLOCKS[3], scope)
    assert scope["call"].record.id == "c1" and len(scope["reply"]) == 2


def test_a_row_is_its_first_callers_and_a_replys_last_token_the_next_calls(run):
    """What a shard's rows are not: the calls' own, what was generated, the chat's roles."""
    episode, other = (pq.read_table(f"data/RUN/shards/{name}.parquet").to_pylist() for name in ("EPISODE", "OTHER"))
    assert ("d1", 3) not in {(row["call"], row["position"]) for row in other}, "it is c1's, in the other shard"
    assert [(row["token_id"], row["phase"]) for row in episode if row["call"] in ("c1", "c7")] == [
        *((token, "prompt") for token in OPENING),
        *[(5, "completion"), (6, "completion"), (7, "prompt"), (8, "completion")],
    ]
    assert {row["role"] for row in episode} == {"agent"}


def test_a_dataset_over_all_shards_takes_their_unified_schema(run):
    shards = sorted(Path("data/RUN/shards").glob("*.parquet"))
    schema = pa.unify_schemas([pq.read_schema(shard) for shard in shards])
    found = ds.dataset("data/RUN/shards", schema=schema).to_table(columns=["call", "layers.4.output"])
    assert found.num_rows - found["layers.4.output"].null_count == 2


def test_the_readme_has_no_other_python():
    """Its last block, an edit, is run by `worker/test_families.py`."""
    assert len(BLOCKS) == 5 and "def steer" in BLOCKS[4]


def test_the_matrix_multiplies_out():
    (matrix,) = (block for language, block in FENCED if language == "toml")
    found = read_matrix(matrix)
    assert len(found) == 6 and "react-verify" in found
    assert {n_attempts(flags) for flags in found.values()} == {4}


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:3]))
def test_a_command_is_one_of_ours(words, tmp_path, monkeypatch):
    """Every flag is one that `tautap`, the worker or vLLM takes."""
    monkeypatch.chdir(tmp_path)
    Path("keys").write_text("ann secret-of-ann")
    name, *arguments = words
    context = cli.commands[name].make_context(name, arguments)  # click refuses what it does not know
    if name == "bench":
        assert n_attempts(translate(parse(context.params["benchmark_arguments"]), "m")) == 3 * 4
    for key in {"arguments", "worker_arguments"} & context.params.keys():
        _, rest = _parser().parse_known_args(context.params[key])
        assert {flag[2:].replace("-", "_") for flag in rest if flag.startswith("--")} <= vllm_fields()


def test_the_commands_are_all_there():
    assert [words[0] for words in COMMANDS] == ["bench", "up", "worker", "proxy", "proxy", "worker"]
