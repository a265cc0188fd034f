"""tau-bench's command line: the flags people write for it, and several configurations out of one TOML file.

Flags are name → words, named as on tau-bench's own command line, without the leading dashes.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path

import msgspec

from episodes.errors import BadInput

Flags = dict[str, list[str]]
Scalar = bool | int | float | str

URL = re.compile(r"(?P<base>https?://[^/]+(?:/[^/]+)*?)(?:/runs/(?P<run>[^/]+))?(?:/v1)?/?")
# Flags that tau-bench does not have and people write for it.
OURS = ("platform", "base-url")
# Agents that send the model its tools, for which litellm wants the package `mcp`.
TOOL_AGENTS = ("tool-calling", "few-shot")
# What tau-bench takes where a flag is not given, as far as we need to know it.
DEFAULTS = {
    "agent-strategy": "tool-calling",
    "temperature": "0.0",
    "start-index": "0",
    "end-index": "-1",
    "num-trials": "1",
    "env": "retail",
    "task-split": "test",
}


def parse(arguments: Iterable[str]) -> Flags:
    """Flags out of a command line; BadInput for words that belong to no flag."""
    flags: Flags = {}
    words: list[str] | None = None
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            words = flags[name.replace("_", "-")] = [value] if equals else []
        elif words is None:
            raise BadInput(f"-- {word}: after -- come tau-bench's flags, such as --env retail --task-ids 1 2 3")
        else:
            words.append(word)
    return flags


def command_line(flags: Flags) -> list[str]:
    """The command line of these flags."""
    return [word for name, words in flags.items() for word in (f"--{name}", *words)]


def split_url(url: str) -> tuple[str, str | None]:
    """A proxy's base, and the run if the URL names one: out of `http://host:8000`, …`/v1` or …`/runs/<run>/v1`."""
    match = URL.fullmatch(url)
    if match is None:
        raise BadInput(f"{url}: give a proxy's base URL, such as http://127.0.0.1:8000/v1")
    return match["base"], match["run"]


def accepted(types: Path) -> set[str]:
    """The flags that a tau-bench takes, out of its `types.py`: the fields of its RunConfig.

    Read and not imported: tau-bench imports litellm, which takes seconds. BadInput if there is no RunConfig.
    """
    try:
        module = ast.parse(types.read_bytes())
    except (OSError, SyntaxError) as error:
        raise BadInput(f"{types} is not tau-bench's: {error}") from None
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == "RunConfig":
            fields = [field.target for field in node.body if isinstance(field, ast.AnnAssign)]
            return {name.id.replace("_", "-") for name in fields if isinstance(name, ast.Name)}
    raise BadInput(f"{types} is not tau-bench's: it has no RunConfig")


def check(flags: Flags, known: set[str]) -> None:
    """BadInput for a flag that tau-bench does not have, one without a value or that lacks another, or one that wants a
    keyboard.
    """
    for name, words in flags.items():
        if name not in known and name not in OURS:
            raise BadInput(f"--{name}: tau-bench has no such flag; it takes --{', --'.join(sorted(known))}")
        if not words:
            raise BadInput(f"--{name}: give it a value")
    if "human" in flags.get("user-strategy", []):
        raise BadInput("--user-strategy human: nobody can type here; give llm, react, verify or reflection")
    if "few-shot" in flags.get("agent-strategy", []) and "few-shot-displays-path" not in flags:
        raise BadInput(
            "--agent-strategy few-shot: it needs --few-shot-displays-path, such as, in a checkout, "
            "few_shot_data/MockRetailDomainEnv-few_shot.jsonl"
        )


def translate(flags: Flags, model: str) -> Flags:
    """The flags as tau-bench takes them. model: the one to use where none is named."""
    said = {name: words for name, words in flags.items() if name not in OURS}
    for name in ("model-provider", "user-model-provider"):
        said.setdefault(name, flags.get("platform", ["openai"]))
    said.setdefault("model", [model])
    said.setdefault("user-model", said["model"])
    if "task-ids" in said:
        said["task-ids"] = _task_ids(said["task-ids"])
    return said


