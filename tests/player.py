"""Plays conversations as tau-bench sends them, with real litellm clients, and knows where each call belongs.

`playing` has a process of its own for it: litellm takes more of a processor than all it talks to, and most of that when
it is imported.

Every request tells the stub its reply (`stub_reply`) and carries the truth about itself (`truth`), which the proxy does
not read. What tau-bench does is described in `episodes.taubench`; the prompts here are short ones that begin and end
like its own.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

JSON = dict[str, Any]
HI = {"role": "user", "content": "Hi! How can I help you today?"}
POLICY = "# Airline Agent Policy\n\nHelp with bookings."
SUPERVISOR = "You are a supervisor of the Agent in the conversation."
TEXT_AGENT = "\n# Instruction\nAct.\n"
ENDS = {
    "act": "Always make sure you generate valid JSON only.\n",
    "react": "Try to be helpful and always follow the policy.\n",
}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
EXAMPLES = ["user: Hi!\nassistant: Hello.", "user: My seat?\ntool: {}\nassistant: 12A."]
LABELS = {"user": "Customer", "assistant": "Agent", "system": "System"}


class GaveUp(Exception):
    """A task ends as one does in tau-bench when something raises."""


def simulator_prompt(instruction: str | None, strategy: str) -> str:
    task = f"\n\nInstruction: {instruction}\n" if instruction is not None else ""
    end = "\n\nUser Response:\n<the user response (this will be parsed and sent to the agent)>"
    return f"You are a user interacting with an agent.{task}\nRules:\n- Be brief.{end if strategy == 'react' else ''}"


@dataclass
class Task:
    """A task attempt to play. turns: the trajectory's messages, system prompt and first user message included."""

    id: int
    trial: int
    instruction: str
    traj: list[JSON]
    agent: str = "tool-calling"
    user: str = "llm"
    crash_at: int | None = None
    info: JSON = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.id}/{self.trial}"


@contextmanager
def playing() -> Iterator[Callable[..., list[JSON]]]:
    """A function: `play(url, model, *trials)` plays trials, lists of tasks, one after another, 16 tasks at once, and
    returns what tau-bench would write into its results file.
    """
    # Without this, importing litellm asks the network for prices.
    env = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command, pipe = [sys.executable, "-W", "ignore", "-m", "tests.player"], subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=env) as process,
    ):
        assert process.stdin is not None and process.stdout is not None

        def play(url: str, model: str, *trials: list[Task]) -> list[JSON]:
            work = {"url": url, "model": model, "trials": [[asdict(task) for task in tasks] for tasks in trials]}
            print(json.dumps(work), file=process.stdin, flush=True)
            late = threading.Timer(300, process.kill)
            late.start()
            answer = process.stdout.readline()
            late.cancel()
            log.seek(0)
            assert answer, log.read()[-4000:]
            return json.loads(answer)

        yield play


class Player:
    """Plays tasks against a base URL; `results` is what tau-bench would write."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.model = model
        self.results: list[JSON] = []
        self._lock = threading.Lock()

    def play_all(self, tasks: list[Task]) -> None:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(self.play, tasks))

    def play(self, task: Task) -> None:
        traj, error = [], None
        try:
            traj = Playing(self, task).run()
        except GaveUp as gave_up:
            error = str(gave_up)
        info = {"error": error} if error else {"task": {"instruction": task.instruction, **task.info}}
        result = {"task_id": task.id, "trial": task.trial, "reward": float(task.id % 2), "info": info, "traj": traj}
        with self._lock:
            self.results.append(result)

    def ask(self, messages: list[JSON], reply: JSON, truth: JSON, **options: Any) -> JSON:
        """One call; returns the reply's message as tau-bench keeps it."""
        import litellm  # here, and not where pytest would see it: it warns

        response = litellm.completion(
            model=self.model,
            custom_llm_provider="openai",
            messages=messages,
            api_base=self.url,
            api_key="none",
            extra_body={"stub_reply": reply, "truth": truth},
            **options,
        )
        return response.choices[0].message.model_dump()


