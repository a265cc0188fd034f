"""Who speaks with whom, in any order in which it can have happened."""

import json
import random
from collections import defaultdict

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from episodes.cast import WARMUPS, Cast, Dialect
from episodes.records import Call
from episodes.taubench import TauBench

HI = {"role": "user", "content": "Hi! How can I help you today?"}
POLICY = {"role": "system", "content": "# Retail agent policy"}
WARM_UP = [{"role": "system", "content": "You are a user interacting with an agent.\nRules:\n- x"}, HI]


def prompt(instruction):
    return {
        "role": "system",
        "content": f"You are a user interacting with an agent.\n\nInstruction: {instruction}\n\nRules:\n- x",
    }


def said(text):
    return {"role": "assistant", "content": text}


class World:
    """Conversations of tau-bench, a step of one at a time, fed to a cast; `truth` knows whose each thread is.

    A script is (instruction, lines): what the user says, the agent responds, the user says, …
    """

    def __init__(self, scripts, dialect=None):
        self.cast = Cast(dialect or TauBench())
        self.scripts = scripts
        self.n = 0
        self.histories = {}

    def ask(self, messages, reply, failures=0):
        for attempt in range(failures + 1):
            self.n += 1
            part = self.cast.dialect.part(messages)
            place = self.cast.place(f"c{self.n}", messages, part, retried=attempt > 0)
            good = attempt == failures
            yield
            self.cast.replied(place, [said(reply) if isinstance(reply, str) else reply] if good else [])
            self.histories.setdefault(place.thread, []).append(
                (place.turn, place.attempt, place.kind, [*messages], reply if good else None)
            )
            yield

    def play(self, script, failures):
        instruction, lines = script
        user, agent = [prompt(instruction), HI], [POLICY]
        for i, line in enumerate(lines):
            yield from self.ask(agent if i % 2 else user, line, next(failures, 0))
            speaker, listener = (agent, user) if i % 2 else (user, agent)
            speaker.append(said(line))
            listener.append({"role": "user", "content": line})

    def run(self, order, failures=()):
        """Step the conversations in the order of these numbers, then the rest one after another."""
        failing = iter(failures)
        playing = [self.play(script, failing) for script in self.scripts]
        for number in order:
            if playing:
                one = playing[number % len(playing)]
                if next(one, "over") == "over":
                    playing.remove(one)
        for one in playing:
            for _ in one:
                pass


