"""The hand-over of a call file through a directory that worker and proxy share: its rows pass through neither.

`GET /v1/activations/{call}?as=recipe` answers with a `Recipe`: which stretches of which spool files, and which bytes
between them, make up the call file. Whoever asks makes the file itself, by `take`. That the directory it sees is the
worker's is proved, not assumed: the file `.token` in it holds the recipe's token, made anew whenever a worker starts.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec

from episodes.errors import CorruptFile
from episodes.wire import Extent

TOKEN = ".token"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}\.\d{1,9}\.safetensors")
Count = Annotated[int, msgspec.Meta(ge=0)]


class Part(msgspec.Struct, frozen=True, array_like=True):
    """`nbytes` of the spool file `name` from `offset` on; `data` itself where there is no name."""

    name: str
    offset: Count
    nbytes: Count
    data: bytes = b""


class Recipe(msgspec.Struct, frozen=True):
    """A call file in parts, one behind the other. directory: the spool's, as the worker sees it."""

    directory: str
    token: str
    parts: list[Part]

    @classmethod
    def of(cls, extents: list[Extent], spool: Path, token: str) -> Recipe:
        return cls(str(spool), token, [Part(e.path.name if e.path else "", *e[1:]) for e in extents])


def take(recipe: Recipe, directory: Path, into: Path, min_free_bytes: int = 0) -> bool:
    """Make the call file `into` out of the spool in `directory`; False if that is not the worker's, or not readable.

    One spool file on the same file system becomes the call file by a link; else the kernel copies, once. The spool
    files stay until the worker is told to forget them. CorruptFile for a recipe that names anything but spool files,
    a link to another file among them; OSError if a copy would leave less of the disk than min_free_bytes.
    """
    for part in recipe.parts:
        if part.name and not NAME.fullmatch(part.name):
            raise CorruptFile(f"{part.name[:200]!r} is no spool file: <call>.<choice>.safetensors is")
    into.unlink(missing_ok=True)
    try:
        if (directory / TOKEN).read_text() != recipe.token:
            return False
        if not _link(recipe, directory, into):
            check_room(into, sum(part.nbytes for part in recipe.parts), min_free_bytes)
            _copy(recipe, directory, into)
    except (FileNotFoundError, NotADirectoryError, PermissionError, UnicodeError):
        into.unlink(missing_ok=True)
        return False
    return True


def check_room(path: Path, n_bytes: int, min_free_bytes: int) -> None:
    """OSError, as of a full disk, if so many more bytes at a path would leave less of its disk than min_free_bytes."""
    if min_free_bytes and (free := shutil.disk_usage(path.parent).free) < min_free_bytes + n_bytes:
        reason = f"{n_bytes:,} bytes are to be written, {free:,} are free, and --min-free-bytes is {min_free_bytes:,}"
        raise OSError(errno.ENOSPC, reason)


def _link(recipe: Recipe, directory: Path, into: Path) -> bool:
    """Give the only spool file of a recipe a second name, and write the other parts into it.

    False if there is more than one, if its rows would have to move (a header that outgrew its room), or if the file
    system does not link it (another one, or another user's file).
    """
    at = list(itertools.accumulate((part.nbytes for part in recipe.parts), initial=0))
    placed = [(part, place) for part, place in zip(recipe.parts, at, strict=False) if part.nbytes]
    names = {part.name for part, _ in placed if part.name}
    if len(names) != 1 or any(part.name and part.offset != place for part, place in placed):
        return False
    try:
        os.link(directory / names.pop(), into, follow_symlinks=False)
        with _open(into, os.O_RDWR) as file:
            for part, place in placed:
                if not part.name:
                    file.seek(place)
                    file.write(part.data)
            file.truncate(at[-1])
    except (OSError, CorruptFile):
        into.unlink(missing_ok=True)
        return False
    return True


def _open(path: Path, access: int) -> BinaryIO:
    """A file of the spool, whose directory others may write to; CorruptFile if it is a link, a pipe or the like."""
    try:
        descriptor = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK)  # to open a pipe may take for ever
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CorruptFile(f"{path.name} is a symbolic link, no spool file") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptFile(f"{path.name} is no plain file, so no spool file")
    return os.fdopen(descriptor, "r+b" if access == os.O_RDWR else "rb")


def _copy(recipe: Recipe, directory: Path, into: Path) -> None:
    with into.open("wb", buffering=0) as out:
        for part in recipe.parts:
            if not part.name:
                out.write(part.data)
                continue
            with _open(directory / part.name, os.O_RDONLY) as spooled:
                _send(spooled, part, out)


def _send(spooled: BinaryIO, part: Part, out: BinaryIO) -> None:
    done = 0
    while done < part.nbytes:
        sent = os.sendfile(out.fileno(), spooled.fileno(), part.offset + done, part.nbytes - done)
        if not sent:
            raise CorruptFile(f"{part.name} ends after {part.offset + done} bytes, the worker said {part.nbytes} more")
        done += sent
