"""The console command `tautap`."""

from __future__ import annotations

import gc
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import click
from click.core import ParameterSource

from episodes import commands
from episodes.access import loopback
from episodes.errors import BadInput, TautapError
from episodes.layout import check_name, existing
from episodes.records import Role
from episodes.terminal import echo
from episodes.wire import Tokens
from proxy import logs
from proxy.config import TLS, Config, Limits, Timeouts
from proxy.flags import parse, split_url
from proxy.keys import API_KEYS, Keys, api_keys, backend_key

SECONDS = click.FloatRange(0, min_open=True)
# -P: a `worker.py` where it is started from is the user's, and not meant.
WORKER = [sys.executable, "-P", "-m", "worker"]
KEY = click.option("--key", envvar="OPENAI_API_KEY", default="none", show_envvar=True, help="Bearer key for the proxy.")
WORKER_PORT = click.option(
    "--worker-port", default=8001, type=click.IntRange(1, 65535), help="The worker's port on loopback."
)


class Group(click.Group):
    """Turns our own errors into one line on standard error: exit code 2 for bad input, 1 for the rest."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TautapError as error:
            echo(f"tautap {ctx.invoked_subcommand}: {error}", err=True)
            ctx.exit(2 if isinstance(error, BadInput) else 1)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tautap")
def cli() -> None:
    """Record a language model's activations while an unmodified agent benchmark talks to it.

    `tautap up` starts a model and the proxy; point any OpenAI client at the proxy's base URL; read the shards with
    pyarrow.
    """


def decorated(command: Callable[..., Any], options: list[Callable[..., Any]]) -> Callable[..., Any]:
    """The command with these options, which its help shows in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def backend_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of those who talk to a worker that somebody else started."""
    return decorated(
        command,
        [
            click.option(
                "--backend",
                "backends",
                required=True,
                multiple=True,
                metavar="URL",
                help="The worker: http://127.0.0.1:8001, or unix:PATH. Given again: more workers of the same model.",
            ),
            click.option(
                "--backend-key-file",
                "backend_key",
                type=click.Path(path_type=Path),
                callback=lambda _, __, file: backend_key(file, os.environ),
                help="Bearer key towards the worker.  [default: TAUTAP_BACKEND_KEY in the environment]",
            ),
            click.option(
                "--spool-dir",
                type=click.Path(path_type=Path),
                default=None,
                help="The worker's --spool-dir, where it is shared but mounted at another path here.",
            ),
        ],
    )


def proxy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `proxy` and `up` share."""
    return decorated(
        command,
        [
            click.option("--data", type=click.Path(path_type=Path), default=Path("data"), help="Directory of runs."),
            click.option(
                "--run", default=None, help="Run to record into.  [default: run-<date>-<time>-<4 hex digits>]"
            ),
            click.option("--host", default="127.0.0.1", help="Address to listen on; beyond loopback only with keys."),
            click.option("--port", default=8000, type=click.IntRange(1, 65535), help="Port to listen on."),
            click.option(
                "--api-key-file",
                "keys",
                type=click.Path(path_type=Path),
                callback=lambda _, __, file: api_keys(file, os.environ),
                help="Clients' bearer keys, lines of a name and a key.  [default: TAUTAP_API_KEYS in the environment]",
            ),
            click.option("--tls-cert", type=click.Path(path_type=Path), help="Serve HTTPS: certificate, in PEM."),
            click.option("--tls-key", type=click.Path(path_type=Path), help="Serve HTTPS: the certificate's key."),
            click.option(
                "--alias",
                multiple=True,
                metavar="NAME=SERVED",
                help="Serve model SERVED under NAME too, in chat and text completions.",
            ),
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
            *(
                click.option(f"--{name}-timeout-s", default=default, type=SECONDS, help=f"Wait so long for {what}.")
                for name, default, what in (
                    ("connect", Timeouts.connect_s, "a connection to the worker"),
                    ("first-byte", Timeouts.first_byte_s, "the first byte of its reply"),
                    ("idle", Timeouts.idle_s, "the next byte of a reply, or a whole request"),
                    ("total", Timeouts.total_s, "the whole reply"),
                )
            ),
            click.option(
                "--max-body-bytes", default=Limits.body_bytes, type=click.IntRange(1), help="Of a request, unpacked."
            ),
            click.option(
                "--max-in-flight", default=Limits.in_flight, type=click.IntRange(1), help="Requests at the same time."
            ),
            click.option("--max-runs", default=Limits.runs, type=click.IntRange(1), help="That are open."),
            click.option(
                "--durability",
                default="async",
                type=click.Choice(["async", "sync"]),
                help="End a reply when its call is noted on disk, or when all of it is recorded.",
            ),
            click.option(
                "--min-free-bytes", default=1 << 30, type=click.IntRange(0), help="Of disk, for taking new calls."
            ),
            click.option(
                "--compression", default="zstd", type=click.Choice(["zstd", "none"]), help="Of vectors in shards."
            ),
            click.option(
                "--drain-s", default=120.0, type=click.FloatRange(0), help="When told to stop, finish within so long."
            ),
            click.option(
                "--log-format", default="text", type=click.Choice(["text", "json"]), help="JSON has a line per call."
            ),
        ],
    )


