"""The recorder and the tap on a toy model: which rows of a step end up in which file."""

import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from episodes.errors import UnknownPoint
from episodes.wire import read_header, read_tensor
from tests.conftest import until
from worker import recorder as module
from worker.metrics import Metrics, exposition
from worker.orders import XARG, Config
from worker.recorder import Lane, Recorder, Writer
from worker.spool import FAILED, PART, WHOLE, prepare, spooled, used_bytes
from worker.tap import Stream, Tap, find_blocks

HIDDEN = 4
N_LAYERS = 3


class Block(nn.Module):
    """A block in vLLM's manner: hidden states and the residual apart."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, positions, hidden_states, residual):
        residual = hidden_states if residual is None else hidden_states + residual
        return self.mlp(self.self_attn(residual)), residual


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(N_LAYERS))

    def forward(self, input_ids):
        hidden, residual = self.embed(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(None, hidden, residual)
        return hidden + residual


class Rig:
    """A recorder over a toy model, stepped by hand as the runner steps it."""

    def __init__(self, tmp_path, points=("layers.0.output",), spool_bytes=1 << 30, buffer_bytes=1 << 30):
        torch.manual_seed(0)
        self.model = self.toy = Toy()
        self.tap = Tap(self.model, N_LAYERS)
        self.source = self.observe(list(points))
        self.spool = tmp_path / "spool"
        prepare(self.spool)
        config = Config(str(self.spool), spool_bytes, buffer_bytes, list(points))
        self.recorder = Recorder(config, self.source, torch.float32, "F32", HIDDEN, Lane())

    def observe(self, points):
        """The source of what is recorded."""
        return self.tap

    def admit(self, request, call, prompt, points=("layers.0.output",), first_choice=0, tokens="all"):
        order = {"call": call, "points": list(points), "first_choice": first_choice, "tokens": tokens}
        self.recorder.admit(request, {XARG: order}, prompt)

    def step(self, *batch, padding=0):
        """Run (request, first position, token ids) as one batch."""
        ids = torch.tensor([t for _, _, tokens in batch for t in tokens] + [0] * padding, dtype=torch.int32)
        with torch.no_grad():
            step = self.recorder.plan([(r, start, len(tokens)) for r, start, tokens in batch], ids.device)
            if step is None:
                return self.model(ids)
            output = self.source.run(step, lambda: self.model(ids))
            self.recorder.hand_over(step, ids)
            return output

    def finish(self, *requests):
        self.recorder.retire(requests)

    def read(self, call, choice=0):
        """(positions, token ids, rows) of a finished sequence."""
        path = spooled(self.spool, call, choice)
        until(path.exists, f"{path.name}, spool: {list(self.spool.iterdir())}")
        tensors, _ = read_header(path)
        return tuple(read_tensor(path, tensors[name]) for name in ("position", "token_id", "rows"))

    def reason(self, call, choice=0):
        path = spooled(self.spool, call, choice, FAILED)
        until(path.exists, path.name)
        return path.read_text()

    def stream(self, tokens, layer):
        """[tokens, hidden]: the residual stream after a layer. The toy has no attention: a token stands alone."""
        with torch.no_grad():
            hidden, residual = self.toy.embed(torch.tensor(tokens)), None
            for block in self.toy.layers[: layer + 1]:
                residual = hidden if residual is None else hidden + residual
                hidden = block.mlp(block.self_attn(residual))
            return (hidden + residual).numpy()


def test_rows_go_to_their_own_calls(tmp_path):
    """A mixed batch: two captured requests around one that is not, prefills and decodes, padding at the end."""
    rig = Rig(tmp_path)
    rig.admit("a", "ca", [1, 2, 3])
    rig.admit("b", "cb", [4])
    rig.step(("a", 0, [1, 2]), ("x", 0, [9, 9]), ("b", 0, [4]), padding=3)
    rig.step(("b", 1, [5]), ("x", 2, [9]), ("a", 2, [3]))
    rig.step(("b", 2, [6]), ("a", 3, [7]), padding=6)
    rig.finish("a", "b", "x")
    for call, tokens in (("ca", [1, 2, 3, 7]), ("cb", [4, 5, 6])):
        positions, ids, rows = rig.read(call)
        assert positions.tolist() == list(range(len(tokens))) and ids.tolist() == tokens
        assert np.allclose(rows[:, 0], rig.stream(tokens, 0), atol=1e-6)


def test_capturing_does_not_change_the_output(tmp_path):
    rig = Rig(tmp_path, points=["layers.0.output", "layers.1.attn"])
    plain = rig.step(("x", 0, [1, 2, 3]))
    rig.admit("a", "ca", [1, 2, 3], points=["layers.0.output", "layers.1.attn"])
    assert torch.equal(plain, rig.step(("a", 0, [1, 2, 3])))
    rig.finish("a")
    assert len(rig.read("ca")[0]) == 3


def test_every_hook_reads_what_its_name_says(tmp_path):
    """`input` of a layer is `output` of the one before; `attn` and `mlp` are what the submodules return."""
    points = ["layers.1.output", "layers.2.input", "layers.2.attn", "layers.2.mlp", "layers.2.output"]
    rig = Rig(tmp_path, points)
    rig.admit("a", "ca", [1, 2], points)
    rig.step(("a", 0, [1, 2]))
    rig.finish("a")
    _, _, rows = rig.read("ca")
    before, entering, attn, mlp, after = rows.swapaxes(0, 1)
    assert np.allclose(before, rig.stream([1, 2], 1), atol=1e-6) and np.array_equal(before, entering)
    block = rig.model.layers[2]
    with torch.no_grad():
        assert np.allclose(attn, block.self_attn(torch.tensor(entering.copy())), atol=1e-6)
        assert np.allclose(mlp, block.mlp(torch.tensor(attn.copy())), atol=1e-6)
    assert np.allclose(after, entering + mlp, atol=1e-6)


@pytest.mark.parametrize(("first", "second"), [([2], [1, 0]), ([0, 2], [2, 0])])
def test_calls_of_one_batch_can_record_different_points(tmp_path, first, second):
    """Others, or the same in another order."""
    rig = Rig(tmp_path)
    rig.admit("a", "ca", [1], points=[f"layers.{n}.output" for n in first])
    rig.admit("b", "cb", [2], points=[f"layers.{n}.output" for n in second])
    rig.step(("a", 0, [1]), ("b", 0, [2]))
    rig.finish("a", "b")
    for call, token, layers in (("ca", 1, first), ("cb", 2, second)):
        assert np.allclose(rig.read(call)[2][0], [rig.stream([token], n)[0] for n in layers], atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "positions"), [("all", [0, 1, 2, 3, 4]), ("prompt", [0, 1, 2]), ("completion", [3, 4]), ("last", [2])]
)
def test_only_the_tokens_that_were_asked_for_are_staged(tmp_path, tokens, positions):
    """In chunks and decodes, beside calls that want other tokens: the rows are right and no others are copied."""
    rig = Rig(tmp_path)
    rig.admit("a", "ca", [1, 2, 3], tokens=tokens)
    rig.admit("b", "cb", [4, 5], tokens="last")
    rig.step(("b", 0, [4, 5]), ("a", 0, [1, 2]))
    rig.step(("a", 2, [3]), ("b", 2, [6]))
    rig.step(("a", 3, [7]), ("b", 3, [8]))
    rig.step(("a", 4, [9]))
    rig.finish("a", "b")
    found, ids, rows = rig.read("ca")
    fed = [1, 2, 3, 7, 9]
    assert found.tolist() == positions and ids.tolist() == [fed[p] for p in positions]
    assert np.allclose(rows[:, 0], rig.stream(fed, 0)[positions], atol=1e-6)
    assert rig.read("cb")[0].tolist() == [1]


def test_a_step_without_a_wanted_token_stages_nothing(tmp_path):
    rig = Rig(tmp_path)
    rig.admit("a", "ca", [1, 2], tokens="prompt")
    assert rig.recorder.plan([("x", 0, 3), ("a", 2, 1)], torch.device("cpu")) is None
    rig.finish("a")
    assert len(rig.read("ca")[0]) == 0


def test_children_become_choices(tmp_path):
    rig = Rig(tmp_path)
    for child in range(2):
        rig.admit(f"{child}_cmpl-x-0", "c", [1], first_choice=3)
    rig.step(("0_cmpl-x-0", 0, [1]), ("1_cmpl-x-0", 0, [1]))
    rig.finish("0_cmpl-x-0", "1_cmpl-x-0")
    assert rig.read("c", 3)[1].tolist() == rig.read("c", 4)[1].tolist() == [1]


def test_there_are_more_than_ten_choices(tmp_path):
    rig = Rig(tmp_path)
    for child in (1, 11):
        rig.admit(f"{child}_cmpl-x-0", "c", [child])
    rig.step(("1_cmpl-x-0", 0, [1]), ("11_cmpl-x-0", 0, [11]))
    rig.finish("1_cmpl-x-0", "11_cmpl-x-0")
    assert [rig.read("c", choice)[1].tolist() for choice in (1, 11)] == [[1], [11]]


def test_rows_that_a_preempted_request_finds_in_the_cache_are_left_out(tmp_path):
    """Another call has computed them meanwhile."""
    rig = Rig(tmp_path)
    rig.admit("a", "ca", [1, 2, 3, 4, 5])
    rig.step(("a", 0, [1, 2]))
    rig.step(("a", 4, [5]))
    rig.finish("a")
    positions, ids, rows = rig.read("ca")
    assert positions.tolist() == [0, 1, 4] and ids.tolist() == [1, 2, 5]
    assert np.allclose(rows[:, 0], rig.stream([1, 2, 5], 0), atol=1e-6)


def test_rows_computed_again_after_a_preemption_are_not_stored_again(tmp_path):
    rig = Rig(tmp_path)
    rig.admit("a", "ca", [1, 2])
    rig.step(("a", 0, [1, 2]))
    rig.step(("a", 2, [3]))
    rig.admit("a", "ca", [1, 2])
    rig.step(("a", 0, [1, 2, 3, 4]))
    rig.finish("a")
    assert rig.read("ca")[0].tolist() == [0, 1, 2, 3] and rig.read("ca")[1].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("extra", [None, {}, {XARG: "mine"}, {XARG: {"call": 3}}, {"other": 1}])
def test_a_request_without_an_order_is_not_captured(tmp_path, extra):
    rig = Rig(tmp_path)
    rig.recorder.admit("a", extra, [1])
    assert rig.recorder.plan([("a", 0, 1)], torch.device("cpu")) is None


def test_a_module_without_a_point_is_left_alone(tmp_path):
    """Only what is watched carries nnsight's controller: the rest costs nothing per step."""
    rig = Rig(tmp_path, points=["layers.1.output"])
    instrumented = [name for name, module in rig.model.named_modules() if "forward" in module.__dict__]
    assert instrumented == ["layers.1"]


