"""tau-bench's command line, translated, and many of them out of one file."""

from pathlib import Path

import pytest

from episodes.errors import BadInput
from proxy.flags import (
    accepted,
    check,
    command_line,
    n_attempts,
    parse,
    read_matrix,
    results_directory,
    split_url,
    translate,
)

TYPES = """
from pydantic import BaseModel
class Task(BaseModel):
    user_id: str
class RunConfig(BaseModel):
    model_provider: str
    env: str = "retail"
    task_ids: list[int] | None = None
"""


def translated(line, model="served"):
    return translate(parse(line.split()), model)


def test_a_command_line_survives_being_parsed():
    line = ["--env", "airline", "--task-ids", "1", "2", "3", "--end-index", "-1", "--temperature", "0.5"]
    assert command_line(parse(line)) == line
    assert parse(["--task_ids=1", "2"]) == {"task-ids": ["1", "2"]}


def test_words_that_belong_to_no_flag_are_refused():
    with pytest.raises(BadInput, match=r"airline.*after -- come tau-bench's flags"):
        parse(["airline", "--env", "retail"])


def test_what_is_not_said_is_filled_in():
    assert translated("--env airline") == {
        "env": ["airline"],
        "model": ["served"],
        "user-model": ["served"],
        "model-provider": ["openai"],
        "user-model-provider": ["openai"],
    }


def test_the_agents_model_plays_the_user_unless_another_is_named():
    assert translated("--model a")["user-model"] == ["a"]
    assert translated("--model a --user-model b")["user-model"] == ["b"]


def test_a_platform_is_a_provider_and_a_base_url_is_ours_to_give():
    said = translated("--platform hosted_vllm --user-model-provider openai --base-url http://elsewhere/v1")
    assert (said["model-provider"], said["user-model-provider"]) == (["hosted_vllm"], ["openai"])
    assert not said.keys() & {"platform", "base-url"}


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://h:8000", ("http://h:8000", None)),
        ("http://h:8000/v1", ("http://h:8000", None)),
        ("http://h/v1/", ("http://h", None)),
        ("https://h/box/runs/r1/v1", ("https://h/box", "r1")),
    ],
)
def test_a_base_url_is_a_proxy_and_maybe_a_run(url, found):
    assert split_url(url) == found


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "ftp://h/v1"])
def test_a_base_url_that_is_none_is_refused(url):
    with pytest.raises(BadInput, match=f"^{url}: give a proxy's base URL"):
        split_url(url)


@pytest.mark.parametrize("words", ["1,5,10", "1 5 10", "1, 5, 10", "1,5 10,"])
def test_task_ids_are_told_apart_by_blanks_or_commas(words):
    assert translated(f"--task-ids {words}")["task-ids"] == ["1", "5", "10"]


@pytest.mark.parametrize("words", ["one", "1-5", ",", "1,-5"])
def test_task_ids_that_are_no_numbers_are_refused(words):
    with pytest.raises(BadInput, match="give numbers, such as 1,5,10"):
        translated(f"--task-ids {words}")


def test_the_accepted_flags_are_what_this_tau_bench_takes(tmp_path):
    """Of any version or fork: they are read in its own source."""
    (tmp_path / "types.py").write_text(TYPES)
    known = accepted(tmp_path / "types.py")
    assert known == {"model-provider", "env", "task-ids"}
    check(parse(["--env", "retail", "--platform", "openai", "--base-url", "x"]), known)
    with pytest.raises(BadInput, match=r"--enf: .* takes --env, --model-provider, --task-ids"):
        check(parse(["--enf", "retail"]), known)
    with pytest.raises(BadInput, match="--env: give it a value"):
        check(parse(["--env"]), known)


def test_a_user_who_would_sit_at_a_keyboard_is_refused():
    """tau-bench runs without one, several tasks at once."""
    with pytest.raises(BadInput, match="--user-strategy human: nobody can type here; give llm, react"):
        check(parse(["--user-strategy", "human"]), {"user-strategy"})


