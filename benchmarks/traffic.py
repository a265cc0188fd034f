"""Agent traffic: conversations held again turn by turn, as an agent benchmark sends them, and what is kept of them.

The messages are all settled beforehand, replies included: what the model says is thrown away, so that every server
gets the same prompts.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import sys
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import aiohttp
from safetensors import safe_open

from episodes.wire import CAPTURE_HEADER, Capture
from proxy.backend import Backend
from worker.smollm import NAME

MAX_MODEL_LEN = 20_480
# A prompt has to fit with its tools; on the recorded trajectories the embedded model makes 2.6 characters a token.
FITTING_CHARS = 2 * (MAX_MODEL_LEN - 2048)
TIMEOUT_S = 1800
MADE_UP_TURNS = 6
IN_FLIGHT, N_TOKENS = 8, 32
SAMPLING = {"model": NAME, "temperature": 0, "ignore_eos": True, "max_tokens": N_TOKENS}
POLICY = "You are an agent of an airline. Look a reservation up before you change it, and confirm every change. " * 12
SAID = "The reservation was found: two passengers, one bag, economy, leaving on the first of May at nine. " * 2
JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}

Message = dict[str, Any]


class Episode(NamedTuple):
    """A conversation from its system prompt on. tag: what makes its system prompt, and so its cache blocks, new."""

    messages: list[Message]
    tag: str = ""

    def prompts(self) -> Iterator[list[Message]]:
        """What the agent is called with: everything before each message of its own."""
        system = {"role": "system", "content": f"{self.tag} {self.messages[0]['content']}"}
        for n, message in enumerate(self.messages):
            if message["role"] == "assistant":
                yield [system, *self.messages[1:n]]


@dataclass
class Tally:
    """n_rows: the rows of every token of every call, had each been stored. n_bytes: what was stored."""

    n_calls: int = 0
    n_rows: int = 0
    n_bytes: int = 0


class Keeper(Protocol):
    """What is kept of a call's activations."""

    def headers(self, call: str, tag: str) -> dict[str, str]: ...

    def fields(self) -> dict[str, Any]: ...

    async def keep(self, session: aiohttp.ClientSession, call: str, reply: Message) -> int:
        """Take what the server stored of a call off it; returns its bytes."""
        ...


class Nothing:
    """No activations are asked for."""

    def headers(self, call: str, tag: str) -> dict[str, str]:
        return {}

    def fields(self) -> dict[str, Any]:
        return {}

    async def keep(self, session: aiohttp.ClientSession, call: str, reply: Message) -> int:
        return 0


class Claimed(Nothing):
    """Our worker's rows, claimed as the proxy claims them."""

    def __init__(self, scratch: Path, points: tuple[str, ...] | None = None) -> None:
        """points: None for the worker's own."""
        self._scratch, self._points = scratch, points

    def headers(self, call: str, tag: str) -> dict[str, str]:
        return {CAPTURE_HEADER: Capture(call, tag, self._points).header()}

    async def keep(self, session: aiohttp.ClientSession, call: str, reply: Message) -> int:
        file = self._scratch / call
        backend = Backend("http://worker", session)
        backend.url = ""  # the session knows the worker's address
        await backend.claim(call, file)
        await backend.forget(call)
        return self.take(file)

    def take(self, file: Path) -> int:
        """What becomes of a call file; returns its bytes."""
        return taken(file)


class Extracted(Nothing):
    """The files that vLLM's hidden states connector writes."""

    def fields(self) -> dict[str, Any]:
        return {"kv_transfer_params": {"include_output_tokens": True}}

    async def keep(self, session: aiohttp.ClientSession, call: str, reply: Message) -> int:
        file = Path(reply["kv_transfer_params"]["hidden_states_path"])
        await asyncio.to_thread(wait_for_lock, Path(f"{file}.lock"))
        with safe_open(file, "np") as tensors:
            n_rows = tensors.get_slice("hidden_states").get_shape()[0]
        assert n_rows == rows_of(reply), f"{n_rows} rows of {rows_of(reply)}"
        return taken(file)


class Home(Nothing):
    """What nnsight's edit saved, by then in the API server's process (`nnsight_home`)."""

    def __init__(self, row_bytes: int) -> None:
        """row_bytes: of one token's vectors."""
        self._row_bytes = row_bytes

    async def keep(self, session: aiohttp.ClientSession, call: str, reply: Message) -> int:
        async with session.get(f"/saved/{reply['id']}") as saved:
            n_bytes = int(await saved.text())
        assert n_bytes == rows_of(reply) * self._row_bytes, f"{n_bytes} bytes of {rows_of(reply)} rows"
        return n_bytes


def taken(file: Path) -> int:
    """The size of a file that has served its purpose."""
    size = file.stat().st_size
    file.unlink()
    return size


