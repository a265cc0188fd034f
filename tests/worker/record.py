"""Records a short generation of a model with our worker class inside vLLM, for `test_families.py`.

    python -m tests.worker.record MODEL OUT.npz POINT,POINT [NAME=LOCATION]

A program of its own: vLLM wants a process to itself, and changes transformers' classes in it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import numpy as np

from episodes.points import parse_custom
from episodes.wire import read_header, read_tensor
from worker.orders import XARG
from worker.spool import prepare, spooled

PROMPT = list(range(5, 45))
N_GENERATED = 4


def record(model: str, spool: Path, points: list[str], custom: dict[str, str]) -> dict[str, np.ndarray]:
    """`tokens` and `rows` of a prompt, run in chunks of 32 tokens, and of what was generated."""
    from vllm import LLM, SamplingParams

    prepare(spool)
    config = {"spool_dir": str(spool), "spool_bytes": 1 << 30, "buffer_bytes": 1 << 30, "points": points}
    llm = LLM(
        model, dtype="float32", skip_tokenizer_init=True, enforce_eager=True, block_size=32, max_model_len=256,
        max_num_batched_tokens=32, max_num_seqs=4, worker_cls="worker.engine.RecordingWorker",
        additional_config={XARG: config | {"custom": custom}}, distributed_executor_backend="uni",
        gpu_memory_utilization=0.1,
    )  # fmt: skip
    order = {"call": "c", "points": points, "first_choice": 0}
    sampling = {"max_tokens": N_GENERATED, "detokenize": False, "temperature": 0, "ignore_eos": True}
    captured = SamplingParams(**sampling, extra_args={XARG: order})
    llm.generate([{"prompt_token_ids": PROMPT}], captured, use_tqdm=False)
    # What is finished arrives with the next step.
    llm.generate([{"prompt_token_ids": [7]}], SamplingParams(**sampling), use_tqdm=False)
    path = spooled(spool, "c", 0)
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    tensors, _ = read_header(path)
    position, token_id, rows = (read_tensor(path, tensors[name]) for name in ("position", "token_id", "rows"))
    assert position.tolist() == list(range(len(position)))
    return {"tokens": token_id, "rows": rows}


if __name__ == "__main__":
    model, out, points, *custom = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        np.savez(out, **record(model, Path(scratch), points.split(","), dict(map(parse_custom, custom))))
    print(json.dumps({"model": model, "recorded": out}))
