"""The journal: an append-only file of checksummed JSON lines. Its form is in `episodes.layout`."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from episodes.errors import CorruptFile
from episodes.records import Record

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


CUT_SHORT = "the line is cut short"
TAIL = 1 << 16


class Broken(NamedTuple):
    """A line that cannot be read: its number from 1, and why."""

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


def placed(path: Path) -> Iterator[tuple[int, Record | Broken]]:
    """As `read`, each with the line's place in the file: its first byte's."""
    if not path.exists():
        return
    at = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield at, decode(line)
            except CorruptFile as error:
                yield at, Broken(number, str(error))
            at += len(line)


def sound(path: Path) -> Iterator[tuple[int, Record]]:
    """The records that can be read, each with its line's place; the others are left to `verify`."""
    return ((at, record) for at, record in placed(path) if not isinstance(record, Broken))


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

    def append(self, *records: Record) -> None:
        """Write records; when this returns they are on disk. If it fails, nothing of their lines stays."""
        self.write(b"".join(map(encode, records)), sync=True)

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
