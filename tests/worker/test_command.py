"""The worker's command line: what it settles before vLLM starts, and what it refuses."""

import json
import socket
import subprocess
import sys

import pytest

from episodes.errors import BadInput, UnknownPoint
from worker.__main__ import free_socket, plan
from worker.spool import prepare


@pytest.fixture
def model(tmp_path):
    """A model's directory, as far as the command line reads it."""
    home = tmp_path / "model"
    home.mkdir()
    (home / "config.json").write_text(json.dumps({"num_hidden_layers": 24}))
    return str(home)


def settled(arguments, tmp_path):
    """vLLM's flags, and our share of the additional config."""
    command, env, spool = plan([*arguments, "--spool-dir", str(tmp_path / "spool")], {})
    assert spool.parent == tmp_path / "spool" and not spool.exists()
    assert env["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    additional = json.loads(command[command.index("--additional-config") + 1])
    return command, additional


def test_vllm_gets_its_own_flags_and_ours_are_taken(model, tmp_path):
    command, additional = settled(
        [model, "--max-model-len", "512", "--layers=3,5", "--hook-points", "output,attn.output"], tmp_path
    )
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert command[command.index("--model") + 1] == model and command[command.index("--max-model-len") + 1] == "512"
    assert "--layers=3,5" not in command and "--spool-dir" not in command
    points = ["layers.3.output", "layers.3.attn", "layers.5.output", "layers.5.attn"]
    assert additional["tautap"]["points"] == points and additional["tautap"]["tokens"] == "all"
    assert command[command.index("--host") + 1] == "127.0.0.1" and "--enforce-eager" in command


def test_a_users_additional_config_and_port_are_kept(model, tmp_path):
    command, additional = settled([model, "--additional-config", '{"a": 1}', "--port=9"], tmp_path)
    assert additional["a"] == 1 and "tautap" in additional
    assert command.count("--additional-config") == 1 and "--port" not in command and "--port=9" in command


@pytest.mark.parametrize(("depth", "layers"), [(24, [8, 12, 16]), (17, [8, 12, 16]), (16, [4, 8, 12]), (2, [0, 1])])
def test_layers_default_to_8_12_16_or_the_models_quarters(tmp_path, depth, layers):
    home = tmp_path / "model"
    home.mkdir()
    (home / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": depth}}))
    _, additional = settled([str(home)], tmp_path)
    assert additional["tautap"]["points"] == [f"layers.{n}.output" for n in layers]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layers", "24"], "layers 0 to 23"),
        (["--layers=8,x"], "numbers .* ranges .* slices"),
        (["--layers=9-8"], "layers of 0 to 23"),
        (["--hook-points", "logits"], "output, input, attn, mlp"),
    ],
)
def test_a_point_that_the_model_lacks_is_refused_with_what_exists(model, tmp_path, arguments, says):
    with pytest.raises(UnknownPoint, match=says):
        settled([model, *arguments], tmp_path)


@pytest.mark.parametrize(
    "flags", [["--speculative-config", "{}"], ["-pp", "2"], ["--data-parallel-size=2"], ["--api-server-count", "4"]]
)
def test_what_cannot_be_recorded_is_refused_by_name(model, tmp_path, flags):
    with pytest.raises(BadInput, match=flags[0].partition("=")[0]):
        settled([model, *flags], tmp_path)
    assert settled([model, "-pp", "1"], tmp_path)


FULL = '{"cudagraph_mode": "FULL", "mode": 3}'
EDITS = """
import os
def steer(model): ...
def told(model, rows): ...
def odd(model, rows, more): ...
"""


