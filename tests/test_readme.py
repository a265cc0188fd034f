"""The README's code runs as it is printed."""

import re
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import pytest

from tests.episodes.test_store import Writer, expected

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run at data/RUN with a sealed episode EPISODE of two calls, one of which was lost."""
    points = ["layers.8.output"]
    (tmp_path / "data").mkdir()
    writer = Writer(tmp_path)
    writer.commit("c1", [1, 2, 3, 4], [5, 6], episode="EPISODE", points=points)
    writer.store.commit(msgspec.structs.replace(writer.call("c2", "EPISODE", 1, points), lost="the worker died"))
    writer.store.seal("EPISODE")
    writer.close()
    (tmp_path / "run").rename(tmp_path / "data" / "RUN")
    monkeypatch.chdir(tmp_path)
    return expected([1, 2, 3, 4, 5], points[0])


def test_five_lines_of_pyarrow_and_numpy_read_one_layer_of_one_episode(run):
    lines, scope = BLOCKS[0], {}
    assert len(lines.strip().splitlines()) == 5 and "episodes" not in lines
    exec(lines, scope)
    assert scope["rows"].dtype == np.float32
    assert np.array_equal(scope["rows"].astype(ml_dtypes.bfloat16), run)


def test_the_api_reads_it_too_and_tells_of_what_was_lost(run, capsys):
    scope = {}
    exec(BLOCKS[1], scope)
    assert np.array_equal(scope["rows"], run) and scope["tokens"].tolist() == [1, 2, 3, 4, 5]
    assert "call c2: no activations: the worker died\n" in capsys.readouterr().out


def test_the_readme_has_no_other_python():
    """Its third block, an edit, is run by `worker/test_families.py`."""
    assert len(BLOCKS) == 3 and "def steer" in BLOCKS[2]
