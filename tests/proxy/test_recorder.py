"""What a recording keeps in memory of a run that goes on for weeks."""

import asyncio

import msgspec
import pytest

from episodes.cast import WARMUPS
from episodes.errors import NotStored
from episodes.layout import Layout
from episodes.records import Call
from episodes.run import open_run
from episodes.store import Store
from proxy.config import Config
from proxy.metrics import Metrics
from proxy.recorder import Deadline, Recording
from proxy.workers import Workers
from tests.player import HI, simulator_prompt

CALL = Call(
    id="c0", thread="t", episode="before", turn=0, attempt=0, endpoint="/v1", model="m", started=1.0, ended=2.0,
    status=200, named=True, role="agent",
)  # fmt: skip
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


def left_open(recording, episode):
    return recording._store.history.episodes[episode].status == "live"


def test_an_episode_stays_open_for_a_while_after_its_last_call_and_after_a_restart(tmp_path):
    """Its conversation goes on, though nothing of it is under way."""
    config, layout = Config(("http://127.0.0.1:1",), tmp_path, "r"), Layout(tmp_path / "r")

    async def main():
        async with Workers.run(config) as workers:
            store = Store(layout)
            store.append([CALL])
            store.close()
            recording = await Recording.open(layout, config, workers, Metrics(), Deadline())
            await recording.seal(60)
            assert left_open(recording, "before")
            place = recording.place("c1", [HI], recording.part([HI]), "now", False)
            fields = dict(zip(("episode", "thread", "turn", "attempt", "kind"), place, strict=True))
            recording.replied(place, [{"role": "assistant", "content": "Hello!"}])
            recording.record(msgspec.structs.replace(CALL, id="c1", **fields), None, {})
            await recording.recorded("c1")
            await recording.seal(60)
            assert left_open(recording, "now")
            await recording.seal(0)
            assert not left_open(recording, "before") and not left_open(recording, "now")
            await recording.close()

    asyncio.run(main())


def test_what_could_not_be_recorded_is_not_relied_upon_in_the_cache(tmp_path, monkeypatch):
    """Its rows are nowhere: the calls after it compute their own."""
    config = Config(("http://127.0.0.1:1",), tmp_path, "r")

    async def main():
        async with Workers.run(config) as workers:
            recording = await Recording.open(Layout(tmp_path / "r"), config, workers, Metrics(), Deadline())
            before, place = recording.salt, recording.place("c0", [HI], recording.part([HI]), "before", False)
            with monkeypatch.context() as patch, pytest.raises(NotStored, match="told to fail"):
                patch.setattr(recording, "_put", lambda *_: (_ for _ in ()).throw(MemoryError("told to fail")))
                recording.record(msgspec.structs.replace(CALL, thread=place.thread), None, {})
                await recording.recorded("c0")
            assert recording.salt != before
            await recording.close()

    asyncio.run(main())
