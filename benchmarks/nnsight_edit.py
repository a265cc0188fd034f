"""nnsight's own worker and runner in vLLM's API server, with one `edit()` installed: the residual stream after chosen
layers, saved for every token of every request.

nnsight 0.8.1 knows the CUDA runner only; on the CPU its runner is put in front of vLLM's CPU runner. A client would
install the edit by RPC; here it is installed in the engine's process, since the client's copy of the model needs a GPU.
"""

from __future__ import annotations

from typing import Any

import nnsight
from nnsight.modeling.vllm.model_runners.GPUModelRunner import NNsightGPUModelRunner
from nnsight.modeling.vllm.workers.GPUWorker import NNsightGPUWorker
from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as EngineWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as EngineWorker


class EditingWorker(EngineWorker):
    """vLLM's worker for this platform with nnsight's runner, as `NNsightGPUWorker` is for CUDA."""

    collect_nnsight = NNsightGPUWorker.collect_nnsight

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        runner.__class__ = type("NNsightRunner", (NNsightGPUModelRunner, type(runner)), {})

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        install(self.model_runner, self.vllm_config.additional_config["edit_layers"])


class Here:
    """The engine, as a `Registration` wants it, in the process of its one worker."""

    def __init__(self, runner: NNsightGPUModelRunner) -> None:
        self._runner = runner

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        return [getattr(self._runner, method)(*args)]


def install(runner: NNsightGPUModelRunner, layers: list[int]) -> None:
    """Have every request save `rows`: after each step, for each layer, a tensor [the step's tokens, hidden]."""
    model = runner.nnsight_model
    model.vllm_entrypoint, model.dispatched = Here(runner), True
    with model.edit() as (tracer, _):
        rows = nnsight.save([])
        for _step in tracer.all():
            for layer in layers:
                hidden, residual = model.model.layers[layer].output
                rows.append(hidden + residual)  # vLLM hands them out apart, and overwrites both
