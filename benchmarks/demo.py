"""`make demo`: the main job on this machine, from starting the model to reading one layer of one episode.

Starts `tautap up` on the embedded model, has an unmodified OpenAI client hold four conversations with it at once (the
help desk of a library, with tools and a scripted reader), stops it, and prints what was recorded. Exits with 1 unless
every row is there.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
from rich.console import Console

from episodes import Run, open_run
from episodes.commands import episodes_overview
from episodes.terminal import console
from episodes.verify import problems
from servers import wait_until_healthy

MODEL = "SmolLM2-135M-Instruct"
PORT, WORKER_PORT = 8000, 8001

POLICY = """\
You are the help desk of a public library. Help one reader at a time.
Look a book up before you say anything about it, and lend only what is on the shelf.
A reader may hold five books. A loan runs four weeks and can be extended once, unless somebody waits for the book.
Late returns cost ten cents a day. Never promise what the tools did not confirm. Answer in one or two sentences.
"""


def tool(name: str, description: str, argument: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {argument: {"type": "string", "maxLength": 24}}, "required": [argument]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema, "strict": True},
    }


TOOLS = [
    tool("find_book", "Find books by title or subject.", "query"),
    tool("lend_book", "Lend a book to the reader.", "book_id"),
    tool("extend_loan", "Extend a loan by four weeks.", "loan_id"),
    tool("reader_account", "Show the reader's loans and fees.", "card_number"),
]
# What the reader says, and the tool that the model is made to call for it: one this small seldom calls one by itself.
SCRIPT = [
    ("Hello, do you have a book about {}?", "find_book"),
    ("Is it hard to read?", None),
    ("I would like to take it home.", "lend_book"),
    ("How long may I keep it?", None),
    ("Could I keep it longer?", "extend_loan"),
    ("Thank you, that is all.", None),
]
SUBJECTS = ["sea voyages", "growing tomatoes", "the history of clocks", "how bridges are built"]
FOUND = {"book_id": "b-1042", "loan_id": "l-7", "on_shelf": True, "waiting": 0, "due": "in four weeks"}


async def converse(client: openai.AsyncOpenAI, subject: str) -> None:
    """One reader's six turns; a turn with a tool takes two calls."""
    messages: list[Any] = [{"role": "system", "content": POLICY}]
    settings: dict[str, Any] = {"model": MODEL, "tools": TOOLS, "temperature": 0, "max_tokens": 64}
    for line, name in SCRIPT:
        messages.append({"role": "user", "content": line.format(subject)})
        if name is not None:
            choice = {"type": "function", "function": {"name": name}}
            reply = await client.chat.completions.create(messages=messages, tool_choice=choice, **settings)
            message = reply.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls or []:
                messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(FOUND)})
        reply = await client.chat.completions.create(messages=messages, tool_choice="none", **settings)
        messages.append({"role": "assistant", "content": reply.choices[0].message.content})


async def converse_all(url: str) -> None:
    client = openai.AsyncOpenAI(base_url=url, api_key="none")
    await asyncio.gather(*(converse(client, subject) for subject in SUBJECTS))


def report(run: Run, out: Console) -> int:
    """Print what was recorded; the exit code."""
    found = list(problems(run))
    out.print(f"\nrecorded in {run.layout.root}\n", style="bold")
    out.print(episodes_overview(run))
    n_kept = sum(call.n_kept for call in run.history.calls.values())
    last = run.call(list(run.history.calls)[-1])
    n_points = len(last.record.points)
    out.print(f"\n{n_kept:,} rows of {n_points} points; saving: against storing every token of every call")
    point = last.record.points[0]
    rows = last.activations(point)
    out.print(f"{point} of call {last.record.id}, episode {last.record.episode}: {rows.dtype} {rows.shape}")
    out.print("\n".join(found) if found else "verified: every row of every call is there, once")
    out.print(f"\nlook around: tautap episodes {run.layout.root}; tautap show {run.layout.root}")
    return 1 if found or not n_kept else 0


def main() -> int:
    out = console()
    name = time.strftime("demo-%Y%m%d-%H%M%S")
    command = [sys.executable, "-m", "proxy", "up", "--run", name, "--port", str(PORT)]
    stack = subprocess.Popen([*command, "--worker-port", str(WORKER_PORT)])
    try:
        wait_until_healthy(f"http://127.0.0.1:{PORT}", stack, "/health/ready")
        begun = time.monotonic()
        asyncio.run(converse_all(f"http://127.0.0.1:{PORT}/v1"))
        out.print(f"{len(SUBJECTS)} conversations at once, {time.monotonic() - begun:.1f} s")
    finally:
        stack.send_signal(signal.SIGINT)
        code = stack.wait(120)
    return code or report(open_run(Path("data") / name), out)


if __name__ == "__main__":
    sys.exit(main())
