"""What capture adds to one decode step, and how fast rows get from the step to the spool.

    python benchmarks/capture_step.py [--hidden 4096] [--steps 200] [--device cuda]

No engine: our recorder and tap over a model of 30 blocks that do nothing but let 2 ms go by, as a step on a device
does, with a row a request as in decoding. Steps with and without capture alternate in one process. The difference of
their medians is what capture costs the step thread: planning, copying, handing over, and waiting for Python's lock
while the writer has it. The rate is that of steps that let no time go by, up to the last file's name.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from servers import machine
from worker.orders import XARG, Config
from worker.recorder import CudaLane, Lane, Recorder
from worker.spool import FAILED, prepare, spooled
from worker.tap import Tap

N_LAYERS = 30
ROWS, POINTS = (1, 8, 64, 256), (3, 30)
BUFFER_BYTES = 1 << 30
SPOOL_BYTES = 1 << 40
BURST_BYTES = 1 << 30  # the spool is in memory
POLL_S = 0.001
STEP_S = 0.002
PROMPT = [0]


class Block(nn.Module):
    """A block that leaves everything to the residual stream, in vLLM's manner: in two parts."""

    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states, residual


class Model(nn.Module):
    """step_s: what the last block leaves to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.step_s = 0.0
        self.layers = nn.ModuleList(Block() for _ in range(N_LAYERS))

    def forward(self, stream: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            stream = layer(*stream)
        if self.step_s:
            time.sleep(self.step_s)
        return stream


class Rig:
    """A recorder over the model, stepped as the runner steps it."""

    def __init__(self, spool: Path, n_rows: int, n_points: int, hidden: int, device: str = "cpu") -> None:
        prepare(spool)
        self.spool, self.hidden = spool, hidden
        stride = N_LAYERS // n_points
        self.points = [f"layers.{n}.output" for n in range(0, N_LAYERS, stride)]
        self.model = Model()
        self.tap = Tap(self.model, N_LAYERS)
        config = Config(str(spool), SPOOL_BYTES, BUFFER_BYTES, self.points)
        lane = CudaLane() if device == "cuda" else Lane()
        self.recorder = Recorder(config, self.tap, torch.bfloat16, "BF16", hidden, lane)
        zeros = torch.zeros(n_rows, hidden, dtype=torch.bfloat16, device=device)
        self.stream = (zeros, zeros + 1)
        self.ids = torch.zeros(n_rows, dtype=torch.int32, device=device)
        self.idle = [f"idle-{n}" for n in range(n_rows)]

    @property
    def step_bytes(self) -> int:
        return len(self.idle) * len(self.points) * self.hidden * 2

    def admit(self, name: str) -> list[str]:
        """One request a row, captured."""
        requests = [f"{name}-{n}" for n in range(len(self.idle))]
        for request in requests:
            self.recorder.admit(request, {XARG: {"call": request, "points": self.points, "first_choice": 0}}, PROMPT)
        return requests

    def step(self, requests: list[str], position: int) -> None:
        """One decode step of these requests."""
        step = self.recorder.plan([(request, position, 1) for request in requests], self.ids.device)
        if step is None:
            self.model(self.stream)
            return
        self.tap.run(step, lambda: self.model(self.stream))
        self.recorder.hand_over(step, self.ids)

    def finish(self, requests: list[str]) -> None:
        """Wait until every row is in a file that has its name, then delete the files."""
        self.recorder.retire(requests)
        waiting = {spooled(self.spool, request, 0) for request in requests}
        while waiting:
            time.sleep(POLL_S)
            for failed in self.spool.glob(f"*{FAILED}"):
                sys.exit(f"a capture failed: {failed.read_text()}")
            waiting = {path for path in waiting if not path.exists()}
        for request in requests:
            spooled(self.spool, request, 0).unlink()


def added_us(rig: Rig, n_steps: int) -> tuple[float, float]:
    """Medians: microseconds of a step without capture, and what capture adds to it."""
    rig.model.step_s = STEP_S
    captured = rig.admit("timed")
    times: dict[bool, list[int]] = {True: [], False: []}
    for position in range(n_steps):
        for capture in (True, False) if position % 2 else (False, True):
            begun = time.perf_counter_ns()
            rig.step(captured if capture else rig.idle, position)
            times[capture].append(time.perf_counter_ns() - begun)
    rig.finish(captured)
    without, with_capture = (statistics.median(times[capture]) / 1e3 for capture in (False, True))
    return without, with_capture - without


def spooled_per_s(rig: Rig, n_steps: int) -> float:
    """Bytes a second from the first step to the last file's name."""
    rig.model.step_s = 0.0
    begun = time.perf_counter()
    captured = rig.admit("burst")
    for position in range(n_steps):
        rig.step(captured, position)
    rig.finish(captured)
    return n_steps * rig.step_bytes / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=576, help="width of the residual stream (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps of each kind, fewer of large ones (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="times that each is measured (%(default)s)")
    parser.add_argument("--spool-dir", default="/dev/shm", help="as the worker's (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the rows are (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch's, to which vLLM sets them too (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    width = f"bfloat16, hidden size {options.hidden}"
    print(f"{machine()}: {options.threads} threads, {options.device}, {width}, medians of {options.repeats}")
    shown = Table("rows", "points", "step µs", "capture adds µs", "spread µs", "MB a step", "MB/s to the spool")
    for n_rows, n_points in itertools.product(ROWS, POINTS):
        shown.add_row(str(n_rows), str(n_points), *line(n_rows, n_points, options))
    Console(width=120).print(shown)


def line(n_rows: int, n_points: int, options: argparse.Namespace) -> list[str]:
    with TemporaryDirectory(dir=options.spool_dir) as scratch, torch.inference_mode():
        rig = Rig(Path(scratch) / "spool", n_rows, n_points, options.hidden, options.device)
        n_steps = max(min(options.steps, BURST_BYTES // rig.step_bytes), 10)
        added_us(rig, n_steps)  # not counted
        found = [(*added_us(rig, n_steps), spooled_per_s(rig, n_steps)) for _ in range(options.repeats)]
    step, added, rate = map(statistics.median, zip(*found, strict=True))
    spread = [added for _, added, _ in found]
    return [
        f"{step:.0f}", f"{added:.0f}", f"{min(spread):.0f}–{max(spread):.0f}",
        f"{rig.step_bytes / 1e6:.2f}", f"{rate / 1e6:.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
