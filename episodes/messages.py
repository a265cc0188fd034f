"""Messages and replies of the OpenAI API: reading a reply's bytes, and what makes two messages the same one.

Pure: bytes in, values out. Tolerant of what other servers send, since whatever is recorded was already answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

JSON = dict[str, Any]
TEXT_PARTS = {"text", "input_text", "output_text", "refusal", "thinking"}
STRIPPED = ("activations", "activation_collection_status")

_objects: msgspec.json.Decoder[JSON] = msgspec.json.Decoder(JSON)
_sorted = msgspec.json.Encoder(order="deterministic")


def parse_object(data: bytes | str) -> JSON | None:
    """The JSON object in `data`, None if it is anything else."""
    try:
        return _objects.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


class Events:
    """Cuts a server-sent event stream into its events, wherever the network cut it into chunks.

    feed: the events that a chunk completes, each with its blank line, byte for byte. rest: what is left at the end.
    """

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        data = self.rest + chunk
        events = []
        start = 0
        while True:
            ends = [e + len(s) for s in (b"\n\n", b"\r\n\r\n") if (e := data.find(s, start)) >= 0]
            if not ends:
                break
            events.append(data[start : min(ends)])
            start = min(ends)
        self.rest = data[start:]
        return events


def event_data(event: bytes) -> bytes:
    """The `data` of one event, its lines joined."""
    return b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))


def without_activations(data: bytes) -> tuple[bytes, JSON]:
    """A JSON reply without the activations that a backend put into it, and what was taken out; the same bytes if
    there were none.
    """
    if not any(f'"{name}"'.encode() in data for name in STRIPPED):
        return data, {}
    reply = parse_object(data)
    if reply is None:
        return data, {}
    taken = {name: reply.pop(name) for name in STRIPPED if name in reply}
    return (msgspec.json.encode(reply), taken) if taken else (data, {})


def event_without_activations(event: bytes) -> tuple[bytes, JSON]:
    """The same for one event of a stream."""
    data = event_data(event)
    kept, taken = without_activations(data)
    return (event.replace(data, kept) if taken else event), taken


def assemble(events: Iterable[bytes]) -> JSON:
    """The reply that a stream of chunks spells out, in the shape of one that was not streamed."""
    reply: JSON = {}
    choices: dict[int, JSON] = {}
    for event in events:
        chunk = parse_object(event_data(event))
        if chunk is None:
            continue
        reply.update({k: v for k, v in chunk.items() if k != "choices" and v is not None})
        for part in chunk.get("choices") or []:
            _grow(choices.setdefault(int(part.get("index") or 0), {}), part)
    reply["choices"] = [choices[i] for i in sorted(choices)]
    return reply


def _grow(choice: JSON, part: JSON) -> None:
    choice["index"] = part.get("index") or 0
    if part.get("finish_reason"):
        choice["finish_reason"] = part["finish_reason"]
    if "text" in part:
        choice["text"] = choice.get("text", "") + (part["text"] or "")
        return
    message = choice.setdefault("message", {"role": "assistant", "content": None})
    delta = part.get("delta") or {}
    for name in ("content", "reasoning", "reasoning_content", "refusal"):
        if delta.get(name):
            message[name] = (message.get(name) or "") + delta[name]
    for piece in delta.get("tool_calls") or []:
        calls = message.setdefault("tool_calls", [])
        index = piece.get("index") or 0
        while len(calls) <= index:
            calls.append({"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = calls[index], piece.get("function") or {}
        call["id"] = piece.get("id") or call["id"]
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""


def chat(fields: JSON | None) -> list[JSON] | None:
    """The messages of a chat request, None if it has none that are well formed."""
    found = (fields or {}).get("messages")
    return found if isinstance(found, list) and all(isinstance(message, dict) for message in found) else None


def media(fields: JSON) -> list[str]:
    """What of a request is not text: the kinds of its messages' parts, such as `image_url`, and `prompt_embeds`."""
    contents = [message.get("content") for message in chat(fields) or []]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    kinds = {str(part.get("type") or next(iter(part), "text")) for part in parts} - TEXT_PARTS
    return sorted(kinds | ({"prompt_embeds"} if fields.get("prompt_embeds") else set()))


def reply_messages(reply: JSON) -> list[JSON]:
    """The assistant message of every choice of a chat reply."""
    return [c["message"] for c in reply.get("choices") or [] if isinstance(c.get("message"), dict)]


def finish_reason(reply: JSON) -> str | None:
    """Why the first choice ended."""
    choices = reply.get("choices") or [{}]
    reason = choices[0].get("finish_reason") if isinstance(choices[0], dict) else None
    return reason if isinstance(reason, str) else None


def canonical(message: JSON) -> tuple[str, str, bytes]:
    """What identifies a message: role, content, and its first tool call by name and arguments.

    Clients send messages back changed: with extra keys, null for empty content, arguments serialised anew, and
    (tau-bench) only the first tool call. All of that makes no difference here.
    """
    return str(message.get("role")), text_of(message), _first_call(message.get("tool_calls"))


def text_of(message: JSON) -> str:
    """A message's content as text, its parts joined; the empty one if there is none."""
    content = message.get("content") or ""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else str(content)


def _first_call(calls: Any) -> bytes:
    call = calls[0] if calls and isinstance(calls, list) else None
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return b""
    arguments = function.get("arguments")
    parsed = parse_object(arguments) if isinstance(arguments, str) else None
    return _sorted.encode([function.get("name"), arguments if parsed is None else parsed])


def prefix_digests(messages: Iterable[JSON], before: int = 0) -> Iterator[int]:
    """A digest of the first message, of the first two, and so on; `before` stands for messages that precede them.

    64 bits, and another value in every process: strings are hashed by Python, ten times as fast as by BLAKE2.
    """
    for message in messages:
        before = hash((before, canonical(message)))
        yield before