def wait_for_lock(file: Path) -> None:
    """Sleep until the connector's writer lets go of its lock file, then remove it."""
    with file.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
    file.unlink()


def rows_of(reply: Message) -> int:
    """A call's tokens but the last sampled one, which was never fed in."""
    usage = reply["usage"]
    return int(usage["prompt_tokens"] + usage["completion_tokens"] - 1)


class Traffic:
    """Episodes to hold, so many at a time, with a reply of `N_TOKENS` tokens to every call."""

    def __init__(self, episodes: list[Episode], tools: list[Message], in_flight: int = IN_FLIGHT) -> None:
        self.episodes, self._tools, self._in_flight = episodes, tools, in_flight

    @property
    def title(self) -> str:
        n_calls = sum(len(list(episode.prompts())) for episode in self.episodes)
        return f"{len(self.episodes)} episodes, {n_calls} calls, {N_TOKENS} tokens a reply, {self._in_flight} at once"

    def fresh(self) -> list[Episode]:
        """The episodes behind a system prompt that no server has seen: one for all of them, as in life."""
        tag = uuid.uuid4().hex
        return [Episode(episode.messages, tag) for episode in self.episodes]

    async def prime(self, url: str, keeper: Keeper, episode: Episode, tally: Tally) -> None:
        """The first call of an episode, and so the system prompt of all that share its tag, into the server's cache."""
        await self.play(url, keeper, [Episode(cut(episode.messages, 1), episode.tag)], tally)

    async def play(self, url: str, keeper: Keeper, episodes: Iterable[Episode], tally: Tally) -> None:
        """Hold these conversations, keep what is to be kept while they run, and count it."""
        waiting = iter(episodes)

        async def seat() -> None:
            for episode in waiting:
                await self._converse(session, keeper, episode, tally)

        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)  # vLLM closes one that is idle for 5 s
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
            await asyncio.gather(*(seat() for _ in range(self._in_flight)))

    async def _converse(self, session: aiohttp.ClientSession, keeper: Keeper, episode: Episode, tally: Tally) -> None:
        async def keep(call: str, reply: Message) -> None:
            kept = await keeper.keep(session, call, reply)
            tally.n_bytes += kept

        keeping = []
        for prompt in episode.prompts():
            call = f"c-{uuid.uuid4().hex}"
            body = SAMPLING | {"messages": prompt} | keeper.fields() | ({"tools": self._tools} if self._tools else {})
            async with session.post(
                "/v1/chat/completions", json=body, headers=keeper.headers(call, episode.tag)
            ) as reply:
                assert reply.status == 200, await reply.text()
                fields = await reply.json()
            tally.n_calls += 1
            tally.n_rows += rows_of(fields)
            keeping.append(asyncio.create_task(keep(call, fields)))
        await asyncio.gather(*keeping)


def load(path: Path | None, n_episodes: int, n_turns: int | None, in_flight: int = IN_FLIGHT) -> Traffic:
    """The shortest trajectories of a tau-bench results file, cut after so many calls if that is asked, with every tool
    that is called in the file; without a file, made-up ones.
    """
    if path is None:
        return Traffic([made_up(number, n_turns or MADE_UP_TURNS) for number in range(n_episodes)], [], in_flight)
    found = [result["traj"] for result in json.loads(path.read_text()) if result["traj"]]
    fitting = [traj for traj in sorted(found, key=size) if size(traj) <= FITTING_CHARS][:n_episodes]
    if len(fitting) < n_episodes:
        sys.exit(f"{path} has {len(fitting)} trajectories that fit, fewer than {n_episodes}: give --episodes less")
    return Traffic([Episode(cut(traj, n_turns)) for traj in fitting], signatures(found), in_flight)


def size(messages: list[Message]) -> int:
    return len(json.dumps(messages))


def cut(messages: list[Message], n_turns: int | None) -> list[Message]:
    """The messages up to and including the agent's n-th."""
    ends = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: ends[:n_turns][-1] + 1]


def made_up(number: int, n_turns: int) -> Episode:
    messages = [{"role": "system", "content": POLICY}]
    for turn in range(n_turns):
        messages.append({"role": "user", "content": f"Customer {number}, question {turn}. {SAID}"})
        messages.append({"role": "assistant", "content": SAID})
    return Episode(messages)


def signatures(trajectories: list[list[Message]]) -> list[Message]:
    """The `tools` of a request: those that are called in these trajectories, with the arguments that they are given."""
    seen: dict[str, dict[str, Message]] = {}
    for message in (message for trajectory in trajectories for message in trajectory):
        for call in message.get("tool_calls") or []:
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            seen.setdefault(name, {}).update({key: {"type": JSON_TYPES[type(v)]} for key, v in arguments.items()})
    return [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
        for name, properties in seen.items()
    ]
