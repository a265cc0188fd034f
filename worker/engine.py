"""vLLM's worker classes with the recorder inside: named to vLLM by `--worker-cls`, nothing of vLLM is patched."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import get_tp_group
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from episodes.errors import BadInput
from episodes.wire import DTYPE_CODES
from worker.auxiliary import Auxiliary
from worker.edit import Edit, Rows
from worker.graphs import Graphs
from worker.limits import check
from worker.orders import XARG, Config
from worker.probe import probe, trial
from worker.recorder import CudaLane, Lane, Recorder, Source
from worker.spool import WRONG
from worker.tap import Tap

if TYPE_CHECKING:
    import torch
    from vllm.v1.core.sched.output import SchedulerOutput


# A row belongs to the token ids up to it.
NO_IDENTITY = "the prompt has images, sound or embeddings in it: what stands there cannot be told by its token ids"


class RecordingRunner(GPUModelRunner):
    """A V1 model runner that labels and records the rows of each step.

    source: vllm 0.32, v1/worker/gpu_model_runner.py: `_update_states` learns of requests, `_model_forward` runs the
    model once `input_batch` is in the order of the rows and says how many tokens of each request are computed.
    """

    config: Config
    recorder: Recorder | None = None
    tap: Tap | None = None
    edit: Edit | None = None
    _scheduled: dict[str, int] | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        check(self.vllm_config)
        self.config = config = msgspec.convert(self.vllm_config.additional_config[XARG], Config)
        if config.source == "graphs" and not has_graphs():
            raise BadInput("--capture-source graphs needs a CUDA device: leave it out")
        self.use_aux_hidden_state_outputs = config.source == "aux"
        super().load_model(*args, **kwargs)
        model, model_config = self.get_model(), self.model_config
        if self.use_aux_hidden_state_outputs:
            self.source: Source = Auxiliary(model, config.points)
        else:
            self.source = self.tap = tap = Tap(model, model_config.get_total_num_hidden_layers(), config.custom)
            self.edit = Edit(config.edit, tap, model) if config.edit else None
        if get_tp_group().rank_in_group != 0:
            return  # the residual stream is the same on every rank: the first one records
        hidden, dtype = model_config.get_hidden_size(), model_config.dtype
        if config.source == "graphs":
            n_rows = self.compilation_config.max_cudagraph_capture_size
            self.source = Graphs(tap, config.points, n_rows, hidden, dtype, self.device)
        lane = Lane() if current_platform.is_cpu() else CudaLane()
        code = DTYPE_CODES[str(dtype).removeprefix("torch.")]
        self.recorder = Recorder(config, self.source, dtype, code, hidden, lane)

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's measure of the memory that a step takes, with what the largest step records beside it, and the one
        before it where steps are planned ahead: the cache of keys and values gets the rest.
        """
        n_rows = self.max_num_tokens * (1 + self.scheduler_config.async_scheduling)
        held = self.recorder and self.recorder.slab(n_rows, len(self.config.points), self.device)
        super().profile_run(*args, **kwargs)
        del held

    def capture_model(self) -> Any:
        """Record vLLM's CUDA graphs, with the observers' copies in them if they are to be replayed, and replay one."""
        recorded = self.source if isinstance(self.source, Graphs) else None
        capture = super().capture_model
        done = recorded.record(capture) if recorded else capture()
        if self.config.source == "graphs":  # every rank takes part
            replay = partial(self._dummy_run, 1, uniform_decode=True)
            recorded.probe(replay) if recorded else replay()
        return done

    def _setup_eagle3_aux_hidden_state_outputs(self) -> None:
        """vLLM's choice of auxiliary layers, which is a drafter's, is not wanted: `Auxiliary` makes its own."""

    def probe(self) -> None:
        """Find out which points are what their names say: UnknownPoint, by name, if one of those to be recorded is not;
        nobody else is given the others. BadInput if the user's edit fails. Every rank does the same, and comes to the
        same.
        """

        def forward(n_rows: int) -> Any:
            # A token from the middle: the first is often padding, and all that is computed of it nought. Attention too:
            # if it does not run, it leaves what was in memory.
            self.input_ids.gpu[:n_rows] = self.model_config.get_vocab_size() // 2
            output: list[Any] = []
            returned = self.get_model().register_forward_hook(lambda model, args, value: output.append(value))
            try:
                self._dummy_run(n_rows, cudagraph_runtime_mode=CUDAGraphMode.NONE, force_attention=True)
            finally:
                returned.remove()
                self.input_ids.gpu[:n_rows] = 0
            return output.pop()

        hidden, dtype = self.model_config.get_hidden_size(), self.model_config.dtype
        ranks = by_rank if get_tp_group().world_size > 1 else None
        if self.tap is not None:
            probe(self.tap, 1, hidden, dtype, partial(forward, 1), ranks)
            for point in self.config.points:
                self.tap.watch(point)
            if self.recorder is not None:
                (Path(self.config.spool_dir) / WRONG).write_bytes(msgspec.json.encode(self.tap.wrong))
        trial(self.source, self.config.points, hidden, dtype, self.device, partial(forward, 1), ranks)
        if self.edit is not None:  # beside rows that are not its own
            edited = partial(self.edit.run, [Rows("", 1, 0, 2, 2)], 4, refuse, partial(forward, 4))
            self.source.run(None, edited)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        if self.recorder is not None:
            self.recorder.retire(scheduler_output.finished_req_ids)
            for new in scheduler_output.scheduled_new_reqs:
                extra_args = new.sampling_params.extra_args if new.sampling_params else None
                refused = NO_IDENTITY if new.mm_features or new.prompt_embeds is not None else None
                self.recorder.admit(new.req_id, extra_args, new.prompt_token_ids or [], refused)
        return super()._update_states(scheduler_output)

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        self._scheduled = scheduler_output.num_scheduled_tokens
        try:
            return super().execute_model(scheduler_output, *args, **kwargs)
        finally:
            self._scheduled = None  # a dummy run that comes by `_model_forward` belongs to nobody

    def _model_forward(self, input_ids: Any = None, positions: Any = None, *args: Any, **kwargs: Any) -> Any:
        forward = partial(super()._model_forward, input_ids, positions, *args, **kwargs)
        recorder = self.recorder
        if recorder is None or self._scheduled is None:
            return forward()
        batch = self._batch(self._scheduled)
        step = recorder.plan(batch, self.device)
        if self.edit is not None and (rows := recorder.rows(batch)):
            forward = partial(self.edit.run, rows, positions.shape[-1], recorder.fail, forward)
        elif step is None:
            return forward()
        output = self.source.run(step, forward)
        if step is not None:
            recorder.hand_over(step, self.input_ids.gpu)  # there too where the model is fed embeddings
        return output

    def _batch(self, scheduled: dict[str, int]) -> list[tuple[str, int, int]]:
        """(request, first position, rows) in the order of the rows: the batch's, not the scheduler's."""
        computed = self.input_batch.num_computed_tokens_cpu
        return [(r, int(computed[i]), scheduled[r]) for i, r in enumerate(self.input_batch.req_ids)]


