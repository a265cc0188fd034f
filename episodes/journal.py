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
    if line[-1:] != b"\n" or blank != b" ":
        raise CorruptFile("the line is cut short")
    if checksum != b"%08x" % zlib.crc32(text):
        raise CorruptFile("the checksum does not match")
    try:
        return _decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(str(error)) from None


def read(path: Path) -> Iterator[Record | Broken]:
    """Every line's record, or what is wrong with the line."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield decode(line)
            except CorruptFile as error:
                yield Broken(number, str(error))


class Journal:
    """The writing end. A torn last line, left by a crash, is cut off: its call was never committed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)
            os.fsync(self._file.fileno())

    def append(self, record: Record) -> None:
        """Write a record; when this returns it is on disk. If it fails, nothing of the line stays."""
        end = self._file.tell()
        rest = encode(record)
        try:
            while rest:  # a disk that fills up takes a part of a line without an error
                rest = rest[self._file.write(rest) or 0 :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        self._file.close()
