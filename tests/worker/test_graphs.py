"""Observers inside graphs that are replayed: the toy model behind something that does to it what a CUDA graph does."""

import numpy as np
import pytest
import torch
from torch import nn

from episodes.errors import UnknownPoint
from tests.worker.replay import Graph
from tests.worker.test_recorder import HIDDEN, Rig
from worker.graphs import Graphs

N_ROWS = 4
POINTS = ["layers.0.output", "layers.1.attn", "layers.2.output"]


class Replayed(nn.Module):
    """A model whose passes of up to N_ROWS rows are one recorded graph, padded; larger ones run eagerly."""

    def __init__(self, model):
        super().__init__()
        self.eager, self.n_replays = model, 0
        self._ids = torch.zeros(N_ROWS, dtype=torch.int32)
        self._graph = Graph()

    @torch.no_grad()
    def capture(self):
        self.eager(torch.zeros(2 * N_ROWS, dtype=torch.int32))  # a pass to warm up
        with self._graph:
            self._output = self.eager(self._ids)

    @torch.no_grad()
    def forward(self, ids):
        if len(ids) > N_ROWS:
            return self.eager(ids)
        self.n_replays += 1
        self._ids[: len(ids)] = ids
        self._graph.replay()
        return self._output[: len(ids)].clone()


class GraphRig(Rig):
    def observe(self, points):
        graphs = Graphs(self.tap, points, N_ROWS, HIDDEN, torch.float32, torch.device("cpu"))
        self.model = Replayed(self.toy)
        graphs.record(self.model.capture)
        graphs.probe(lambda: self.model(torch.zeros(1, dtype=torch.int32)))
        return graphs


@pytest.mark.parametrize("points", [POINTS, ["layers.2.output", "layers.0.output"]])
def test_rows_of_replayed_steps_are_recorded_like_those_of_eager_ones(tmp_path, points):
    """A prompt too long for a graph, then decodes beside another call; of all points, or of some in another order."""
    rig = GraphRig(tmp_path, POINTS)
    rig.admit("a", "ca", [1, 2, 3, 4, 5], points)
    rig.step(("a", 0, [1, 2, 3, 4, 5]))
    rig.admit("b", "cb", [6, 7], points)
    rig.step(("x", 0, [9]), ("a", 5, [8]), ("b", 0, [6, 7]))
    rig.step(("b", 2, [10]), ("x", 1, [9]), ("a", 6, [11]))
    rig.finish("a", "b")
    assert rig.model.n_replays == 1 + 2  # the first is the probe's
    for call, tokens in (("ca", [1, 2, 3, 4, 5, 8, 11]), ("cb", [6, 7, 10])):
        position, ids, rows = rig.read(call)
        assert position.tolist() == list(range(len(tokens))) and ids.tolist() == tokens
        for layer in (0, 2):
            assert np.allclose(rows[:, points.index(f"layers.{layer}.output")], rig.stream(tokens, layer), atol=1e-6)


def test_a_step_that_nobody_captures_is_replayed_as_it_is(tmp_path):
    rig = GraphRig(tmp_path, POINTS)
    ids = [1, 2, 3]
    assert torch.allclose(rig.step(("x", 0, ids)), torch.tensor(rig.stream(ids, 2)), atol=1e-6)
    assert rig.model.n_replays == 1 + 1


def test_a_point_that_was_not_recorded_into_the_graphs_refuses_the_capture(tmp_path):
    rig = GraphRig(tmp_path, POINTS)
    rig.admit("a", "ca", [1], points=["layers.1.output"])
    assert rig.reason("ca") == f"layers.1.output: the recorded graphs have {', '.join(POINTS)}"
    with pytest.raises(UnknownPoint, match="layers 0 to 2"):
        GraphRig(tmp_path / "other", ["layers.3.output"])


def test_a_point_that_a_replay_leaves_nothing_of_is_refused_at_start(tmp_path):
    """Graphs that were recorded with the observers of some points, or of none, would leave the rows of other steps."""
    rig = GraphRig(tmp_path, POINTS)
    some = Graphs(rig.tap, [*POINTS, "layers.1.output"], N_ROWS, HIDDEN, torch.float32, torch.device("cpu"))
    with pytest.raises(UnknownPoint, match=rf"{', '.join(POINTS)}, layers.1.output: .* replayed"):
        some.probe(lambda: rig.model(torch.zeros(1, dtype=torch.int32)))
    with torch.no_grad():
        some.probe(lambda: rig.toy(torch.zeros(1, dtype=torch.int32)))  # which is not replayed
