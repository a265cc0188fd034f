"""Who plays which part in which episode: the open threads of a run, and those of them that speak with each other.

A benchmark may play both sides with the model: an agent, and a user who gives it its task. What each says is what the
other is told next, and that pairs the threads: by the whole exchange, and by the order in which it happened, since no
one is told what has not been said. While threads grow, pairs may change. Where the same exchange happened at the
same time more than once, any choice fits; one is made and called a tie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from episodes.matching import match, ties
from episodes.messages import JSON, chat, parse_object, reply_messages
from episodes.records import BACKFILL, Call, Role
from episodes.threads import Place, Threads


class Part(NamedTuple):
    """What a call's messages say of its thread. strategy: the benchmark's name for the way it is played."""

    role: Role = "agent"
    strategy: str | None = None


class Watch(NamedTuple):
    """What a supervisor's call is about: a user's conversation so far and a reply in it.

    strategy: what its being there says of the user's. n_asked: so often are the same messages asked while it says no
    """

    conversation: str
    response: str
    strategy: str | None = None
    n_asked: int = 1


class Dialect:
    """How a benchmark's calls speak for themselves. This one is of those who say nothing: every thread is an agent's,
    and an episode. Another benchmark is a subclass that says what it knows; messages are OpenAI's.
    """

    name: str | None = None

    def part(self, messages: list[JSON]) -> Part:
        """Who speaks in a call with these messages."""
        return Part()

    def told(self, part: Part, messages: list[JSON]) -> str | None:
        """What the last message tells this side of the other; None if it is something else, such as a tool's result."""
        return None

    def says(self, part: Part, reply: JSON) -> str | None:
        """What a reply will tell the other side; None if nothing."""
        return None

    def conversation(self, messages: list[JSON]) -> str:
        """A user's messages as its supervisor is shown them."""
        return ""

    def watch(self, messages: list[JSON]) -> Watch | None:
        """What a supervisor's messages are about."""
        return None

    def shown(self, watch: Watch, reply: str) -> bool:
        """Whether this is the reply that the supervisor was shown."""
        return reply in watch.response

    def approves(self, reply: JSON) -> bool:
        """Whether the supervisor says yes."""
        return True


class Told(NamedTuple):
    """What was told to a side, and when. Texts are kept as their hashes, times are ticks of the cast's own clock."""

    text: int
    at: int


@dataclass
class Said:
    """What a side may have said in a turn: any of its attempts' replies may have been the one that was passed on."""

    turn: int
    at: int
    texts: set[int]


@dataclass(eq=False)
class Actor:
    """A thread with its part. named: the client said which episode.

    watched: hash of its conversation → how many supervisors it has had, less the replies it got. conversation: the
    last of these; heard: when it got its last reply. watch: what a supervisor's call is about; subject: whose.
    """

    thread: str
    episode: str
    named: bool
    part: Part
    told: list[Told] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    watched: Counter[int] = field(default_factory=Counter)
    conversation: int | None = None
    heard: int = 0
    last_reply: str = ""
    subject: Actor | None = None
    watch: Watch | None = None


class Group(NamedTuple):
    """The threads of an episode, the agent's first. placed: those that the client has not put there itself.

    tied: other threads that could stand in it as well
    """

    episode: str
    threads: list[str]
    placed: list[str]
    strategy: str | None
    user_strategy: str | None
    tied: list[str]


WARMUPS = "warmups"


def n_episodes(names: Iterable[str]) -> int:
    """How many episodes these are: the calls before there is a task are none, though they have a name as one."""
    return sum(name != WARMUPS for name in names)