class Playing:
    """One task attempt under way."""

    def __init__(self, player: Player, task: Task) -> None:
        self._player = player
        self._task = task
        self._random = random.Random(task.name)
        self._turns: Counter[str] = Counter()
        self._attempts: Counter[tuple[str, int]] = Counter()
        self.simulated: list[JSON] = []

    def run(self) -> list[JSON]:
        for _ in range(2 if self._task.user == "react" else 1):
            self._warm_up()
        said = iter([m for m in self._task.traj[1:] if m["role"] == "user"])
        self._simulator_reset()
        messages = [self._system(), {"role": "user", "content": self._say(next(said)["content"])}]
        for i, message in enumerate(self._task.traj):
            if message["role"] != "assistant":
                continue
            if self._task.crash_at is not None and i >= self._task.crash_at:
                raise GaveUp("told to crash")
            messages.append(self._act(messages, message))
            following = self._task.traj[i + 1]
            if following["role"] == "user":
                self.simulated.append({"role": "user", "content": message["content"]})
                messages.append({"role": "user", "content": self._say(next(said)["content"])})
            elif self._task.agent in ENDS:
                messages.append({"role": "user", "content": f"API output: {following['content']}"})
            else:
                call = messages[-1]["tool_calls"][0]
                messages.append({**following, "tool_call_id": call["id"], "name": call["function"]["name"]})
        return messages

    # ---- the agent

    def _system(self) -> JSON:
        if self._task.agent in ENDS:
            return {"role": "system", "content": POLICY + TEXT_AGENT + ENDS[self._task.agent]}
        shots = self._random.sample(EXAMPLES, len(EXAMPLES)) if self._task.agent == "few-shot" else []
        examples = [f"Example {i + 1}:\n{shot}" for i, shot in enumerate(shots)]
        return {"role": "system", "content": "\n\n".join([self._task.traj[0]["content"], *examples])}

    def _act(self, messages: list[JSON], message: JSON) -> JSON:
        calls = message.get("tool_calls")
        truth = self._truth("agent", "agent")
        if self._task.agent in ENDS:
            function = calls[0]["function"] if calls else {"name": "respond", "arguments": None}
            arguments = json.loads(function["arguments"]) if calls else {"content": message["content"]}
            thought = "Thought:\nHm.\n" if self._task.agent == "react" else ""
            action = json.dumps({"name": function["name"], "arguments": arguments})
            if not calls and self._random.random() < 0.3:
                action = message["content"]
            reply = {"content": f"{thought}Action:\n{action}"}
            return self._player.ask(messages, reply, truth, temperature=0.0)
        reply = {"content": message["content"]}
        if calls:  # the benchmark keeps the first of several
            reply["tool_calls"] = calls * self._random.choice([1, 2])
        echo = self._player.ask(messages, reply, truth, temperature=0.0, tools=TOOLS)
        if calls:
            echo["tool_calls"] = echo["tool_calls"][:1]
        return echo

    # ---- the simulator

    def _warm_up(self) -> None:
        messages = [{"role": "system", "content": simulator_prompt(None, self._task.user)}, HI]
        truth = {"task": "warmup", "role": "warmup", "thread": "warmup", "turn": 0, "attempt": 0, "kind": "turn"}
        reply = {"content": self._random.choice(["Hello!", "Hi."])}
        echo = self._player.ask(messages, reply, truth)
        if self._task.user in ("verify", "reflection"):
            self._supervise(messages, self._shown(echo), "true", "warmup")

    def _simulator_reset(self) -> None:
        prompt = simulator_prompt(self._task.instruction, self._task.user)
        self.simulated = [{"role": "system", "content": prompt}, HI]

    def _say(self, text: str) -> str:
        """The simulator's next utterance as the agent hears it."""
        messages = list(self.simulated)
        say = {"react": self._think, "verify": self._verified, "reflection": self._reflected}.get(self._task.user)
        if say is not None:
            return say(messages, text)
        self.simulated.append(self._simulate(messages, text))
        return text

    def _simulate(self, messages: list[JSON], text: str, kind: str = "turn") -> JSON:
        return self._player.ask(messages, {"content": text}, self._truth("user", "user", kind))

    def _think(self, messages: list[JSON], text: str) -> str:
        if self._random.random() < 0.5:
            self.simulated.append(self._simulate(messages, f"User Response:\n{text}\n"))
        else:
            self.simulated.append(self._simulate(messages, f"Thought:\n{text}"))
        return "###STOP###" if "###STOP###" in text else text.strip()

    def _verified(self, messages: list[JSON], text: str) -> str:
        rejected = self._random.choice([0, 0, 1, 3])
        for attempt in range(3):
            last = attempt == min(rejected, 2)
            draft = text if last else f"{text} (draft {attempt})"
            echo = self._simulate(messages, draft, "reask" if attempt else "turn")
            good = last and rejected < 3
            self._supervise(messages, self._shown(echo), "true" if good else "false")
            if good:
                self.simulated.append(echo)
            if last:
                return draft
        raise AssertionError

    def _reflected(self, messages: list[JSON], text: str) -> str:
        fine, mended = self._random.random() < 0.5, self._random.random() < 0.5
        first = text if fine or not mended else f"{text} (draft)"
        self.simulated.append(self._simulate(messages, first))
        self._supervise(messages, first, "true" if fine else "false")
        if fine:
            return text
        self._supervise(messages, first, f"Reflection:\nHm.\n\nResponse:\nBetter: {text}")
        beside = [*messages, {"role": "user", "content": f"Better: {text}"}]
        second = text if mended else f"{text} (worse)"
        self.simulated.append(self._simulate(beside, second, "branch"))
        self._supervise(beside, second, "true" if mended else "false")
        return text

    def _shown(self, echo: JSON) -> str:
        """A reply as the verify strategy shows it, a whole message, and as reflection does."""
        return (
            f"Message(content={echo['content']!r}, role='assistant')"
            if self._task.user == "verify"
            else echo["content"]
        )

    def _supervise(self, messages: list[JSON], response: str, verdict: str, task: str | None = None) -> None:
        transcript = "\n".join(f"{LABELS[m['role']]}: {m['content']}" for m in messages)
        text = f"{SUPERVISOR}\n\n# Transcript:\n{transcript}\n\n# Response:\n{response}\n"
        self._turns["supervisor"] += 1
        truth = {"task": task or self._task.name, "role": "supervisor", "turn": 0, "attempt": 0, "kind": "turn"}
        truth["thread"] = f"supervisor {self._turns['supervisor']}"
        self._player.ask([{"role": "user", "content": text}], {"content": verdict}, truth)

    def _truth(self, role: str, thread: str, kind: str = "turn") -> JSON:
        if kind == "turn":
            self._turns[thread] += 1
        turn = self._turns[thread] - 1
        attempt = self._attempts[thread, turn]
        self._attempts[thread, turn] += 1
        return {"task": self._task.name, "role": role, "thread": thread, "turn": turn, "attempt": attempt, "kind": kind}


def unchecked(body: JSON, expected: Any) -> JSON:
    """What the OpenAI client makes of a body like ours when it has gone through every field of every message: half of
    the time that a call takes.
    """
    import openai

    return {name: value for name, value in body.items() if not isinstance(value, openai.NotGiven | openai.Omit)}


if __name__ == "__main__":
    # litellm imports it when it first needs it, which may not happen in two threads at once.
    with suppress(ImportError):
        import httpx2  # noqa: F401
    from openai.resources.chat.completions import completions

    completions.maybe_transform = unchecked
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what litellm prints is no answer
    for line in sys.stdin:
        work = json.loads(line)
        player = Player(work["url"], work["model"])
        for tasks in work["trials"]:
            player.play_all([Task(**task) for task in tasks])
        print(json.dumps(player.results), file=answers)
