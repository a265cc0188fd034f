"""Messages and replies of the OpenAI API: reading a reply's bytes, and what makes two messages the same one.

Pure: bytes in, values out. Tolerant of what other servers send, since whatever is recorded was already answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from episodes.errors import BadInput

JSON = dict[str, Any]
TEXT_PARTS = {"text", "input_text", "output_text", "refusal", "thinking"}
STRIPPED = ("activations", "activation_collection_status")
# Tools' schemas are about ten deep.
DEPTH_LIMIT = 100
TOO_DEEP = f"the JSON is more than {DEPTH_LIMIT} deep: that is all that is taken"

_objects: msgspec.json.Decoder[JSON] = msgspec.json.Decoder(JSON)
_sorted = msgspec.json.Encoder(order="deterministic")


def parse_request(data: bytes | str) -> JSON | None:
    """The JSON object in `data`, None if it is anything else; BadInput for one so deep that code that walks it would
    fall over.
    """
    try:
        found = _objects.decode(data)
    except ValueError:  # of msgspec, of UTF-8, or of an integer of thousands of digits
        return None
    except RecursionError:
        raise BadInput(TOO_DEEP) from None
    if _openings(data) > DEPTH_LIMIT and _deep(found):
        raise BadInput(TOO_DEEP)
    return found


def parse_object(data: bytes | str) -> JSON | None:
    """The JSON object in `data`, None if it is anything else or too deep."""
    try:
        return parse_request(data)
    except BadInput:
        return None


def _openings(data: bytes | str) -> int:
    """Brackets in a JSON text: it is no deeper than it has of them."""
    if isinstance(data, str):
        return data.count("{") + data.count("[")
    return data.count(b"{") + data.count(b"[")


def _deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEPTH_LIMIT):
        inner = [child for v in level for child in (v.values() if type(v) is dict else v)]
        level = [child for child in inner if type(child) in (dict, list)]
        if not level:
            return False
    return True


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
    return [choice["message"] for choice in objects(reply.get("choices")) if isinstance(choice.get("message"), dict)]


def finish_reason(reply: JSON) -> str | None:
    """Why the first choice ended."""
    reason = next((choice.get("finish_reason") for choice in objects(reply.get("choices"))), None)
    return reason if isinstance(reason, str) else None


def objects(found: Any) -> list[JSON]:
    """The objects of what should be a list of them; none if it is no list."""
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def canonical(message: JSON) -> tuple[str, str, bytes]:
    """What identifies a message: role, content, and its first tool call by name and arguments.

    Clients send messages back changed: with extra keys, null for empty content, arguments serialised anew, and
    (tau-bench) only the first tool call. All of that makes no difference here.
    """
    call = first_call(message)
    return str(message.get("role")), text_of(message), b"" if call is None else _sorted.encode(call)


def text_of(message: JSON) -> str:
    """A message's content as text, its parts joined; the empty one if there is none."""
    content = message.get("content") or ""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else str(content)


def first_call(message: JSON) -> tuple[Any, Any] | None:
    """The name and the arguments of a message's first tool call, these parsed if they are an object's JSON; None if it
    has none.
    """
    calls = message.get("tool_calls")
    call = calls[0] if calls and isinstance(calls, list) else None
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return None
    arguments = function.get("arguments")
    parsed = parse_object(arguments) if isinstance(arguments, str) else None
    return function.get("name"), arguments if parsed is None else parsed


def prefix_digests(messages: Iterable[JSON], before: int = 0) -> Iterator[int]:
    """A digest of the first message, of the first two, and so on; `before` stands for messages that precede them.

    64 bits, and another value in every process: strings are hashed by Python, ten times as fast as by BLAKE2.
    """
    for message in messages:
        before = hash((before, canonical(message)))
        yield before