def test_an_error_in_a_capture_ends_that_capture_alone(tmp_path):
    """A value that does not fit its slab: the forward goes on, the call has its reason, the next call works."""
    rig = Rig(tmp_path)
    rig.admit("a", "ca", [1])
    step = rig.recorder.plan([("a", 0, 1)], torch.device("cpu"))
    step.receive(0, lambda: Stream(torch.zeros(1, HIDDEN + 1)))
    rig.recorder.hand_over(step, torch.tensor([1], dtype=torch.int32))
    assert rig.reason("ca").startswith("layers.0.output: The size of tensor")
    rig.finish("a")
    rig.admit("b", "cb", [1])
    rig.step(("b", 0, [1]))
    rig.finish("b")
    assert len(rig.read("cb")[0]) == 1


@pytest.mark.parametrize(("called", "says"), [(False, "did not come by it"), (True, "'NoneType'")])
def test_a_point_that_has_no_value_ends_the_captures_that_want_it_and_no_other(tmp_path, monkeypatch, called, says):
    """A module that is not run, or returns nothing. What stood in memory is never stored for it."""

    def forward(block, positions, hidden_states, residual):
        return block.mlp(hidden_states), (called and block.self_attn(hidden_states)) or hidden_states

    monkeypatch.setattr(Block, "forward", forward)
    rig = Rig(tmp_path)
    for block in rig.toy.layers:
        block.self_attn = Nothing()
    rig.admit("a", "ca", [1])
    rig.admit("b", "cb", [2], points=["layers.0.output", "layers.0.attn"])
    rig.step(("a", 0, [1]), ("b", 0, [2]))
    rig.finish("a", "b")
    assert rig.reason("cb").startswith("layers.0.attn: ") and says in rig.reason("cb")
    assert len(rig.read("ca")[0]) == 1


