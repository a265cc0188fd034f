"""Recorded episodes: read a run's calls and activations, live or sealed.

from episodes import open_run

run = open_run("data/my-run")
run.episodes, run.columns("call", "role", "status")       # Arrow tables; `run.calls` has all that was said, too
for call in run.episode(run.names[0]):
    if call.whole:
        call.activations("layers.8.output")               # [positions, hidden]
"""

from episodes.errors import MissingRows, UnknownPoint
from episodes.run import Call, Run, open_run

__all__ = ["Call", "MissingRows", "Run", "UnknownPoint", "open_run"]
