"""Builds the images of `docker-compose.yml` and runs them as it says, on a machine without Docker.

    make containers     as root on Debian, with its packages buildah and debootstrap; some ten minutes

The proxy's, the bench's and the CPU worker's image are built on Debian's own Python instead of the official image of
it, which is the Dockerfiles' build argument BASE. Each then runs by `buildah run --isolation chroot` with the entry
point, command, environment, user and mounts that Docker Compose settles; only the proxy's address is another, on
loopback. A captured call is made with the openai client, by `tautap bench` too, the worker is killed and started over,
and the rows are read from the data volume with pyarrow. The image for a GPU is not built: its base cannot be had here.
Nothing is left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pyarrow.parquet as pq

from tests.conftest import free_port
from tests.proxy.test_bench import COMMAND_LINE, RUN, TYPES
from tests.test_compose import EXAMPLE, KEY, ROOT, services

USER = 10001
PORT = free_port()
START_S = 600
BASE = "localhost/tautap-base:bookworm"
BUILDAHS = re.compile("subprocess exited|Error: exit status")
# Few tokens, and not in bfloat16, which not every CPU has.
CPU_FLAGS = """--dtype float32 --layers 8,16 --override-generation-config '{"max_new_tokens": 8}'"""
KNOBS = {"TAUTAP_KEY": KEY, "TAUTAP_CPU_FLAGS": CPU_FLAGS}


def say(text: str) -> None:
    print(f"== {text}", flush=True)


class Store:
    """Buildah with a storage of its own, and this machine's way to packages: its pip's settings and certificates."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        self._own = ["buildah", "--root", f"{home}/storage", "--runroot", f"{home}/run", "--storage-driver", "overlay"]
        said = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
        )
        self.pip = {key.split(".")[1]: value for key, value in re.findall(r"^(\S+)='(.*)'$", said.stdout, re.M)}
        conf = home / "pip.conf"
        conf.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in self.pip.items()))
        words = [word for value in self.pip.values() for word in value.split()]
        # An index on disk names files that lie beside it.
        indexes = [str(Path(word.removeprefix("file://")).parent) for word in words if word.startswith("file://")]
        seen = sorted({*indexes, *(word for word in words if word.startswith("/") and Path(word).exists())})
        self._mounts = [(conf, "/etc/pip.conf"), *((path, path) for path in seen)]

    def __call__(self, *arguments: object) -> str:
        """What a command of buildah's says; its errors go where ours do."""
        command = [*self._own, *map(str, arguments)]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()

    def start(self, *arguments: object, **options: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen([*self._own, *map(str, arguments)], **options)

    def size(self, image: str) -> str:
        """Of an image that is there; nothing of one that is not."""
        listed = json.loads(self("images", "--json")) or []
        sizes = {name: one["size"] for one in listed for name in one["names"] or ()}
        return str(sizes.get(f"localhost/{image.removeprefix('localhost/')}", ""))

    def base(self, name: str) -> None:
        """An image of Debian with its Python, from where this machine's apt takes packages."""
        targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
        mirror = subprocess.run(targets, capture_output=True, text=True, check=True).stdout.split()[0]
        root, packages = self.home / "debian", "--include=python3,python3-venv,ca-certificates"
        command = ["debootstrap", "--variant=minbase", packages, "bookworm", root, mirror]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        container = self("from", "scratch")
        self("add", "--quiet", container, root, "/")
        self("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
        self("commit", "--quiet", "--rm", container, name)
        shutil.rmtree(root)

    def build(self, service: dict[str, Any], base: str) -> None:
        build = service["build"]
        how = ["--quiet", "--isolation", "chroot", "--network", "host", "--build-arg", f"BASE={base}"]
        if "extra-index-url" in self.pip:
            how += ["--build-arg", f"PIP_EXTRA_INDEX_URL={self.pip['extra-index-url']}"]
        for path, at in self._mounts:
            how += ["--volume", f"{path}:{at}:ro"]
        file = f"{build['context']}/{build['dockerfile']}"
        self("build-using-dockerfile", *how, "--file", file, "--tag", service["image"], build["context"])


class Container:
    """A service's container, to be run once or more."""

    def __init__(self, store: Store, service: dict[str, Any], mounts: dict[str, Path]) -> None:
        """mounts: volume or bind source → the directory that stands for it"""
        self._store, self._service = store, service
        self.id = store("from", "--pull-never", service["image"])
        self.root = Path(store("mount", self.id))
        image = json.loads(store("inspect", self.id))["OCIv1"]["config"]
        assert image["User"] == str(USER)
        self._entry = service.get("entrypoint") or image["Entrypoint"]
        self._how = ["--isolation", "chroot", "--network", "host"]
        for mount in service["volumes"]:
            mode = ":ro" if mount.get("read_only") else ""
            self._how += ["--volume", f"{mounts[mount['source']]}:{mount['target']}{mode}"]
        for name, value in (service.get("environment") or {}).items():
            self._how += ["--env", f"{name}={value}"]

    def execute(self, words: list[str], log: Path | None = None) -> subprocess.Popen[Any]:
        output = log.open("ab") if log else subprocess.PIPE
        return self._store.start("run", *self._how, self.id, "--", *words, stdout=output, stderr=subprocess.STDOUT)

    def command(self, arguments: list[str] | None = None) -> list[str]:
        """The entry point, and what follows it: by default the service's command."""
        return [*self._entry, *(self._service["command"] if arguments is None else arguments)]

    def output(self, words: list[str]) -> tuple[int, str]:
        """The exit code of a command, and what it said."""
        process = self.execute(words)
        said, _ = process.communicate(timeout=START_S)
        return process.returncode, said.decode()

    def healthy(self) -> bool:
        """Whether the service's own health check passes."""
        return self.output(self._service["healthcheck"]["test"][1:])[0] == 0

    @contextmanager
    def running(self, log: Path) -> Iterator[subprocess.Popen[Any]]:
        process = self.execute(self.command(), log)
        try:
            yield process
        except BaseException:
            print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
            raise
        finally:
            end(process, signal.SIGKILL)

    def written(self, since: float) -> list[str]:
        """The files in the container's own file system that are newer."""
        found = (path for path in self.root.rglob("*") if path.is_file() and not path.is_symlink())
        return [str(path.relative_to(self.root)) for path in found if path.stat().st_mtime > since]


def end(process: subprocess.Popen[Any], how: signal.Signals) -> int:
    """Send a signal to what runs in a container, and to all that it started if it is killed; returns the exit code."""
    if process.poll() is None:
        started = psutil.Process(process.pid).children(recursive=True)
        inside = [one for one in started if "buildah" not in " ".join(one.cmdline()[:1])]
        for one in inside if how == signal.SIGKILL else inside[:1]:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(how)
    return process.wait(180)


def check_bad_input(store: Store, proxy: dict[str, Any], mounts: dict[str, Path]) -> None:
    """A data directory that is another's: one line, and what to change."""
    other = mounts["data"].with_name("root-only")
    other.mkdir()
    container = Container(store, proxy, mounts | {"data": other})
    code, said = container.output(container.command())
    ours = [line for line in said.splitlines() if not BUILDAHS.match(line)]
    print(*ours, sep="\n")
    assert code == 2 and len(ours) == 1 and f"cannot be written by user {USER}" in ours[0]


def call(text: str) -> str:
    """One call of an unmodified client; returns the reply."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key=KEY, max_retries=0)
    (model,) = client.models.list().data
    messages: Any = [{"role": "user", "content": text}]
    reply = client.chat.completions.create(model=model.id, messages=messages, temperature=0)
    print(f"{model.id}: {reply.choices[0].message.content!r}, {reply.usage}")
    return str(reply.choices[0].message.content)


def check_keyless() -> None:
    """A stranger is sent away."""
    try:
        openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="another", max_retries=0).models.list()
    except openai.AuthenticationError as error:
        print(error)
    else:
        raise AssertionError("a client without the key was served")


def wait_for(condition: Callable[[], bool], what: str, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:.0f} s: {what}"
        time.sleep(1)


def ready() -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health/ready", timeout=5) as reply:
        return bool(reply.status == 200)
    return False


def answers() -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health/live", timeout=5):
        return True
    return False


def check_rows(data: Path) -> None:
    """Every call's rows are in a shard, or in that of a call which it goes on from, and are numbers. No call failed."""
    calls = pq.read_table(data / "calls.parquet").to_pylist()
    shards = {path.stem: pq.read_table(path) for path in (data / "shards").glob("*.parquet")}
    for call in calls:
        print(*(f"{name} {call[name]}" for name in ("call", "role", "status", "n_prompt", "n_completion", "n_rows")))
        assert call["status"] == 200 and not call["n_missing"] and call["error"] is call["lost"] is None, call
        assert call["points"] == ["layers.8.output", "layers.16.output"]
        spans = sum(span["stop"] - span["start"] for span in call["spans"])
        assert spans == call["n_prompt"] + call["n_completion"] - 1
    n_rows = 0
    for episode, shard in shards.items():
        for point in ("layers.8.output", "layers.16.output"):
            vectors = shard[point].combine_chunks()
            rows = np.frombuffer(vectors.buffers()[1], "<f4").reshape(len(vectors), -1)
            assert rows.shape[1] == 576 and np.isfinite(rows).all() and (np.linalg.norm(rows, axis=1) > 0).all()
        n_rows += len(shard)
        print(f"episode {episode}: {len(shard)} rows, {point} {rows.shape} {rows.dtype}, mean {rows.mean():.4f}")
    assert n_rows == sum(call["n_rows"] for call in calls) > 0


def make_checkout(home: Path) -> Path:
    """What is run in tau-bench's place: the tests' own, which speaks as it does."""
    (home / "tau_bench").mkdir(parents=True)
    for name, text in {"run.py": COMMAND_LINE, "tau_bench/types.py": TYPES, "tau_bench/run.py": RUN}.items():
        (home / name).write_text(text)
    (home / "tau_bench" / "__init__.py").touch()
    return home


def settle(scratch: Path) -> dict[str, dict[str, Any]]:
    """The services with the settings of this check, the proxy on loopback and a port that is free."""
    env = scratch / "env"
    knobs = KNOBS | {"TAUTAP_TAU_BENCH": str(make_checkout(scratch / "tau-bench"))}
    env.write_text(EXAMPLE + "".join(f"\n{name}={value}" for name, value in knobs.items()))
    found = services("--profile", "cpu", "--profile", "bench", env=env)

    def here(words: list[str]) -> list[str]:
        moved = {"0.0.0.0": "127.0.0.1", "8000": str(PORT)}
        return [re.sub(r"//(127.0.0.1|proxy):8000", f"//127.0.0.1:{PORT}", moved.get(word, word)) for word in words]

    found["proxy"]["command"] = here(found["proxy"]["command"])
    found["proxy"]["healthcheck"]["test"] = here(found["proxy"]["healthcheck"]["test"])
    found["bench"]["entrypoint"] = here(found["bench"]["entrypoint"])
    return found


@contextmanager
def volumes(scratch: Path) -> Iterator[dict[str, Path]]:
    """Directories in the volumes' place: as Docker makes them, the image's user's, and the spool as the file says."""
    found = {name: scratch / name for name in ("data", "results", "spool")}
    for path in found.values():
        path.mkdir()
        os.chown(path, USER, USER)
    options = re.search(r"type: tmpfs, device: tmpfs, o: \"(.*)\"", (ROOT / "docker-compose.yml").read_text())
    assert options
    subprocess.run(["mount", "-t", "tmpfs", "-o", options[1], "tmpfs", found["spool"]], check=True)
    try:
        yield found | {str(scratch / "tau-bench"): scratch / "tau-bench"}
    finally:
        subprocess.run(["umount", found["spool"]], check=True)


def check(store: Store, found: dict[str, dict[str, Any]], mounts: dict[str, Path], scratch: Path) -> None:
    say("a data directory that the proxy's user cannot write")
    check_bad_input(store, found["proxy"], mounts)
    proxy, worker, bench = (Container(store, found[name], mounts) for name in ("proxy", "worker-cpu", "bench"))
    begun = time.time()
    proxy_log, worker_log = scratch / "proxy.log", scratch / "worker.log"
    with ExitStack() as stack:
        say("the proxy, before there is a worker")
        proxying = stack.enter_context(proxy.running(proxy_log))
        wait_for(answers, "the proxy serves", 60)
        assert not ready() and not proxy.healthy() and not worker.healthy()
        print(proxy_log.read_text().strip())
        say(f"the worker: tautap worker {' '.join(found['worker-cpu']['command'])}")
        with worker.running(worker_log) as working:
            wait_for(lambda: working.poll() is not None or ready(), "the worker is ready", START_S)
            assert working.poll() is None and worker.healthy() and proxy.healthy()
            print("both health checks pass")
            check_keyless()
            call("What is the capital of France?")
            say("tautap bench")
            code, said = bench.output(bench.command(["--env", "retail", "--task-ids", "2"]))
            print(said.strip())
            assert code == 0
            say("the worker is killed, and started over on the socket that it left")
            end(working, signal.SIGKILL)
        with worker.running(worker_log) as working:
            wait_for(lambda: working.poll() is not None or ready(), "the worker is ready again", START_S)
            assert working.poll() is None
            call("And of Italy?")
            say("SIGTERM to the proxy, then to the worker")
            codes = end(proxying, signal.SIGTERM), end(working, signal.SIGTERM)
            print(f"exit codes {codes}")
            assert codes[0] == 0
    said = proxy_log.read_text()
    assert "come over HTTP" not in said, said  # rows that do not come out of the spool come so, and the proxy says it
    written = proxy.written(begun)
    assert not written, f"a root that can only be read would not do: {written}"
    say("read from the volume")
    check_rows(mounts["data"] / "first")
    code, said = proxy.output(["tautap", "verify", "/data/first"])
    print(said.strip())
    assert code == 0


def build(store: Store, found: dict[str, dict[str, Any]]) -> None:
    """Build the images that the store does not have."""
    for service in (found[name] for name in ("proxy", "worker-cpu", "bench")):
        begun = time.monotonic()
        if not store.size(service["image"]):
            if not store.size(BASE):
                say("a base image: Debian's Python")
                store.base(BASE)
            store.build(service, BASE)
        say(f"built {service['image']} in {time.monotonic() - begun:.0f} s, {store.size(service['image'])}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="keep images here; what is here already is not built again")
    parser.add_argument("--build-only", action="store_true", help="build the images and run nothing")
    options = parser.parse_args()
    missing = [name for name in ("buildah", "debootstrap", "mount") if shutil.which(name) is None]
    if missing or os.getuid():
        sys.exit(f"this takes root and {', '.join(missing) or 'nothing else'}: apt-get install buildah debootstrap")
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="tautap-containers-") as name:
        scratch = Path(name)
        scratch.chmod(0o755)
        found = settle(scratch)
        store = Store(options.store.absolute() if options.store else scratch)
        try:
            build(store, found)
            if not options.build_only:
                with volumes(scratch) as mounts:
                    check(store, found, mounts, scratch)
        finally:
            store("rm", "--all")
            if not options.store:
                store("rmi", "--all", "--force")
    say("all of it did what it says")


if __name__ == "__main__":
    main()
