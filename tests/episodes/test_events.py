"""Streamed replies: their events, and what they spell."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from episodes.events import Events, Transcript, event_data
from episodes.messages import finish_reason, reply_messages


def spelt(events):
    transcript = Transcript()
    for event in events:
        transcript.take(event)
    return transcript.reply()


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
    reply = spelt(Events().feed(STREAM))
    assert reply_messages(reply) == [{"role": "assistant", "content": "Grüße, Welt"}]
    assert reply["model"] == "m" and reply["choices"][0]["finish_reason"] == "stop"


def test_streamed_tool_calls_are_put_together():
    pieces = [
        chunk({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "find", "arguments": ""}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"x":'}}]}),
        chunk({"tool_calls": [{"index": 1, "id": "b", "function": {"name": "stop", "arguments": "{}"}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}, reason="tool_calls"),
    ]
    (message,) = reply_messages(spelt(pieces))
    assert [c["function"] for c in message["tool_calls"]] == [
        {"name": "find", "arguments": '{"x":1}'},
        {"name": "stop", "arguments": "{}"},
    ]


def test_choices_of_a_stream_are_kept_apart():
    reply = spelt([chunk({"content": "a"}, 0), chunk({"content": "b"}, 1), chunk({"content": "c"}, 0)])
    assert [m["content"] for m in reply_messages(reply)] == ["ac", "b"]


def with_choice(said):
    return b"data: " + json.dumps({"choices": [{"index": 0, "stop_reason": None, **said}]}).encode() + b"\n\n"


def test_what_a_client_asked_for_beside_a_chats_text_is_kept():
    """Log probabilities and token ids of all events, the last reason to stop; nothing of what was null in all."""
    tokens = [{"token": token, "logprob": -1.5, "top_logprobs": []} for token in ("a", "b", "c")]
    said, ids = [{"content": part, "refusal": None} for part in (tokens[:2], tokens[2:])], {"prompt_token_ids": [7, 8]}
    reply = spelt(
        [
            with_choice({"delta": {"role": "assistant", "content": ""}, "logprobs": None, "token_ids": None}),
            with_choice({"delta": {"content": "ab"}, "logprobs": said[0], "token_ids": [1, 2], **ids}),
            with_choice({"delta": {"content": "c"}, "logprobs": said[1], **ids}),
            with_choice({"delta": {}, "logprobs": None, "token_ids": [3], "stop_reason": 3}),
        ]
    )
    beside = {"logprobs": {"content": tokens, "refusal": None}, "token_ids": [1, 2, 3], "stop_reason": 3, **ids}
    message = {"role": "assistant", "content": "abc"}
    assert reply["choices"] == [{"index": 0, "message": message, **beside}]
    (plain,) = spelt([with_choice({"delta": {"content": "a"}, "logprobs": None})])["choices"]
    assert plain.keys() == {"index", "message"}


def test_the_four_lists_of_a_completions_log_probabilities_go_on_side_by_side():
    lists = {"text_offset": [0, 1], "token_logprobs": [None, -1.5], "tokens": ["a", "b"], "top_logprobs": [None, {}]}
    pieces = [{name: values[i : i + 1] for name, values in lists.items()} for i in range(2)]
    reply = spelt([with_choice({"text": text, "logprobs": part}) for text, part in zip("ab", pieces, strict=True)])
    assert reply["choices"] == [{"index": 0, "text": "ab", "logprobs": lists}]


def test_the_usage_that_a_stream_ends_with_is_its_replys():
    """Of several, as after each token, it is the last."""
    counts = [{"prompt_tokens": 7, "completion_tokens": n} for n in (1, 2)]
    said = [b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n" for usage in (*counts, None)]
    assert spelt([chunk({"content": "a"}), *said])["usage"] == counts[1]


def test_activations_are_taken_out_of_an_event():
    """Also where its data is on several lines; the rest of the event stays."""
    for event in (
        b'data: {"id":"x","activations":{"a":1}}\n\n',
        b'event: m\r\ndata: {"id":"x",\r\ndata: "activations":{"a":1}}\r\n\r\n',
    ):
        transcript = Transcript()
        kept = transcript.take(event)
        assert json.loads(event_data(kept)) == {"id": "x"} and transcript.foreign == {"activations": {"a": 1}}
        assert b"activations" not in kept and kept.endswith(b"\n\n") and (b"event: m" in kept) == (b"event: m" in event)


@pytest.mark.parametrize(
    ("error", "said"), [({"message": "dead", "code": 500}, "dead"), ("dead", "dead"), ({"code": 5}, "{'code': 5}")]
)
def test_a_stream_can_say_that_it_failed(error, said):
    """And has said what it said before."""
    transcript = Transcript()
    for event in (chunk({"content": "a"}), b"data: " + json.dumps({"error": error}).encode() + b"\n\n"):
        assert transcript.error is None
        transcript.take(event)
    assert transcript.error == said and reply_messages(transcript.reply())[0]["content"] == "a"


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "index", "delta", "tool_calls", "function", "text", "error", "logprobs", "token_ids"]
            ),
            inner,
        )
    ),
)


@given(st.lists(JSONS | st.binary(), max_size=5), st.integers(1, 50))
def test_whatever_a_worker_streams_comes_through_whole(parts, size):
    """Any bytes, cut anywhere: nothing raises, and the client gets every byte."""
    events = [part if isinstance(part, bytes) else b"data: " + json.dumps(part).encode() + b"\n\n" for part in parts]
    stream = b"".join(events)
    cutter, transcript = Events(), Transcript()
    kept = b"".join(
        transcript.take(event) for at in range(0, len(stream), size) for event in cutter.feed(stream[at : at + size])
    )
    assert kept + cutter.rest == stream
    assert transcript.error is None or isinstance(transcript.error, str)
    reply = transcript.reply()
    assert isinstance(reply_messages(reply), list) and (finish_reason(reply) is None or finish_reason(reply))
