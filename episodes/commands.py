"""The offline commands: `tautap runs`, `episodes`, `show`, `seal`, `link` and `verify`."""

from __future__ import annotations

import time
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from episodes.cast import n_episodes
from episodes.errors import BadInput, BadRun
from episodes.layout import existing
from episodes.messages import JSON, canonical, objects, parse_object, reply_messages
from episodes.outline import Outline
from episodes.recovery import STOPPED
from episodes.rows import Span
from episodes.run import Call, Run, open_run
from episodes.store import Store
from episodes.taubench import DIALECT, Links, find_links, read_results, read_tasks
from episodes.terminal import console, echo
from episodes.verify import problems

RUN = click.argument("run", type=click.Path(path_type=Path))


@click.command()
@click.argument("data", type=click.Path(path_type=Path), default=Path("data"))
def runs(data: Path) -> None:
    """List the runs in a directory.

    DATA is where the proxy writes them (default: data).
    """
    table = _table("run", "model", "points", "episodes", "calls", "rows", "created")
    for path in sorted(data.iterdir()) if data.is_dir() else []:
        if not (path / "run.json").exists():
            continue
        try:
            run = open_run(path)
        except BadRun as error:
            echo(error, err=True)
            continue
        recorded = run.about.recorded
        table.add_row(
            path.name,
            recorded.model if recorded else "",
            " ".join(recorded.points) if recorded else "",
            str(n_episodes(run.names)),
            str(sum(run.episodes["n_calls"].to_pylist())),
            f"{sum(run.episodes['n_rows'].to_pylist()):,}",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.about.created)),
        )
    if not table.rows:
        raise BadRun(f"{data} holds no run")
    console().print(table)


@click.command()
@RUN
def episodes(run: Path) -> None:
    """List a run's episodes.

    RUN is its directory. Per episode: calls, turns, tokens, rows that it stores, rows that it shares with other calls,
    rows that are known to be missing, calls that lack rows, bytes of its shard, and how many rows it would have stored
    for each that it did.
    """
    console().print(episodes_overview(open_run(run)))


def episodes_overview(run: Run) -> Table:
    """A line per episode and one for all: calls, turns, tokens, rows stored, shared and missing, calls that lack rows,
    bytes, the saving.
    """
    counts = ("calls", "turns", "tokens", "rows", "shared", "missing", "incomplete", "bytes")
    table = _table("episode", "status", *counts, "saving")
    rows = run.episodes.to_pylist()
    for row in rows:
        table.add_row(row["episode"], row["status"], *_counts(row))
    if len(rows) > 1:
        table.add_section()
        names = [name for name in rows[0] if name.startswith("n_")]
        table.add_row("all", "", *_counts({name: sum(row[name] for row in rows) for name in names}))
    return table


def _counts(row: dict[str, Any]) -> list[str]:
    rows, shared = row["n_rows"], row["n_shared"]
    return [
        str(row["n_calls"]),
        str(row["n_turns"]),
        f"{row['n_prompt'] + row['n_completion']:,}",
        f"{rows:,}",
        f"{shared:,}",
        f"{row['n_missing']:,}",
        f"{row['n_incomplete']:,}",
        f"{row['n_bytes']:,}",
        f"{(rows + shared) / rows:.1f}×" if rows else "",
    ]


@click.command()
@RUN
@click.argument("episode", required=False)
def show(run: Path, episode: str | None) -> None:
    """Print an episode's conversation, turns and rows.

    The EPISODE is of the directory RUN; without one, it is the run's first.
    """
    opened = open_run(run)
    if not opened.names:
        raise BadRun(f"{run} holds no episode yet")
    name = episode or opened.names[0]
    said: dict[str, list[JSON]] = {}
    for call in opened.episode(name):
        thread = call.record.thread
        said[thread] = _show_call(console(), call, said.get(thread, []))


def _request_messages(call: Call) -> list[JSON]:
    fields = parse_object(call.record.request.encode()) or {}
    if "prompt" in fields:
        return [{"role": "prompt", "content": _text(fields["prompt"])}]
    return objects(fields.get("messages"))


def _n_alike(messages: list[JSON], others: list[JSON]) -> int:
    """How many messages two conversations begin with alike."""
    alike = (canonical(one) == canonical(other) for one, other in zip(messages, others, strict=False))
    return sum(takewhile(bool, alike))


def _show_call(out: Console, call: Call, before: list[JSON]) -> list[JSON]:
    """Print what a call adds to its conversation; returns that up to its reply. before: as the call before returned it,
    which may have been a branch, or be gone on from without its reply
    """
    record = call.record
    asked = _request_messages(call)
    for message in asked[_n_alike(asked, before) :]:
        _say(out, str(message.get("role")), message)
    repeat = f", attempt {record.attempt} ({record.kind})" if record.attempt else ""
    head = f"{record.thread} {record.role}, turn {record.turn}{repeat}, {record.id}"
    out.rule(Text(head, "dim"), align="left", characters="·")
    reply = parse_object(record.reply.encode()) or {}
    replies = reply_messages(reply)
    for message in replies:
        _say(out, "assistant", message)
    for choice in objects(reply.get("choices")):
        if "text" in choice:
            _say(out, "completion", {"content": choice["text"]})
    if not record.answered:
        out.print(f"  HTTP {record.status}: {record.error or record.reply[:200]}", style="red")
    for sequence in record.sequences:
        spans = ", ".join(_span(span, record.id) for span in call.spans(sequence.choice))
        tokens = f"{len(sequence.prompt_token_ids)} + {len(sequence.completion_token_ids)} tokens"
        out.print(f"  {tokens}; rows: {spans or 'none'}", style="cyan")
    if record.lost and (call.missing or not record.sequences):
        out.print(f"  no activations: {record.lost}", style="red")
    return asked + replies[:1]