def _task_ids(words: list[str]) -> list[str]:
    """`1,5,10` or `1 5 10`, one word each."""
    found = [part for word in words for part in word.split(",") if part]
    if not found or not all(part.isdecimal() for part in found):
        raise BadInput(f"--task-ids {' '.join(words)}: give numbers, such as 1,5,10")
    return found


def value(flags: Flags, name: str) -> str:
    """What a flag is set to, or tau-bench's default."""
    return flags[name][0] if name in flags else DEFAULTS[name]


def number(flags: Flags, name: str) -> float:
    """What a flag is set to, as a number; BadInput if it is none."""
    try:
        return float(value(flags, name))
    except ValueError:
        raise BadInput(f"--{name} {value(flags, name)}: give a number") from None


def n_attempts(flags: Flags) -> int | None:
    """How many task attempts the flags ask for; None where that depends on how many tasks there are."""
    span = int(number(flags, "end-index") - number(flags, "start-index"))
    n_tasks = len(flags["task-ids"]) if "task-ids" in flags else span
    return n_tasks * int(number(flags, "num-trials")) if n_tasks > 0 else None


def results_directory(flags: Flags) -> Path:
    """Where tau-bench writes its results file. With a slash in the user model's name that is below --log-dir, and
    tau-bench fails at the end of the first task unless somebody has made it.

    source: tau-bench 59a200c, tau_bench/run.py, ckpt_path
    """
    model, user = flags["model"][0].split("/")[-1], flags["user-model"][0]
    span = f"{int(number(flags, 'start-index'))}-{int(number(flags, 'end-index'))}"
    name = f"{value(flags, 'agent-strategy')}-{model}-{number(flags, 'temperature')}_range_{span}_user-{user}"
    return Path(flags["log-dir"][0], name).parent


class Matrix(msgspec.Struct, forbid_unknown_fields=True):
    """A matrix file: flags for all, lists of values that multiply out, and configurations with a `name` each."""

    defaults: dict[str, Scalar | list[Scalar]] = {}
    matrix: dict[str, list[Scalar]] = {}
    eval: list[dict[str, Scalar | list[Scalar]]] = []


def read_matrix(text: str, common: Flags | None = None) -> dict[str, Flags]:
    """name → flags of every configuration in a matrix file; BadInput says what is wrong with it.

    common: flags that all of them have unless they say otherwise
    """
    try:
        file = msgspec.convert(tomllib.loads(text), Matrix)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise BadInput(f"--matrix: {error}; it takes [defaults], [matrix] and [[eval]] tables") from None
    if not (file.eval or file.matrix) or not all(file.matrix.values()):
        raise BadInput("--matrix names no configuration: give [[eval]] tables or lists of values under [matrix]")
    found: dict[str, Flags] = {}
    for own in file.eval or [{}]:
        if file.eval and not isinstance(own.get("name"), str):
            raise BadInput('--matrix: each [[eval]] needs a name, such as name = "react"')
        for chosen in _choices(file.matrix):
            if both := own.keys() & chosen.keys():
                raise BadInput(f"--matrix: {', '.join(sorted(both))} is under [matrix] and in [[eval]] {own['name']}")
            name = _name([str(own["name"])] if file.eval else [], chosen.values())
            if name in found:
                raise BadInput(f"--matrix: two configurations are named {name}")
            settings = {key: word for key, word in own.items() if key != "name"}
            found[name] = (common or {}) | _flags(file.defaults) | _flags(settings) | _flags(chosen)
    return found


def _choices(lists: Mapping[str, list[Scalar]]) -> list[dict[str, Scalar]]:
    """Every combination of one value from each list."""
    return [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]


def _name(own: Iterable[Scalar], chosen: Iterable[Scalar]) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(map(_word, (*own, *chosen))))


def _flags(settings: Mapping[str, Scalar | list[Scalar]]) -> Flags:
    return {
        name.replace("_", "-"): [_word(word) for word in (words if isinstance(words, list) else [words])]
        for name, words in settings.items()
    }


def _word(value: Scalar) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
