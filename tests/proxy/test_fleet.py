"""Which worker a call goes to."""

import pytest

from proxy.fleet import Fleet


@pytest.fixture
def fleet():
    return Fleet(["a", "b", "c"])


def visit(fleet, thread, episode=None, tried=()):
    """A call that begins and ends."""
    worker = fleet.enter((thread, episode or thread), tried)
    fleet.leave(worker)
    return worker


def test_a_conversation_stays_and_new_ones_spread(fleet):
    first = [visit(fleet, f"t{i}") for i in range(6)]
    assert sorted(first) == ["a", "a", "b", "b", "c", "c"]
    assert [visit(fleet, f"t{i}") for i in reversed(range(6))] == first[::-1]


def test_a_new_one_goes_where_the_fewest_calls_are_under_way(fleet):
    """Whatever is at home there: conversations that wait for their client cost nothing."""
    for i in range(6):
        visit(fleet, f"idle {i}")
    busy = [fleet.enter([f"t{i}"]) for i in range(2)]
    assert len(set(busy)) == 2
    third = fleet.enter(["t2"])
    assert {*busy, third} == {"a", "b", "c"}
    fleet.leave(busy[1])
    assert fleet.enter(["t3"]) == busy[1]
    assert fleet.n_calls(busy[1]) == 1


def test_the_threads_of_an_episode_go_together_from_when_it_is_known(fleet):
    """A thread that begins in an episode joins it; one that had begun elsewhere stays where its cache is."""
    home = visit(fleet, "agent", "e")
    elsewhere = visit(fleet, "early")
    assert elsewhere != home
    assert visit(fleet, "user", "e") == home
    assert visit(fleet, "early", "e") == elsewhere
    assert visit(fleet, "supervisor", "e") == visit(fleet, "agent", "e") == home


def test_a_worker_that_is_down_is_passed_over_and_taken_back(fleet):
    home = visit(fleet, "t")
    assert fleet.fail(home) and not fleet.fail(home) and not fleet.up(home)
    moved = visit(fleet, "t")
    assert moved != home
    assert home not in {visit(fleet, f"new {i}") for i in range(6)}
    assert fleet.back(home) and not fleet.back(home)
    assert visit(fleet, "t") == moved, "its cache is there now"
    assert visit(fleet, "another") == home


def test_a_call_that_could_not_be_sent_tries_each_worker_once(fleet):
    tried = []
    while (worker := fleet.enter(["t"], tried)) is not None:
        fleet.leave(worker)
        fleet.fail(worker)
        tried.append(worker)
    assert sorted(tried) == ["a", "b", "c"]
    assert visit(fleet, "t") in tried, "the next call tries again"


def test_a_call_of_no_conversation_goes_where_least_is_done_and_moves_nothing(fleet):
    home = visit(fleet, "t")
    others = {fleet.enter(), fleet.enter()}
    assert others == {"a", "b", "c"} - {home} and visit(fleet, "t") == home


def test_one_worker_is_all_there_is_up_or_down():
    fleet = Fleet(["a"])
    fleet.fail("a")
    assert visit(fleet, "t") == "a" and fleet.enter(["t"], ["a"]) is None


def test_what_is_over_is_forgotten(fleet):
    for i in range(3):
        visit(fleet, f"t{i}", f"e{i}")
    home = visit(fleet, "t0", "e0")
    fleet.close(["t0", "e0", "never heard of"])
    assert visit(fleet, "new") == home, "nobody is at home there any more"
