"""Edits that do not fit the batch they are in."""

import pytest
import torch

from tests.worker.test_recorder import N_LAYERS, Toy
from worker.edit import Edit, Rows
from worker.tap import Tap

EDITS = """
import torch

def skip(model):
    model.layers[1].mlp.skip(torch.zeros_like(model.layers[1].mlp.input))

def one(model):
    hidden, residual = model.layers[1].output
    model.layers[1].output = (torch.zeros(1, 4), residual)
"""


@pytest.mark.parametrize("function", ["skip", "one"])
def test_an_edit_that_does_not_fit_beside_others_ends_its_own_capture_and_not_the_engine(tmp_path, function):
    """The pass is done again without it, so that the others get what they would have got."""
    (tmp_path / "steer.py").write_text(EDITS)
    toy = Toy()
    tap, ids, failed = Tap(toy, N_LAYERS), torch.tensor([1, 2, 3]), []
    edit = Edit(f"{tmp_path}/steer.py:{function}", tap, toy)
    with torch.no_grad():
        plain = toy(ids)
        rows = [Rows("a", 1, 0, 2, 2)]
        output = tap.run(None, lambda: edit.run(rows, 3, lambda *said: failed.append(said), lambda: toy(ids)))
    assert torch.equal(output, plain)
    ((request, reason),) = failed
    assert request == "a" and f"steer.py:{function}: " in reason