def test_a_compiled_model_is_not_made_eager_and_an_edit_is_found_from_anywhere(model, tmp_path, monkeypatch):
    command, additional = settled([model, "--capture-source", "aux"], tmp_path)
    assert "--enforce-eager" not in command and additional["tautap"]["source"] == "aux"
    command, additional = settled([model, "--capture-source", "graphs", "--compilation-config", FULL], tmp_path)
    compilation = json.loads(command[command.index("--compilation-config") + 1])
    assert "--enforce-eager" not in command and compilation == {"cudagraph_mode": "FULL", "mode": 0}
    assert additional["tautap"]["source"] == "graphs" and command.count("--compilation-config") == 1
    (tmp_path / "edits.py").write_text(EDITS)
    monkeypatch.chdir(tmp_path)
    for function in ("steer", "told"):
        _, additional = settled([model, "--edit", f"edits.py:{function}"], tmp_path)
        assert additional["tautap"]["edit"] == f"{tmp_path}/edits.py:{function}"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--capture-source", "aux", "--hook-points", "output,attn"], "layers.<n>.output only, not layers.8.attn"),
        (["--capture-source", "aux", "--edit", "{}/edits.py:steer"], "inside a graph or a compiled model"),
        (["--capture-source", "graphs", "--edit", "{}/edits.py:steer"], "inside a graph"),
        (["--edit", "{}/edits.py:steer", "-tp", "2"], "--tensor-parallel-size"),
        (["--edit", "{}/edits.py:nobody"], "no function 'nobody', only steer, told, odd"),
        (["--edit", "{}/edits.py:odd"], r"must take \(model\) or \(model, rows\)"),
        (["--edit", "{}/none.py:steer"], "there is no file"),
        (["--edit", "steer"], "give file.py:function"),
        (["--edit", "{}/broken.py:steer"], "does not import: ZeroDivisionError"),
        (["--edit", "{}/edits.txt:steer"], "not a Python file"),
    ],
)
def test_a_source_or_an_edit_that_cannot_be_is_refused_with_the_reason(model, tmp_path, arguments, says):
    for name, text in (("edits.py", EDITS), ("broken.py", "1 / 0"), ("edits.txt", EDITS)):
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=says):
        settled([model, *(argument.format(tmp_path) for argument in arguments)], tmp_path)


def test_a_spool_has_one_worker_and_nothing_of_anyone_else(tmp_path):
    """A second worker on the same port must not clear the first one's spool; other files stay."""
    spool = tmp_path / "tautap-spool-1"
    spool.mkdir()
    (spool / "old.0.safetensors").write_text("")
    (tmp_path / "model.safetensors").write_text("mine")
    prepare(spool)
    assert sorted(p.name for p in spool.iterdir()) == [".lock", ".token"] and (tmp_path / "model.safetensors").exists()
    (spool / "new.0.safetensors").write_text("")
    with pytest.raises(BadInput, match="another --port or --spool-dir"):
        prepare(spool)
    assert (spool / "new.0.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layers", "99"], "layer 99 does not exist: this model has layers 0 to 23"),
        (["--spool-bytes", "much"], "'much': give bytes"),
        (["--spool-dir", "/dev/null"], "cannot be written"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(model, arguments, says):
    command = [sys.executable, "-m", "proxy", "worker", model, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_help_names_our_flags_and_says_where_the_others_go():
    command = [sys.executable, "-m", "proxy", "worker", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--hook-points" in done.stdout and "vLLM" in done.stdout


@pytest.mark.parametrize(
    "flags",
    [["--host", "0.0.0.0"], ["--host=::"], ["--host", "127.0.0.1", "--host", "10.0.0.1"], ["--host", "box.lan"]],
)
def test_beyond_loopback_the_worker_listens_only_with_a_key(model, tmp_path, flags):
    """A flag, a file or vLLM's own variable; a key from a file is on no command line."""
    with pytest.raises(BadInput, match="--api-key-file or set VLLM_API_KEY"):
        settled([model, *flags], tmp_path)
    file = tmp_path / "key"
    file.write_text("worker-key-0123456789\n")
    command, env, _ = plan([model, *flags, "--api-key-file", str(file)], {})
    assert env["VLLM_API_KEY"] == "worker-key-0123456789" and "worker-key-0123456789" not in " ".join(command)
    assert plan([model, *flags], {"VLLM_API_KEY": "x"}) and plan([model, *flags, "--api-key", "x"], {})
    with pytest.raises(BadInput, match="one word"):
        plan([model, *flags, "--api-key-file", "/dev/null"], {})


@pytest.mark.parametrize("flags", [[], ["--host", "localhost"], ["--host=127.0.0.1"], ["--uds", "/run/worker.sock"]])
def test_on_loopback_or_a_socket_it_needs_none(model, tmp_path, flags):
    command, _ = settled([model, *flags], tmp_path)
    assert "0.0.0.0" not in command


def test_a_socket_that_a_worker_left_is_taken_over_and_one_in_use_is_not(tmp_path):
    """A worker that starts again in its container finds the socket of the one before: vLLM would not bind to it."""
    path, plain = tmp_path / "worker.sock", tmp_path / "plain"
    free_socket(None)
    free_socket(str(path))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        with pytest.raises(BadInput, match="a server listens there: stop it"):
            free_socket(str(path))
    free_socket(str(path))
    assert not path.exists()
    plain.touch()
    with pytest.raises(BadInput, match="no socket: delete it"):
        free_socket(str(plain))
    assert plain.exists()
