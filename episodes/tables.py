"""The index tables: `calls.parquet` and `episodes.parquet`, made from the journal's history.

The file metadata `journal_bytes` says how much of the journal a table stands for.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from episodes.history import Episode, History
from episodes.layout import Layout
from episodes.records import Call

SPAN = pa.struct(
    [
        pa.field("choice", pa.int16()),
        pa.field("call", pa.string()),
        pa.field("source_choice", pa.int16()),
        pa.field("start", pa.int32()),
        pa.field("stop", pa.int32()),
    ]
)
SEQUENCE = pa.struct(
    [
        pa.field("choice", pa.int16()),
        pa.field("prompt_token_ids", pa.list_(pa.int32())),
        pa.field("completion_token_ids", pa.list_(pa.int32())),
        pa.field("finish_reason", pa.string()),
        pa.field("n_cached", pa.int32()),
    ]
)
CALLS = pa.schema(
    [
        pa.field("call", pa.string()),
        pa.field("episode", pa.string()),
        pa.field("thread", pa.string()),
        pa.field("role", pa.string()),
        pa.field("turn", pa.int32()),
        pa.field("attempt", pa.int32()),
        pa.field("endpoint", pa.string()),
        pa.field("model", pa.string()),
        pa.field("started", pa.timestamp("us", "UTC")),
        pa.field("first_byte", pa.timestamp("us", "UTC")),
        pa.field("ended", pa.timestamp("us", "UTC")),
        pa.field("status", pa.int16()),
        pa.field("finish_reason", pa.string()),
        pa.field("error", pa.string()),
        pa.field("lost", pa.string()),
        pa.field("foreign", pa.bool_()),
        pa.field("n_prompt", pa.int32()),
        pa.field("n_cached", pa.int32()),
        pa.field("n_completion", pa.int32()),
        pa.field("n_rows", pa.int32()),
        pa.field("n_missing", pa.int32()),
        pa.field("points", pa.list_(pa.string())),
        pa.field("spans", pa.list_(SPAN)),
        pa.field("sequences", pa.list_(SEQUENCE)),
        pa.field("request", pa.string()),
        pa.field("reply", pa.string()),
    ]
)
EPISODES = pa.schema(
    [
        pa.field("episode", pa.string()),
        pa.field("status", pa.string()),
        pa.field("benchmark", pa.string()),
        pa.field("env", pa.string()),
        pa.field("task_id", pa.string()),
        pa.field("trial", pa.int32()),
        pa.field("reward", pa.float64()),
        pa.field("threads", pa.list_(pa.string())),
        pa.field("n_calls", pa.int32()),
        pa.field("n_turns", pa.int32()),
        pa.field("n_prompt", pa.int64()),
        pa.field("n_completion", pa.int64()),
        pa.field("n_rows", pa.int64()),
        pa.field("n_shared", pa.int64()),
        pa.field("n_missing", pa.int64()),
        pa.field("started", pa.timestamp("us", "UTC")),
        pa.field("ended", pa.timestamp("us", "UTC")),
        pa.field("shard", pa.string()),
        pa.field("n_bytes", pa.int64()),
    ]
)


def calls_table(history: History) -> pa.Table:
    """One row per committed call, in the journal's order."""
    return _table([_call_row(history, call) for call in history.calls.values()], CALLS)


def episodes_table(history: History, layout: Layout) -> pa.Table:
    """One row per episode. n_rows: rows it stores; n_shared: positions of its calls whose row is another call's."""
    return _table([_episode_row(history, layout, episode) for episode in history.episodes.values()], EPISODES)


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema)


def _call_row(history: History, call: Call) -> dict[str, Any]:
    spans = history.spans(call)
    return {
        "call": call.id,
        "episode": call.episode,
        "thread": call.thread,
        "role": call.role,
        "turn": call.turn,
        "attempt": call.attempt,
        "endpoint": call.endpoint,
        "model": call.model,
        "started": _us(call.started),
        "first_byte": _us(call.first_byte),
        "ended": _us(call.ended),
        "status": call.status,
        "finish_reason": call.finish_reason,
        "error": call.error,
        "lost": call.lost,
        "foreign": call.foreign,
        "n_prompt": call.n_prompt,
        "n_cached": sum(s.n_cached for s in call.sequences),
        "n_completion": call.n_completion,
        "n_rows": call.n_kept,
        "n_missing": sum(s.stop - s.start for part in spans.values() for s in part if s.owner is None),
        "points": call.points,
        "spans": [
            {
                "choice": choice,
                "call": span.owner.call if span.owner else None,
                "source_choice": span.owner.choice if span.owner else None,
                "start": span.start,
                "stop": span.stop,
            }
            for choice, part in spans.items()
            for span in part
        ],
        "sequences": [
            {
                "choice": s.choice,
                "prompt_token_ids": s.prompt_token_ids,
                "completion_token_ids": s.completion_token_ids,
                "finish_reason": s.finish_reason,
                "n_cached": s.n_cached,
            }
            for s in call.sequences
        ],
        "request": call.request,
        "reply": call.reply,
    }


def _episode_row(history: History, layout: Layout, episode: Episode) -> dict[str, Any]:
    calls = episode.calls
    n_rows = sum(call.n_kept for call in calls)
    n_missing = sum(history.n_missing(call) for call in calls)
    n_positions = sum(call.n_positions for call in calls if call.points)
    return {
        "episode": episode.id,
        "status": episode.status,
        "threads": list(dict.fromkeys(call.thread for call in calls)),
        "n_calls": len(calls),
        "n_turns": max((call.turn + 1 for call in calls), default=0),
        "n_prompt": sum(call.n_prompt for call in calls),
        "n_completion": sum(call.n_completion for call in calls),
        "n_rows": n_rows,
        "n_shared": n_positions - n_rows - n_missing,
        "n_missing": n_missing,
        "started": _us(min((call.started for call in calls), default=None)),
        "ended": _us(max((call.ended for call in calls), default=None)),
        "shard": str(layout.shard(episode.id).relative_to(layout.root)) if episode.sealed else None,
        "n_bytes": episode.sealed.n_bytes if episode.sealed else 0,
    }


def _us(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1e6)
