"""A client of another kind: Inspect AI, unchanged and unconfigured but for the base URL.

It runs in an environment of its own, which `make test` sets up: its packages do not go with litellm's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from episodes.verify import problems
from tests.stub import MODEL

INSPECT = Path(sys.prefix, "inspect", "bin", "python")
TASK = Path(__file__).with_name("inspect_task.py")


@pytest.mark.skipif(not INSPECT.exists(), reason="Inspect AI has no environment: make test sets one up")
def test_inspect_gets_an_episode_a_sample(proxy, tmp_path):
    """Twenty samples of one turn: twenty episodes of one call, each with its rows and the completion Inspect scored."""
    env = os.environ | {"TAUTAP_BASE_URL": f"{proxy.url}/v1", "TAUTAP_API_KEY": "none"}
    command = [INSPECT, TASK, MODEL, tmp_path / "logs"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    proxy.stop()
    run = proxy.open()
    rows = run.episodes.to_pylist()
    assert len(answers) == len(rows) == 20
    assert {(row["n_calls"], row["n_turns"], row["benchmark"], row["status"]) for row in rows} == {
        (1, 1, None, "sealed")
    }
    recorded = {}
    for call in run.history.calls.values():
        assert call.role == "agent" and call.kind == "turn" and call.n_kept
        question = json.loads(call.request)["messages"][-1]["content"]
        recorded[question] = json.loads(call.reply)["choices"][0]["message"]["content"]
    assert recorded == answers
    assert list(problems(run)) == []
