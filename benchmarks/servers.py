"""The servers that are measured: how each is started, and what its processes use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from worker.__main__ import plan
from worker.launch import SERVER

RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
HERE = Path(__file__).parent
START_S = 600
STOP_S = 60

Command = tuple[list[str], dict[str, str]]


def ours(flags: list[str]) -> Command:
    """The command and environment of the worker with these flags."""
    return [sys.executable, "-m", "worker", *flags], dict(os.environ)


def spool(flags: list[str]) -> Path:
    """Where the worker with these flags keeps rows until they are claimed."""
    return Path(plan(list(flags), dict(os.environ))[2].spool_dir)


def model_home() -> Path:
    """Where the embedded model lies, which is made if it is not there yet."""
    command = plan([], dict(os.environ))[0]
    return Path(command[command.index("--model") + 1])


def stock(flags: list[str], env: dict[str, str] | None = None) -> Command:
    """The command and environment of vLLM's own server with the worker's flags, and nothing of ours in it: it takes the
    model runner that it likes best.
    """
    command, env, _ = plan(list(flags), dict(os.environ) if env is None else env)
    command[2] = SERVER
    for flag in ("--worker-cls", "--middleware", "--additional-config"):
        at = command.index(flag)
        del command[at : at + 2]
    return command, {name: value for name, value in env.items() if name != RUNNER}


def extracting(flags: list[str], layers: list[int], files: Path) -> Command:
    """Stock vLLM with its own `extract_hidden_states`: the residual stream after these layers, into `files`."""
    command, env = stock(flags)
    ids = {"eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in layers]}
    draft = {"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": {"hf_config": ids}}
    transfer = {
        "kv_connector": "HostConnector",
        "kv_connector_module_path": "connector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(files)},
    }
    command += ["--speculative-config", json.dumps(draft), "--kv-transfer-config", json.dumps(transfer)]
    return command, importable(env)


def edited(flags: list[str], layers: list[int], max_model_len: int) -> Command:
    """Stock vLLM with nnsight's own runner, an installed `edit()` and the settings that nnsight starts it with."""
    command, env = stock(flags)
    command += ["--worker-cls", "nnsight_edit.EditingWorker", "--middleware", "nnsight_home.HomeMiddleware"]
    command += ["--additional-config", json.dumps({"edit_layers": layers})]
    command += ["--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
    command += ["--max-num-batched-tokens", str(max_model_len)]  # a prompt goes through in one piece
    return command, importable(env) | {RUNNER: "0"}  # nnsight instruments the first only


def importable(env: dict[str, str]) -> dict[str, str]:
    """An environment in which the server's processes find the modules beside this one."""
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), env.get("PYTHONPATH")]))}


class Server:
    """A running server, with all its processes."""

    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url = url
        self._root = psutil.Process(process.pid)

    def _processes(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        times = [process.cpu_times() for process in self._processes()]
        return sum(t.user + t.system for t in times)

    def resident_bytes(self) -> int:
        """Memory in use, a page that several processes share counted once."""
        return sum(process.memory_full_info().pss for process in self._processes())


@contextmanager
def running(command: Command, port: int, log: Path, health: str = "/health") -> Iterator[Server]:
    """The server that this command starts, once it is healthy. Leaving it stops it and whatever it started.

    health: the path that answers 200 when it is
    """
    arguments, env = command
    url = f"http://127.0.0.1:{port}"
    if healthy(url, health):
        sys.exit(f"port {port} is taken: end the server there first")
    # Whoever ends this process wants the server gone, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    with log.open("wb") as output:
        process = subprocess.Popen(arguments, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_until_healthy(url, process, health)
        yield Server(url, process)
    except BaseException:
        print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
        raise
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], health: str = "/health") -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"the server ended with {process.returncode}")
        if healthy(url, health):
            return
        time.sleep(0.25)
    sys.exit(f"the server was not ready in {START_S} s")


def healthy(url: str, health: str = "/health") -> bool:
    try:
        with urllib.request.urlopen(f"{url}{health}", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def machine() -> str:
    """Cores, processor and what CUDA devices there are, for a table's first line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " and ".join([f"{os.cpu_count()} × {names[0] if names else 'unknown processor'}", *devices()])


def devices() -> list[str]:
    """The names of the CUDA devices."""
    import torch

    return [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
