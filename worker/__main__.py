"""`tautap worker`: settle what to record, then become vLLM's own API server with our worker class and middleware.

A child that vLLM spawns does not import this module again: nothing but the command line lives here.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

import msgspec

from episodes.access import key_in, loopback
from episodes.errors import BadInput, TautapError
from episodes.points import Points, default_layers, parse_custom
from episodes.wire import CaptureSource, Tokens
from worker import smollm
from worker.limits import PLAIN, REFUSED
from worker.orders import XARG, Config, load_edit
from worker.spool import prepare

USAGE = "tautap worker [MODEL] [--layers 8,12,16] [--hook-points output] [options] [any vLLM flag]"
EPILOG = """\
MODEL, if given, comes first: a Hugging Face name or a local directory. Without one the embedded
SmolLM2-135M-Instruct runs, which needs no GPU and no model hub.

Every other flag goes to vLLM's OpenAI server as it is (--max-model-len, --tensor-parallel-size,
--tool-call-parser, --uds, …). The server listens on 127.0.0.1:8001 unless --host and --port say otherwise; beyond
loopback only with a key: --api-key-file, or VLLM_API_KEY in the environment.
Prefix caching and chunked prefill stay on. The model runs eagerly, unless --capture-source says otherwise.
"""
# vLLM's short names of flags that are looked at here.
SHORT = {
    "-asc": "--api-server-count", "-cc": "--compilation-config", "-dp": "--data-parallel-size",
    "-dpl": "--data-parallel-size-local", "-dpn": "--data-parallel-rank", "-dpr": "--data-parallel-start-rank",
    "-n": "--nnodes", "-pcp": "--prefill-context-parallel-size", "-pp": "--pipeline-parallel-size",
    "-sc": "--speculative-config",
}  # fmt: skip
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def main(argv: list[str] | None = None) -> None:
    """Run the worker; exits with 2 on bad input, with the reason on standard error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        command, env, config = plan(arguments, dict(os.environ))
        _check_address(command)
        try:
            prepare(Path(config.spool_dir), config.spool_bytes)
        except OSError as error:
            raise BadInput(f"--spool-dir: {config.spool_dir} cannot be written: {error.strerror}") from None
    except BadInput as error:
        sys.exit(_complain(error, 2))
    except TautapError as error:
        sys.exit(_complain(error, 1))
    os.execve(command[0], command, env)


