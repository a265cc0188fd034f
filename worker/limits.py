"""What vLLM can do and the recorder cannot, or was never seen to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from episodes.errors import BadInput

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_REPLICAS = "start one worker for each replica, and give the proxy all of them: --backend URL --backend URL"
_STAGES = "each stage would see its own layers only: use --tensor-parallel-size"
_MACHINES = "rows were never seen to come from other machines"
# flag → why it is refused, if it is given and not set to one of PLAIN.
REFUSED = {
    "--config": "what it sets would not be looked at here: give the flags themselves",
    "--speculative-config": "rows of rejected draft tokens cannot be told apart yet: leave it out",
    "--kv-transfer-config": "rows of a prefix that another engine computed are not here: leave it out",
    "--pipeline-parallel-size": _STAGES,
    "--prefill-context-parallel-size": "each rank would see its own tokens only: use --tensor-parallel-size",
    "--distributed-executor-backend": f"{_MACHINES}: give mp, or leave it out",
    "--nnodes": f"{_MACHINES}: leave it out",
    **dict.fromkeys(("--data-parallel-size", "--data-parallel-size-local"), _REPLICAS),
    **dict.fromkeys(("--data-parallel-rank", "--data-parallel-start-rank"), _REPLICAS),
    "--api-server-count": "the activations of a call are known to one API server only: leave it out",
}
PLAIN = ("1", "mp", "uni")
# The same of what only the engine is asked about.
_FOUND = {
    "--kv-sharing-fast-prefill": "a layer would see some of the rows only: leave it out",
    "--offload-group-size": "to move a block's weights vLLM puts away what observes it: give --cpu-offload-gb",
}
# They keep what this engine computed, under the salt of those who had it computed.
OWN_CACHE = ("OffloadingConnector", "SimpleCPUOffloadConnector")


def check(config: VllmConfig) -> None:
    """BadInput for what vLLM has been told to do, in whatever words: its flags have short forms, parts and beginnings.

    source: vllm 0.26 to 0.32, config/
    """
    parallel, transfer, offload = config.parallel_config, config.kv_transfer_config, config.offload_config
    told = {
        "--speculative-config": config.speculative_config is not None,
        "--kv-transfer-config": transfer is not None and transfer.kv_connector not in OWN_CACHE,
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--distributed-executor-backend": parallel.distributed_executor_backend not in (*PLAIN, None),
        "--nnodes": parallel.nnodes > 1,
        "--data-parallel-size": parallel.data_parallel_size > 1,
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
        "--offload-group-size": offload.offload_backend == "prefetch" or offload.prefetch.offload_group_size > 0,
    }
    for flag, so in told.items():
        if so:
            raise BadInput(f"{flag}: {(REFUSED | _FOUND)[flag]}")