WORDS = st.sampled_from(["Yes.", "Hi!", "No."])
SCRIPTS = st.lists(
    st.tuples(st.sampled_from(["buy", "sell"]), st.lists(WORDS, min_size=3, max_size=9).filter(lambda x: len(x) % 2)),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(max_examples=60)
@given(SCRIPTS, st.lists(st.integers(0, 99), max_size=200), st.lists(st.integers(0, 2), max_size=20))
def test_threads_and_pairs_are_whole_conversations_however_they_interleave(scripts, order, failures):
    """Few words, few tasks, so that openings and whole conversations are the same; some calls fail and are repeated.

    Up to an exchange of what nobody can tell apart: the episodes, read one by one, are the conversations played.
    """
    world = World(scripts)
    world.run(order, failures)
    found = sorted(map(str, (episode(world, group) for group in world.cast.groups())))
    assert found == sorted(str((instruction, lines)) for instruction, lines in scripts)


def episode(world, group):
    """An episode's (instruction, lines), read off its threads' last calls; every turn of both must be there once."""
    agent, user = (world.histories[thread] for thread in group.threads)
    for history in (agent, user):
        turns = [(turn, attempt) for turn, attempt, *_ in history]
        assert turns == sorted(turns) and [turn for turn, *_, reply in history if reply] == list(
            range(turns[-1][0] + 1)
        )
        assert all(kind == ("retry" if attempt else "turn") for _, attempt, kind, *_ in history)
    heard = [m["content"] for m in agent[-1][3] if m["role"] != "system"]
    told = [m["content"] for m in user[-1][3] if m["role"] != "system"][1:]
    assert heard == told[: len(heard)] or told == heard[: len(told)]
    last = user[-1][3]
    lines = max(heard, told, key=len)
    instruction = last[0]["content"].split("Instruction: ")[1].split("\n")[0]
    return instruction, [*lines, user[-1][-1]]


def test_conversations_that_cannot_be_told_apart_are_reported_as_tied():
    world = World([("buy", ["Hi!", "Yes.", "Bye."])] * 2)
    world.run([0, 1] * 20)
    groups = world.cast.groups()
    assert [len(group.threads) for group in groups] == [2, 2]
    assert [group.tied for group in groups] == [[groups[1].threads[1]], [groups[0].threads[1]]]


def test_the_same_conversations_one_after_the_other_are_no_tie():
    """No one is told what has not been said yet."""
    world = World([("buy", ["Hi!", "Yes.", "Bye."])] * 3)
    world.run([])
    assert [group.tied for group in world.cast.groups()] == [[], [], []]


def test_a_pair_changes_when_the_exchange_shows_that_it_was_another():
    world = World([])
    buyer, seller = [prompt("buy"), HI], [prompt("sell"), HI]
    for messages in (buyer, seller):
        list(world.ask(messages, "Hi!"))
    first, second = ([POLICY, {"role": "user", "content": "Hi!"}] for _ in range(2))
    list(world.ask(first, "A?"))
    list(world.ask(second, "B?"))
    before = {frozenset(group.threads) for group in world.cast.groups()}
    assert before == {frozenset({"t-c3", "t-c2"}), frozenset({"t-c4", "t-c1"})}
    list(world.ask([*seller, said("Hi!"), {"role": "user", "content": "B?"}], "No."))
    after = {frozenset(group.threads) for group in world.cast.groups()}
    assert after == {frozenset({"t-c3", "t-c1"}), frozenset({"t-c4", "t-c2"})}


def test_warm_ups_and_those_who_watch_them_are_in_no_task():
    world = World([])
    supervised(world, WARM_UP, "Hello", "true")
    assert [(group.episode, group.threads) for group in world.cast.groups()] == [(WARMUPS, ["t-c1", "t-c2"])]


def watched(messages, reply, whole=True):
    """What a supervisor is asked about a simulator's reply; whole: as the verify strategy shows it."""
    labels = {"system": "System", "user": "Customer", "assistant": "Agent"}
    transcript = "\n".join(f"{labels[m['role']]}: {m['content']}" for m in messages)
    begin = "You are a supervisor of the Agent in the conversation.\n# Transcript:\n"
    response = f"Message(content={reply!r})" if whole else reply
    return [{"role": "user", "content": f"{begin}{transcript}\n\n# Response:\n{response}"}]


def supervised(world, messages, reply, verdict):
    """A simulator of the verify strategy says something, and its supervisor what it thinks of it."""
    list(world.ask(messages, reply))
    list(world.ask(watched(messages, reply), verdict))


class Trials:
    """Trials of tasks in which everybody says the same, but for who the user is; supervisors are of no firm opinion.

    said: thread → (task, trial), side, of each of its calls
    """

    LINES = ("Hi!", "Who are you?", "I am number {}.", "Done.", "###STOP###")

    def __init__(self, user, seed):
        self.cast = Cast(TauBench())
        self.said = defaultdict(list)
        self._user = {"verify": self.verified, "reflection": self.reflected}[user]
        self._random = random.Random(seed)
        self._n = 0

    def run(self, n_tasks, n_trials, at_once):
        for trial in range(n_trials):
            waiting, playing = [self.play(task, trial) for task in range(n_tasks)], []
            while waiting or playing:
                while waiting and len(playing) < at_once:
                    playing.append(waiting.pop(0))
                one = self._random.choice(playing)
                if next(one, "over") == "over":
                    playing.remove(one)

    def play(self, task, trial):
        """Of four tasks one ends in an exception, when the user has said who it is."""
        user, agent = [prompt(f"number {task}"), HI], [POLICY]
        for i, line in enumerate(self.LINES[: 3 if task % 4 == 3 else 5]):
            text = line.format(task)
            if i % 2:
                yield from self.ask(agent, text, (task, trial), "agent" if i > 1 else "any agent")
                agent.append(said(text))
                user.append({"role": "user", "content": text})
            else:
                yield from self._user(user, text, (task, trial))
                agent.append({"role": "user", "content": text})

    def ask(self, messages, reply, whose, side):
        self._n += 1
        place = self.cast.place(f"c{self._n}", messages, self.cast.dialect.part(messages), retried=False)
        self.said[place.thread].append((whose, side))
        yield
        self.cast.replied(place, [said(reply)])
        yield

    def watch(self, messages, reply, verdict, whose, whole=True):
        yield from self.ask(watched(messages, reply, whole), verdict, whose, f"supervisor {self._n}")

    def verified(self, user, text, whose):
        messages = list(user)
        for _ in range(3):
            good = self._random.random() < 0.6
            yield from self.ask(messages, text, whose, "user")
            yield from self.watch(messages, text, str(good), whose)
            if good:
                user.append(said(text))
                return

    def reflected(self, user, text, whose):
        messages, good = list(user), self._random.random() < 0.6
        yield from self.ask(messages, text, whose, "user")
        user.append(said(text))
        yield from self.watch(messages, text, str(good), whose, False)
        if good:
            return
        beside = [*messages, {"role": "user", "content": "Better."}]
        yield from self.watch(messages, text, "Reflection:\nHm.\n\nResponse:\nBetter.", whose, False)
        yield from self.ask(beside, text, whose, "user")
        user.append(said(text))
        yield from self.watch(beside, text, "True", whose, False)


@pytest.mark.parametrize("user", ["verify", "reflection"])
@pytest.mark.parametrize("at_once", [1, 16])
@pytest.mark.parametrize("seed", range(8))
def test_trials_in_which_everybody_says_the_same_are_told_apart(user, at_once, seed):
    """Up to the agents' first calls, which have nothing of their own, when tasks run at once."""
    trials = Trials(user, seed)
    trials.run(8, 4, at_once)
    groups = trials.cast.groups()
    assert len(groups) == 32
    for group in groups:
        calls = [[call for call in trials.said[thread] if call[1] != "any agent"] for thread in group.threads]
        assert all(len(set(one)) == 1 for one in calls if one), "a thread is one side of one attempt"
        assert len({whose for one in calls for whose, _ in one}) == 1, "and an episode one attempt"


def test_a_supervisor_watches_the_conversation_that_has_just_gone_on_not_one_like_it_that_has_ended():
    """One trial ends, in an exception say, when a reply was approved; in the next one the same is rejected twice."""
    world = World([])
    opening = [prompt("buy"), HI]
    going_on = [*opening, said("Hi!"), {"role": "user", "content": "Who are you?"}]
    for verdicts in (["true"], ["false", "false", "true"]):
        supervised(world, opening, "Hi!", "true")
        for verdict in verdicts:
            supervised(world, going_on, "I am 3.", verdict)
    users = [group.threads for group in world.cast.groups()]
    assert [len(threads) for threads in users] == [3, 5], "a user and a supervisor for each of its replies"
    first, second = ([history[:3] for history in world.histories[threads[0]]] for threads in users)
    assert first == [(0, 0, "turn"), (1, 0, "turn")]
    assert second == [(0, 0, "turn"), (1, 0, "turn"), (1, 1, "reask"), (1, 2, "reask")]


@pytest.mark.parametrize("retried", [None, False])
def test_a_benchmarks_first_call_is_no_retry_unless_its_client_says_so(retried):
    """A trial ends as its first call fails, and the next one begins alike; litellm's hosted_vllm sends no header and
    does not retry.
    """
    cast = Cast(TauBench())

    def ask(call, messages, *replies):
        place = cast.place(call, messages, cast.dialect.part(messages), retried=retried)
        cast.replied(place, [said(reply) for reply in replies])
        return place

    ask("c1", WARM_UP, "Hello!")
    assert [ask(call, [prompt("buy"), HI]).thread for call in ("c2", "c3")] == ["t-c2", "t-c3"]


def test_an_agent_that_calls_a_tool_named_respond_speaks_to_the_user():
    """As in tau-bench, whatever it called beside it."""
    world = World([])
    user, agent = [prompt("buy"), HI], [POLICY, {"role": "user", "content": "Hi!"}]
    list(world.ask(user, "Hi!"))
    calls = [
        {"id": name, "type": "function", "function": {"name": name, "arguments": json.dumps({"content": "Who?"})}}
        for name in ("respond", "look")
    ]
    asked = {"role": "assistant", "content": None, "tool_calls": calls}
    list(world.ask(agent, asked))
    list(world.ask([*user, said("Hi!"), {"role": "user", "content": "Who?"}], "me"))
    list(world.ask([*agent, asked, {"role": "user", "content": "me"}], "Bye."))
    assert [group.threads for group in world.cast.groups()] == [["t-c2", "t-c1"]]


def test_a_client_that_is_no_benchmark_gets_an_episode_a_thread():
    for dialect in (TauBench(), Dialect()):
        world = World([], dialect)
        for question in ("2 + 2?", "3 + 3?", "2 + 2?"):
            list(world.ask([{"role": "user", "content": question}], "4"))
        groups = world.cast.groups()
        assert [group.episode for group in groups] == [group.threads[0] for group in groups] == ["t-c1", "t-c2", "t-c3"]
        assert all(group.user_strategy is None and not group.tied for group in groups)


def verified_task():
    """The calls of a task of the verify strategy: messages, reply."""
    user, agent = [prompt("buy"), HI], [POLICY]
    for said_by_user, verdicts, answer in (("Hi!", ["true"], "Who?"), ("Me.", ["false", "true"], "Done.")):
        for verdict in verdicts:
            yield [*user], said_by_user
            yield watched(user, said_by_user), verdict
        agent.append({"role": "user", "content": said_by_user})
        yield [*agent], answer
        agent.append(said(answer))
        user += [said(said_by_user), {"role": "user", "content": answer}]
    yield user, "###STOP###"


def record(call, place, part, messages, replies, at):
    request, reply = {"messages": messages}, {"choices": [{"message": said(reply)} for reply in replies]}
    texts = {"request": json.dumps(request), "reply": json.dumps(reply)}
    fields = {"role": part.role, "endpoint": "/v1", "model": "m", "status": 200 if replies else 0, **texts}
    return Call(id=call, **place._asdict(), started=at, first_byte=at + 1, ended=at + 9, **fields)


def played(killed_at=None, begun=False):
    """The places of a task's calls, and the groups at the end. Before call number `killed_at` another process takes
    over that knows the calls so far; begun: and that one, which had no reply, and which its client sends again.
    """
    cast, calls, places = Cast(TauBench()), [], []

    def ask(call, messages, *replies, retried=False):
        part = cast.dialect.part(messages)
        place = cast.place(call, messages, part, retried=retried)
        calls.append(record(call, place, part, messages, replies, at=2.0 * len(calls)))
        if replies:
            cast.replied(place, [said(reply) for reply in replies])
        return place

    for n, (messages, reply) in enumerate(verified_task()):
        again = begun and n == killed_at
        if again:
            ask(f"c{n}", messages)
        if n == killed_at:
            before, cast = cast.groups(), Cast(TauBench())
            cast.replay(calls)
            assert cast.groups() == before
        places.append(ask("again" if again else f"c{n}", messages, reply, retried=again))
    return places, cast.groups()


@pytest.mark.parametrize("killed_at", range(1, 9))
def test_conversations_go_on_where_they_were_when_another_process_takes_over(killed_at):
    assert played(killed_at) == played()


@pytest.mark.parametrize("killed_at", range(9))
def test_what_was_under_way_when_another_process_took_over_is_tried_again_in_its_place(killed_at):
    (places, groups), (expected, as_before) = played(killed_at, begun=True), played()
    assert [place[:3] for place in places] == [place[:3] for place in expected]
    assert places[killed_at].kind == "retry" and groups == as_before


def test_who_was_taken_for_the_user_leaves_the_episode_after_a_restart_too():
    """Two said the same, and the one that was thought to have been heard was not: known only after a restart."""
    cast, calls = Cast(TauBench()), []
    hello, answer = said("Hello!"), {"role": "user", "content": "Who?"}

    def ask(call, messages, reply):
        part = cast.dialect.part(messages)
        place = cast.place(call, messages, part)
        cast.replied(place, [said(reply)])
        calls.append(record(call, place, part, messages, [reply], at=2.0 * len(calls)))

    users = {f"t-{name}": [prompt(name), HI] for name in ("one", "two")}
    for name in ("one", "two"):
        ask(name, users[f"t-{name}"], "Hello!")
    ask("agent", [POLICY, {"role": "user", "content": "Hello!"}], "Who?")
    homes = {thread: group.episode for group in cast.groups() for thread in group.placed}
    cast = Cast(TauBench())
    cast.replay([msgspec.structs.replace(call, episode=homes[call.thread]) for call in calls])
    (taken,) = [thread for thread in users if homes[thread] == "t-agent"]
    (right,) = users.keys() - {taken}
    ask("told", [*users[right], hello, answer], "Me.")
    groups = [(group.episode, group.threads) for group in cast.groups()]
    assert groups == [("t-agent", ["t-agent", right]), (taken, [taken])]


def test_what_is_closed_is_forgotten():
    world = World([("buy", ["Hi!", "Yes.", "Bye."])])
    world.run([])
    for group in world.cast.groups():
        world.cast.close(group.threads)
    assert len(world.cast) == 0 and not world.cast._watched and not world.cast._threads


def test_a_named_episode_wins_over_what_the_messages_say():
    cast = Cast(TauBench())
    messages = [prompt("buy"), HI]
    place = cast.place("c1", messages, cast.dialect.part(messages), "mine")
    cast.replied(place, [said("Hi!")])
    heard = [POLICY, {"role": "user", "content": "Hi!"}]
    cast.place("c2", heard, cast.dialect.part(heard))
    assert [(g.episode, g.threads, g.placed) for g in cast.groups()] == [
        ("t-c2", ["t-c2"], ["t-c2"]),
        ("mine", ["t-c1"], []),
    ]
