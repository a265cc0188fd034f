"""A client of another kind: Inspect AI, unchanged and unconfigured but for the base URL."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from episodes.verify import problems
from tests.stub import MODEL


@pytest.mark.skipif(importlib.util.find_spec("inspect_ai") is None, reason="inspect_ai is not installed")
def test_inspect_gets_an_episode_a_sample(proxy, tmp_path):
    """Twenty samples of one turn: twenty episodes of one call, each with its rows and the completion Inspect scored."""
    env = os.environ | {"TAUTAP_BASE_URL": f"{proxy.url}/v1", "TAUTAP_API_KEY": "none"}
    command = [sys.executable, "-m", "tests.inspect_task", MODEL, str(tmp_path / "logs")]
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
