"""What a recording keeps in memory of a run that goes on for weeks."""

import asyncio

from episodes.cast import WARMUPS
from episodes.layout import Layout
from episodes.records import Call
from episodes.run import open_run
from proxy.config import Config
from proxy.metrics import Metrics
from proxy.recorder import Deadline, Recording
from proxy.workers import Workers
from tests.player import HI, simulator_prompt

WARM_UP = [{"role": "system", "content": simulator_prompt(None, "llm")}, HI]


def test_warm_ups_are_forgotten_one_by_one_while_tasks_go_on_to_begin(tmp_path):
    """They look alike, so that each costs the next ones something. They are sealed once, when there are no more."""

    def begin(recording, call):
        return recording.place(call, WARM_UP, recording.part(WARM_UP), None, False)

    async def end(recording, call, place):
        fields = dict(zip(("episode", "thread", "turn", "attempt", "kind"), place, strict=True))
        times = {"started": 1.0, "ended": 2.0, "status": 200}
        recording.replied(place, [{"role": "assistant", "content": "Hello!"}])
        recording.record(Call(call, **fields, **times, role="warmup", endpoint="/v1", model="m"), None, {})
        await recording.recorded(call)

    async def main():
        config = Config(("http://127.0.0.1:1",), tmp_path, "r")
        async with Workers.run(config) as workers:
            recording = await Recording.open(Layout(tmp_path / "r"), config, workers, Metrics(), Deadline())
            places = {f"c{n}": begin(recording, f"c{n}") for n in range(3)}
            for call in ("c0", "c1"):
                await end(recording, call, places[call])
            await recording.seal(0)
            assert (len(recording._cast), recording._store.history.episodes[WARMUPS].status) == (1, "live")
            await end(recording, "c2", places["c2"])
            await recording.seal(0)
            assert (len(recording._cast), recording._store.history.episodes[WARMUPS].status) == (0, "sealed")
            await recording.close()

    asyncio.run(main())
    assert sorted(open_run(tmp_path / "r").history.episodes[WARMUPS].sealed.calls) == ["c0", "c1", "c2"]
