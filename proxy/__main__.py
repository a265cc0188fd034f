"""The console command `tautap`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast, get_args

import click

from episodes import commands
from episodes.errors import BadInput, TautapError
from episodes.layout import Layout
from episodes.records import Role
from episodes.wire import Tokens
from proxy.config import Config

WORKER = [sys.executable, "-m", "worker"]


class Group(click.Group):
    """Turns our own errors into one line on standard error: exit code 2 for bad input, 1 for the rest."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TautapError as error:
            click.echo(f"tautap {ctx.invoked_subcommand}: {error}", err=True)
            ctx.exit(2 if isinstance(error, BadInput) else 1)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tautap")
def cli() -> None:
    """Record a language model's activations while an unmodified agent benchmark talks to it.

    `tautap up` starts a model and the proxy; point any OpenAI client at the proxy's base URL; read the shards with
    pyarrow.
    """


def backend_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of those who talk to a worker that somebody else started."""
    for option in reversed(
        [
            click.option("--backend", required=True, metavar="URL", help="The worker, such as http://127.0.0.1:8001."),
            click.option("--backend-key", envvar="TAUTAP_BACKEND_KEY", help="Bearer key towards the worker."),
            click.option(
                "--spool-dir",
                type=click.Path(path_type=Path),
                default=None,
                help="The worker's --spool-dir, where it is shared but mounted at another path here.",
            ),
        ]
    ):
        command = option(command)
    return command


def proxy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `proxy` and `up` share."""
    for option in reversed(
        [
            click.option("--data", type=click.Path(path_type=Path), default=Path("data"), help="Directory of runs."),
            click.option("--run", default=None, help="Run to record into.  [default: run-<date>-<time>]"),
            click.option("--host", default="127.0.0.1", help="Address to listen on."),
            click.option("--port", default=8000, type=click.IntRange(0, 65535), help="Port to listen on."),
            click.option("--alias", multiple=True, metavar="NAME=SERVED", help="Serve model SERVED under NAME too."),
            click.option(
                "--capture",
                multiple=True,
                metavar="ROLE=TOKENS",
                help="What to record of agent, user, supervisor or warmup: all, prompt, completion, last or none.",
            ),
            click.option(
                "--episode-idle-s", default=300.0, type=click.FloatRange(0), help="Seal an episode quiet for so long."
            ),
            click.option(
                "--backfill", is_flag=True, help="Before sealing an episode, run again what calls lack rows of."
            ),
            click.option(
                "--compression", default="zstd", type=click.Choice(["zstd", "none"]), help="Of vectors in shards."
            ),
        ]
    ):
        command = option(command)
    return command


@cli.command(context_settings={"show_default": True})
@backend_options
@proxy_options
def proxy(backend: str, **options: Any) -> None:
    """Serve the OpenAI API and record every call.

    Requests go to the worker at --backend; what it answers goes to the client. On SIGTERM the proxy finishes what is
    under way and seals every episode.
    """
    config = settle(backend, options)
    asyncio_run(_proxy(config))


@cli.command("backfill")
@click.argument("run", type=click.Path(path_type=Path))
@backend_options
def backfill_command(run: Path, **options: Any) -> None:
    """Run again what calls lack rows of, and store the rows.

    RUN is a directory that no proxy is writing; --backend is a worker of the same model. Every position that a call
    of RUN lacks is computed anew and stored with the episode; then the run is sealed and its index written. Exits with
    1 if calls are left that lack rows.
    """
    from proxy.backfill import backfill

    done = asyncio_run(backfill(Layout(run), Config(data=run.parent, run=run.name, **options)))
    for call, reason in done.left.items():
        click.echo(f"call {call}: {reason}")
    click.echo(f"{done.n_rows:,} rows of {done.n_calls} calls filled, {len(done.left)} calls left without")
    sys.exit(1 if done.left else 0)


@cli.command(
    "worker",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    short_help="Serve a model with vLLM and record.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def worker_command(arguments: tuple[str, ...]) -> None:
    """Serve a model with vLLM and record its activations."""
    os.execv(WORKER[0], [*WORKER, *arguments])


@cli.command(context_settings={"ignore_unknown_options": True, "show_default": True})
@click.option("--worker-port", default=8001, type=click.IntRange(1, 65535), help="The worker's port on loopback.")
@proxy_options
@click.argument("worker_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL] [WORKER AND VLLM FLAGS]")
def up(worker_port: int, worker_arguments: tuple[str, ...], **options: Any) -> None:
    """Start a worker and a proxy in front of it.

    Ctrl-C stops both and seals what was recorded.

    MODEL is a Hugging Face name or a directory; without it the embedded SmolLM2-135M-Instruct runs. Flags that are
    not the proxy's go to the worker: see `tautap worker --help`.
    """
    from proxy.up import run_stack

    config = settle(f"http://127.0.0.1:{worker_port}", options)
    command = [*WORKER, *worker_arguments, "--host", "127.0.0.1", "--port", str(worker_port)]
    sys.exit(asyncio_run(run_stack(config, command)))


def settle(backend: str, options: dict[str, Any]) -> Config:
    """The proxy's Config out of its command line."""
    aliases = {}
    for pair in options.pop("alias"):
        name, equals, served = pair.partition("=")
        if not (name and equals and served):
            raise BadInput(f"--alias {pair!r}: give NAME=SERVED, such as gpt-4o=Qwen/Qwen3-8B")
        aliases[name] = served
    capture = dict(_captured(pair) for pair in options.pop("capture"))
    run = options.pop("run") or time.strftime("run-%Y%m%d-%H%M%S")
    return Config(backend=backend, aliases=aliases, capture=capture, run=run, **options)


def _captured(pair: str) -> tuple[Role, Tokens | Literal["none"]]:
    """A role and which of its tokens to record, out of one --capture."""
    role, _, tokens = pair.partition("=")
    if role not in get_args(Role) or tokens not in (*get_args(Tokens), "none"):
        roles, kinds = ", ".join(get_args(Role)), ", ".join(get_args(Tokens))
        raise BadInput(f"--capture {pair!r}: give ROLE=TOKENS; roles are {roles}, tokens {kinds} and none")
    return cast(Role, role), cast(Tokens, tokens)


async def _proxy(config: Config) -> None:
    from proxy.server import serve, stopper

    ready = asyncio.Event()
    serving = asyncio.create_task(serve(config, stopper(), ready))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
    if ready.is_set():
        click.echo(f"tautap: http://{config.host}:{config.port}/v1 → {config.backend}, run {config.data / config.run}")
    waiting.cancel()
    await serving


def asyncio_run(main: Any) -> Any:
    import uvloop

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return uvloop.run(main)


for command in commands.COMMANDS:
    cli.add_command(command)


def main() -> None:
    cli(prog_name="tautap")


if __name__ == "__main__":
    main()
