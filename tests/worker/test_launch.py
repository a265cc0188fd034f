"""The one line that a worker ends with: what is left as the reason, and what is made of it."""

import logging
from logging.config import dictConfig

import msgspec
import pytest

from worker.__main__ import plan
from worker.launch import LIMIT, Reasons, explained, in_a_line, reason_file


def test_the_first_error_with_an_exception_is_the_reason(tmp_path):
    """Ranks fail first, then the engine because of them; what is logged without an exception is no reason."""
    file = tmp_path / ".reason"
    logger = logging.getLogger("reasons.engine")
    logger.addFilter(Reasons(file))
    dictConfig({"version": 1, "loggers": {"reasons": {}}, "disable_existing_loggers": False})  # as vLLM does
    logger.error("in passing")
    assert not file.exists()
    for error in (ValueError("the\n  cause"), RuntimeError("a rank failed")):
        try:
            raise error
        except Exception:
            logger.exception("failed to start")
    assert file.read_text() == "the cause"


class Pydantic(ValueError):
    def errors(self):
        return [{"msg": "Value error, too long", "input": "pages"}, {"msg": "and wrong"}]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (Pydantic("2 validation errors, pages of them"), "Value error, too long; and wrong"),
        (MemoryError(), "MemoryError"),
        (ValueError("x" * 10_000), "x" * LIMIT),
    ],
)
def test_an_error_becomes_one_line(error, line):
    assert in_a_line(error) == line


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("Failed to infer device type, please set …", "nvidia-smi"),
        ("Found no NVIDIA driver on your system.", "nvidia-smi"),
        ("CUDA out of memory. Tried to allocate 2 GiB", "take a smaller model"),
        ("Free memory on device cuda:0 (1/80 GiB) on startup is less than desired", "end what else uses it"),
        (
            "Available memory on node 0 (9/24 GiB) on kv cache allocation is less than requested",
            "VLLM_CPU_KVCACHE_SPACE",
        ),
        ("'_OpNamespace' '_C' object has no attribute 'init_cpu_memory_env'", "apt-get install libnuma1"),
        ("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", "--max-model-len"),
    ],
)
def test_a_known_reason_comes_with_advice_and_stays_readable(reason, says):
    line, known = explained(reason)
    assert known and says in line and reason in line
    assert explained("something new") == ("something new", False)


def test_all_processes_of_a_server_agree_where_the_reason_is():
    config = msgspec.json.encode({"tautap": {"spool_dir": "/spool"}}).decode()
    assert str(reason_file(["x", "--additional-config", config])) == "/spool/.reason"


@pytest.mark.parametrize("flag", ["--spool-bytes", "--buffer-bytes"])
@pytest.mark.parametrize("size", ["-5", "0", "-1G", "", "G"])
def test_a_size_below_one_byte_is_refused(flag, size, capsys):
    with pytest.raises(SystemExit, match="2"):
        plan([f"{flag}={size}"], {})
    assert f"{size!r}: give bytes, at least 1" in capsys.readouterr().err
