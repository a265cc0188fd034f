"""Records short generations of models with our worker class inside vLLM, for `test_families.py`.

    python -m tests.worker.record

Reads jobs from its input, one JSON object a line, and answers each with one: `{}` when `out` is written, else
`{"error": the traceback}`. A job has `model`, a directory; `out`, an .npz to write; `asked`, the recorder's
configuration as in `worker.orders.Config`, but for what all share; `adapter`, the directory of a LoRA adapter, or null;
`ranks`, how many the model is split over; `flags`, more of vLLM's own; `stop`, the token that ends the reply, or null.
With a `stop`, and with graphs, steps are planned ahead, as on a GPU.

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
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from episodes.wire import read_header, read_tensor
from worker.orders import XARG
from worker.spool import WRONG, prepare, spooled

PROMPT = list(range(5, 45))
N_GENERATED = 4
# Of one size: decode steps of fewer requests are padded.
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [4]}
# One core a rank. Without this vLLM wants memory of several kinds.
SPLIT = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def record(
    model: str,
    spool: Path,
    asked: dict[str, object],
    adapter: str | None,
    ranks: int,
    flags: dict[str, object],
    stop: int | None,
) -> dict[str, np.ndarray]:
    """`tokens` and `rows` of a prompt, run in chunks of 32 tokens between two others, and of what was generated;
    `uncaptured`: what is generated without a capture; `n_replays`: how many of its steps a CUDA graph did; `wrong`: the
    points that the probe refused, and why, as JSON.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from worker.recorder import Step

    prepare(spool)
    config = {"spool_dir": str(spool), "spool_bytes": 1 << 30, "buffer_bytes": 1 << 30}
    more = flags | {"worker_cls": "worker.engine.RecordingWorker", "distributed_executor_backend": "uni"}
    graphs, ahead = asked.get("source") == "graphs", stop is not None
    as_on_a_gpu = ExitStack()
    if graphs:
        more["compilation_config"] = GRAPHS
    if (graphs or ahead) and not torch.cuda.is_available():
        from tests.worker.graphed import asynchronous, graphed

        if graphs:
            more["worker_cls"] = "tests.worker.graphed.GraphedWorker"
            as_on_a_gpu.enter_context(graphed())
        as_on_a_gpu.enter_context(asynchronous())
    if ranks > 1:
        more |= {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}
        os.environ.update(SPLIT)
    order = {"call": "c", "points": asked["points"], "first_choice": 0}
    sampling = {"detokenize": False, "temperature": 0, "ignore_eos": True}
    plain = SamplingParams(**sampling, max_tokens=N_GENERATED)
    until = {"stop_token_ids": [] if stop is None else [stop]}
    captured = SamplingParams(**sampling, **until, max_tokens=N_GENERATED, extra_args={XARG: order})
    lora = LoRARequest("tuned", 1, adapter) if adapter else None
    with as_on_a_gpu, patch.object(Step, "receive_all", autospec=True, side_effect=Step.receive_all) as replayed:
        register(model)
        gc.freeze()  # vLLM collects garbage nine times a model, and looks through all that it has imported
        llm = LLM(
            model, dtype="float32", skip_tokenizer_init=True, enforce_eager=asked.get("source", "nnsight") == "nnsight",
            max_model_len=256, max_num_batched_tokens=32, max_num_seqs=4, block_size=32, kv_cache_memory_bytes=1 << 26,
            additional_config={XARG: config | asked}, enable_lora=adapter is not None, **more,
        )  # fmt: skip
        # The worker's middleware gives captured calls a salt, which keeps their cache from others. The first prompt's
        # request is done early: the others move up in the batch. The last one's chunks go beside others' decode steps.
        prompts = [{"prompt_token_ids": PROMPT[20:25]}, {"prompt_token_ids": PROMPT, "cache_salt": "captured"}]
        prompts.append({"prompt_token_ids": PROMPT[::-1]})
        ways = [SamplingParams(**sampling, max_tokens=2), captured, plain]
        llm.generate(prompts, ways, use_tqdm=False, lora_request=[None, lora, None])
        # What is finished arrives with the next step.
        (other,) = llm.generate([{"prompt_token_ids": PROMPT}], plain, use_tqdm=False)
    path = spooled(spool, "c", 0)
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    tensors, _ = read_header(path)
    position, token_id, rows = (read_tensor(path, tensors[name]) for name in ("position", "token_id", "rows"))
    assert position.tolist() == list(range(len(position)))
    wrong = (spool / WRONG).read_text() if (spool / WRONG).exists() else "{}"
    return {
        "tokens": token_id,
        "rows": rows,
        "uncaptured": np.array(other.outputs[0].token_ids),
        "n_replays": np.array(replayed.call_count),
        "wrong": np.array(wrong),
    }


def register(model: str) -> None:
    """Have vLLM look at the model's class in this process: of one that it has not seen it asks another, for 9 s."""
    from vllm import ModelRegistry

    (name,) = json.loads((Path(model) / "config.json").read_text())["architectures"]
    ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def work(job: dict[str, object]) -> dict[str, str]:
    """Do one job; what it says."""
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        with tempfile.TemporaryDirectory() as scratch:
            out = job.pop("out")
            np.savez(out, **record(spool=Path(scratch), **job))
        return {}
    except Exception:
        return {"error": traceback.format_exc()}
    finally:
        cleanup_dist_env_and_memory()
        gc.collect()


if __name__ == "__main__":
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints is no answer
    for line in sys.stdin:
        print(json.dumps(work(json.loads(line))), file=answers)
