"""What the benchmarks stand on: the traffic that they replay, what they claim of it, and the steps that they time."""

import asyncio
import json

import pytest
import torch

import peers
import proxies
import traffic
from capture_step import Rig, added_us, spooled_per_s
from tests.stub import MODEL
from traffic import Claimed, Tally, load
from worker.spool import used_bytes

CALL = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"query": "tea", "n": 3}'}}
TRAJECTORY = [
    {"role": "system", "content": "You are an agent. " * 200},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "found"},
    {"role": "assistant", "content": "There is tea."},
    {"role": "user", "content": "###STOP###"},
]


@pytest.fixture
def results(tmp_path):
    """A results file of two episodes, and one that failed."""
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"traj": TRAJECTORY}, {"traj": []}, {"traj": TRAJECTORY}]))
    return path


def test_each_call_gets_what_stands_before_a_message_of_the_agent(results):
    episode = load(results, 1, None).fresh()[0]
    first, second = episode.prompts()
    assert first[1:] == TRAJECTORY[1:2] and second[1:] == TRAJECTORY[1:4]
    assert first[0] == second[0] and first[0]["content"].endswith(TRAJECTORY[0]["content"])


def test_episodes_can_be_cut_short_and_must_be_there(results):
    assert [len(list(episode.prompts())) for episode in load(results, 2, 1).episodes] == [1, 1]
    with pytest.raises(SystemExit, match="2 trajectories that fit, fewer than 3"):
        load(results, 3, None)


def test_the_episodes_of_a_round_share_a_system_prompt_that_no_other_round_has(results):
    replay = load(results, 2, None)
    rounds = [{next(episode.prompts())[0]["content"] for episode in replay.fresh()} for _ in range(2)]
    assert [len(found) for found in rounds] == [1, 1] and rounds[0] != rounds[1]


def test_replayed_traffic_is_claimed_counted_and_deleted(results, stub, tmp_path, monkeypatch):
    """Fewer bytes than every token of every call would have taken, and nothing is left, here or in the spool."""
    monkeypatch.setitem(traffic.SAMPLING, "model", MODEL)
    scratch, tally = tmp_path / "scratch", Tally()
    scratch.mkdir()
    replay = load(results, 2, None)
    asyncio.run(replay.play(stub.url, Claimed(scratch, ("layers.1.output",)), replay.fresh(), tally))
    assert tally.n_calls == 4
    assert 0 < tally.n_bytes < tally.n_rows * (32 + 12)  # of one point, 16 wide in bfloat16, and each row's index
    assert not list(scratch.iterdir()) and used_bytes(tmp_path / "spool") == 0


def test_timed_steps_store_every_row(tmp_path):
    """Of so many rows a step, at so many points; the files are gone afterwards."""
    with torch.inference_mode():
        rig = Rig(tmp_path / "spool", 4, 3, 16)
        assert (
            rig.points == ["layers.0.output", "layers.10.output", "layers.20.output"] and rig.step_bytes == 4 * 3 * 32
        )
        step, _ = added_us(rig, 4)
        assert step >= 2000 and spooled_per_s(rig, 4) > 0
    assert used_bytes(rig.spool) == 0


def test_the_clients_of_the_proxies_time_whole_replies_and_refuse_wrong_ones(monkeypatch):
    """The first event of a stream comes long before its end; a reply without its text is an error."""

    async def run():
        server = await asyncio.get_running_loop().create_server(peers.Replying, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, proxies.clients(port, 1) as (client,):
            streamed = await client.ask(proxies.request('"stream":true'))
            whole = await client.ask(proxies.request())
            monkeypatch.setattr(peers, "WHOLE", peers.answer(b"{}"))
            with pytest.raises(AssertionError):
                await client.ask(proxies.request())
        return streamed, whole

    streamed, whole = asyncio.run(run())
    assert streamed.first < streamed.last - peers.PIECES * peers.PAUSE_S / 2 and whole.first <= whole.last