class Nothing(nn.Module):
    def forward(self, hidden):
        return None


def test_a_value_that_cannot_be_read_ends_the_capture_and_not_the_step(tmp_path):
    """A module that is called with no tensor at all: the forward pass goes on."""
    rig = Rig(tmp_path, points=["layers.0.input"])
    rig.admit("a", "ca", [1], ["layers.0.input"])
    step = rig.recorder.plan([("a", 0, 1)], torch.device("cpu"))

    def forward():
        return rig.tap.handle(next(iter(rig.tap._receive)), ((), {}))

    assert rig.tap.run(step, forward) == ((), {})
    rig.recorder.hand_over(step, torch.tensor([1], dtype=torch.int32))
    assert "missing a required argument" in rig.reason("ca")


def test_a_device_without_room_ends_the_capture_and_not_the_step(tmp_path):
    rig = Rig(tmp_path)
    rig.admit("a", "ca", [1])

    class Full(Lane):
        def leave(self, slab, token_ids):
            raise RuntimeError("out of memory")

    rig.recorder._lane = Full()
    rig.step(("a", 0, [1]))
    assert rig.reason("ca") == "no room to take 1 rows off the device: out of memory"


def test_a_device_without_room_to_stage_ends_the_capture_and_not_the_step(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("out of memory")

    rig = Rig(tmp_path)
    rig.admit("a", "ca", [1])
    monkeypatch.setattr(rig.recorder, "slab", full)
    assert rig.step(("a", 0, [1])).shape == (1, HIDDEN)
    assert rig.reason("ca") == "no room to stage 1 rows: out of memory"


def test_the_device_has_its_memory_back_while_the_writer_waits(tmp_path):
    """What is staged on the device is counted by nobody: it must not wait for the disk with its copy on the host."""
    rig, gate, slabs = Rig(tmp_path), threading.Event(), []

    class Copying(Lane):
        def leave(self, slab, token_ids):
            slabs.append(weakref.ref(slab))
            return super().leave(slab.clone(), token_ids)

    rig.recorder._lane = Copying()
    rig.recorder._writer.put(0, gate.wait)
    rig.admit("a", "ca", [1])
    rig.step(("a", 0, [1]))
    rig.step(("a", 1, [2]))
    assert [slab() for slab in slabs] == [None, None]
    gate.set()
    rig.finish("a")
    assert len(rig.read("ca")[0]) == 2


def test_a_disk_that_is_full_ends_the_captures_it_touches_and_no_other(tmp_path):
    """What is buffered cannot be written at the end either: the file goes all the same, and the reason stays."""
    rig, many = Rig(tmp_path), [1] * 70_000  # more than is buffered
    part = spooled(rig.spool, "ca", 0, PART)
    part.symlink_to("/dev/full")
    rig.admit("a", "ca", many)
    rig.admit("b", "cb", [4])
    rig.step(("a", 0, many), ("b", 0, [4]))
    rig.finish("a", "b")
    assert "No space left on device" in rig.reason("ca") and not part.is_symlink()
    assert len(rig.read("cb")[0]) == 1


def test_where_there_is_no_room_for_the_reason_it_is_seen_that_the_capture_failed(tmp_path, monkeypatch):
    def no_room(*args):
        raise OSError("no room")

    rig = Rig(tmp_path, spool_bytes=0)
    monkeypatch.setattr(Path, "write_text", no_room)
    rig.admit("a", "ca", [1])
    assert rig.reason("ca") == ""


@pytest.mark.parametrize("points", [["layers.0.output"], ["layers.9.output"]], ids=["captured", "refused"])
def test_a_sequence_is_seen_in_the_spool_before_it_runs_however_late_the_writer_is(tmp_path, points):
    """Else it would be taken for one that never ran, when its client has left."""
    rig, gate = Rig(tmp_path), threading.Event()
    rig.recorder._writer.put(0, gate.wait)
    rig.admit("a", "ca", [1], points)
    assert [path.name for path in rig.spool.glob("ca*")] == ["ca.0.part"]
    gate.set()
    rig.finish("a")
    until(lambda: [p.suffix for p in rig.spool.glob("ca*")] in ([WHOLE], [FAILED]), "a file or a reason, alone")


def test_a_module_that_sees_some_of_the_rows_only_ends_the_capture(tmp_path):
    """As one that runs on the last row of each request: where it lies in the batch, another's row may stand."""
    rig = Rig(tmp_path)
    rig.toy.layers[0].register_forward_pre_hook(lambda module, args: (None, args[1][1:], args[2]))
    rig.admit("a", "ca", [1, 2])
    rig.step(("a", 0, [1, 2]), ("b", 0, [3]))
    rig.finish("a")
    assert rig.reason("ca") == "layers.0.output: it has 2 rows of a batch of 3"


def test_a_capture_that_fails_in_a_way_nobody_foresaw_is_said_to(tmp_path, monkeypatch):
    rig = Rig(tmp_path)
    monkeypatch.setattr(module, "SpoolFile", lambda *args: 1 / 0)
    rig.admit("a", "ca", [1])
    assert "division by zero" in rig.reason("ca")
    until(lambda: [path.suffix for path in rig.spool.glob("ca*")] == [FAILED], "a reason alone")


def test_a_prompt_whose_rows_have_no_identity_refuses_the_capture(tmp_path):
    rig = Rig(tmp_path)
    rig.recorder.admit("a", {XARG: {"call": "ca", "points": ["layers.0.output"], "first_choice": 0}}, [1], "images")
    assert rig.reason("ca") == "images"


def test_a_full_spool_refuses_the_next_capture(tmp_path):
    rig = Rig(tmp_path, spool_bytes=10)
    rig.admit("a", "ca", [1])
    rig.step(("a", 0, [1]))
    rig.finish("a")
    assert len(rig.read("ca")[0]) == 1 and used_bytes(rig.spool) > 10
    rig.admit("b", "cb", [1])
    rig.step(("b", 0, [1]))
    rig.finish("b")
    assert "spool is full" in rig.reason("cb")


def test_a_point_that_the_model_lacks_refuses_the_capture(tmp_path):
    rig = Rig(tmp_path)
    del rig.model.layers[2].mlp
    rig.admit("a", "ca", [1], points=["layers.2.mlp"])
    assert "Block has no mlp, only self_attn" in rig.reason("ca")


def test_a_point_that_the_model_lacks_stops_the_worker(tmp_path):
    with pytest.raises(UnknownPoint, match="layers 0 to 2"):
        Rig(tmp_path, points=["layers.3.output"])
    with pytest.raises(UnknownPoint, match="lists of 7 blocks"):
        find_blocks(Toy(), 7)


def test_a_second_list_of_the_same_blocks_is_none():
    toy = Toy()
    toy.half = nn.Sequential(toy.layers[:])
    path, blocks = find_blocks(toy, N_LAYERS)
    assert path == "layers" and blocks is toy.layers


def test_nothing_waits_that_holds_nothing():
    writer, gate, done = Writer(bound=10), threading.Event(), threading.Event()
    writer.put(100, gate.wait)
    opening = threading.Thread(target=lambda: writer.put(0, done.set))
    opening.start()
    opening.join(10)
    assert not opening.is_alive() and not done.is_set()
    gate.set()
    assert done.wait(10)


def test_a_job_that_fails_does_not_end_the_writer(caplog):
    """Else nothing is recorded any more, and a step waits for ever when the buffer is full."""
    writer, done = Writer(bound=10), threading.Event()
    writer.put(5, lambda: 1 / 0)
    writer.put(5, done.set)
    assert done.wait(10) and "a capture job failed" in caplog.messages


def test_the_step_waits_when_the_buffer_is_full():
    """More than the bound is never queued, and nothing is dropped: a job larger than it goes through alone."""
    writer, gate, done = Writer(bound=10), threading.Event(), []
    writer.put(8, lambda: (gate.wait(), done.append("first")))
    waiting = threading.Thread(
        target=lambda: [writer.put(8, lambda: done.append("second")), writer.put(100, lambda: done.append("large"))]
    )
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive() and not done
    gate.set()
    waiting.join(10)
    until(lambda: done == ["first", "second", "large"], "all jobs")


def test_waiting_is_counted_where_the_server_sees_it(tmp_path):
    """How often, while it lasts, and how long; what fits does not count."""
    prepare(tmp_path)
    config = Config(str(tmp_path), 1 << 30, 10, [])
    writer, gate = Writer(10, Metrics(tmp_path)), threading.Event()
    writer.put(4, gate.wait)
    writer.put(6, lambda: None)
    assert value(config, "buffer_bytes") == 10 and value(config, "buffer_waits_total") == 0
    waiting = threading.Thread(target=lambda: writer.put(1, lambda: None))
    begun = time.monotonic()
    waiting.start()
    until(lambda: value(config, "buffer_waits_total") == 1, "a wait")
    assert value(config, "buffer_wait_seconds_total") == 0 and value(config, "buffer_limit_bytes") == 10
    gate.set()
    waiting.join(10)
    assert 0 < value(config, "buffer_wait_seconds_total") <= time.monotonic() - begun
    until(lambda: value(config, "buffer_bytes") == 0, "an empty buffer")


def value(config, name):
    lines = [line.split() for line in exposition(config).decode().splitlines() if not line.startswith("#")]
    return float(dict(lines)[f"tautap_{name}"])


def test_what_was_recorded_and_what_failed_is_counted(tmp_path):
    rig = Rig(tmp_path)
    assert value(rig.recorder.config, "captures_total") == 0
    rig.admit("a", "ca", [1, 2])
    rig.admit("b", "cb", [1], points=["layers.9.output"])
    rig.step(("a", 0, [1, 2]), ("x", 0, [3]))
    rig.admit("a", "ca", [1, 2])
    rig.step(("a", 0, [1, 2, 3]))
    rig.finish("a")
    rows = rig.read("ca")[2]
    assert rig.reason("cb")
    found = [value(rig.recorder.config, name) for name in ("captures_total", "captures_failed_total", "rows_total")]
    assert found == [1, 1, 3] and value(rig.recorder.config, "row_bytes_total") == rows.nbytes
    assert value(rig.recorder.config, "spool_bytes") > rows.nbytes