def _span(span: Span, own: str) -> str:
    owner = span.owner
    where = "missing" if owner is None else "stored here" if owner.call == own else f"of {owner.call}"
    return f"{span.start}–{span.stop} {where}"


def _say(out: Console, role: str, message: JSON) -> None:
    out.print(role, style="bold", end=" ")
    out.print(_text(message.get("content")))
    for function in objects([call.get("function") for call in objects(message.get("tool_calls"))]):
        out.print(f"  → {function.get('name')}({function.get('arguments')})", style="yellow")


def _text(content: Any) -> str:
    return content if isinstance(content, str) else msgspec.json.encode(content).decode() if content else ""


@click.command()
@RUN
def seal(run: Path) -> None:
    """Seal a run that no proxy is writing.

    Moves the rows of every episode of the directory RUN into its shard, and writes the index tables. What a proxy that
    was killed left is finished or cleared away first, and said; of calls that it had not recorded, the rows that only
    the worker has are lost then. Start a proxy on the run instead, and it fetches them. Episodes that cannot be sealed,
    for a file is damaged, are left and said; the exit code is 1 then.
    """
    store = _opened(run)
    try:
        sealed = store.finish(DIALECT)
    finally:
        store.close()
    echo(f"sealed {n_episodes(s.episode for s in sealed)} episodes, {sum(s.n_rows for s in sealed):,} rows")


def _opened(run: Path) -> Store:
    """A run to write; what a writer that died left in it is said."""
    store = Store(existing(run))
    for recovered in store.recovered:
        echo(recovered)
    for call in store.left:
        echo(f"call {call.id}: {STOPPED}; recorded with what there is")
    return store


@click.command()
@RUN
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--env", help="tau-bench's --env, where the conversations do not tell it.")
@click.option("--split", help="tau-bench's --task-split.")
@click.option(
    "--tau-bench",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A checkout of it, to know by its task an attempt that crashed; with --env.",
)
def link(run: Path, results: tuple[Path, ...], env: str | None, split: str | None, tau_bench: Path | None) -> None:
    """Join tau-bench's results to a run's episodes.

    RESULTS are the JSON files that tau-bench wrote, any number, at any time after the proxy stopped; RUN is the run's
    directory. What is live is sealed first; the exit code is 1 if some of it cannot be.
    """
    entries = [entry for path in results for entry in read_results(path)]
    tasks = _tasks(tau_bench, env, split or "test") if tau_bench else {}
    store, failed = _opened(run), None
    try:
        try:
            store.seal_all(DIALECT)
        except BadRun as error:  # its episodes are joined all the same
            failed = error
        found = find_links(Outline(store.layout), entries, env, split, tasks)
        if entries and not found.links:
            names = ", ".join(path.name for path in results)
            raise BadInput(
                f"{names}: none of {len(entries)} results tells of an episode of {run}: is it another run's?"
            )
        n_new = store.link(found.links)
        store.roll()
    finally:
        store.close()
    _report_links(found, n_new)
    if failed:
        raise failed


def _tasks(tau_bench: Path, env: str | None, split: str) -> dict[int, str]:
    """The tasks of a checkout; BadInput if it has none of that name."""
    if env is None:
        raise BadInput(f"--tau-bench {tau_bench}: say which tasks, with --env airline or --env retail")
    found = read_tasks(tau_bench / "tau_bench", env, split)
    if not found:
        raise BadInput(
            f"--tau-bench {tau_bench}: no tasks of --env {env} --split {split} there; give a checkout of "
            "github.com/sierra-research/tau-bench"
        )
    return found


def _report_links(found: Links, n_new: int) -> None:
    """Say what was joined, and all that was not."""
    for result in found.results:
        echo(f"{result.source}: task {result.task_id}, trial {result.trial}: no episode")
    for episode in found.episodes:
        echo(f"episode {episode}: in no results file")
    for doubt in found.doubts():
        echo(doubt)
    echo(
        f"{len(found.links)} results joined, {n_new} of them new or changed; "
        f"{len(found.results)} results without an episode, {len(found.episodes)} episodes without a result"
    )


@click.command()
@RUN
@click.pass_context
def verify(context: click.Context, run: Path) -> None:
    """Check every checksum, span and row.

    Says what is wrong with the directory RUN, and exits with 1 if anything is.
    """
    opened = open_run(run)
    found = list(problems(opened))
    for problem in found:
        echo(problem)
    history = opened.outline
    echo(
        f"{n_episodes(history.episodes)} episodes, {len(history.calls)} calls, "
        f"{sum(call.n_kept for call in history.calls.values()):,} rows: "
        f"{f'{len(found)} problems' if found else 'all there'}"
    )
    context.exit(1 if found else 0)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold")
    for i, column in enumerate(columns):
        words = i == 0 or column in ("status", "model", "points", "created")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table


COMMANDS = [runs, episodes, show, seal, link, verify]
