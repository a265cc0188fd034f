"""Faults in a running process's system calls, by strace: what the kernel would do, at the call that it is told."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import until


@contextmanager
def injected(pid: int, calls: str, fault: str, log: Path) -> Iterator[None]:
    """A block in which a process's calls fare as strace's `-e inject=<calls>:<fault>` says; skips where that cannot be.

    fault: such as `delay_enter=30000` (microseconds), `error=ENOSPC` or `signal=KILL:when=3`
    """
    if shutil.which("strace") is None:
        pytest.skip("there is no strace")
    command = ["strace", "-f", "-p", str(pid), "-o", f"{log}.calls"]
    command += ["-e", f"trace={calls}", "-e", f"inject={calls}:{fault}"]
    with log.open("wb") as said:
        tracing = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=said)
    try:
        until(lambda: tracing.poll() is not None or " attached" in log.read_text(), "strace")
        if " attached" not in log.read_text():
            pytest.skip(f"strace may not trace here: {log.read_text()}")
        yield
    finally:
        tracing.terminate()
        tracing.wait(30)
