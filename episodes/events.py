"""A reply that comes as server-sent events: where each ends, what goes on to the client, and what they spell together.

Pure: bytes in, values out. Nothing that a worker sends makes this raise.
"""

from __future__ import annotations

import re
from typing import Any

from episodes.messages import JSON, objects, parse_object, without_activations

END = re.compile(rb"\n\r?\n")
DONE = b"[DONE]"
# Larger than any event with activations in it: a body without an end of an event is none.
EVENT_LIMIT = 256 << 20
TEXTS = ("content", "reasoning", "reasoning_content", "refusal")
# What a client may ask for beside what was said, a choice's own.
GROWING, SAID_ONCE = ("logprobs", "token_ids"), ("prompt_token_ids", "stop_reason")


class Events:
    """Cuts a stream into its events, wherever the network cut it into chunks. rest: what is left at the end."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._seen = 0

    @property
    def rest(self) -> bytes:
        return bytes(self._data)

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that a chunk completes, each with its blank line, byte for byte."""
        self._data += chunk
        events, start = [], 0
        for end in END.finditer(self._data, self._seen):
            events.append(bytes(self._data[start : end.end()]))
            start = end.end()
        if not events and len(self._data) > EVENT_LIMIT:
            events, start = [self.rest], len(self._data)
        del self._data[:start]
        self._seen = max(len(self._data) - 2, 0)  # where an end could have begun
        return events


def event_data(event: bytes) -> bytes:
    """The `data` of one event, its lines joined."""
    return b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))


class Transcript:
    """What a stream's events spell out. done: whether the last one has come. foreign: activations that a backend put
    into them.
    """

    def __init__(self) -> None:
        self.done = False
        self.foreign: JSON = {}
        self._fields: JSON = {}
        self._choices: dict[int, _Choice] = {}

    @property
    def error(self) -> str | None:
        """Why the stream failed, if one of its events says that it has: it ends as any other all the same."""
        error = self._fields.get("error")
        return str(error.get("message") or error) if isinstance(error, dict) else str(error) if error else None

    def take(self, event: bytes) -> bytes:
        """Take in an event; returns it as the client is to have it."""
        data = event_data(event)
        if data == DONE:
            self.done = True
            return event
        kept, taken = without_activations(data)
        chunk = parse_object(kept)
        if chunk is not None:
            self._fields.update({name: value for name, value in chunk.items() if value is not None})
            for part in objects(chunk.get("choices")):
                self._choices.setdefault(_index(part), _Choice()).grow(part)
        if not taken:
            return event
        self.foreign |= taken
        others = [line for line in event.splitlines() if line and not line.startswith(b"data:")]
        return b"\n".join([*others, b"data: " + kept, b"", b""])

    def reply(self) -> JSON:
        """The reply so far, in the shape of one that was not streamed."""
        choices = [{"index": index, **self._choices[index].whole()} for index in sorted(self._choices)]
        return self._fields | {"choices": choices}


class _Choice:
    def __init__(self) -> None:
        self._texts: dict[str, list[str]] = {}
        self._calls: dict[int, _ToolCall] = {}
        self._beside: JSON = {}
        self._finish_reason: str | None = None

    def grow(self, part: JSON) -> None:
        self._finish_reason = _text(part.get("finish_reason")) or self._finish_reason
        for name in GROWING:
            if (piece := part.get(name)) is not None:
                self._beside[name] = _joined(self._beside.get(name), piece)
        for name in SAID_ONCE:
            if (piece := part.get(name)) is not None:
                self._beside[name] = piece
        if "text" in part:
            self._texts.setdefault("text", []).append(_text(part["text"]))
        delta = part.get("delta")
        if not isinstance(delta, dict):
            return
        for name in TEXTS:
            if piece := _text(delta.get(name)):
                self._texts.setdefault(name, []).append(piece)
        for call in objects(delta.get("tool_calls")):
            self._calls.setdefault(_index(call), _ToolCall()).grow(call)

    def whole(self) -> JSON:
        texts: JSON = {name: "".join(pieces) for name, pieces in self._texts.items()}
        others = self._beside | ({"finish_reason": self._finish_reason} if self._finish_reason else {})
        if "text" in texts:
            return others | texts
        message = {"role": "assistant", "content": None, **texts}
        if self._calls:
            message["tool_calls"] = [self._calls[index].whole() for index in sorted(self._calls)]
        return others | {"message": message}


class _ToolCall:
    def __init__(self) -> None:
        self._id: str | None = None
        self._name: list[str] = []
        self._arguments: list[str] = []

    def grow(self, piece: JSON) -> None:
        self._id = _text(piece.get("id")) or self._id
        function = piece.get("function")
        if isinstance(function, dict):
            self._name.append(_text(function.get("name")))
            self._arguments.append(_text(function.get("arguments")))

    def whole(self) -> JSON:
        function = {"name": "".join(self._name), "arguments": "".join(self._arguments)}
        return {"id": self._id, "type": "function", "function": function}


def _joined(before: Any, piece: Any) -> Any:
    """What has come of a value so far, grown in place: lists go on, objects field by field, else it is the last."""
    if isinstance(before, list) and isinstance(piece, list):
        before += piece
        return before
    if isinstance(before, dict) and isinstance(piece, dict):
        before.update({name: _joined(before.get(name), more) for name, more in piece.items() if more is not None})
        return before
    return piece


def _index(part: JSON) -> int:
    index = part.get("index")
    return index if isinstance(index, int) else 0


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
