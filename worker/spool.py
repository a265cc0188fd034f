"""The spool: one safetensors file per sequence, appended as steps finish, renamed when it is whole.

    <call>.<choice>.part            growing, from the step on that runs the sequence first; its first `room` bytes are
                                    kept free for the header
    <call>.<choice>.safetensors     complete
    <call>.<choice>.failed          the reason why there is none
    .token                          tells whoever can read it that this is the worker's spool (`episodes.handover`)
    .lock                           held by the worker
    .metrics                        what the recorder counts (`worker.metrics`)
    .reason                         why the engine could not start (`worker.launch`)
    .wrong                          which points the model does not have, and why (`worker.probe`)

The format is in `episodes.wire`. Written by the engine process, read and deleted by the API server. Prompts can be read
out of it, and its name can be guessed: it is made for its owner alone, and nothing that others could have put there is
used.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from episodes.errors import BadInput
from episodes.handover import TOKEN
from episodes.wire import header

PART, WHOLE, FAILED = ".part", ".safetensors", ".failed"
WRONG = ".wrong"
TOKEN_ROOM = 8  # bytes of a token id in JSON, at most


def spooled(directory: Path, call: str, choice: int, suffix: str = WHOLE) -> Path:
    return directory / f"{call}.{choice}{suffix}"


class SpoolFile:
    """One sequence's rows on their way to disk."""

    def __init__(
        self, directory: Path, call: str, choice: int, points: list[str], dtype: str, hidden: int, prompt: list[int]
    ) -> None:
        """dtype: safetensors' name. prompt: the prompt's token ids. OSError if the file cannot be made."""
        self.points = points
        self._path = spooled(directory, call, choice, "")
        self.name = self._path.name
        self._call = call
        self._dtype, self._hidden = dtype, hidden
        self._prompt = np.array(prompt, "<i4")
        self._runs: list[tuple[int, int]] = []  # of positions: from here, to there
        self._token_ids = bytearray()
        # Room for the call file's header too, up to 1,024 generated tokens: then the file is handed over as it is.
        self._room = 4096 + len(header({}, {"points": json.dumps(points)})) + TOKEN_ROOM * (len(prompt) + 1024)
        self._file: BinaryIO = Path(f"{self._path}{PART}").open("wb", buffering=1 << 20)
        self._file.seek(self._room)

    def append(self, start: int, token_ids: NDArray[np.int32], rows: NDArray[Any]) -> int:
        """Store the rows of positions start, start + 1, …; returns how many are new.

        Positions stored already are left out: a request that was preempted computes its rows again, the first stay.
        While this runs, once for every row of a decode step, the step waits for Python's lock: it has to be quick.
        token_ids: [n] of little-endian int32. rows: [n, points, hidden] of raw elements
        """
        first, last = self._runs[-1] if self._runs else (start, start)
        if start < last:
            token_ids, rows, start = token_ids[last - start :], rows[last - start :], last
        n_rows = len(token_ids)
        if n_rows:
            self._file.write(np.ascontiguousarray(rows).data)
            self._token_ids += token_ids.tobytes()
            if start == last:
                self._runs[-1:] = [(first, start + n_rows)]
            else:
                self._runs.append((start, start + n_rows))
        return n_rows

    def finish(self) -> None:
        """Write the index behind the rows and the header before them, then give the file its name."""
        position = np.concatenate([np.empty(0, "<i4"), *(np.arange(a, b, dtype="<i4") for a, b in self._runs)])
        token_id = np.frombuffer(self._token_ids, "<i4")
        for array in (position, token_id, self._prompt):
            self._file.write(array.data)
        shapes = {
            "rows": (self._dtype, (len(position), len(self.points), self._hidden)),
            "position": ("I32", position.shape),
            "token_id": ("I32", token_id.shape),
            "prompt_token_ids": ("I32", self._prompt.shape),
        }
        self._file.seek(0)
        self._file.write(header(shapes, {"call": self._call, "points": json.dumps(self.points)}, self._room))
        self._file.close()
        Path(f"{self._path}{PART}").rename(f"{self._path}{WHOLE}")

    def drop(self) -> None:
        """Give up what was written, and its room; `refuse` takes the file away."""
        with contextlib.suppress(OSError):  # what is buffered has no room either
            self._file.close()
        with contextlib.suppress(OSError):
            os.truncate(f"{self._path}{PART}", 0)


def refuse(directory: Path, name: str, reason: str) -> None:
    """Leave a reason where the spool file `<call>.<choice>` would have been; none, if there is no room for one."""
    draft = directory / f"{name}.reason{PART}"
    draft.touch()
    with contextlib.suppress(OSError):
        draft.write_text(reason)
    draft.rename(directory / f"{name}{FAILED}")
    (directory / f"{name}{PART}").unlink(missing_ok=True)


def used_bytes(directory: Path) -> int:
    """What the spool takes up now."""
    total = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                total += 0 if entry.name.startswith(".") else entry.stat().st_size
            except FileNotFoundError:  # claimed and deleted meanwhile
                continue
    return total


def prepare(directory: Path, n_bytes: int = 0) -> None:
    """Make the directory this process's own and clear what a worker before it left: nobody can claim that any more.

    The lock is held until the process ends, whatever it becomes by `exec`. BadInput if another worker holds it, if
    others may have put something there, or if n_bytes of rows would not fit.
    """
    with contextlib.suppress(FileExistsError):
        directory.mkdir(0o700, parents=True)
    _check_own(directory)
    lock = _opened(directory / ".lock", 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise BadInput(f"{directory} is the spool of a worker that runs: give another --port or --spool-dir") from None
    os.set_inheritable(lock, True)
    for path in directory.iterdir():
        if path.suffix in (PART, WHOLE, FAILED) or path.name == WRONG:
            path.unlink()
    free = shutil.disk_usage(directory).free
    if free < n_bytes:
        raise BadInput(f"{free:,} bytes are free in {directory}: give another --spool-dir, or fewer --spool-bytes")
    # For a group too, if it was let into the directory: with the token it takes rows out of it, as `episodes.handover`.
    with os.fdopen(_opened(directory / TOKEN, 0o640, os.O_TRUNC), "w") as token:
        token.write(secrets.token_hex())


def _check_own(directory: Path) -> None:
    """Close a spool to all but its owner and group. BadInput for one in which others can write, or could lead what is
    written elsewhere.
    """
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise BadInput(f"{directory} is a link or a file, no directory: delete it, or give another --spool-dir")
    if found.st_uid != os.geteuid():
        raise BadInput(f"{directory} belongs to user {found.st_uid}, not to {os.geteuid()}: give another --spool-dir")
    if found.st_mode & 0o022:
        raise BadInput(f"others may write in {directory}: delete it, or give another --spool-dir")
    directory.chmod(found.st_mode & ~0o007)


def _opened(path: Path, mode: int, flags: int = 0) -> int:
    """A descriptor of a file of ours that is made if it is not there; OSError if it is a link to another."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | flags, mode)
    os.fchmod(descriptor, mode)
    return descriptor
