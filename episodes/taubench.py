"""What tautap knows of tau-bench, all of it: who is speaking, its tasks, and its results files.

tau-bench sends no id of any kind. The agent is told what the simulated user says, the user what the agent responds; a
supervisor is shown a user's conversation and a reply in it, and says whether it will do.
source: github.com/sierra-research/tau-bench, commit 59a200c: envs/user.py, agents/*.py, run.py
"""

from __future__ import annotations

import ast
import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from episodes.cast import WARMUPS, Dialect, Part, Watch
from episodes.errors import BadInput
from episodes.history import Episode, History
from episodes.matching import match, ties
from episodes.messages import JSON, chat, first_call, parse_object, prefix_digests, reply_messages, text_of
from episodes.records import Call, Count, Link

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
VERIFY_ATTEMPTS = 3
STOP = "###STOP###"
POLICY = re.compile(r"# (\w+) agent policy", re.IGNORECASE)
# tau_bench/run.py, ckpt_path
FILE_NAME = re.compile(r"(tool-calling|few-shot|act|react)-.*_user-.*-(llm|react|verify|reflection|human)_\d+\.json")
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
            if part.strategy in TEXT_AGENTS:
                return _response(text)
            call = first_call(reply)
            return text if call is None else _responded(*call)
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
        if response.startswith("Message("):
            return Watch(conversation, response, "verify", VERIFY_ATTEMPTS)
        return Watch(conversation, response, "reflection")

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
    return _responded(fields.get("name"), fields.get("arguments"))


def _responded(name: object, arguments: object) -> str | None:
    """What a tool call says to the user; None if it is another tool than that for it."""
    content = arguments.get("content") if name == "respond" and isinstance(arguments, dict) else None
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


# ---- tasks

# Python 3.11 may end it with a SystemError where two threads do it at once: they share the count of its depth.
PARSING = threading.Lock()


def read_tasks(package: Path, env: str, split: str) -> dict[int, str]:
    """Task id → instruction, out of the directory `tau_bench` of a checkout or an installation; none if it has no such
    tasks.

    Read and not imported: tau-bench imports litellm, which takes seconds.
    """
    try:
        with PARSING:
            module = ast.parse((package / "envs" / env / f"tasks_{split}.py").read_bytes())
    except (OSError, SyntaxError, ValueError):
        return {}
    lists = [node.value for node in module.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)]
    tasks = [task for one in lists for task in one.elts if isinstance(task, ast.Call)]
    return {number: text for number, task in enumerate(tasks) if (text := _keyword(task, "instruction")) is not None}


def _keyword(call: ast.Call, name: str) -> str | None:
    """The text that a call is given under a name."""
    found = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
    return found.value if isinstance(found, ast.Constant) and isinstance(found.value, str) else None


# ---- results files


class Result(msgspec.Struct, frozen=True, eq=False):
    """One entry of a results file: a task attempted. source: the file's name."""

    task_id: int
    reward: float
    info: JSON
    traj: list[JSON]
    trial: Count  # the index has no room for a larger one
    source: str = ""

    @property
    def instruction(self) -> str | None:
        """The task's; None for an attempt that ended in an exception, of which little is kept."""
        task = self.info.get("task")
        found = task.get("instruction") if isinstance(task, dict) else None
        return found if isinstance(found, str) else None


def read_results(path: Path) -> list[Result]:
    """The entries of a results file; BadInput says what is wrong with it."""
    try:
        return parse_results(path.read_bytes(), path.name)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None


def parse_results(text: bytes, source: str) -> list[Result]:
    """The entries of a results file of that name; BadInput says what is wrong with it."""
    try:
        results = msgspec.json.decode(text, type=list[Result])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadInput(
            f"{source} is not a results file of tau-bench, a JSON list of task_id, reward, info, traj and trial: "
            f"{error}"
        ) from None
    return [msgspec.structs.replace(result, source=source) for result in results]


class Score(msgspec.Struct, frozen=True):
    """An entry of a results file without what was said."""

    task_id: int
    trial: int
    reward: float

    @property
    def passed(self) -> bool:
        return abs(self.reward - 1) <= 1e-6


def pass_hat(scores: Iterable[Score]) -> dict[int, float]:
    """k → the chance that k attempts at a task all pass, averaged over the tasks that were attempted so often.

    source: tau_bench/run.py, display_metrics; arxiv.org/abs/2406.12045
    """
    attempts: dict[int, list[bool]] = {}
    for score in scores:
        attempts.setdefault(score.task_id, []).append(score.passed)
    found = {}
    for k in range(1, max(map(len, attempts.values()), default=0) + 1):
        rates = [math.comb(sum(a), k) / math.comb(len(a), k) for a in attempts.values() if len(a) >= k]
        found[k] = sum(rates) / len(rates)
    return found


