"""How the proxy logs: lines for people, or JSON objects, one a line, that name the calls they are about."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from episodes.records import Call

Format = Literal["text", "json"]
# One line a call, at level INFO: too many for people.
calls = logging.getLogger("tautap.calls")
TOLD = ("thread", "episode", "role", "turn", "attempt", "kind", "model", "status", "finish_reason", "error", "lost")


class JSONLines(logging.Formatter):
    """`time`, `level`, `logger`, `message`, and what a record's `extra` has under `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()


def configure(form: Format) -> None:
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JSONLines() if form == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    calls.setLevel(logging.INFO if form == "json" else logging.WARNING)


def about(call: Call) -> dict[str, Any]:
    """`extra` of a record about a call."""
    return {"fields": {"call": call.id}}


def recorded(run: str, call: Call, rows: Mapping[str, int]) -> None:
    """Tell of a call that is on disk. rows: how many of its positions it stored, shares, lacks, or
    may yet share (`awaited`).
    """
    if calls.isEnabledFor(logging.INFO):
        told = {name: getattr(call, name) for name in TOLD}
        tokens = {"n_prompt": call.n_prompt, "n_completion": call.n_completion}
        first_byte_s = None if call.first_byte is None else call.first_byte - call.started
        times = {"seconds": call.ended - call.started, "first_byte_s": first_byte_s}
        fields = {"call": call.id, "run": run, **told, **tokens, **times, "rows": rows}
        calls.info("call recorded", extra={"fields": fields})
