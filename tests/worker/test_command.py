"""The worker's command line: what it settles before vLLM starts, and what it refuses."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from episodes.errors import BadInput, UnknownPoint
from tests.conftest import free_port
from tests.worker.test_families import make
from worker import smollm
from worker.__main__ import _values, free_socket, main, plan
from worker.spool import WRONG, prepare


@pytest.fixture
def model(tmp_path):
    """A model's directory, as far as the command line reads it."""
    home = tmp_path / "model"
    home.mkdir()
    (home / "config.json").write_text(json.dumps({"num_hidden_layers": 24}))
    return str(home)


def settled(arguments, tmp_path):
    """vLLM's flags, and our share of the additional config."""
    command, env, config = plan([*arguments, "--spool-dir", str(tmp_path / "spool")], {})
    spool = Path(config.spool_dir)
    assert spool.parent == tmp_path / "spool" and not spool.exists()
    assert env["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    additional = json.loads(command[command.index("--additional-config") + 1])
    return command, additional


def test_vllm_gets_its_own_flags_and_ours_are_taken(model, tmp_path):
    command, additional = settled(
        [model, "--max-model-len", "512", "--layers=3,5", "--hook-points", "output,attn.output"], tmp_path
    )
    assert command[1:3] == ["-m", "worker.launch"]
    assert command[command.index("--model") + 1] == model and command[command.index("--max-model-len") + 1] == "512"
    _, negative = settled([model, "--layers", "-2,-1"], tmp_path)
    assert negative["tautap"]["points"] == ["layers.22.output", "layers.23.output"]
    assert "--layers=3,5" not in command and "--spool-dir" not in command
    points = ["layers.3.output", "layers.3.attn", "layers.5.output", "layers.5.attn"]
    assert additional["tautap"]["points"] == points and additional["tautap"]["tokens"] == "all"
    assert command[command.index("--host") + 1] == "127.0.0.1" and "--enforce-eager" in command


def test_the_embedded_models_cache_is_as_large_as_is_said(model, tmp_path, monkeypatch):
    """On a CPU, vLLM's variable would override either flag."""
    monkeypatch.setattr(smollm, "ensure", lambda cache: Path(model))
    envs = [plan(flags, {})[1] for flags in ([], ["--kv-cache-memory-bytes=1G"], ["--gpu-memory-utilization", "0.2"])]
    assert [env.get("VLLM_CPU_KVCACHE_SPACE") for env in envs] == ["2", None, None]
    assert plan([], {"VLLM_CPU_KVCACHE_SPACE": "5"})[1]["VLLM_CPU_KVCACHE_SPACE"] == "5"


def test_a_flag_without_a_value_is_left_to_vllm():
    assert _values(["--port", "1", "--port=2", "--port"], "--port") == ["1", "2"]


def test_a_users_additional_config_and_port_are_kept(model, tmp_path):
    dotted = "--compilation_config.cudagraph_mode=NONE"
    command, additional = settled([model, "--additional_config", '{"a": 1}', "--port=9", dotted], tmp_path)
    assert "--compilation-config.cudagraph_mode=NONE" in command
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
    ("flags", "says"),
    [
        (["--speculative-config", "{}"], "cannot be told apart"),
        (["-pp", "2"], "--pipeline-parallel-size 2: .* use --tensor-parallel-size"),
        (["--pipeline_parallel_size=2"], "--pipeline-parallel-size 2: "),
        (["--data-parallel-size", "1", "--data-parallel-size=2"], "--data-parallel-size 2: "),
        (["--data-parallel-size=2"], "--data-parallel-size 2: .* --backend URL --backend URL"),
        (["--data-parallel-rank", "0"], "--data-parallel-rank 0: "),
        (["--distributed-executor-backend", "ray"], "ray: .* give mp"),
        (["--api-server-count", "4"], "one API server only"),
        (["--config", "vllm.yaml"], "--config vllm.yaml: .* give the flags themselves"),
        (["--additional-config", "{bad"], "--additional-config {bad: give --additional-config one JSON object"),
        (["--additional-config=[]"], r"--additional-config \[\]: give"),
        (["--additional-config.a", "1"], "--additional-config.a: give --additional-config one JSON object"),
        (["--capture-source=graphs", "--compilation-config.mode=3"], "--compilation-config.mode=3: give"),
        (["--capture-source=graphs", "-cc.mode=3"], "--compilation-config.mode=3: give"),
        (["-sc", "{}"], "cannot be told apart"),
        (["--kv-transfer-config", "{}"], "another engine"),
    ],
)
def test_what_cannot_be_recorded_is_refused_by_name(model, tmp_path, flags, says):
    with pytest.raises(BadInput, match=says):
        settled([model, *flags], tmp_path)
    assert settled([model, "-pp", "1", "--tensor-parallel-size", "2", "--distributed-executor-backend=mp"], tmp_path)


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
    assert command == settled([model, "--capture-source", "graphs", "-cc", FULL], tmp_path)[0]
    (tmp_path / "edits.py").write_text(EDITS)
    monkeypatch.chdir(tmp_path)
    for function in ("steer", "told"):
        _, additional = settled([model, "--edit", f"edits.py:{function}"], tmp_path)
        assert additional["tautap"]["edit"] == f"{tmp_path}/edits.py:{function}"


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A working directory in which the user keeps modules that have our names."""
    home = tmp_path / "mine"
    home.mkdir()
    for name in ("worker", "proxy", "episodes", "msgspec", "vllm"):
        (home / f"{name}.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(home)
    return home


def test_a_users_modules_of_our_names_do_not_stand_in_for_ours(hostile, model, tmp_path):
    """Neither in the command, whose help names our flags and says where the others go, nor in what vLLM starts with its
    environment.
    """
    command = [sys.executable, "-P", "-m", "proxy", "worker", "--help"]  # as the console script, which is no directory
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--hook-points" in done.stdout and "vLLM" in done.stdout, done.stderr
    command, env, _ = plan([model, "--spool-dir", str(tmp_path)], dict(os.environ))
    for how in (["-c", "import worker.launch"], ["-m", "worker.orders"]):
        done = subprocess.run([command[0], *how], capture_output=True, text=True, timeout=60, env=env)
        assert done.returncode == 0, done.stderr


def test_an_edit_imports_what_lies_beside_it(hostile, model, tmp_path, monkeypatch):
    """Behind all else, so that nothing there stands in for a module of ours."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (hostile / "probes.py").write_text("WEIGHT = 2")
    (hostile / "edits.py").write_text("import probes\ndef steer(model): ...\n")
    assert settled([model, "--edit", "edits.py:steer"], tmp_path)
    assert sys.path[-1] == str(hostile) and sys.modules.pop("probes").WEIGHT == 2


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


