"""The hand-over through a shared directory: the same file by link and by copy, and only from the worker's own spool."""

import errno
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from episodes import handover
from episodes.errors import CorruptFile
from episodes.handover import Part, Recipe, take
from episodes.wire import CallFile, Sequence, join
from worker.spool import SpoolFile, prepare, spooled

POINTS = ["layers.0.output", "layers.1.output"]
HIDDEN = 3


@pytest.fixture
def spool(tmp_path):
    prepare(tmp_path / "spool")
    return tmp_path / "spool"


def write(spool, choice=0, n_prompt=4, n_completion=3):
    """A spooled sequence and what the client saw of it."""
    prompt, completion = list(range(n_prompt)), list(range(50, 50 + n_completion))
    sequence = Sequence(choice, prompt, completion, "stop")
    file = SpoolFile(spool, "c", choice, POINTS, "F32", HIDDEN, prompt)
    rows = np.random.default_rng(choice).standard_normal((sequence.n_positions, len(POINTS), HIDDEN), np.float32)
    file.append(0, sequence.tokens, rows)
    file.finish()
    return sequence, spooled(spool, "c", choice), rows


def recipe(spool, *written):
    """As it comes over the wire."""
    extents = join("c", [(sequence, path) for sequence, path, _ in written], POINTS)
    made = Recipe.of(extents, spool, (spool / handover.TOKEN).read_text())
    return msgspec.json.decode(msgspec.json.encode(made), type=Recipe)


def check(path, *written):
    file = CallFile(path)
    assert [s for s, _, _ in written] == file.sequences and file.points == POINTS
    for sequence, _, rows in written:
        own = file.choice == sequence.choice
        assert np.array_equal(file.rows[own], rows)
        assert np.array_equal(file.token_id[own], sequence.tokens)
        assert file.position[own].tolist() == list(range(sequence.n_positions))


def test_one_sequence_becomes_the_call_file_without_a_copy(spool, tmp_path):
    """The spool's file itself, whose header and end are written anew; asking twice gives the same."""
    written = write(spool)
    for name in ("first", "second"):
        assert take(recipe(spool, written), spool, tmp_path / name)
        check(tmp_path / name, written)
    assert (tmp_path / "first").samefile(written[1])
    written[1].unlink()
    check(tmp_path / "first", written)


def test_another_file_system_gets_a_copy(spool, tmp_path, monkeypatch):
    """The same bytes as a link gives."""
    written = write(spool)
    assert take(recipe(spool, written), spool, tmp_path / "linked")

    def link(source, target, follow_symlinks):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    assert take(recipe(spool, written), spool, tmp_path / "copied")
    assert not (tmp_path / "copied").samefile(written[1])
    assert (tmp_path / "copied").read_bytes() == (tmp_path / "linked").read_bytes()


def test_several_sequences_and_long_replies_are_copied(spool, tmp_path):
    """Rows of several files have to move, and so have those whose header does not fit before them."""
    several = [write(spool, choice, 4 + choice) for choice in range(3)]
    assert take(recipe(spool, *several), spool, tmp_path / "several")
    check(tmp_path / "several", *several)
    long = write(spool, choice=7, n_completion=6000)
    assert take(recipe(spool, long), spool, tmp_path / "long")
    check(tmp_path / "long", long)
    assert not (tmp_path / "long").samefile(long[1])


def test_a_sequence_without_rows_is_handed_over_too(spool, tmp_path):
    nothing = write(spool, n_prompt=1, n_completion=0)
    sequence = Sequence(0, [1], [2], "stop", n_cached=1)
    file = SpoolFile(spool, "c", 0, POINTS, "F32", HIDDEN, [1])
    file.finish()
    assert take(recipe(spool, (sequence, nothing[1], None)), spool, tmp_path / "out")
    assert CallFile(tmp_path / "out").n_rows == 0 and CallFile(tmp_path / "out").sequences == [sequence]


def test_a_directory_that_is_not_the_workers_is_not_taken_from(spool, tmp_path):
    """Nowhere, without a token, with another worker's token, or with a file missing: nothing is made."""
    written = write(spool)
    asked = recipe(spool, written)
    other = tmp_path / "other"
    assert not take(asked, other, tmp_path / "out")
    other.mkdir()
    assert not take(asked, other, tmp_path / "out")
    prepare(other)
    (other / written[1].name).write_bytes(written[1].read_bytes())
    assert not take(asked, other, tmp_path / "out")
    written[1].unlink()
    assert not take(asked, spool, tmp_path / "out") and not (tmp_path / "out").exists()


@contextmanager
def nobody():
    """Be a user without rights for a while, where root runs the tests; nobody else may read what has mode 0."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


def test_a_spool_of_another_user_is_not_taken_from(spool):
    """As a worker makes it, for itself alone: its rows then come over HTTP."""
    asked = recipe(spool, write(spool))
    spool.chmod(0)
    with nobody(), tempfile.TemporaryDirectory() as own:
        assert not take(asked, spool, Path(own) / "out") and not list(Path(own).iterdir())
    spool.chmod(0o700)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", ".token", "c.0.part", "c/../../x.0.safetensors"])
def test_a_recipe_cannot_name_a_file_outside_the_spool(spool, tmp_path, name):
    asked = Recipe(str(spool), (spool / handover.TOKEN).read_text(), [Part(name, 0, 1)])
    with pytest.raises(CorruptFile, match=r"<call>\.<choice>\.safetensors"):
        take(asked, spool, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe", "directory"])
def test_what_is_no_plain_file_is_neither_read_nor_written(spool, tmp_path, kind, several):
    """Whoever may write into the spool cannot name another file of the proxy's by it."""
    written = [write(spool, choice) for choice in range(1 + several)]
    asked, path, mine = recipe(spool, *written), written[-1][1], tmp_path / "mine"
    if kind != "link to nothing":
        mine.write_bytes(b"mine")
    path.unlink()
    {"pipe": os.mkfifo, "directory": os.mkdir}.get(kind, lambda path: path.symlink_to(mine))(path)
    with pytest.raises(CorruptFile, match=r"c\.\d\.safetensors is (a symbolic link|no plain file)"):
        take(asked, spool, tmp_path / "out")
    assert not mine.exists() if kind == "link to nothing" else mine.read_bytes() == b"mine"


def test_a_spool_file_that_is_too_short_is_an_error(spool, tmp_path):
    asked = recipe(spool, write(spool), write(spool, 1))
    os.truncate(spooled(spool, "c", 1), 10)
    with pytest.raises(CorruptFile, match=r"c\.1\.safetensors ends after"):
        take(asked, spool, tmp_path / "out")
