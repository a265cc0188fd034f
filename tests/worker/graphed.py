"""What vLLM does on a GPU, on a CPU: all of its own code for it, with a stand-in for what CUDA would do.

CUDA graphs: its dispatcher picks a graph for a batch and pads it, its loop records one for each size, its wrapper
replays them, which is `replay.Graph`. Asynchronous scheduling: a step is planned before the one before it is done.
"""

from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import torch
from vllm.compilation import cuda_graph
from vllm.config import CUDAGraphMode
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.worker import gpu_model_runner

from tests.worker.replay import Graph
from worker import engine

try:
    from vllm.compilation import cudagraph_pool as pools
except ImportError:  # vllm 0.26
    pools = cuda_graph

check = CpuPlatform.check_and_update_config


class GraphedWorker(engine.RecordingWorker):
    """Does with its model, and after its probe, what vLLM's worker for a GPU does."""

    def load_model(self, **kwargs):
        super().load_model(**kwargs)
        runner = self.model_runner
        runner.model = cuda_graph.CUDAGraphWrapper(runner.model, self.vllm_config, CUDAGraphMode.FULL)
        runner.get_model = runner.model.unwrap

    def compile_or_warm_up_model(self):
        done = super().compile_or_warm_up_model()
        self.model_runner.capture_model()
        return done


class Done:
    """A stream or an event of CUDA's where all is done at once."""

    def __init__(self, *args, **options):
        pass

    def record(self, *args):
        pass

    wait = wait_stream = synchronize = record


@contextmanager
def asynchronous():
    """What keeps vLLM from planning ahead on a CPU is taken out of the way. Where both are wanted, inside `graphed`."""
    before = CpuPlatform.check_and_update_config

    def check_first(config):
        before(config)
        config.scheduler_config.async_scheduling = True

    with ExitStack() as stack:
        for owner, name, value in (
            (CpuPlatform, "check_and_update_config", staticmethod(check_first)),
            (torch.cuda, "Event", Done),
            (torch.cuda, "Stream", Done),
            (torch.cuda, "stream", lambda stream: nullcontext()),
            (torch.cuda, "current_stream", Done),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


@contextmanager
def graphed():
    """What keeps vLLM from having graphs on a CPU is taken out of the way."""

    def check_only(config):
        sizes = config.compilation_config.cudagraph_capture_sizes
        check(config)
        config.compilation_config.cudagraph_capture_sizes = sizes

    with ExitStack() as stack:
        for owner, name, value in (
            (engine, "has_graphs", lambda: True),
            (CpuPlatform, "support_static_graph_mode", lambda platform: True),
            (CpuPlatform, "check_and_update_config", staticmethod(check_only)),
            (CpuPlatform, "graph_pool_handle", lambda platform: None),
            (CPUAttentionMetadataBuilder, "_cudagraph_support", AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
            (gpu_model_runner, "graph_capture", lambda device: nullcontext()),
            (gpu_model_runner, "lock_workspace", lambda: None),
            (torch.accelerator, "get_memory_info", lambda: (0, 0)),
            (torch.cuda, "CUDAGraph", Graph),
            (torch.cuda, "graph", lambda graph, **kwargs: graph),
            (cuda_graph, "weak_ref_tensors", lambda tensors: tensors),
            (pools, "set_graph_pool_id", lambda pool: None),
        ):
            stack.enter_context(patch.object(owner, name, value, create=True))
        yield
