"""The journal: an append-only file of checksummed JSON lines. Its form is in `episodes.layout`."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import msgspec

from episodes.errors import CorruptFile
from episodes.records import Record

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


CUT_SHORT = "the line is cut short"
TAIL = 1 << 16
END = 4096


class Broken(NamedTuple):
    """A line that cannot be read: its number, 1 where the reading began, and why."""

    line: int
    reason: str


def encode(record: Record) -> bytes:
    text = _encoder.encode(record)
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode(line: bytes) -> Record:
    """The record in a line with its newline; CorruptFile says what is wrong with it."""
    checksum, blank, text = line[:8], line[8:9], line[9:-1]
    if line[-1:] != b"\n":
        raise CorruptFile(CUT_SHORT)
    if blank != b" ":
        raise CorruptFile("the line has no checksum")
    if checksum != b"%08x" % zlib.crc32(text):
        raise CorruptFile("the checksum does not match")
    try:
        return _decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(str(error)) from None


def read(path: Path) -> Iterator[Record | Broken]:
    """Every line's record, or what is wrong with the line."""
    return (record for _, record in placed(path))


def placed(path: Path, at: int = 0, stop: int = sys.maxsize) -> Iterator[tuple[int, Record | Broken]]:
    """As `read`, each with the line's place in the file: its first byte's. at, stop: where the first one begins, and
    before which the last one does
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(at)
        for number, line in enumerate(file, 1):
            if at >= stop:
                return
            try:
                yield at, decode(line)
            except CorruptFile as error:
                yield at, Broken(number, str(error))
            at += len(line)


def sound(path: Path, at: int = 0, stop: int = sys.maxsize) -> Iterator[tuple[int, Record]]:
    """As `placed`, but only the records that can be read; the others are left to `verify`."""
    return ((at, record) for at, record in placed(path, at, stop) if not isinstance(record, Broken))


def size(path: Path) -> int:
    """Bytes of a journal; 0 where there is none yet."""
    return path.stat().st_size if path.exists() else 0


def has_line(path: Path) -> bool:
    """Whether a journal has a whole line: one that a crash tore is none."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return file.readline().endswith(b"\n")


def end(path: Path, n_bytes: int) -> int:
    """The CRC-32 of the last of so many bytes of a journal, by which it is told to be the same one."""
    with path.open("rb") as file:
        file.seek(max(n_bytes - END, 0))
        return zlib.crc32(file.read(min(END, n_bytes)))


def record_at(path: Path, place: int) -> Record:
    """The record whose line begins at a place; CorruptFile if none that is sound does."""
    with path.open("rb") as file:
        file.seek(place)
        return decode(file.readline())


class Journal:
    """The writing end. A torn last line, left by a crash, is cut off: its call was never committed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b", buffering=0)
        self.n_bytes = self._end_of_lines()
        if self.n_bytes < os.fstat(self._file.fileno()).st_size:
            self._file.truncate(self.n_bytes)
            os.fsync(self._file.fileno())

    def _end_of_lines(self) -> int:
        """Where the last whole line ends."""
        at = os.fstat(self._file.fileno()).st_size
        while at:
            start = max(at - TAIL, 0)
            newline = os.pread(self._file.fileno(), at - start, start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            at = start
        return 0

    def append(self, *records: Record) -> list[int]:
        """Write records, on disk when this returns their places. If it fails, nothing of their lines stays."""
        lines = [encode(record) for record in records]
        *places, _ = accumulate(map(len, lines), initial=self.n_bytes)
        self.write(b"".join(lines), sync=True)
        return places

    def write(self, lines: bytes, sync: bool = False) -> None:
        """Write lines; if it fails, nothing of them stays."""
        if os.fstat(self._file.fileno()).st_size != self.n_bytes:  # a failed write that could not be taken back
            self._file.truncate(self.n_bytes)
        try:
            done = 0
            while done < len(lines):  # a disk that fills up takes a part of a line without an error
                done += self._file.write(memoryview(lines)[done:]) or 0
            if sync:
                os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(self.n_bytes)
            raise
        self.n_bytes += len(lines)

    def clear(self) -> None:
        """Drop all lines."""
        self._file.truncate(0)
        self.n_bytes = 0

    def duplicate(self) -> int:
        """Another descriptor of the file, the caller's to close."""
        return os.dup(self._file.fileno())

    def close(self) -> None:
        self._file.close()