def test_a_spool_is_held_by_what_its_process_becomes(tmp_path):
    """The server, in whose place `tautap worker` stood."""
    later = "import sys; print(flush=True); sys.stdin.read()"
    begins = f"import os, pathlib, sys, worker.spool; worker.spool.prepare(pathlib.Path({str(tmp_path / 'spool')!r}))"
    script = f"{begins}; os.execv(sys.executable, [sys.executable, '-c', {later!r}])"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout.readline()
        with pytest.raises(BadInput, match="is the spool of a worker that runs"):
            prepare(tmp_path / "spool")
        holder.stdin.close()
    prepare(tmp_path / "spool")


def test_what_a_model_before_lacked_is_forgotten(tmp_path):
    """The next one on the spool may have all of it."""
    (tmp_path / WRONG).write_text('{"layers.0.attn": "scaled"}')
    tmp_path.chmod(0o700)
    prepare(tmp_path)
    assert not (tmp_path / WRONG).exists()


def test_a_spool_is_its_users_alone(tmp_path):
    """Whatever the umask; a directory that was made for a group to read stays so, and a lock of before is closed."""
    made, given = tmp_path / "made", tmp_path / "given"
    given.mkdir()
    given.chmod(0o2755)
    (given / ".lock").touch(0o666)
    before = os.umask(0)
    try:
        prepare(made)
        prepare(given)
    finally:
        os.umask(before)
    assert mode(made) == 0o700 and mode(given) == 0o2750
    assert [mode(home / ".lock") for home in (made, given)] == [0o600] * 2 and mode(given / ".token") == 0o640


