"""Which conversation a call belongs to."""

import pytest

from episodes.threads import Threads


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


class Talk:
    """Calls of a client, answered at once unless told otherwise."""

    def __init__(self):
        self.threads = Threads()
        self.n = 0

    def ask(self, messages, reply="ok", episode=None, retried=None):
        self.n += 1
        place = self.threads.place(f"c{self.n}", messages, episode, retried)
        if reply is not Ellipsis:
            self.answer(place, reply)
        return place

    def answer(self, place, reply):
        replies = [said(r) for r in ([reply] if isinstance(reply, str) else reply or [])]
        self.threads.replied(place, replies)


def test_a_call_continues_the_thread_whose_reply_it_echoes():
    talk = Talk()
    first = talk.ask([user("a")], "one")
    second = talk.ask([user("a"), said("one"), user("b")], "two")
    third = talk.ask([user("a"), said("one"), user("b"), said("two"), user("c")])
    assert [p.turn for p in (first, second, third)] == [0, 1, 2]
    assert len({p.thread for p in (first, second, third)}) == 1 and first.episode == first.thread


def test_another_reply_is_another_conversation():
    talk = Talk()
    first = talk.ask([user("a")], "one")
    assert talk.ask([user("a"), said("else"), user("b")]).thread != first.thread


def test_identical_conversations_are_told_apart_one_to_one():
    talk = Talk()
    openings = [talk.ask([user("a")], "same") for _ in range(3)]
    assert len({p.thread for p in openings}) == 3
    nexts = [talk.ask([user("a"), said("same"), user("b")], ...) for _ in range(3)]
    assert {p.thread for p in nexts} == {p.thread for p in openings}
    assert {p.turn for p in nexts} == {1}


def test_a_thread_waits_for_its_own_reply_before_it_goes_on():
    talk = Talk()
    a = talk.ask([user("a")], "x")
    running = talk.ask([user("a"), said("x"), user("b")], ...)
    other = talk.ask([user("a"), said("x"), user("b")], ...)
    assert running.thread == a.thread and other.thread != a.thread


def test_a_retry_after_a_failure_is_an_attempt_of_the_same_turn():
    talk = Talk()
    first = talk.ask([user("a")], None)
    again = talk.ask([user("a")], "one")
    assert (again.thread, again.turn, again.attempt) == (first.thread, 0, 1)
    assert talk.ask([user("a"), said("one"), user("b")]).turn == 1


@pytest.mark.parametrize("begun", [[user("a")], [user("a"), said("one"), user("b")]])
def test_a_retry_is_of_the_conversation_that_is_going_on_not_of_one_like_it_that_was_given_up(begun):
    """One trial ends in an exception, for all attempts at a call fail; in the next one the second attempt is good."""
    talk = Talk()

    def trial(*replies):
        places = [talk.ask(begun[:1], "one", retried=False)] if len(begun) > 1 else []
        places += [talk.ask(begun, reply, retried=attempt > 0) for attempt, reply in enumerate(replies)]
        (thread,) = {place.thread for place in places}
        assert [place.attempt for place in places if place.turn == places[-1].turn] == list(range(len(replies)))
        return thread

    assert trial(None, None, None) != trial(None, "good")


def test_a_repeat_of_which_there_is_no_sign_is_of_the_conversation_that_is_going_on():
    """As a retry of a client without the SDK's header, or a reply that was rejected."""
    talk = Talk()
    messages = [user("a"), said("one"), user("b")]
    for reply in (None, "two"):
        given_up, going_on = ([talk.ask(messages[:1], "one"), talk.ask(messages, reply)] for _ in range(2))
        assert talk.ask(messages, "again").thread == going_on[0].thread != given_up[0].thread


def test_a_repeat_after_a_good_reply_is_an_attempt_once_the_talk_is_under_way():
    talk = Talk()
    talk.ask([user("a")], "one")
    messages = [user("a"), said("one"), user("b")]
    first, again = talk.ask(messages, "two"), talk.ask(messages, "three")
    assert (again.thread, again.turn, again.attempt) == (first.thread, 1, 1)
    assert talk.ask([*messages, said("three"), user("c")]).turn == 2


def test_a_reply_that_got_lost_on_its_way_is_none_of_those_that_may_be_rejected():
    """Of three that a simulator is asked for at the most."""
    talk = Talk()
    places = [talk.ask([user("a")], "lost"), talk.ask([user("a")], "one", retried=True)]
    for reply in ("two", "three", "another conversation"):
        talk.threads.rejected(places[0].thread, 3)
        places.append(talk.ask([user("a")], reply, retried=False))
    assert [place.kind for place in places] == ["turn", "retry", "reask", "reask", "turn"]
    assert [place.thread for place in places] == ["t-c1"] * 4 + ["t-c5"]


def test_a_conversation_repeated_word_for_word_is_another_one_to_its_end():
    """A second trial at temperature 0: its last turn is no attempt of the first trial's, which got its reply."""
    talk = Talk()
    turns = [
        [user("a")],
        [user("a"), said("one"), user("b")],
        [user("a"), said("one"), user("b"), said("two"), user("c")],
    ]
    replies = ("one", "two", "end")
    trials = [[talk.ask(messages, reply) for messages, reply in zip(turns, replies, strict=True)] for _ in range(3)]
    assert len({trial[0].thread for trial in trials}) == 3
    for trial in trials:
        assert len({place.thread for place in trial}) == 1
        assert [(place.turn, place.attempt, place.kind) for place in trial] == [(n, 0, "turn") for n in range(3)]


def test_any_choice_can_be_continued():
    talk = Talk()
    first = talk.ask([user("a")], ["one", "two"])
    assert talk.ask([user("a"), said("two"), user("b")]).thread == first.thread


def test_a_tool_result_continues_the_call():
    talk = Talk()
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    place = talk.ask([user("a")], ...)
    talk.threads.replied(place, [asked])
    tool = {"role": "tool", "tool_call_id": "1", "content": "4"}
    assert talk.ask([user("a"), {**asked, "content": ""}, tool]).thread == place.thread


def test_a_named_episode_keeps_its_calls_together():
    talk = Talk()
    a, b = talk.ask([user("a")], "x", "e1"), talk.ask([user("other")], "y", "e1")
    c = talk.ask([user("a"), said("x"), user("b")], "z", "e1")
    assert {p.episode for p in (a, b, c)} == {"e1"} and a.thread == c.thread != b.thread
    assert talk.ask([user("a"), said("x"), user("b")], "z").episode != "e1"


def test_calls_without_messages_are_threads_of_their_own():
    talk = Talk()
    assert talk.ask(None).thread != talk.ask(None).thread
    assert talk.ask([]).turn == 0


def test_a_closed_episode_is_continued_by_nobody():
    talk = Talk()
    first = talk.ask([user("a")], "one")
    talk.threads.close(first.thread)
    assert talk.ask([user("a"), said("one"), user("b")]).thread != first.thread
    assert len(talk.threads) == 1
