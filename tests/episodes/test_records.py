"""What a call's record says of itself, by what is known of it."""

import msgspec
import pytest

from episodes.wire import Sequence
from tests.episodes.test_store import Writer

SAID = '{"id": "x", "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}'


def tokens(**fields):
    call = msgspec.structs.replace(Writer.call("c1"), **fields)
    return call.n_prompt, call.n_completion


def test_a_calls_tokens_are_the_engines_or_else_what_its_reply_says():
    sequences = [Sequence(choice, [1, 2], [3, 4, 5][:choice]) for choice in (1, 3)]
    assert tokens(reply=SAID, sequences=sequences) == (4, 4)
    assert tokens(reply=SAID, points=[]) == (7, 3)
    assert tokens(reply='{"usage": {"prompt_tokens": 7}}') == (7, None)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "[]",
        '{"error": {"message": "no such model"}}',
        '{"usage": null}',
        '{"usage": 7}',
        '{"usage": {}}',
        '{"usage": {"prompt_tokens": -1}}',
        '{"usage": {"prompt_tokens": "7"}}',
        '{"usage": {"prompt_tokens": 2147483648}}',
        '{"usage": {"prompt_tokens": 7}',
        "[" * 9999,
        '{"choices": ["\\ud800"]}',
    ],
)
def test_tokens_of_a_reply_that_does_not_tell_them_are_not_known(reply):
    assert tokens(reply=reply) == (None, None)
