"""Records short generations of models with our worker class inside vLLM, for `test_families.py`.

    python -m tests.worker.record

Reads jobs from its input, one JSON object a line, and answers each with one: `{}` when `out` is written, else
`{"error": the traceback}`. A job has `model`, a directory; `out`, an .npz to write; `asked`, the recorder's
configuration as in `worker.orders.Config`, but for what all share; `adapter`, the directory of a LoRA adapter, or null;
`ranks`, how many the model is split over.

A program of its own: vLLM wants a process to itself, and changes transformers' classes in it. One for all models: to
import vLLM takes longer than all else.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import numpy as np

from episodes.wire import read_header, read_tensor
from worker.orders import XARG
from worker.spool import prepare, spooled

PROMPT = list(range(5, 45))
N_GENERATED = 4
# One core a rank. Without this, and without saying how large the cache is, vLLM wants memory of several kinds.
SPLIT = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def record(model: str, spool: Path, asked: dict[str, object], adapter: str | None, ranks: int) -> dict[str, np.ndarray]:
    """`tokens` and `rows` of a prompt, run in chunks of 32 tokens, and of what was generated; `uncaptured`: what is
    generated without a capture.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    prepare(spool)
    config = {"spool_dir": str(spool), "spool_bytes": 1 << 30, "buffer_bytes": 1 << 30}
    split = {"tensor_parallel_size": ranks, "kv_cache_memory_bytes": 1 << 26} if ranks > 1 else {}
    os.environ.update(SPLIT if ranks > 1 else {})
    llm = LLM(
        model, dtype="float32", skip_tokenizer_init=True, enforce_eager=asked.get("source") != "aux", block_size=32,
        max_model_len=256, max_num_batched_tokens=32, max_num_seqs=4, worker_cls="worker.engine.RecordingWorker",
        additional_config={XARG: config | asked}, distributed_executor_backend="mp" if split else "uni",
        gpu_memory_utilization=0.1, enable_lora=adapter is not None, **split,
    )  # fmt: skip
    order = {"call": "c", "points": asked["points"], "first_choice": 0}
    sampling = {"max_tokens": N_GENERATED, "detokenize": False, "temperature": 0, "ignore_eos": True}
    captured = SamplingParams(**sampling, extra_args={XARG: order})
    lora = LoRARequest("tuned", 1, adapter) if adapter else None
    # The worker's middleware gives captured calls a salt, which keeps their cache from others.
    prompt = {"prompt_token_ids": PROMPT, "cache_salt": "captured"}
    llm.generate([prompt], captured, use_tqdm=False, lora_request=lora)
    # What is finished arrives with the next step.
    (other,) = llm.generate([{"prompt_token_ids": PROMPT}], SamplingParams(**sampling), use_tqdm=False)
    path = spooled(spool, "c", 0)
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    tensors, _ = read_header(path)
    position, token_id, rows = (read_tensor(path, tensors[name]) for name in ("position", "token_id", "rows"))
    assert position.tolist() == list(range(len(position)))
    return {"tokens": token_id, "rows": rows, "uncaptured": np.array(other.outputs[0].token_ids)}


def work(job: dict[str, object]) -> dict[str, str]:
    """Do one job; what it says."""
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        with tempfile.TemporaryDirectory() as scratch:
            np.savez(job["out"], **record(job["model"], Path(scratch), job["asked"], job["adapter"], job["ranks"]))
        return {}
    except Exception:
        return {"error": traceback.format_exc()}
    finally:
        cleanup_dist_env_and_memory()
        gc.collect()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints is no answer
    for line in sys.stdin:
        print(json.dumps(work(json.loads(line))), file=answers)