@cli.command(context_settings={"show_default": True})
@backend_options
@proxy_options
def proxy(backends: tuple[str, ...], **options: Any) -> None:
    """Serve the OpenAI API and record every call.

    Requests go to the worker at --backend, of several an episode's to the same; what it answers goes to the client. On
    SIGTERM the proxy finishes what is under way and seals every episode, within --drain-s.
    """
    from proxy.server import run

    config = settle(backends, options)
    where = f"{config.url}/v1 → {', '.join(config.backends)}, run {config.data / config.run}"
    asyncio_run(run(config, lambda: click.echo(f"tautap: {where}")), config.log_format)


@cli.command("top", context_settings={"show_default": True})
@click.argument("url", default="http://127.0.0.1:8000")
@KEY
@click.option("--every-s", default=2.0, type=click.FloatRange(0.1), help="How often to look.")
def top_command(url: str, key: str, every_s: float) -> None:
    """Show how a running proxy is doing: episodes, tokens, rows, bytes, backlog.

    Ctrl-C ends it. Where the output is no terminal, one look is printed.
    """
    from proxy.top import top

    base_url, _ = split_url(url)
    with suppress(KeyboardInterrupt):
        asyncio_run(top(base_url, key, every_s))


@cli.command("backfill")
@click.argument("run", type=click.Path(path_type=Path))
@backend_options
def backfill_command(run: Path, backends: tuple[str, ...], **options: Any) -> None:
    """Run again what calls lack rows of, and store the rows.

    RUN is a directory that no proxy is writing; --backend is a worker of the same model. Every position that a call
    of RUN lacks is computed anew and stored with the episode; then the run is sealed and its index written. Exits with
    1 if calls are left that lack rows.
    """
    from proxy.backfill import backfill

    config = Config(_backends(backends), data=run.parent, run=run.name, **options)
    done = asyncio_run(backfill(existing(run), config))
    for call, reason in done.left.items():
        echo(f"call {call}: {reason}")
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
@WORKER_PORT
@proxy_options
@click.argument("worker_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL] [WORKER AND VLLM FLAGS]")
def up(worker_port: int, worker_arguments: tuple[str, ...], **options: Any) -> None:
    """Start a worker and a proxy in front of it.

    Ctrl-C stops both and seals what was recorded.

    MODEL is a Hugging Face name or a directory; without it the embedded SmolLM2-135M-Instruct runs. Flags that are
    not the proxy's go to the worker: see `tautap worker --help`.
    """
    from proxy.up import greet, run_stack

    config = settle([f"http://127.0.0.1:{worker_port}"], options)
    worker = _worker(worker_arguments, worker_port)
    running = run_stack(config, worker, os.environ, partial(greet, config))
    sys.exit(asyncio_run(running, config.log_format))


def _worker(arguments: tuple[str, ...], port: int) -> list[str]:
    """The command that starts a worker on loopback."""
    return [*WORKER, *arguments, "--host", "127.0.0.1", "--port", str(port)]