def test_an_agent_that_is_shown_examples_needs_to_be_told_which():
    """tau-bench would say so too, but only when the model is loaded."""
    known = {"agent-strategy", "few-shot-displays-path"}
    with pytest.raises(BadInput, match="few-shot: it needs --few-shot-displays-path"):
        check(parse(["--agent-strategy", "few-shot"]), known)
    check(parse(["--agent-strategy", "few-shot", "--few-shot-displays-path", "shots.jsonl"]), known)


@pytest.mark.parametrize("text", ["class Config: pass", "class :"])
def test_a_file_without_a_run_config_is_no_tau_benchs(tmp_path, text):
    (tmp_path / "types.py").write_text(text)
    with pytest.raises(BadInput, match="is not tau-bench's"):
        accepted(tmp_path / "types.py")


@pytest.mark.parametrize(
    ("line", "n"),
    [
        ("--task-ids 1 2 3 --num-trials 4", 12),
        ("--start-index 2 --end-index 7", 5),
        ("--num-trials 4", None),
        ("--end-index 0", None),
    ],
)
def test_how_many_attempts_are_to_come_is_known_if_the_flags_say_it(line, n):
    assert n_attempts(parse(line.split())) == n


def test_a_number_that_is_none_is_refused():
    with pytest.raises(BadInput, match="--num-trials four: give a number"):
        n_attempts(parse(["--task-ids", "1", "--num-trials", "four"]))


def test_the_results_lie_below_the_log_directory_where_a_users_model_has_a_slash():
    flags = translated("--log-dir /logs --temperature 0 --agent-strategy act --end-index 4 --model Qwen/Q")
    assert results_directory(flags) == Path("/logs/act-Q-0.0_range_0-4_user-Qwen")
    assert results_directory(translated("--log-dir /logs --model q")) == Path("/logs")


# ---- matrices


def test_a_matrix_multiplies_lists_with_configurations():
    """Flags come from the command line, the defaults and the configuration, the last of them first."""
    found = read_matrix(
        """
        [defaults]
        env = "airline"
        task-ids = [1, 2]
        temperature = 0.5
        [matrix]
        agent-strategy = ["act", "react"]
        [[eval]]
        name = "plain"
        [[eval]]
        name = "verified"
        user_strategy = "verify"
        temperature = 1
        """,
        {"env": ["retail"], "seed": ["3"]},
    )
    assert list(found) == ["plain-act", "plain-react", "verified-act", "verified-react"]
    common = {"env": ["airline"], "seed": ["3"], "task-ids": ["1", "2"]}
    assert found["plain-act"] == common | {"agent-strategy": ["act"], "temperature": ["0.5"]}
    assert found["verified-react"] == common | {
        "agent-strategy": ["react"],
        "user-strategy": ["verify"],
        "temperature": ["1"],
    }


def test_a_matrix_of_lists_alone_is_named_by_their_values():
    found = read_matrix('[matrix]\nmodel = ["Qwen/Q", "b"]\nshuffle = [true, false]')
    assert list(found) == ["Qwen-Q-1", "Qwen-Q-0", "b-1", "b-0"]
    assert [flags["shuffle"] for flags in found.values()] == [["1"], ["0"], ["1"], ["0"]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[matrix", "--matrix: .*it takes"),
        ('[default]\nenv = "retail"', "unknown field `default`.*it takes \\[defaults\\]"),
        ("[defaults]\nenv = {a = 1}", "defaults"),
        ("[matrix]\nenv = 1", "Expected `array`"),
        ("", "names no configuration"),
        ("[matrix]\nenv = []", "names no configuration"),
        ('[[eval]]\nenv = "retail"', "needs a name"),
        ('[[eval]]\nname = "a"\n[[eval]]\nname = "a"', "two configurations are named a"),
        ('[matrix]\nenv = ["retail"]\n[[eval]]\nname = "a"\nenv = "airline"', "env is under .* and in .* a"),
    ],
)
def test_a_matrix_that_cannot_be_says_why(text, reason):
    with pytest.raises(BadInput, match=reason):
        read_matrix(text)
