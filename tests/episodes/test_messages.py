"""Reading replies, and what makes two messages the same."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from episodes.errors import BadInput
from episodes.messages import (
    DEPTH_LIMIT,
    canonical,
    chat,
    finish_reason,
    media,
    parse_object,
    parse_request,
    prefix_digests,
    reply_messages,
    without_activations,
)

DENSE = '{"b":[2],"a":1}'
CALL = {"type": "function", "function": {"name": "find", "arguments": '{"a": 1, "b": [2]}'}}


def said(content, *calls):
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [
        ({"role": "assistant", "content": "Hi"}, {"content": "Hi", "role": "assistant", "function_call": None}),
        (said(None, CALL), said("", CALL)),
        (said("", {"id": "1", **CALL}, {"id": "2"}), said(None, {"function": {"name": "find", "arguments": DENSE}})),
        ({"role": "user", "content": "Hi"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}),
        ({"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "Hi", "tool_calls": None}),
    ],
)  # fmt: skip
def test_an_echo_is_the_same_message(sent, echoed):
    """What clients change when they send a message back makes no difference."""
    assert canonical(sent) == canonical(echoed)


@pytest.mark.parametrize(
    "other",
    [
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Hi!"},
        {"role": "user", "content": "Hi", "tool_calls": [CALL]},
    ],
)
def test_other_messages_are_told_apart(other):
    assert canonical({"role": "user", "content": "Hi"}) != canonical(other)


def test_a_digest_stands_for_its_whole_prefix():
    a, b, c = ({"role": "user", "content": text} for text in "abc")
    abc, abb = list(prefix_digests([a, b, c])), list(prefix_digests([a, b, b]))
    assert abc[:2] == abb[:2] and abc[2] != abb[2] and len(set(abc)) == 3


def test_activations_are_taken_out_of_a_reply():
    data = (
        b'{"id":"x","activations":{"layer_8_output":{}},"choices":[],"activation_collection_status":{"requested":true}}'
    )
    kept, taken = without_activations(data)
    assert json.loads(kept) == {"id": "x", "choices": []}
    assert set(taken) == {"activations", "activation_collection_status"}


@pytest.mark.parametrize(
    "data", [b'{"id": "x",  "choices": []}', b"not json", b'{"text": "\\"activations\\" is a word"}']
)
def test_a_reply_without_them_keeps_its_bytes(data):
    assert without_activations(data) == (data, {})


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "tool_calls", "function", "arguments"]), inner
        )
    ),
)


@given(JSONS.map(json.dumps).map(str.encode) | st.binary())
def test_no_request_raises_anything_but_bad_input(data):
    """Whatever a client sends: parsed, its messages told apart, or said to be none."""
    fields = parse_request(data)
    assert fields is None or isinstance(fields, dict)
    assert parse_object(data) == fields
    if fields is not None:
        media(fields)
        assert list(prefix_digests(chat(fields) or [])) == list(prefix_digests(chat(fields) or []))
        assert isinstance(reply_messages(fields), list)
        finish_reason(fields)
    without_activations(data)


@pytest.mark.parametrize("n", [DEPTH_LIMIT, DEPTH_LIMIT + 1, 5000])
def test_an_object_may_be_so_deep_and_no_deeper(n):
    text = b'{"a":' + b"[" * (n - 1) + b"]" * (n - 1) + b"}"
    if n <= DEPTH_LIMIT:
        assert parse_request(text) == parse_object(text) is not None
        return
    assert parse_object(text) is None
    with pytest.raises(BadInput, match=f"{DEPTH_LIMIT} deep"):
        parse_request(text)


def test_a_number_of_thousands_of_digits_is_no_object_of_ours():
    assert parse_request(b'{"a":' + b"9" * 10_000 + b"}") is None
