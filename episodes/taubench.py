"""What tautap knows of tau-bench, all of it: who is speaking, and its results files.

tau-bench sends no id of any kind. The agent is told what the simulated user says, the user what the agent responds; a
supervisor is shown a user's conversation and a reply in it, and says whether it will do.
source: github.com/sierra-research/tau-bench, commit 59a200c: envs/user.py, agents/*.py, run.py
"""

from __future__ import annotations

from episodes.cast import Dialect, Part, Watch
from episodes.messages import JSON, parse_object, text_of

USER = "You are a user interacting with an agent."
INSTRUCTION = "\n\nInstruction: "
RULES = "\nRules:\n"
SUPERVISOR = "You are a supervisor of the Agent in the conversation."
REACT_USER_END = "(this will be parsed and sent to the agent)>"
# How the prompts of the two agents that act in plain text end.
TEXT_AGENTS = {
    "act": "Always make sure you generate valid JSON only.",
    "react": "Try to be helpful and always follow the policy.",
}
TOOL_RESULT = "API output: "
STOP = "###STOP###"
LABELS = {"user": "Customer", "assistant": "Agent"}


class TauBench(Dialect):
    """tau-bench's own way of speaking."""

    name = "tau-bench"

    def part(self, messages: list[JSON]) -> Part:
        first = text_of(messages[0]) if messages else ""
        if first.startswith(USER):
            strategy = "react" if first.endswith(REACT_USER_END) else "llm"
            # Making a simulator makes it talk before it has a task.
            return Part("user" if instruction(messages) is not None else "warmup", strategy)
        if len(messages) == 1 and first.startswith(SUPERVISOR):
            return Part("supervisor")
        return Part("agent", _agent_strategy(first))

    def told(self, part: Part, messages: list[JSON]) -> str | None:
        last = messages[-1]
        if last.get("role") != "user" or (part.role != "agent" and len(messages) <= 2):
            return None
        text = text_of(last)
        return None if part.strategy in TEXT_AGENTS and text.startswith(TOOL_RESULT) else text

    def says(self, part: Part, reply: JSON) -> str | None:
        text = text_of(reply)
        if part.role == "agent":
            return _response(text) if part.strategy in TEXT_AGENTS else None if reply.get("tool_calls") else text
        if part.role == "user":
            return _user_response(text) if part.strategy == "react" else text
        return None

    def conversation(self, messages: list[JSON]) -> str:
        return "\n".join(
            f"{LABELS.get(role := str(message.get('role')), role.capitalize())}: {message.get('content')}"
            for message in messages
        )

    def watch(self, messages: list[JSON]) -> Watch | None:
        """What the verify and the reflection strategy's supervisors are shown. Only the former puts a whole message,
        as Python prints it, where the reply's text should be; only it asks again with the same messages.
        """
        conversation, mark, response = (
            text_of(messages[0]).partition("# Transcript:\n")[2].partition("\n\n# Response:\n")
        )
        if not mark:
            return None
        verifies = response.startswith("Message(")
        return Watch(conversation, response, "verify" if verifies else "reflection", verifies)

    def shown(self, watch: Watch, reply: str) -> bool:
        return reply in watch.response or repr(reply)[1:-1] in watch.response

    def approves(self, reply: JSON) -> bool:
        return "true" in text_of(reply).lower()


def instruction(messages: list[JSON]) -> str | None:
    """The task that a simulator's messages give it; None if they give none."""
    first = text_of(messages[0])
    if not first.startswith(USER + INSTRUCTION):
        return None
    return first[len(USER + INSTRUCTION) :].partition("\n" + RULES)[0]


def _agent_strategy(system: str) -> str:
    for strategy, end in TEXT_AGENTS.items():
        if system.endswith(end + "\n"):
            return strategy
    return "few-shot" if "\n\nExample 1:\n" in system else "tool-calling"


def _response(text: str) -> str | None:
    """What an agent that acts in plain text says to the user; None if it uses a tool."""
    action = text.split("Action:")[-1].strip()
    fields = parse_object(action)
    if fields is None:
        return action
    arguments = fields.get("arguments")
    content = arguments.get("content") if fields.get("name") == "respond" and isinstance(arguments, dict) else None
    return content if isinstance(content, str) else None


def _user_response(text: str) -> str | None:
    """What a simulator that thinks first says to the agent; None if it cannot be told, which ends the task."""
    if STOP in text:
        return STOP
    for mark in ("Thought:", "User Response:"):
        if mark in text:
            parts = text.split(mark)
            return parts[1].strip() if len(parts) == 2 else None
    return None
