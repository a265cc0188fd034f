"""Reading replies, and what makes two messages the same."""

import json

import pytest

from episodes.messages import (
    canonical,
    prefix_digests,
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
