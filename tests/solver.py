"""A stub worker that plays the tasks of a real tau-bench, both sides, from their own solutions.

All users open with the same words and say who they are when they are asked. Of every four tasks, by their numbers, two
are solved, one is answered with nothing done, and one crashes in tau-bench, on a reply that it cannot read. Supervisors
are of no firm opinion.
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

from episodes.messages import text_of
from episodes.taubench import REACT_USER_END, TEXT_AGENTS, TOOL_RESULT, USER, instruction
from tests.stub import Asked, Stub, main

JSON = dict[str, Any]
SOLUTIONS = "TAUTAP_SOLUTIONS"
ASK, DONE, STOP = "Who are you?", "That is all:", "###STOP###"
LEAVES, CRASHES = 2, 3


class Solver(Stub):
    """Reads the file that TAUTAP_SOLUTIONS names: a list of tasks as tau-bench has them, in its order."""

    def __init__(self, spool: Path) -> None:
        super().__init__(spool)
        self._solutions: list[JSON] = json.loads(Path(os.environ[SOLUTIONS]).read_text())
        self._numbers = {task["instruction"]: number for number, task in enumerate(self._solutions)}
        self._random = random.Random(1)

    def told(self, asked: Asked) -> JSON | None:
        messages = asked.messages
        first = text_of(messages[0])
        if messages[0]["role"] == "user":
            return {"content": self._supervisor(first)}
        if first.startswith(USER):
            text = self._user(messages)
            return {"content": f"Thought:\nHm.\n\nUser Response:\n{text}" if first.endswith(REACT_USER_END) else text}
        action = self._agent(messages)
        if first.endswith(tuple(f"{end}\n" for end in TEXT_AGENTS.values())):
            return {"content": f"Thought:\nHm.\nAction:\n{json.dumps(action)}"}
        if action["name"] == "respond":
            return {"content": action["arguments"]["content"]}
        arguments = json.dumps(action["arguments"]) if "arguments" in action else "{"
        function = {"name": action["name"], "arguments": arguments}
        return {"content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}

    def _supervisor(self, asked: str) -> str:
        if asked.endswith(REACT_USER_END):
            return "Reflection:\nHm.\n\nResponse:\nBetter."
        return self._random.choice(["true", "true", "false"])

    def _user(self, messages: list[JSON]) -> str:
        task = instruction(messages)
        for message in reversed(messages[1:]):
            text = text_of(message)
            if task is not None and ASK in text:
                return f"I am customer {self._numbers[task]}."
            if DONE in text:
                return STOP
        return "Hi!"

    def _agent(self, messages: list[JSON]) -> JSON:
        heard = [text_of(message) for message in messages[1:] if message["role"] != "assistant"]
        number = next((int(found[1]) for text in heard if (found := re.search(r"I am customer (\d+)\.", text))), None)
        if number is None:
            return {"name": "respond", "arguments": {"content": ASK}}
        if number % 4 == CRASHES:
            return {"name": "nothing"}
        task = self._solutions[number]
        results = [m for m in messages if m["role"] == "tool" or text_of(m).startswith(TOOL_RESULT)]
        actions = [] if number % 4 == LEAVES else task["actions"]
        if len(results) < len(actions):
            action = actions[len(results)]
            return {"name": action["name"], "arguments": action["kwargs"]}
        return {"name": "respond", "arguments": {"content": f"{DONE} {', '.join(task['outputs'])}"}}


if __name__ == "__main__":
    main(Solver)