def plan(arguments: list[str], env: dict[str, str]) -> tuple[list[str], dict[str, str], Config]:
    """The command to become, its environment, and the recorder's share of it; BadInput for what cannot be recorded."""
    model = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    ours, vllm_args = _parser().parse_known_args(_joined(list(map(_dashed, arguments))))
    if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("nnsight") is None:
        raise BadInput(
            "the worker needs vLLM and nnsight: install tautap with the extra [worker] (GPU) or [worker-cpu]"
        )
    for flag, reason in REFUSED.items():
        for given in _values(vllm_args, flag):
            if given not in PLAIN:
                raise BadInput(f"{flag} {given}: {reason}")
    if ours.api_key_file is not None:
        env["VLLM_API_KEY"] = key_in(Path(ours.api_key_file))
    _check_listening(vllm_args, env)
    # No web page may read what it answers: older releases of vLLM let all of them.
    defaults: dict[str, str | None] = {"--host": "127.0.0.1", "--port": "8001", "--allowed-origins": "[]"}
    if model is None and _value(vllm_args, "--model") is None:
        model = str(smollm.ensure(Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tautap"))
        defaults |= smollm.VLLM_ARGS
        if not (_values(vllm_args, "--kv-cache-memory-bytes") or _values(vllm_args, "--gpu-memory-utilization")):
            env.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # on a CPU it overrides both
    if model is not None:
        defaults["--model"] = model
    for flag, value in defaults.items():
        if _value(vllm_args, flag) is None and flag not in vllm_args:
            vllm_args += [flag] if value is None else [flag, value]
    n_layers = _n_layers(_value(vllm_args, "--model") or "", "--trust-remote-code" in vllm_args)
    offered = Points(n_layers, dict(map(parse_custom, ours.point)))
    layers = default_layers(n_layers) if ours.layers is None else offered.parse_layers(ours.layers)
    points = offered.name(layers, [*ours.hook_points.split(","), *offered.custom])
    if ours.capture_source == "aux":
        _check_aux(points)
    if ours.edit:
        _check_edit(ours.edit, ours.capture_source, vllm_args)
    # A directory of our own in the one that was given: whatever lies in it when a worker starts is cleared.
    home = Path(ours.spool_dir) if ours.spool_dir else _spool_home(ours.spool_bytes)
    config = Config(
        spool_dir=str(home / f"tautap-spool-{_value(vllm_args, '--port')}"),
        spool_bytes=ours.spool_bytes,
        buffer_bytes=ours.buffer_bytes,
        points=points,
        custom=offered.custom,
        tokens=ours.tokens,
        source=ours.capture_source,
        edit=ours.edit,
    )
    additional = _take_object(vllm_args, "--additional-config") | {XARG: msgspec.to_builtins(config)}
    env["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # nnsight instruments the first runner only
    # As `python -P`, in vLLM's own processes too: a `worker.py` where it is started from is the user's, and not meant.
    env["PYTHONSAFEPATH"] = "1"
    own = ["--worker-cls", "worker.engine.RecordingWorker", "--middleware", "worker.server.CaptureMiddleware"]
    own += ["--additional-config", json.dumps(additional)]
    if ours.capture_source == "nnsight":
        own.append("--enforce-eager")
    elif ours.capture_source == "graphs":
        # Not compiled, for observers are Python; a decode step is replayed whole, larger ones run eagerly.
        asked = _take_object(vllm_args, "--compilation-config")
        own += ["--compilation-config", json.dumps({"cudagraph_mode": "FULL_DECODE_ONLY"} | asked | {"mode": 0})]
    return [sys.executable, "-m", "worker.launch", *vllm_args, *own], env, config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "tautap worker", usage=USAGE, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, description="Serve a model with vLLM and record its activations.",
    )  # fmt: skip
    parser.add_argument(
        "--layers",
        metavar="N,N",
        help="layers to record: numbers, -1, 8-15, ::4, all (8,12,16, or the model's quarters)",
    )
    parser.add_argument(
        "--hook-points", default="output", metavar="H,H",
        help="output, input, attn, mlp, embed.output, final.output (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--point", action="append", default=[], metavar="NAME=LOCATION",
        help="a module's .input or .output, * for the layer: o_proj=model.layers.*.self_attn.o_proj.output",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", default="all", choices=get_args(Tokens),
        help="whose rows; last is the last prompt token; prompt does without the prefix cache (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--capture-source", default="nnsight", choices=get_args(CaptureSource),
        help="nnsight: observers, any point of any call; graphs: the same inside CUDA graphs, only the points given at "
        "start; aux: vLLM's auxiliary hidden states, the model is compiled, only output can be had (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--edit", type=_located, default="", metavar="FILE:FUNCTION",
        help="run this nnsight block on every captured request: steering, ablation, a probe",
    )  # fmt: skip
    parser.add_argument("--api-key-file", metavar="FILE", help="the key that every request but /health must bring")
    parser.add_argument("--spool-dir", metavar="DIR", help="where rows wait to be claimed (default: in /dev/shm)")
    parser.add_argument("--spool-bytes", type=_bytes, default=4 << 30, metavar="N", help="bound of the spool (4G)")
    parser.add_argument("--buffer-bytes", type=_bytes, default=1 << 30, metavar="N", help="rows in memory (1G)")
    return parser


def _check_listening(vllm_args: list[str], env: dict[str, str]) -> None:
    """BadInput for a server that others could reach without a key: whoever does reads every prompt's activations."""
    given = _values(vllm_args, "--api-key")
    if "" in given:
        raise BadInput("--api-key is empty: give a key, or leave it out")
    keyed = env.get("VLLM_API_KEY") or given
    outside = [host for host in _values(vllm_args, "--host") if not loopback(host)]
    if outside and not keyed:
        raise BadInput(f"--host {outside[0]}: beyond loopback a key is needed: give --api-key-file or set VLLM_API_KEY")


def _check_address(vllm_args: list[str]) -> None:
    """BadInput where the server could not listen: found out before it loads a model."""
    if uds := _value(vllm_args, "--uds"):
        return free_socket(Path(uds))
    host, port = _value(vllm_args, "--host"), _value(vllm_args, "--port")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
    except OSError as error:
        advice = "give another --port" if error.errno == errno.EADDRINUSE else "give another --host or --port"
        raise BadInput(f"cannot listen on {host}:{port}: {error.strerror or error}: {advice}") from None


def free_socket(uds: Path) -> None:
    """Remove the socket that a worker before left, where vLLM could not listen; BadInput if it is not left over."""
    if not uds.exists():
        return
    try:
        with socket.socket(socket.AF_UNIX) as trying:
            trying.connect(str(uds))
    except ConnectionRefusedError:  # nobody listens; a file that is no socket says the same
        if uds.is_socket():
            return uds.unlink()
        raise BadInput(f"--uds {uds} is there and no socket: delete it, or give another path") from None
    except OSError as error:
        raise BadInput(f"--uds {uds}: {error.strerror}: give another path") from None
    raise BadInput(f"--uds {uds}: a server listens there: stop it, or give another path")


def _located(text: str) -> str:
    """The file's path made absolute: the engine may run elsewhere."""
    path, colon, function = text.rpartition(":")
    return f"{Path(path).absolute()}{colon}{function}" if path else text


def _check_aux(points: list[str]) -> None:
    other = [point for point in points if not re.fullmatch(r"layers\.\d+\.output", point)]
    if other:
        raise BadInput(f"--capture-source aux records layers.<n>.output only, not {', '.join(other)}")


def _check_edit(edit: str, source: str, vllm_args: list[str]) -> None:
    if source != "nnsight":
        raise BadInput("--edit needs --capture-source nnsight: no Python runs inside a graph or a compiled model")
    if {_value(vllm_args, flag) for flag in ("--tensor-parallel-size", "-tp")} - {None, "1"}:
        raise BadInput("--edit: only one rank knows which rows are captured: leave --tensor-parallel-size out")
    load_edit(edit)


def _bytes(text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        found = int(number) * UNITS[unit]
    except (KeyError, ValueError):
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give bytes, at least 1, or a number with K, M, G or T")
    return found


def _values(args: list[str], flag: str) -> list[str]:
    """All that a flag is set to in vLLM's arguments, `--flag value` or `--flag=value`."""
    values = []
    for arg, after in zip_longest(args, args[1:]):
        if arg == flag and after is not None:
            values.append(after)
        elif arg.startswith(f"{flag}="):
            values.append(arg.removeprefix(f"{flag}="))
    return values


def _value(args: list[str], flag: str) -> str | None:
    """What a flag is set to: of several vLLM takes the last."""
    return next(reversed(_values(args, flag)), None)


def _take(args: list[str], flag: str) -> str | None:
    """The flag's value, and the flag gone from the arguments."""
    value = _value(args, flag)
    while flag in args:
        at = args.index(flag)
        del args[at : at + 2]
    args[:] = [arg for arg in args if not arg.startswith(f"{flag}=")]
    return value


def _take_object(args: list[str], flag: str) -> dict[str, Any]:
    """The JSON object that the flag is set to, and the flag gone from the arguments."""
    dotted = [arg for arg in args if arg.startswith(f"{flag}.")]
    text = _take(args, flag) or "{}"
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if dotted or not isinstance(found, dict):
        raise BadInput(f"{dotted[0] if dotted else f'{flag} {text}'}: give {flag} one JSON object")
    return found


def _dashed(arg: str) -> str:
    """A flag by its long name: vLLM takes -cc, --max_model_len, and --config.some_key of what a flag is made of."""
    flag, *rest = re.split(r"([.=])", arg, maxsplit=1)
    return "".join([SHORT.get(flag, flag).replace("_", "-"), *rest]) if flag.startswith("-") else arg


def _joined(args: list[str]) -> list[str]:
    """With `--layers` and what follows it in one: it may begin with a minus, as `-2,-1` does."""
    found, rest = [], iter(args)
    for arg in rest:
        found.append(f"{arg}={next(rest, '')}" if arg == "--layers" else arg)
    return found


def _n_layers(model: str, trust_remote_code: bool) -> int:
    """The model's depth, from its config.json where it is local (importing transformers takes seconds)."""
    home = Path(model)
    if not home.is_dir() and (model.startswith(("/", ".", "~")) or model.count("/") > 1):
        raise BadInput(f"model {model}: there is no such directory")
    if home.is_dir() and not (home / "config.json").is_file():
        raise BadInput(f"model {model} has no config.json: give a directory as Hugging Face's tools save it")
    if home.is_dir():
        try:
            config = json.loads((home / "config.json").read_text())
            config = config.get("text_config", config)
        except (OSError, ValueError, AttributeError) as error:
            raise BadInput(f"model {model}: its config.json cannot be read: {error}") from None
        if isinstance(config.get("num_hidden_layers"), int):
            return int(config["num_hidden_layers"])
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise BadInput(f"model {model!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    return int(found.get_text_config().num_hidden_layers)


def _spool_home(n_bytes: int) -> Path:
    """Memory if it has room: in a container it often has none."""
    shm = Path("/dev/shm")
    return shm if os.access(shm, os.W_OK) and shutil.disk_usage(shm).free >= n_bytes else Path(tempfile.gettempdir())


def _complain(error: Exception, code: int) -> int:
    print(f"tautap worker: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
