"""The probe, on toys of the ways in which families differ: what is refused, and that the rest can be had."""

import pytest
import torch
from torch import nn

from episodes.errors import UnknownPoint
from episodes.points import split
from worker.auxiliary import Auxiliary
from worker.probe import probe, trial
from worker.tap import Tap

HIDDEN, N_LAYERS = 8, 3


class Norm(nn.Module):
    """vLLM's: adds the residual up."""

    def forward(self, hidden, residual=None):
        stream = hidden if residual is None else hidden + residual
        return stream / stream.norm(), stream


class Block(nn.Module):
    """As Llama's."""

    def __init__(self):
        super().__init__()
        self.norm, self.post_norm = Norm(), Norm()
        self.self_attn, self.mlp = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, positions, hidden_states, residual):
        hidden, residual = self.norm(hidden_states, residual)
        hidden, residual = self.post_norm(self.self_attn(hidden), residual)
        return self.mlp(hidden), residual


class Whole(Block):
    """As Cohere's and EXAONE 4's: the stream is returned whole, and what is beside it is not to be added."""

    def forward(self, positions, hidden_states, residual):
        normed, _ = self.norm(hidden_states)
        return hidden_states + self.self_attn(normed) + self.mlp(normed), hidden_states


class Second(Block):
    """The next block begins with the second of what it returns."""

    def forward(self, positions, hidden_states, residual):
        return super().forward(positions, hidden_states if residual is None else residual, None)


class Apart(Block):
    """As Llama's, but for its first module, which is given one part of the stream alone."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Dropout(0)

    def forward(self, positions, hidden_states, residual):
        return super().forward(positions, self.scale(hidden_states), residual)


class Scaled(Block):
    """As Granite's: what is added is scaled outside of the modules."""

    def forward(self, positions, hidden_states, residual):
        hidden, residual = self.norm(hidden_states, residual)
        hidden, residual = self.post_norm(0.2 * self.self_attn(hidden), residual)
        return 0.2 * self.mlp(hidden), residual


class Half(Scaled):
    """Attention alone is scaled, and gives nought without a cache."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.self_attn.weight)
        nn.init.zeros_(self.self_attn.bias)

    def forward(self, positions, hidden_states, residual):
        hidden, residual = self.norm(hidden_states, residual)
        hidden, residual = self.post_norm(0.2 * self.self_attn(hidden), residual)
        return self.mlp(hidden), residual


class Silent(Block):
    """As LongCat's: the module of that name is never called itself; and its MLP runs twice."""

    def forward(self, positions, hidden_states, residual):
        hidden, residual = self.norm(hidden_states, residual)
        return self.mlp(self.mlp(hidden)), residual


class Paired(Block):
    """Attention returns something beside what it adds."""

    def __init__(self):
        super().__init__()
        self.self_attn = Pair()

    def forward(self, positions, hidden_states, residual):
        hidden, residual = self.norm(hidden_states, residual)
        hidden, residual = self.post_norm(self.self_attn(hidden)[0], residual)
        return self.mlp(hidden), residual


class Pair(nn.Module):
    def forward(self, hidden):
        return torch.zeros_like(hidden), None


class Odd(Block):
    """One that lacks a module."""

    def __init__(self):
        super().__init__()
        del self.mlp
        self.experts = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, positions, hidden_states, residual):
        hidden, residual = self.norm(hidden_states, residual)
        return self.experts(hidden), residual


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed, self.norm = nn.Embedding(10, HIDDEN), Norm()
        self.layers = nn.ModuleList(kind() for _ in range(N_LAYERS))

    def forward(self, ids):
        hidden, residual = self.embed(ids), None
        for layer in self.layers:
            hidden, residual = layer(None, hidden, residual)
        return self.norm(hidden, residual)[0]


def probed(kind, custom=None):
    torch.manual_seed(0)
    model = Model(kind)
    tap = Tap(model, N_LAYERS, custom)
    with torch.no_grad():
        probe(tap, 1, HIDDEN, torch.float32, lambda: model(torch.tensor([5])))
    return tap


