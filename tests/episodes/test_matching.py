"""Who gets whom, and whether it could be otherwise."""

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from episodes.matching import match, ties

FITTING = st.lists(st.lists(st.integers(0, 4), unique=True), min_size=1, max_size=5).map(lambda x: dict(enumerate(x)))


def matchings(fitting, ones):
    """All of them that give each of these ones somebody."""
    for others in permutations(range(5), len(ones)):
        if all(other in fitting[one] for one, other in zip(ones, others, strict=True)):
            yield dict(zip(ones, others, strict=True))


@given(FITTING)
def test_as_many_as_can_get_somebody_and_ties_are_all_that_could_be_otherwise(fitting):
    pairs = match(fitting)
    assert not any(list(matchings(fitting, [*pairs, one])) for one in fitting if one not in pairs)
    could = {one: {matching[one] for matching in matchings(fitting, [*pairs])} for one in pairs}
    assert all(other in could[one] for one, other in pairs.items())
    found = ties(fitting, pairs)
    assert found == {one: [other for other in fitting[one] if other in could[one] - {pairs[one]}] for one in pairs}


def test_hundreds_that_all_fit_each_other_are_tied_at_once():
    """In quadratic time. What took its fourth power needs minutes here."""
    fitting = {one: list(range(400)) for one in range(400)}
    assert all(len(others) == 399 for others in ties(fitting, match(fitting)).values())