def mode(path):
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize("access", [0o777, 0o1777, 0o770])
def test_a_spool_that_others_may_write_in_is_refused(tmp_path, access):
    """Its name can be guessed: who made it before may have put a link there, and what it leads to would be lost."""
    spool, precious = tmp_path / "spool", tmp_path / "precious"
    spool.mkdir()
    spool.chmod(access)
    precious.write_text("mine")
    (spool / ".token").symlink_to(precious)
    with pytest.raises(BadInput, match=f"others may write in {spool}: delete it, or give another --spool-dir"):
        prepare(spool)
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("name", [".lock", ".token"])
def test_no_link_in_a_spool_is_followed(tmp_path, name):
    spool, precious = tmp_path / "spool", tmp_path / "precious"
    spool.mkdir(0o700)
    precious.write_text("mine")
    (spool / name).symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"):
        prepare(spool)
    assert precious.read_text() == "mine"


def test_a_spool_that_is_a_link_or_a_file_is_refused(tmp_path):
    (tmp_path / "mine").mkdir(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    (tmp_path / "file").touch()
    for name in ("link", "nowhere", "file"):
        with pytest.raises(BadInput, match="is a link or a file, no directory: delete it"):
            prepare(tmp_path / name)
    assert not list((tmp_path / "mine").iterdir()) and not (tmp_path / "none").exists()


def test_a_spool_of_another_user_is_refused(tmp_path, monkeypatch):
    (tmp_path / "spool").mkdir(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(BadInput, match=f"belongs to user {os.getuid()}, not to 4321: give another --spool-dir"):
        prepare(tmp_path / "spool")


def run(*arguments, script=None, **env):
    """`tautap worker` with these arguments, in a directory where `broken` is no model."""
    command = [sys.executable, *(("-c", script) if script else ("-m", "proxy", "worker")), *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=kept | env)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--spool-bytes", "much"], "'much': give bytes"),
        (["--spool-dir", "/dev/null"], "cannot be written"),
        (["--spool-dir", "{tmp}", "--spool-bytes", "1000T"], "bytes are free in {tmp}/tautap-spool-"),
        (["--port", "{taken}"], "cannot listen on 127.0.0.1:{taken}: Address already in use: give another --port"),
        (["--port", "1", "--port={taken}"], "cannot listen on 127.0.0.1:{taken}: "),  # the last counts, as for vLLM
        (["--host", "203.0.113.1", "--api-key", "k"], "cannot listen on 203.0.113.1:8001: "),
        (["--uds", "{tmp}/socket"], "--uds {tmp}/socket is there and no socket: delete it, or give another path"),
        (["-dp", "2"], "--data-parallel-size 2: start one worker for each replica"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(model, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.delattr(os, "execve")  # by which it becomes vLLM
    (tmp_path / "socket").touch()
    with socket.create_server(("127.0.0.1", 0)) as listening, pytest.raises(SystemExit) as ended:
        known = {"tmp": tmp_path, "taken": listening.getsockname()[1]}
        main([model, *(argument.format(**known) for argument in arguments)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(("tautap worker: ", "usage: ")), said
    assert says.format(**known) in said.splitlines()[-1]


def test_bad_input_ends_the_process_as_well(model):
    done = run(model, "--layers", "99")
    (said,) = done.stderr.splitlines()
    assert done.returncode == 2 and said.startswith("tautap worker: ")
    assert "layer 99 does not exist: this model has layers 0 to 23" in said


@pytest.mark.parametrize(
    ("named", "config", "says"),
    [
        ("{home}/nowhere", None, "there is no such directory"),
        ("./nowhere", None, "there is no such directory"),
        ("{home}", None, "has no config.json"),
        ("{home}", "{", "its config.json cannot be read"),
        ("{home}", "[]", "its config.json cannot be read"),
    ],
)
def test_a_model_that_is_not_there_is_named(tmp_path, named, config, says):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(BadInput, match=says):
        plan([named.format(home=tmp_path)], {})


# vLLM as its GPU build is on a machine without a GPU: it finds no platform.
WITHOUT_A_GPU = """
import runpy, sys, vllm.platforms
vllm.platforms.builtin_platform_plugins.pop("cpu")
runpy.run_module("worker.launch", run_name="__main__")
"""


ROOM = ["--gpu-memory-utilization", "0.1"]
# flags → what the last line says
UNSTARTED = [
    (["--kv-cache-memory-bytes", "4096"], "too little memory for its cache: give a smaller --max-model-len"),
    (["--gpu-memory-utilization", "0.00001"], "--gpu-memory-utilization"),
    (["--max-model-len", "100000"], "give a smaller --max-model-len (Value error, User-specified max_model_len"),
    (["-tp", "3"], "give another --tensor-parallel-size"),
    (["--load-format", "safetensors", *ROOM], "the model's directory is not whole: download it again"),
    (["--point", "x=model.layers.*.nothing.output", *ROOM], "model.layers.0 has self_attn, mlp"),
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ([], "there is no GPU that can be used here"),
]


@pytest.fixture(scope="module")
def ended(engines, tmp_path_factory):
    """How each of UNSTARTED ended. Two at a time: until it has a model, vLLM takes one core."""
    engines.stop()
    homes = [tmp_path_factory.mktemp("unstarted") for _ in UNSTARTED]
    for home in homes:
        make("qwen3", home)
    with ThreadPoolExecutor(2) as two:
        return list(two.map(start, homes, (flags for flags, _ in UNSTARTED)))


def start(home, flags):
    if "--load-format" in flags:
        (home / "model.safetensors").unlink()
    where = ["--port", str(free_port()), "--spool-dir", str(home), "--spool-bytes", "1M"]
    arguments = [str(home), *flags, *where, "--skip-tokenizer-init", "--max-num-seqs", "4"]
    if "--point" in flags:  # as on a user's machine: what fails is a process of its own, and says so to another
        return run(*arguments)
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if flags:
        return run(*arguments, **env)
    command, env, config = plan(arguments, env)
    prepare(Path(config.spool_dir))
    return run(*command[3:], script=WITHOUT_A_GPU, **env)


@pytest.mark.engine
@pytest.mark.parametrize("n", range(len(UNSTARTED)), ids=[" ".join(flags[:2]) or "no GPU" for flags, _ in UNSTARTED])
def test_a_worker_that_cannot_start_says_in_its_last_line_what_to_change(ended, n):
    """Real vLLM, which says it in pages; ours is the last line of all."""
    done, (flags, says) = ended[n], UNSTARTED[n]
    *_, last = done.stderr.splitlines()
    assert done.returncode == (1 if "--point" in flags else 2)
    assert last.startswith("tautap worker: ") and says in last, done.stderr[-3000:]


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
    for empty in (["--api-key", ""], ["--api-key="]):
        with pytest.raises(BadInput, match="--api-key is empty"):
            plan([model, *flags, *empty], {"VLLM_API_KEY": "x"})


@pytest.mark.parametrize("flags", [[], ["--host", "localhost"], ["--host=127.0.0.1"], ["--uds", "/run/worker.sock"]])
def test_on_loopback_or_a_socket_it_needs_none(model, tmp_path, flags):
    command, _ = settled([model, *flags], tmp_path)
    assert "0.0.0.0" not in command


def test_no_web_page_may_read_what_vllm_answers_unless_the_user_says_so(model, tmp_path):
    command, _ = settled([model], tmp_path)
    assert command[command.index("--allowed-origins") + 1] == "[]"
    command, _ = settled([model, '--allowed_origins=["https://mine.example"]'], tmp_path)
    assert "--allowed-origins" not in command and '--allowed-origins=["https://mine.example"]' in command


def test_a_socket_that_a_worker_left_is_taken_over_and_one_in_use_is_not(tmp_path):
    """A worker that starts again in its container finds the socket of the one before: vLLM would not bind to it."""
    path, plain = tmp_path / "worker.sock", tmp_path / "plain"
    free_socket(path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        with pytest.raises(BadInput, match="a server listens there: stop it"):
            free_socket(path)
    free_socket(path)
    assert not path.exists()
    plain.touch()
    with pytest.raises(BadInput, match="no socket: delete it"):
        free_socket(plain)
    assert plain.exists()