def by_rank(value: torch.Tensor) -> torch.Tensor:
    """What each tensor-parallel rank has: [ranks, *value's shape]. All ranks call this together."""
    return get_tp_group().all_gather(value[None], dim=0)


def has_graphs() -> bool:
    """Whether vLLM records CUDA graphs here."""
    return bool(current_platform.is_cuda() and current_platform.support_static_graph_mode())


def refuse(request: str, reason: str) -> None:
    raise BadInput(f"--edit {reason}")


def recording(runner: Any) -> None:
    """Turn a runner that vLLM built into a RecordingRunner of its own kind: it gains methods, its state stays."""
    built = type(runner)
    if not issubclass(built, GPUModelRunner):
        raise BadInput(f"tautap records vLLM's V1 model runner, not {built.__module__}: set VLLM_USE_V2_MODEL_RUNNER=0")
    runner.__class__ = type(f"Recording{built.__name__}", (RecordingRunner, built), {})


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as EngineWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as EngineWorker


class RecordingWorker(EngineWorker):
    """vLLM's worker for this platform, CPU or CUDA, whose runner records."""

    def init_device(self) -> None:
        super().init_device()
        recording(self.model_runner)

    def compile_or_warm_up_model(self) -> Any:
        self.model_runner.probe()  # before graphs are recorded, which copy what it has found
        return super().compile_or_warm_up_model()