@dataclass(eq=False)
class Attempt:
    """An episode as a results file can know it.

    ends: digests of the agent's conversation with its last reply. endings: what the user may have said last.
    """

    episode: Episode
    started: float
    ends: set[int] = field(default_factory=set)
    endings: set[str] = field(default_factory=set)
    instruction: str | None = None
    env: str | None = None


def attempts(history: History) -> list[Attempt]:
    """The run's episodes in the order in which they began."""
    found = [_attempt(history, e) for e in history.episodes.values() if e.calls and e.id != WARMUPS]
    return sorted(found, key=lambda attempt: attempt.started)


def _attempt(history: History, episode: Episode) -> Attempt:
    attempt = Attempt(episode, min(call.started for call in episode.calls))
    for call in _last_turn(episode, "user"):
        messages, replies = _exchange(history.whole(call))
        said = (DIALECT.says(DIALECT.part(messages), reply) for reply in replies)
        attempt.endings |= {text for text in said if text is not None}
        attempt.instruction = instruction(messages) if messages else None
    for call in _last_turn(episode, "agent"):
        messages, replies = _exchange(history.whole(call))
        attempt.ends |= {list(prefix_digests([*messages, reply]))[-1] for reply in replies}
        attempt.env = _env(messages)
    return attempt


def _last_turn(episode: Episode, role: str) -> list[Call]:
    """The calls of the turn that began last. A conversation that went on after a seal has another thread since."""
    calls = [call for call in episode.calls if call.role == role]
    turns = [(call.thread, call.turn) for call in sorted(calls, key=lambda call: call.started)]
    return [call for call in calls if (call.thread, call.turn) == turns[-1]]


def _exchange(call: Call) -> tuple[list[JSON], list[JSON]]:
    replies = reply_messages(parse_object(call.reply) or {}) if call.status == 200 else []
    return chat(parse_object(call.request)) or [], replies


def _env(messages: list[JSON]) -> str | None:
    policy = POLICY.match(text_of(messages[0])) if messages else None
    return policy[1].lower() if policy else None


By = Literal["transcript", "instruction", "order"]
Fitting = dict[Result, list[Attempt]]


class Links(NamedTuple):
    """What results and a run have to do with each other: links, results of no episode, episodes of no result."""

    links: list[Link]
    results: list[Result]
    episodes: list[str]

    def doubts(self) -> Iterator[str]:
        """Of each link that could be another: why."""
        for link in self.links:
            joined = f"episode {link.episode}: task {link.task_id}, trial {link.trial}"
            if link.by == "order":
                yield f"{joined}, by the order of tasks alone"
            if link.tied:
                yield f"{joined}, or {', '.join(link.tied)}"


def find_links(
    history: History,
    results: Iterable[Result],
    env: str | None = None,
    split: str | None = None,
    tasks: Mapping[int, str] | None = None,
) -> Links:
    """The episode of each result.

    By transcript; an attempt that ended in an exception has none, and is found by its task's instruction and by its
    place among the task's trials. The instruction is told by tasks (task id → instruction), else by a result of another
    trial, else, if as many tasks as instructions are left over, by the order in which they began.
    """
    results, known = sorted(results, key=lambda result: result.trial), attempts(history)
    by: dict[Result, By] = {}
    fitting = _by_transcript([result for result in results if result.traj], known)
    pairs = match(fitting)
    by.update(dict.fromkeys(pairs, "transcript"))
    silent = [result for result in results if not result.traj]
    # What was found by its transcript before is not given away on less.
    loose = [a for a in known if (before := a.episode.link) is None or before.by != "transcript"]
    instructions = _known_before(loose) | {
        (r.source, r.task_id): i for r in results if (i := (tasks or {}).get(r.task_id, r.instruction))
    }
    for kind in ("instruction", "order"):
        if kind == "order":
            instructions |= _left_over(silent, instructions, loose, pairs)
        fits = _by_instruction([r for r in silent if r not in pairs], instructions, loose, pairs)
        found = match(fits)
        pairs |= found
        fitting |= {result: fits[result] for result in found}
        by.update(dict.fromkeys(found, kind))
    envs = {result.source: attempt.env for result, attempt in pairs.items() if attempt.env}
    tied = _tied(fitting, pairs)
    links = [
        _link(result, attempt, by[result], envs.get(result.source) or env, split, tied[result])
        for result, attempt in pairs.items()
    ]
    linked = {link.episode for link in links} | {a.episode.id for a in known if a.episode.link is not None}
    said = {_identity(result) for result in pairs}
    return Links(
        links,
        [result for result in results if result not in pairs and _identity(result) not in said],
        [attempt.episode.id for attempt in known if attempt.episode.id not in linked],
    )


def _identity(result: Result) -> bytes:
    """What makes two entries the same, in whatever files they are."""
    return msgspec.json.encode([result.task_id, result.trial, result.info, result.traj])