class BenchCommand(click.Command):
    """Keeps what follows `--` for tau-bench; click would give it to the worker."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        rest = super().parse_args(ctx, args[:at])
        ctx.params["benchmark_arguments"] = args[at + 1 :]
        return rest


@cli.command(
    cls=BenchCommand,
    context_settings={"ignore_unknown_options": True, "show_default": True},
    short_help="Run tau-bench, record it, join its rewards.",
)
@click.option(
    "--tau-bench", type=click.Path(path_type=Path), metavar="DIR", help="A checkout of it.  [default: the package]"
)
@click.option("--python", metavar="EXE", help="tau-bench's interpreter.  [default: DIR/.venv/bin/python, or tautap's]")
@click.option("--base-url", metavar="URL", help="A proxy that runs already.  [default: start the stack, as `up` does]")
@click.option("--matrix", type=click.Path(path_type=Path), metavar="FILE", help="Configurations, in TOML.")
@click.option("--at-once", default=4, type=click.IntRange(1), help="How many configurations run at the same time.")
@KEY
@WORKER_PORT
@proxy_options
@click.argument(
    "worker_arguments",
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="[MODEL] [WORKER AND VLLM FLAGS] -- [TAU-BENCH'S FLAGS]",
)
@click.pass_context
def bench(
    ctx: click.Context, /, tau_bench: Path | None, python: str | None, matrix: Path | None, **options: Any
) -> None:
    """Run tau-bench, record it, and join its rewards to what was recorded.

    An unmodified tau-bench, a checkout or an installed package, runs in its own interpreter with the flags after `--`;
    --platform, --task-ids 1,2,3 and no --user-model are understood too. The run is sealed and joined with the results
    also if tau-bench fails or Ctrl-C ends it.
    """
    from proxy.bench import Bench, Benchmark, plan
    from proxy.up import attend, run_stack

    at_once, key, port = (options.pop(name) for name in ("at_once", "key", "worker_port"))
    arguments, flags = options.pop("worker_arguments"), parse(options.pop("benchmark_arguments"))
    base_url = options.pop("base_url") or "".join(flags.get("base-url", []))
    if base_url:
        _refuse_stack(ctx, arguments)
        base_url, run = split_url(base_url)
        options["run"] = options["run"] or run
    elif options["keys"] and key == "none":
        key = next(iter(options["keys"].values()))
    config = settle([f"http://127.0.0.1:{port}"], options)
    benchmark = Benchmark.at(tau_bench, python, sys.executable)
    evals = plan(flags, matrix, config, benchmark, own=not base_url)
    running = Bench(benchmark, evals, at_once, key, dict(os.environ))
    job = partial(running.run, base_url or config.url)
    doing = attend(job) if base_url else run_stack(config, _worker(arguments, port), os.environ, job)
    sys.exit(asyncio_run(doing, config.log_format) or int(running.failed))  # Ctrl-C may come before the job begins


def _refuse_stack(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """BadInput for what says how to start a stack when none is started."""
    ours = {"worker_port", *(p.name for p in proxy.params)} - {"run"}
    given = [p.opts[0] for p in ctx.command.params if p.name in ours and _given(ctx, p.name)]
    if arguments or given:
        raise BadInput(f"{' '.join([*given, *arguments])}: not with --base-url, where the stack runs already")


def _given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _backends(given: Sequence[str]) -> tuple[str, ...]:
    """Where the workers are; BadInput if two are the same."""
    if twice := [address for i, address in enumerate(given) if address in given[:i]]:
        raise BadInput(f"--backend {twice[0]} is given twice")
    return tuple(given)


def settle(backends: Sequence[str], options: dict[str, Any]) -> Config:
    """The proxy's Config out of its command line."""
    aliases = {}
    for pair in options.pop("alias"):
        name, equals, served = pair.partition("=")
        if not (name and equals and served):
            raise BadInput(f"--alias {pair!r}: give NAME=SERVED, such as gpt-4o=Qwen/Qwen3-8B")
        aliases[name] = served
    capture = dict(_captured(pair) for pair in options.pop("capture"))
    # Two that start in one second, at a proxy that runs, would else share a run.
    run = check_name("run", options.pop("run") or f"{time.strftime('run-%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
    options["host"] = options["host"].strip("[]")  # as a URL has it
    keys = Keys(options.pop("keys"))
    if not (keys or loopback(options["host"])):
        raise BadInput(
            f"--host {options['host']}: without keys only this machine is served: set --api-key-file or {API_KEYS}"
        )
    timeouts = Timeouts(*(options.pop(f"{name}_timeout_s") for name in ("connect", "first_byte", "idle", "total")))
    return Config(
        _backends(backends),
        aliases=aliases,
        capture=capture,
        run=run,
        keys=keys,
        tls=_tls(options.pop("tls_cert"), options.pop("tls_key")),
        timeouts=timeouts,
        limits=Limits(*(options.pop(f"max_{name}") for name in ("body_bytes", "in_flight", "runs"))),
        **options,
    )


def _tls(cert: Path | None, key: Path | None) -> TLS | None:
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise BadInput("--tls-cert and --tls-key: give both, or neither to serve plain HTTP")
    return TLS(cert, key)


def _captured(pair: str) -> tuple[Role, Tokens | Literal["none"]]:
    """A role and which of its tokens to record, out of one --capture."""
    role, _, tokens = pair.partition("=")
    if role not in get_args(Role) or tokens not in (*get_args(Tokens), "none"):
        roles, kinds = ", ".join(get_args(Role)), ", ".join(get_args(Tokens))
        raise BadInput(f"--capture {pair!r}: give ROLE=TOKENS; roles are {roles}, tokens {kinds} and none")
    return cast(Role, role), cast(Tokens, tokens)


def asyncio_run(main: Any, log_format: logs.Format = "text") -> Any:
    """Run what a command has imported and built; returns its result."""
    import uvloop

    logs.configure(log_format)
    # What is imported by now is never garbage: to walk it would hold the event loop up for 30 ms every so often. And
    # nearly all that a call makes goes without a collection: at Python's own pace they take a fifth of a call's CPU. Of
    # what stays, 50,000 objects at a time are walked: a quarter of a million take 60 ms.
    gc.freeze()
    gc.set_threshold(5_000, 10, 100)
    return uvloop.run(main)


for command in commands.COMMANDS:
    cli.add_command(command)


def main() -> None:
    cli(prog_name="tautap")


if __name__ == "__main__":
    main()