class Cast:
    """The open threads of a run. Not safe to call from several threads of the process at once."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self._threads = Threads()
        self._actors: dict[str, Actor] = {}
        self._watched: dict[int, list[Actor]] = {}
        self._clock = 0
        self._recognised = False

    def __len__(self) -> int:
        return len(self._actors)

    def place(
        self,
        call: str,
        messages: list[JSON] | None,
        part: Part,
        episode: str | None = None,
        retried: bool | None = None,
    ) -> Place:
        """Where a call that begins now belongs; arguments as `Threads.place`."""
        # A benchmark leaves it to its SDK, which says so or does not do it; many another client retries by itself.
        retried = bool(retried) if self._recognised else retried or None
        told = self.dialect.told(part, messages) if messages else None
        place = self._threads.place(call, messages, episode, retried, lambda thread: self._awaits(thread, told))
        self._take(place, messages or [], part, episode is not None)
        return place

    def replied(self, place: Place, replies: list[JSON]) -> None:
        """The call at `place` is over; `replies` are its choices' messages, none if it failed."""
        self._threads.replied(place, replies)
        for reply in replies:
            self._hear(place, reply)

    def replay(self, calls: Iterable[Call]) -> None:
        """Take in calls that another process placed, in the order of their times. One that it had not recorded is a
        call that failed.
        """
        events = []
        for call in calls:
            if call.role == BACKFILL:
                continue
            end = call.first_byte if call.first_byte is not None else call.ended
            events += [(call.started, 0, call), (end, 1, call)]
        for _, over, call in sorted(events, key=lambda event: event[:2]):
            place = Place(call.episode, call.thread, call.turn, call.attempt, call.kind)
            if over:
                self.replied(place, reply_messages(parse_object(call.reply) or {}) if call.answered else [])
            else:
                messages = chat(parse_object(call.request)) or []
                self._threads.replay(place, messages, call.named)
                self._take(place, messages, self.dialect.part(messages), call.named)

    def close(self, threads: Iterable[str]) -> None:
        """Forget threads whose episode is sealed."""
        for thread in threads:
            self._threads.close(thread)
            actor = self._actors.pop(thread, None)
            if actor is None:
                continue
            for conversation in actor.watched:
                self._watched[conversation].remove(actor)
                if not self._watched[conversation]:
                    del self._watched[conversation]

    def _take(self, place: Place, messages: list[JSON], part: Part, named: bool) -> None:
        """A call has begun."""
        self._recognised |= part.role != "agent"
        self._clock += 1
        actor = self._actors.get(place.thread)
        if actor is None:
            actor = self._actors[place.thread] = Actor(place.thread, place.episode, named, part)
            if part.role == "supervisor":
                self._attach(actor, messages)
        text = self.dialect.told(part, messages) if place.kind == "turn" and messages else None
        if text is not None:
            actor.told.append(Told(hash(text), self._clock))
        if part.role in ("user", "warmup"):
            conversation = actor.conversation = hash(self.dialect.conversation(messages))
            if conversation not in actor.watched:
                actor.watched[conversation] = 0
                self._watched.setdefault(conversation, []).append(actor)

    def _awaits(self, thread: str, told: str | None) -> bool:
        """Whether the other side may just have said this to a thread."""
        actor, text = self._actors.get(thread), hash(told)
        if actor is None or told is None:
            return False
        others = [other for other in self._actors.values() if other.said and text in other.said[-1].texts]
        if actor.part.role == "agent":
            users = (other for other in others if other.part.role == "user" and len(other.said) > len(actor.told))
            return any(fits(actor, user, 0, True) for user in users)
        return any(fits(other, actor, 1, True) for other in others if other.part.role == "agent")

    def _attach(self, supervisor: Actor, messages: list[JSON]) -> None:
        """Find whom a supervisor watches: the conversation it is shown, with the reply, whose replies have been watched
        least; of several the one that got its reply last, since others may have ended with theirs.
        """
        watch = supervisor.watch = self.dialect.watch(messages)
        if watch is None:
            return
        conversation = hash(watch.conversation)
        found = [a for a in self._watched.get(conversation, []) if self.dialect.shown(watch, a.last_reply)]
        if found:
            subject = supervisor.subject = min(found, key=lambda actor: (actor.watched[conversation], -actor.heard))
            subject.watched[conversation] += 1
            subject.part = subject.part._replace(strategy=watch.strategy or subject.part.strategy)

    def _hear(self, place: Place, reply: JSON) -> None:
        """A call has got this reply."""
        self._clock += 1
        actor = self._actors.get(place.thread)
        if actor is None:
            return
        actor.last_reply, actor.heard = str(reply.get("content") or ""), self._clock
        if actor.conversation is not None:
            actor.watched[actor.conversation] -= 1
        if actor.watch and actor.subject and not self.dialect.approves(reply):
            self._threads.rejected(actor.subject.thread, actor.watch.n_asked)
        text = self.dialect.says(actor.part, reply)
        if text is None:
            return
        if actor.said and actor.said[-1].turn == place.turn:
            actor.said[-1].texts.add(hash(text))
        else:
            actor.said.append(Said(place.turn, self._clock, {hash(text)}))

    def groups(self) -> list[Group]:
        """The open threads as episodes, as far as is known now."""
        pairs, tied = _pairs([actor for actor in self._actors.values() if not actor.named])
        homes = {user: agent for agent, user in pairs.items()}
        members: dict[str, list[Actor]] = {}
        for actor in sorted(self._actors.values(), key=lambda a: a.part.role != "agent"):
            members.setdefault(_home(actor, homes), []).append(actor)
        return [_group(episode, actors, tied.get(actors[0], [])) for episode, actors in members.items()]


