"""A disk that is slow, and one that is full."""

import subprocess

import pytest

from episodes.run import open_run
from tests.faults.conftest import running, tally
from tests.faults.stack import Load, Stack
from tests.faults.syscalls import injected

MIB = 1 << 20


def test_a_slow_disk_delays_no_reply_and_loses_nothing(stack, tmp_path, times):
    """Every sync takes 30 ms longer: replies run ahead of the disk, which comes after."""
    for _ in range(times):
        with tally("slow disk", stack, lossless=True):
            with injected(stack.proxy.pid, "fsync,fdatasync", "delay_enter=30000", tmp_path / "strace.log"):
                with Load(stack) as load:
                    load.wait(0.5)
                behind = len(stack.answered) - len(open_run(stack.run_dir).history.calls)
            assert behind > 0 and not load.failures
    stack.finish()


@pytest.fixture
def small(tmp_path, times):
    """A stack whose run lies on a small tmpfs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={16 + 2 * times}m", "none", str(disk)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mount.stderr.strip()}")
    try:
        yield from running(Stack(tmp_path, disk))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_fills_up_under_load_and_is_freed_again_loses_nothing(small, times):
    """Somebody else takes all of it, to the last byte."""
    for _ in range(times):
        with tally("the disk is full", small):
            filler = small.run_dir.parent / "filler"
            with Load(small) as load:
                load.wait(0.2)
                with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
                    while True:
                        file.write(bytes(MIB))
                load.wait(0.5)
                filler.unlink()
                load.wait(0.2)
    small.finish()
