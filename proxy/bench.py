"""`tautap bench`: an unmodified tau-bench run through a proxy, and its results joined to what was recorded.

tau-bench runs as a child process in its own interpreter, told by its environment where the proxy is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

from episodes.errors import BadInput, TautapError
from episodes.layout import check_name
from episodes.tables import Totals
from episodes.taubench import Score, pass_hat, read_tasks
from episodes.terminal import console
from proxy.admin import Client, Joined, Progress
from proxy.config import Config
from proxy.flags import (
    TOOL_AGENTS,
    Flags,
    accepted,
    check,
    command_line,
    n_attempts,
    read_matrix,
    results_directory,
    translate,
    value,
)
from proxy.up import end

EVERY_S = 1.0
PLAIN_EVERY_S = 10.0
WHOLE_S, WHOLE_EVERY_S = 5.0, 0.05
N_LAST_LINES, LINE_LIMIT = 20, 300

# Run in tau-bench's interpreter, where it would be imported from: what is not there, and where tau_bench is.
PROBE = """
import importlib.util, json, sys
found = {name: importlib.util.find_spec(name) for name in sys.argv[1:]}
home = found["tau_bench"] and list(found["tau_bench"].submodule_search_locations)[0]
print(json.dumps({"missing": [name for name, spec in found.items() if spec is None], "home": home}))
"""
# What run.py of a checkout does, for an installed package, which comes without one.
INSTALLED = """
import json, sys
from tau_bench.run import run
from tau_bench.types import RunConfig
run(RunConfig(**json.loads(sys.argv[1])))
"""


@dataclass(frozen=True)
class Benchmark:
    """A tau-bench. directory: its checkout, None for the package that `python` has installed."""

    directory: Path | None
    python: str

    @classmethod
    def at(cls, directory: Path | None, python: str | None, default: str) -> Benchmark:
        """The one in a checkout, or the installed one; BadInput if the directory is no tau-bench.

        python: its interpreter, by default the checkout's own, else `default`
        """
        if directory is not None and not (directory / "tau_bench" / "run.py").is_file():
            raise BadInput(
                f"--tau-bench {directory}: no tau_bench/run.py there; give a checkout of "
                "github.com/sierra-research/tau-bench"
            )
        own = directory.absolute() / ".venv" / "bin" / "python" if directory else None
        if python is not None and "/" in python:
            python = str(Path(python).absolute())  # it is run in the checkout
        return cls(directory, python or (str(own) if own and own.exists() else default))

    def package(self, tools: bool) -> Path:
        """Where its code is; BadInput if its interpreter lacks what it needs. tools: some agent sends tools"""
        home, missing = self._probe("tau_bench", "litellm", "pydantic", *(["mcp"] if tools else []))
        if home is None:
            raise BadInput(
                f"{self.python} has no tau_bench: give --tau-bench DIR, a checkout of "
                "github.com/sierra-research/tau-bench, or --python, an interpreter that has it installed"
            )
        if missing:
            names = " ".join(missing)
            raise BadInput(
                f"{self.python} lacks {names}, which tau-bench needs: {self.python} -m pip install {names}, "
                "or give another --python"
            )
        return Path(home)

    def _probe(self, *packages: str) -> tuple[str | None, list[str]]:
        """Where its interpreter finds tau_bench, and which packages it does not find."""
        command = [self.python, "-c", PROBE, *packages]
        try:
            done = subprocess.run(command, cwd=self.directory, capture_output=True, text=True, timeout=60, check=True)
            found = json.loads(done.stdout)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise BadInput(f"--python {self.python} does not run: {error}") from None
        return found["home"], found["missing"]

    def command(self, flags: Flags) -> list[str]:
        if self.directory is not None:
            return [self.python, "run.py", *command_line(flags)]
        fields = {name.replace("-", "_"): words[0] for name, words in flags.items()}
        lists = {"task_ids": flags["task-ids"]} if "task-ids" in flags else {}
        return [self.python, "-c", INSTALLED, json.dumps(fields | lists)]


@dataclass(eq=False)
class Eval:
    """One configuration and how far it has come. log_dir: where tau-bench writes, absolute. place: where its run is.

    started, stopped, code: of tau-bench's process. trouble: why something of ours could not be done
    """

    run: str
    flags: Flags
    log_dir: Path
    place: str
    progress: Progress = field(default_factory=Progress)
    scores: list[Score] = field(default_factory=list)
    started: bool = False
    stopped: bool = False
    code: int | None = None
    totals: Totals | None = None
    joined: Joined | None = None
    trouble: str | None = None
    _before: set[Path] = field(default_factory=set)
    _read: tuple[int, int] = (0, 0)

    @property
    def log(self) -> Path:
        return self.log_dir / "tau-bench.log"

    @property
    def failed(self) -> bool:
        return self.code != 0 or self.trouble is not None

    @property
    def running(self) -> bool:
        return self.started and self.code is None

    def prepare(self) -> None:
        """Make the directories that tau-bench writes into, and note what lies there already."""
        try:
            results_directory(self.flags).mkdir(parents=True, exist_ok=True)
            self.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--log-dir {self.log_dir} cannot be written: {error.strerror}") from None
        self._before = set(results_directory(self.flags).glob("*.json"))

    def results(self) -> Path | None:
        """The file that tau-bench writes anew after each task; None before the first."""
        fresh = set(results_directory(self.flags).glob("*.json")) - self._before
        return max(fresh, key=lambda path: path.stat().st_mtime, default=None)

    def whole(self) -> bool:
        """Read the results if they changed; False while tau-bench is in the middle of writing them."""
        path = self.results()
        if path is None:
            return True
        about = path.stat()
        if (about.st_mtime_ns, about.st_size) != self._read:
            try:
                self.scores = msgspec.json.decode(path.read_bytes(), type=list[Score])
            except msgspec.MsgspecError:
                return False
            self._read = (about.st_mtime_ns, about.st_size)
        return True

    def columns(self) -> dict[str, str]:
        """How far it has come, in words."""
        wanted, done, passed = n_attempts(self.flags), len(self.scores), sum(s.passed for s in self.scores)
        return {
            "tasks": f"{done}/{wanted}" if wanted else str(done),
            "passed": f"{100 * passed / done:.0f} %" if done else "",
            "calls": f"{self.progress.calls:,}",
            "tokens": f"{self.progress.tokens:,}",
            "rows": f"{self.progress.rows:,}",
            "MB": f"{self.progress.bytes / 1e6:,.1f}",
        }


def plan(common: Flags, matrix: Path | None, config: Config, benchmark: Benchmark, own: bool) -> list[Eval]:
    """What is to run: one configuration, or those of a matrix file, each into its own run.

    common: flags of all. own: the proxy is to be started here, so that each one's results lie in its run
    """
    if matrix is None:
        named = {config.run: common}
    else:
        named = {f"{config.run}-{name}": flags for name, flags in read_matrix(_text(matrix), common).items()}
    evals = []
    for run, flags in named.items():
        home = config.data / run / "results" if own else Path("results", run)
        if "log-dir" in flags:  # where tau-bench would look for it; those of a matrix would write the same files
            home = (benchmark.directory or Path()) / flags["log-dir"][0] / (run if matrix else "")
        place = str(config.data / run) if own else f"{run} at the proxy"
        evals.append(Eval(run, flags, home.absolute(), place))
    return evals


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeError) as error:
        raise BadInput(f"--matrix {path} cannot be read: {error}") from None


class Bench:
    """Configurations of one tau-bench, run through one proxy. failed: whether any has, or none was run."""

    def __init__(
        self, benchmark: Benchmark, evals: list[Eval], at_once: int, key: str, environment: Mapping[str, str]
    ) -> None:
        """BadInput for what can be seen to be wrong before anything starts. key: for the proxy."""
        self._package = benchmark.package(any(value(e.flags, "agent-strategy") in TOOL_AGENTS for e in evals))
        known = accepted(self._package / "types.py")
        for e in evals:
            check_name("run", e.run)
            check(e.flags, known)
            n_attempts(e.flags)
            e.flags["log-dir"] = [str(e.log_dir)]
        self.evals = evals
        self.failed = True
        self._benchmark = benchmark
        self._slots = asyncio.Semaphore(at_once)
        self._key = key
        self._environment = environment

    async def run(self, url: str, stop: asyncio.Event) -> int:
        """Run all of them, joining each one's results when it ends; returns the exit code. stop: end them early."""
        async with aiohttp.ClientSession() as session:
            proxy = Client(session, url, self._key)
            await self._settle(proxy)
            watching = asyncio.create_task(self._watch(proxy))
            try:
                await asyncio.gather(*(self._run(e, proxy, stop) for e in self.evals))
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
        for e in self.evals:
            _report(e)
        if len(self.evals) > 1:
            console().print(_table(self.evals))
        self.failed = any(e.failed for e in self.evals)
        return int(self.failed)

    async def _settle(self, proxy: Client) -> None:
        """Complete the flags with what is served, and open the runs; BadInput for a model that is not served."""
        about, served = await proxy.about(), await proxy.models()
        if not served:
            raise BadInput(f"{proxy.url} serves no model")
        for e in self.evals:
            e.flags = translate(e.flags, served[0])
            _check_models(e.flags, [*served, *about.aliases], proxy.url)
        for e in self.evals:
            e.prepare()
            await proxy.open(e.run)

    async def _run(self, e: Eval, proxy: Client, stop: asyncio.Event) -> None:
        async with self._slots:
            if stop.is_set():
                e.trouble = "it was not started"
                return
            e.started = True
            try:
                e.code = await self._child(e, f"{proxy.url}/runs/{e.run}/v1", stop)
                e.totals = await proxy.seal(e.run)
                await self._join(e, proxy)
            except (TautapError, OSError) as error:
                e.trouble = str(error)

    async def _child(self, e: Eval, base_url: str, stop: asyncio.Event) -> int:
        """Run tau-bench until it ends or is told to; returns its exit code."""
        told = {"OPENAI_BASE_URL": base_url, "OPENAI_API_BASE": base_url, "OPENAI_API_KEY": self._key}
        # litellm fetches its list of prices when it is imported, and tau-bench prints emoji.
        wise = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
        with e.log.open("wb") as output:
            # A session of its own: Ctrl-C reaches us alone.
            child = await asyncio.create_subprocess_exec(
                *self._benchmark.command(e.flags),
                cwd=self._benchmark.directory,
                env={**wise, **self._environment, **told},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        ended, stopped = asyncio.create_task(child.wait()), asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([ended, stopped], return_when=asyncio.FIRST_COMPLETED)
            e.stopped = not ended.done()
            if e.stopped:
                await _until_whole(e)
        finally:
            stopped.cancel()
            await end(child, ended)
        return ended.result()

    async def _join(self, e: Eval, proxy: Client) -> None:
        e.progress = await proxy.progress(e.run)
        if not await asyncio.to_thread(e.whole):
            e.trouble = f"{e.results()} broke off: nothing is joined"
        elif path := e.results():
            env, split = value(e.flags, "env"), value(e.flags, "task-split")
            tasks = await asyncio.to_thread(read_tasks, self._package, env, split)
            results = await asyncio.to_thread(path.read_bytes)
            e.joined = await proxy.link(e.run, path.name, results, env, split, tasks)

    async def _watch(self, proxy: Client) -> None:
        """Say how far they have come: a table that is kept up to date on a terminal, now and then a line elsewhere."""
        out, said = Console(stderr=True), time.monotonic()
        live = Live(console=out, transient=True, auto_refresh=False) if out.is_terminal else None
        with live or contextlib.nullcontext():
            while True:
                running = [e for e in self.evals if e.running]
                await asyncio.gather(*(_refresh(e, proxy) for e in running))
                if live is not None:
                    # What is under way comes first: a screen may be too small for all of a matrix.
                    live.update(_table(sorted(self.evals, key=lambda e: not e.running)), refresh=True)
                elif time.monotonic() - said >= PLAIN_EVERY_S:
                    said = time.monotonic()
                    for e in running:
                        line = ", ".join(f"{text} {name}" for name, text in e.columns().items() if text)
                        out.print(f"{e.run}: {line}", highlight=False, soft_wrap=True)
                await asyncio.sleep(EVERY_S)


def _check_models(flags: Flags, names: list[str], url: str) -> None:
    """BadInput for a model that is to come from the proxy, which does not serve it."""
    for flag in ("model", "user-model"):
        name = flags[flag][0]
        if flags[f"{flag}-provider"] == ["openai"] and name not in names:
            raise BadInput(
                f"--{flag} {name}: {url} serves {', '.join(names)}: give one of these, or start the proxy with "
                f"--alias {name}={names[0]}"
            )


async def _refresh(e: Eval, proxy: Client) -> None:
    with contextlib.suppress(TautapError):  # it is asked again soon, and at the end in earnest
        e.progress = await proxy.progress(e.run)
    await asyncio.to_thread(e.whole)


async def _until_whole(e: Eval) -> None:
    """Wait, a little, until tau-bench is not in the middle of writing its results."""
    for _ in range(round(WHOLE_S / WHOLE_EVERY_S)):
        if await asyncio.to_thread(e.whole):
            return
        await asyncio.sleep(WHOLE_EVERY_S)


def _table(evals: list[Eval]) -> Table:
    table = Table(Column("run", overflow="fold"), box=None, header_style="bold")
    for name in evals[0].columns():
        table.add_column(name, justify="right")
    for e in evals:
        table.add_row(e.run, *e.columns().values())
    return table


def _report(e: Eval) -> None:
    """Print how one ended: what tau-bench found beside what was recorded, and what of either is nobody's."""
    out = console()
    out.print(e.run, style="bold", soft_wrap=True)
    for line in _lines(e):
        out.print(f"  {line}", soft_wrap=True)
    if e.stopped:
        _complain(f"{e.run}: tau-bench was stopped; all it said is in {e.log}")
    elif e.code:
        lines = e.log.read_text(errors="replace").splitlines()[-N_LAST_LINES:]
        ended = f"{e.run}: tau-bench ended with exit code {e.code}; all it said is in {e.log}"
        _complain("\n".join([*(line[:LINE_LIMIT] for line in lines), ended]))


def _complain(text: str) -> None:
    console(err=True).print(text, soft_wrap=True)


def _lines(e: Eval) -> Iterator[str]:
    hats = ", ".join(f"pass^{k} {rate:.3f}" for k, rate in pass_hat(e.scores).items())
    n_tasks, n_passed = len({score.task_id for score in e.scores}), sum(score.passed for score in e.scores)
    yield f"tau-bench: {n_tasks} tasks, {len(e.scores)} attempts, {n_passed} passed{f'; {hats}' if hats else ''}"
    if e.totals is not None:
        yield _recorded(e.totals)
        if n_waiting := e.totals.n_waiting:
            yield f"waiting: {n_waiting:,} calls more were not recorded by then: they will be when they are over"
        if n_incomplete := e.totals.n_incomplete:
            yield f"incomplete: {n_incomplete:,} of {e.totals.n_calls:,} calls lack rows: `tautap verify` names them"
    if e.joined is not None:
        yield f"joined: {e.joined.joined} of {len(e.scores)} results"
        yield from (f"no episode for {result}" for result in e.joined.results)
        yield from (f"in no results file: episode {episode}" for episode in e.joined.episodes)
        yield from e.joined.doubts
    if e.trouble is not None:
        yield f"trouble: {e.trouble}"
    yield f"run: {e.place}; results: {e.results() or e.log_dir}"


def _recorded(t: Totals) -> str:
    saving = f" ({(t.n_rows + t.n_shared) / t.n_rows:.1f}×)" if t.n_rows else ""
    missing = f"{t.n_missing:,} known to be missing" if t.n_incomplete else "0 missing"
    return (
        f"recorded: {t.n_episodes} episodes, {t.n_calls:,} calls, {t.n_prompt + t.n_completion:,} tokens; "
        f"{t.n_rows:,} rows stored, {t.n_shared:,} shared{saving}, {missing}; {t.n_bytes / 1e6:,.1f} MB"
    )
