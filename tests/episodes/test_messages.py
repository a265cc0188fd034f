"""Reading replies, and what makes two messages the same."""

import json

import pytest

from episodes.messages import (
    Events,
    assemble,
    canonical,
    event_data,
    event_without_activations,
    prefix_digests,
    reply_messages,
    without_activations,
)


def chunk(delta, index=0, reason=None):
    choice = {"index": index, "delta": delta, "finish_reason": reason}
    return b"data: " + json.dumps({"id": "x", "model": "m", "choices": [choice]}).encode() + b"\n\n"


STREAM = b"".join(
    [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "Grüße, "}),
        b": a comment\r\n\r\n",
        chunk({"content": "Welt"}, reason="stop"),
        b"data: [DONE]\n\n",
    ]
)


@pytest.mark.parametrize("cut", range(len(STREAM)))
def test_events_survive_any_cut(cut):
    """The same events come out wherever the network cuts the bytes, and no byte is lost."""
    cutter = Events()
    events = cutter.feed(STREAM[:cut]) + cutter.feed(STREAM[cut:])
    assert events == Events().feed(STREAM)
    assert len(events) == 5 and b"".join(events) + cutter.rest == STREAM


def test_events_survive_byte_by_byte():
    cutter = Events()
    events = [event for i in range(len(STREAM)) for event in cutter.feed(STREAM[i : i + 1])]
    assert b"".join(events) == STREAM and cutter.rest == b""


def test_a_stream_is_assembled_into_the_reply_it_spells():
    reply = assemble(Events().feed(STREAM))
    assert reply_messages(reply) == [{"role": "assistant", "content": "Grüße, Welt"}]
    assert reply["model"] == "m" and reply["choices"][0]["finish_reason"] == "stop"


def test_streamed_tool_calls_are_put_together():
    pieces = [
        chunk({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "find", "arguments": ""}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"x":'}}]}),
        chunk({"tool_calls": [{"index": 1, "id": "b", "function": {"name": "stop", "arguments": "{}"}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}, reason="tool_calls"),
    ]
    (message,) = reply_messages(assemble(pieces))
    assert [c["function"] for c in message["tool_calls"]] == [
        {"name": "find", "arguments": '{"x":1}'},
        {"name": "stop", "arguments": "{}"},
    ]


def test_choices_of_a_stream_are_kept_apart():
    reply = assemble([chunk({"content": "a"}, 0), chunk({"content": "b"}, 1), chunk({"content": "c"}, 0)])
    assert [m["content"] for m in reply_messages(reply)] == ["ac", "b"]


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


def test_activations_are_taken_out_of_an_event():
    event = b'data: {"id":"x","activations":{"a":1}}\n\n'
    kept, taken = event_without_activations(event)
    assert json.loads(event_data(kept)) == {"id": "x"} and taken == {"activations": {"a": 1}}
    assert event_without_activations(STREAM) == (STREAM, {})