def _home(actor: Actor, homes: Mapping[Actor, Actor]) -> str:
    """The episode that a thread stands in; homes: user → agent."""
    if actor.named:
        return actor.episode
    lead = actor.subject or actor
    if lead.named:
        return lead.episode
    if lead.part.role == "warmup":
        return WARMUPS
    found = homes.get(lead, lead).episode
    # Replayed where it stood before; its agent may have another user by now.
    gone = lead.part.role == "user" and lead not in homes and any(agent.episode == found for agent in homes.values())
    return lead.thread if gone else found


def _group(episode: str, actors: list[Actor], tied: list[Actor]) -> Group:
    strategies = {actor.part.role: actor.part.strategy for actor in reversed(actors)}
    # An agent that no user was found for may be any client's: how it speaks says nothing then.
    return Group(
        episode,
        [actor.thread for actor in actors],
        [actor.thread for actor in actors if not actor.named],
        strategies.get("agent") if "user" in strategies else None,
        strategies.get("user"),
        [actor.thread for actor in tied],
    )


def _pairs(actors: list[Actor]) -> tuple[dict[Actor, Actor], dict[Actor, list[Actor]]]:
    """agent → user, and agent → users that it could have just as well.

    First where all that was said has arrived, then where an agent's last word has not yet, or never will; and where
    nothing fits, without regard to time: of threads that were the same, one may have been given the other's next call.
    """
    pairs: dict[Actor, Actor] = {}
    tied: dict[Actor, list[Actor]] = {}
    for n_open, timed in product((0, 1), (True, False)):
        settled = {*pairs, *pairs.values()}
        left = [actor for actor in actors if actor not in settled]
        agents = [actor for actor in left if actor.part.role == "agent" and actor.told]
        users = [actor for actor in left if actor.part.role == "user" and actor.said]
        if not agents or not users:  # as of every client that is no benchmark
            break
        fitting = candidates(agents, users, n_open, timed)
        found = match(fitting)
        pairs |= found
        if timed:
            tied |= ties(fitting, found)
        else:
            tied |= {agent: _like(user, pairs.values()) for agent, user in found.items()}
    return pairs, tied


def _like(user: Actor, users: Iterable[Actor]) -> list[Actor]:
    """The users that began as this one did."""
    texts = user.said[0].texts
    return [other for other in users if other is not user and other.said[0].texts & texts]


def fits(agent: Actor, user: Actor, n_open: int, timed: bool) -> bool:
    """Whether the two can have spoken with each other: each was told what the other had said, by then if `timed`.

    n_open: how much the agent has said that the user was not told
    """
    if len(agent.said) - len(user.told) != n_open:
        return False
    return _answers(agent.told, user.said, timed) and _answers(user.told, agent.said, timed)


def _answers(told: list[Told], said: list[Said], timed: bool) -> bool:
    # From the end: openings are what conversations share.
    return len(told) <= len(said) and all(
        t.text in s.texts and (s.at < t.at or not timed)
        for t, s in zip(reversed(told), reversed(said[: len(told)]), strict=True)
    )


def candidates(agents: list[Actor], users: list[Actor], n_open: int, timed: bool) -> dict[Actor, list[Actor]]:
    """agent → the users that fit it, those that spoke last first: some of the others will have ended with that."""
    opened: dict[int, list[Actor]] = {}
    for user in sorted(users, key=lambda user: -user.said[0].at):
        for text in user.said[0].texts:
            opened.setdefault(text, []).append(user)
    return {
        agent: [user for user in opened.get(agent.told[0].text, []) if fits(agent, user, n_open, timed)]
        for agent in sorted(agents, key=lambda agent: agent.told[0].at)
    }