def _by_transcript(results: list[Result], known: list[Attempt]) -> Fitting:
    """result → the attempts that it tells of, those first that were linked to it before, then those not linked yet.

    Of its own task if there are any; the results that have none come last, for they are to take nobody else's.
    """
    by_end: dict[int, list[Attempt]] = {}
    for attempt in known:
        for end in attempt.ends:
            by_end.setdefault(end, []).append(attempt)
    fitting: Fitting = {}
    doubtful: Fitting = {}
    for result in results:
        # The last message is what the last action led to; the agent was not asked again.
        *_, end = prefix_digests(result.traj[:-1] or result.traj)
        fits = [attempt for attempt in by_end.get(end, []) if _ends_so(result, attempt)]
        mine = [attempt for attempt in fits if not _of_another_task(result, attempt)]
        # Agents that were told the same may have each other's user, so that a transcript says more than an instruction.
        into = fitting if mine else doubtful
        into[result] = sorted(mine or fits, key=lambda attempt: _linked_before(result, attempt))
    return fitting | doubtful


def _of_another_task(result: Result, attempt: Attempt) -> bool:
    return None not in (result.instruction, attempt.instruction) and result.instruction != attempt.instruction


def _ends_so(result: Result, attempt: Attempt) -> bool:
    last = result.traj[-1]
    return (
        last.get("role") != "user"
        or not attempt.endings
        or text_of(last).startswith(TOOL_RESULT)
        or text_of(last) in attempt.endings
    )


def _linked_before(result: Result, attempt: Attempt) -> int:
    link = attempt.episode.link
    if link is None:
        return 1
    return 0 if (link.source, link.task_id, link.trial) == (result.source, str(result.task_id), result.trial) else 2


def _by_instruction(
    results: list[Result],
    instructions: Mapping[tuple[str, int], str],
    known: list[Attempt],
    pairs: Mapping[Result, Attempt],
) -> Fitting:
    """result → the attempts that are nobody's yet and had its task, between those of the trials before and after."""
    taken = set(pairs.values())
    fitting: Fitting = {}
    for result in results:
        task = (result.source, result.task_id)
        trials = [(r.trial, a.started) for r, a in pairs.items() if (r.source, r.task_id) == task]
        after = max((at for trial, at in trials if trial < result.trial), default=0.0)
        before = min((at for trial, at in trials if trial > result.trial), default=math.inf)
        fits = [a for a in known if a not in taken and a.instruction is not None and after <= a.started <= before]
        mine = [attempt for attempt in fits if attempt.instruction == instructions.get(task)]
        fitting[result] = sorted(mine, key=lambda attempt: _linked_before(result, attempt))
    return fitting


def _known_before(known: list[Attempt]) -> dict[tuple[str, int], str]:
    """Instructions of tasks that attempts were linked to by them."""
    linked = [(a.instruction, a.episode.link) for a in known if a.instruction and a.episode.link]
    return {(link.source, int(link.task_id)): text for text, link in linked if link.by == "instruction"}


def _left_over(
    silent: list[Result],
    instructions: Mapping[tuple[str, int], str],
    known: list[Attempt],
    pairs: Mapping[Result, Attempt],
) -> dict[tuple[str, int], str]:
    """Instructions of tasks that no result tells, in the order in which both began; none unless the numbers agree."""
    tasks = dict.fromkeys((r.source, r.task_id) for r in silent if (r.source, r.task_id) not in instructions)
    taken, told = set(pairs.values()), set(instructions.values())
    left = dict.fromkeys(a.instruction for a in known if a not in taken and a.instruction and a.instruction not in told)
    return dict(zip(tasks, left, strict=True)) if len(tasks) == len(left) else {}


def _tied(fitting: Fitting, pairs: Mapping[Result, Attempt]) -> dict[Result, list[str]]:
    """result → other episodes that it fits. Trials of one file follow each other, which tells equal ones apart."""
    found, fits = {}, {result: set(fitting[result]) for result in pairs}
    for result, others in ties(fitting, pairs).items():
        rivals = [other for other in pairs if not fits[other].isdisjoint(fits[result])] if others else []
        contested = set().union(*(fits[other] for other in rivals))
        ordered = len({(other.source, other.task_id) for other in rivals}) == 1 and len(rivals) == len(contested)
        found[result] = [] if ordered else [attempt.episode.id for attempt in others]
    return found


def _link(result: Result, attempt: Attempt, by: By, env: str | None, split: str | None, tied: list[str]) -> Link:
    name = FILE_NAME.fullmatch(result.source)
    pair, error = attempt.episode.pair, result.info.get("error")
    return Link(
        episode=attempt.episode.id,
        benchmark="tau-bench",
        task_id=str(result.task_id),
        trial=result.trial,
        reward=result.reward,
        by=by,
        env=env,
        split=split,
        strategy=name[1] if name else pair.strategy if pair else None,
        user_strategy=name[2] if name else pair.user_strategy if pair else None,
        error=None if error is None else str(error),
        info=msgspec.json.encode(result.info).decode(),
        source=result.source,
        tied=tied,
    )


DIALECT = TauBench()