@pytest.mark.parametrize(
    ("kind", "hooks", "says"),
    [
        (Block, [], ""),
        (Paired, [], ""),
        (Whole, [], ""),
        (Apart, ["input", "output", "attn", "mlp"], "Model: layer 1 does not begin with layers."),
        (Second, ["input", "output", "attn", "mlp"], "Model: layer 1 does not begin with layers."),
        (Scaled, ["attn", "mlp"], "attn and mlp are not what joins the residual stream at layer 0"),
        (Half, ["attn", "mlp"], "attn and mlp are not what joins the residual stream at layer 0"),
        (Silent, ["attn", "mlp"], "Model does not run it"),
        (Odd, ["attn", "mlp"], "does not run it"),
    ],
)
def test_points_that_are_not_what_their_names_say_are_refused_and_no_others(kind, hooks, says):
    """At every layer, also where nobody had asked for them at start."""
    tap = probed(kind)
    assert {split(point).hook for point in tap.wrong} == set(hooks), tap.wrong
    assert says in " ".join(tap.wrong.values())
    for point in tap.points:
        if split(point).hook in hooks:
            with pytest.raises(UnknownPoint, match=rf"^{point}: |^{point.rpartition('.')[0]}"):
                tap.watch(point)
        else:
            tap.watch(point)


def test_a_module_of_ones_own_is_refused_alone():
    tap = probed(Block, {"mine": "layers.*.mlp.output", "ids": "embed.input", "none": "layers.x.output"})
    assert tap.wrong.keys() == {"ids", "none"}
    assert tap.wrong["ids"] == "ids: it is called with no tensor of numbers"
    assert "layers.x.output does not exist" in tap.wrong["none"]


OUTPUTS = [f"layers.{n}.output" for n in range(N_LAYERS)]


def tried(model, source, by_rank=None):
    """A trial of every block's output."""
    with torch.no_grad():
        trial(source, OUTPUTS, HIDDEN, torch.float32, torch.device("cpu"), lambda: model(torch.tensor([5])), by_rank)


def watching(model):
    tap = Tap(model, N_LAYERS)
    for point in OUTPUTS:
        tap.watch(point)
    return tap


@pytest.mark.filterwarnings("ignore:.*was replaced after nnsight wrapped")
def test_a_point_whose_module_is_given_another_forward_as_it_runs_is_refused():
    """As vLLM does to move a block's weights to the device in time; its first pass is not the last."""
    model = Model(Block)
    block = model.layers[2]
    plain = block.forward

    def moving(*args):
        block.forward = plain
        output = plain(*args)
        block.forward = moving
        return output

    block.forward = moving
    with pytest.raises(UnknownPoint, match=r"layers\.2\.output: the model did not come by it"):
        tried(model, watching(model))


def test_a_point_of_which_each_rank_has_a_part_is_refused():
    model = Model(Block)

    def by_rank(rows):
        other = rows.clone()
        other[:, 1] += 0.5
        return torch.stack([rows, other])

    tried(model, watching(model), lambda rows: torch.stack([rows, rows]))
    with pytest.raises(UnknownPoint, match=r"layers\.1\.output: each rank has a part of it"):
        tried(model, watching(model), by_rank)


class Auxiliaries(Model):
    """Returns the stream behind chosen blocks, but for the last one's, as some of vLLM's families do."""

    def set_aux_hidden_state_layers(self, layers):
        self.wanted = layers

    def forward(self, ids):
        hidden, residual, states = self.embed(ids), None, []
        for n, layer in enumerate(self.layers):
            if n in self.wanted:
                states.append(hidden if residual is None else hidden + residual)
            hidden, residual = layer(None, hidden, residual)
        return self.norm(hidden, residual)[0], states


def test_auxiliary_hidden_states_that_are_fewer_than_was_told_are_refused_and_never_end_a_step():
    model = Auxiliaries(Block)
    with pytest.raises(UnknownPoint, match=r"layers\.0\.output: the model returns 2 auxiliary hidden states, of 3"):
        tried(model, Auxiliary(model, OUTPUTS))
