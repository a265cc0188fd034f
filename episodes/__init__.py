"""Recorded episodes: read a run's calls and activations, live or sealed.

from episodes import open_run

run = open_run("data/my-run")
run.episodes, run.calls                                   # Arrow tables
run.call(run.calls["call"][0].as_py()).activations("layers.8.output")   # [positions, hidden]
"""

from episodes.errors import MissingRows
from episodes.run import Call, Run, open_run

__all__ = ["Call", "MissingRows", "Run", "open_run"]
