"""The journal: what was appended is read back, and what was damaged is said to be."""

import io
import zlib
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from episodes.errors import CorruptFile
from episodes.journal import Broken, Journal, decode, encode, read
from episodes.records import Call, Kept, Link, Pair, Seal
from episodes.wire import Sequence

CALL = Call(
    id="c-1", thread="t-1", episode="e", turn=2, attempt=1, endpoint="/v1/completions", model="m", started=1.5,
    ended=2.5, status=200, first_byte=2.0, request='{"a": "ä"}', reply="{}", points=["layers.1.output"],
    sequences=[Sequence(0, [1, 2], [3], "stop", 1)], kept=[Kept(0, 1, 2)],
)  # fmt: skip
SEAL = Seal("e", ["c-1"], 1, 100, 7, 3.0)
PAIR = Pair("e", ["t-1", "t-2"], 3.0, tied=["t-3"])
LINK = Link("e", "tau-bench", "7", 0, 1.0, "order", tied=["f"])


def test_records_come_back_as_they_went(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.append(CALL)
    journal.append(SEAL)
    journal.close()
    assert list(read(tmp_path / "j")) == [CALL, SEAL]


def test_a_torn_tail_is_cut_off_when_the_journal_is_opened(tmp_path):
    """A line without its newline was never committed; the next one must not be glued to it."""
    path = tmp_path / "j"
    line = encode(CALL)
    path.write_bytes(line + line[:40])
    assert [type(r) for r in read(path)] == [Call, Broken]
    journal = Journal(path)
    journal.append(SEAL)
    journal.close()
    assert list(read(path)) == [CALL, SEAL]


@pytest.mark.parametrize("n_torn", [0, 100, 149_000])
def test_every_line_stays_when_a_journal_is_opened_however_long_they_are(tmp_path, n_torn):
    """Longer than what is looked at at once, which begins amid a line; and so may be what is torn."""
    path, long = tmp_path / "j", msgspec.structs.replace(CALL, request="x" * 150_000)
    path.write_bytes(encode(long) + encode(SEAL) + encode(long)[:n_torn])
    Journal(path).close()
    assert list(read(path)) == [long, SEAL]


def test_nothing_stays_of_a_line_that_could_not_be_written(tmp_path, monkeypatch):
    """Taken back at once where that can be, else before the next."""
    path = tmp_path / "j"
    journal = Journal(path)
    journal.append(CALL)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="told to fail"):
        patch.setattr("episodes.journal.os.fsync", lambda _: (_ for _ in ()).throw(OSError("told to fail")))
        journal.append(PAIR)
    assert list(read(path)) == [CALL]
    with path.open("ab") as file:
        file.write(encode(PAIR)[:40])
    journal.append(SEAL)
    journal.close()
    assert list(read(path)) == [CALL, SEAL]


def test_a_line_of_which_the_disk_takes_a_part_at_a_time_is_whole(tmp_path):
    class Short(io.FileIO):
        def write(self, data):
            return super().write(data[:7])

    journal = Journal(tmp_path / "j")
    journal._file.close()
    journal._file = Short(tmp_path / "j", "a+")
    journal.append(CALL, SEAL)
    journal.close()
    assert list(read(tmp_path / "j")) == [CALL, SEAL]


@pytest.mark.parametrize("at", [0, 5, 8, 12, 60, -2])
def test_a_changed_byte_is_found(at):
    """Wherever a bit flips, the line is refused and the ones around it are not."""
    line = bytearray(encode(CALL))
    line[at] ^= 1
    with pytest.raises(Exception, match=r"checksum|cut short"):
        decode(bytes(line))


def test_a_broken_line_does_not_hide_the_next(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(b"nonsense\n" + encode(SEAL))
    broken, seal = read(path)
    assert isinstance(broken, Broken) and broken.line == 1 and seal == SEAL


def test_no_journal_is_an_empty_one(tmp_path):
    assert list(read(tmp_path / "none")) == []


@given(st.binary(max_size=200), st.booleans())
def test_no_line_raises_anything_else(text, checked):
    """Nor one whose checksum is right."""
    line = (b"%08x " % zlib.crc32(text) if checked else b"") + text + b"\n"
    with suppress(CorruptFile):
        assert encode(decode(line))


@pytest.mark.parametrize("text", [b'{"type":"call","x":' + b"[" * 5000 + b"]" * 5000 + b"}", b"9" * 5000])
def test_a_line_that_a_parser_chokes_on_is_corrupt(text):
    with pytest.raises(CorruptFile):
        decode(b"%08x %s\n" % (zlib.crc32(text), text))


@pytest.mark.parametrize("name", ["", "..", "/tmp/x", "../x", "a/b", "a\0", "a\n", ".a", "a" * 129])
@pytest.mark.parametrize(
    ("record", "field"),
    [
        *((CALL, field) for field in ("id", "thread", "episode")),
        *((SEAL, field) for field in ("episode", "calls")),
        *((PAIR, field) for field in ("episode", "threads", "tied")),
        *((LINK, field) for field in ("episode", "tied")),
    ],
)
def test_a_name_that_could_lead_out_of_the_run_makes_its_line_corrupt(record, field, name):
    """Its checksum may be right: whoever made the run wrote that too."""
    names = [*getattr(record, field), name] if isinstance(getattr(record, field), list) else name
    with pytest.raises(CorruptFile, match="regex"):
        decode(encode(msgspec.structs.replace(record, **{field: names})))
    assert decode(encode(record)) == record


@given(st.data())
def test_no_damage_to_a_line_goes_unnoticed(data):
    line = bytearray(encode(CALL))
    at = data.draw(st.integers(0, len(line) - 1))
    line[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptFile):
        decode(bytes(line))
