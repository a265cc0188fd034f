"""The wire: the capture header, and call files made out of spool files."""

import json
import struct
from contextlib import suppress

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from episodes.errors import BadCapture, CorruptFile, UnknownPoint
from episodes.points import Points
from episodes.wire import DTYPES, CallFile, Capture, Collect, Sequence, header, join, read_header
from worker.spool import SpoolFile, spooled


def file(tmp_path, fields, data=b"", size=None):
    """A safetensors file with this header, true or not."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


def field(dtype="F32", shape=(1,), start=0, stop=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


POINTS = ["layers.1.output", "layers.3.output"]
NAMES = ["call", "points", "tokens", "salt", "layers", "hook_points", "positions", "dtype", "shape", "data_offsets"]
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner),
)
COUNTS = st.integers(-1, 9) | st.integers()
FIELDS = st.builds(
    field, st.sampled_from(["F32", "BF16", "I32", "U8"]), st.lists(COUNTS, max_size=4), st.just(0) | COUNTS, COUNTS
)


def test_a_capture_survives_its_header():
    for capture in (Capture("c-1"), Capture("c-1", "run/1", ("layers.1.output",))):
        assert Capture.parse(capture.header()) == capture


@pytest.mark.parametrize("text", ["", "{", "[]", '{"salt": "x"}', '{"call": 3}'])
def test_a_bad_header_says_what_is_wrong(text):
    with pytest.raises(BadCapture, match="X-Tautap-Capture"):
        Capture.parse(text)


def spool(tmp_path, call, sequences, hidden=4):
    """Spool files of random rows, and those rows."""
    rng = np.random.default_rng(0)
    rows = []
    for sequence, start in sequences:
        file = SpoolFile(tmp_path, call, sequence.choice, POINTS, "BF16", hidden, sequence.prompt_token_ids)
        tokens = sequence.tokens[start:]
        made = rng.standard_normal((len(tokens), len(POINTS), hidden)).astype(DTYPES["BF16"])
        file.append(start, tokens, made.view(np.uint8))
        file.finish()
        rows.append(made)
    return rows


def joined(tmp_path, call, sequences):
    """The call file, put together from its stretches as the server does."""
    path = tmp_path / f"{call}.whole"
    extents = join(call, [(s, spooled(tmp_path, call, s.choice)) for s, _ in sequences], POINTS)
    path.write_bytes(
        b"".join(e.data if e.path is None else e.path.read_bytes()[e.offset : e.offset + e.nbytes] for e in extents)
    )
    return path


def test_sequences_join_into_one_call_file(tmp_path):
    """Rows, positions and tokens of every choice come through, from the first row that each one computed."""
    sequences = [(Sequence(0, [5, 6, 7], [8, 9], "stop", 2), 2), (Sequence(1, [5, 6, 7], [4], "length", 0), 0)]
    rows = spool(tmp_path, "c", sequences)
    file = CallFile(joined(tmp_path, "c", sequences))
    assert (file.call, file.points, file.dtype, file.hidden_size) == ("c", POINTS, "BF16", 4)
    assert file.sequences == [s for s, _ in sequences]
    assert file.choice.tolist() == [0, 0, 1, 1, 1] and file.position.tolist() == [2, 3, 0, 1, 2]
    assert file.token_id.tolist() == [7, 8, 5, 6, 7]
    assert np.array_equal(file.rows, np.concatenate(rows))


def test_the_format_is_safetensors(tmp_path):
    """The library itself reads what we write by hand."""
    sequences = [(Sequence(0, [5, 6], [7, 8]), 0)]
    (rows,) = spool(tmp_path, "c", sequences)
    for path in (joined(tmp_path, "c", sequences), spooled(tmp_path, "c", 0)):
        assert np.array_equal(safetensors.numpy.load_file(path)["rows"], rows)


def test_rows_computed_again_are_not_stored_again(tmp_path):
    """A preempted request runs its tokens again: the first rows stay."""
    file = SpoolFile(tmp_path, "c", 0, POINTS, "F32", 1, [1, 2, 3])
    for start, value in ((0, 1), (1, 2), (2, 3)):
        file.append(start, np.array([1, 2][: 3 - start], np.int32), np.full((2, 2, 1), value, np.float32)[: 3 - start])
    file.finish()
    tensors = safetensors.numpy.load_file(spooled(tmp_path, "c", 0))
    assert tensors["position"].tolist() == [0, 1, 2] and tensors["rows"][:, 0, 0].tolist() == [1, 1, 2]


def test_a_sequence_has_no_row_for_its_last_token():
    assert Sequence(0, [1, 2], [3, 4, 5]).tokens.tolist() == [1, 2, 3, 4]
    assert Sequence(0, [1, 2], []).n_positions == 2 == Sequence(0, [1, 2], [3]).n_positions


@given(st.data())
def test_no_damage_goes_unnoticed_or_raises_anything_else(tmp_path_factory, data):
    """A torn file, a changed header: CorruptFile, and nothing is trusted."""
    tmp_path = tmp_path_factory.mktemp("wire")
    spool(tmp_path, "c", [(Sequence(0, [5, 6, 7], [8]), 0)])
    path = joined(tmp_path, "c", [(Sequence(0, [5, 6, 7], [8]), 0)])
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little") + 8
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        damaged = bytearray(whole)
        damaged[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(damaged))
    try:
        file = CallFile(path)
    except CorruptFile:
        return
    assert file.rows.shape == (file.n_rows, len(file.points), file.hidden_size)


@pytest.mark.parametrize(
    ("fields", "n_bytes"),
    [
        ({"a": field(shape=[1 << 32, 1 << 32], stop=0)}, 0),  # 2**64 elements are none, in 64 bits
        ({"a": field(shape=[1 << 62, 4, 1], stop=0)}, 0),
        ({"a": field(shape=[-1, -1])}, 4),
        ({"a": field(shape=[1.0])}, 4),
        ({"a": field(shape=[True])}, 4),
        ({"a": field(shape=[1, 1, 1, 1])}, 4),
        ({"a": field("F64", stop=8)}, 8),
        ({"a": field(stop=8)}, 8),
        ({"a": field(), "b": field()}, 4),  # both in one place
        ({"a": field(), "b": field(start=2, stop=6)}, 6),
        ({"a": field(), "b": field(start=8, stop=12)}, 12),  # a gap
        ({"a": field(start=4, stop=8)}, 8),
        ({"a": field(stop=-4)}, 4),
        ({"a": field()}, 5),
        ({"a": field()}, 3),
        ({"__metadata__": {"call": 3}}, 0),
        ({"a": 3}, 0),
        (b"[]", 0),
        (b"{" * 10_000, 0),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, 0),
        (b"\xff", 0),
    ],
)
def test_a_header_that_does_not_account_for_every_byte_once_is_refused(tmp_path, fields, n_bytes):
    with pytest.raises(CorruptFile, match="x is not a whole safetensors file"):
        read_header(file(tmp_path, fields, b"\0" * n_bytes))


@pytest.mark.parametrize("size", [0, 1, 3, 100, 1 << 40, (1 << 64) - 1])
def test_a_header_of_another_length_than_it_says_is_refused(tmp_path, size):
    with pytest.raises(CorruptFile):
        read_header(file(tmp_path, {"a": field()}, b"\0" * 4, size))


def call_file(tmp_path, **changes):
    """A call file of two rows, with some of its parts replaced."""
    parts = {
        "rows": np.zeros((2, 1, 3), np.float32),
        "position": np.array([0, 1], np.int32),
        "token_id": np.array([5, 6], np.int32),
        "choice": np.array([0, 0], np.int32),
        "call": "c",
        "points": '["layers.1.output"]',
        "tokens": '"all"',
        "sequences": '[{"choice":0,"prompt_token_ids":[5,6],"completion_token_ids":[7]}]',
    } | changes
    tensors = {name: part for name, part in parts.items() if isinstance(part, np.ndarray)}
    path = tmp_path / "c"
    safetensors.numpy.save_file(tensors, path, {name: part for name, part in parts.items() if isinstance(part, str)})
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"position": np.array([0, -1], np.int32)},
        {"position": np.array([0, 1 << 30], np.int32)},
        {"position": np.array([0, 1], np.float32)},
        {"position": np.array([[0, 1]], np.int32)},
        {"token_id": np.array([5], np.int32)},
        {"choice": np.array([0, 7], np.int32)},
        {"rows": np.zeros((2, 2, 3), np.float32)},
        {"rows": np.zeros((2, 3), np.float32)},
        {"rows": np.zeros((2, 1, 3), np.int32)},
        {"points": "[3]"},
        {"tokens": '"some"'},
        {"sequences": "[" * 10_000},
        {"sequences": "[]"},
        {"sequences": '[{"choice":0,"prompt_token_ids":[5,6],"completion_token_ids":[7]}]' * 2},
        {"call": None},
    ],
)
def test_a_call_file_that_contradicts_itself_is_refused(tmp_path, changes):
    """One that does not is taken."""
    assert CallFile(call_file(tmp_path)).n_rows == 2
    with pytest.raises(CorruptFile, match="c is not a call file"):
        CallFile(call_file(tmp_path, **changes))


def test_rows_that_an_engine_ran_ahead_are_no_contradiction(tmp_path):
    """It hears late that a sequence is over."""
    assert CallFile(call_file(tmp_path, position=np.array([2, 3], np.int32))).n_rows == 2


def test_rows_are_found_where_they_lie_amid_others_and_none_in_anothers_place(tmp_path):
    sequence = '{"choice":%d,"prompt_token_ids":[5,6],"completion_token_ids":[7]}'
    parts = {
        "rows": np.arange(9, dtype=np.float32).reshape(3, 1, 3),
        "token_id": np.array([5, 5, 6], np.int32),
        "choice": np.array([0, 1, 0], np.int32),
        "sequences": f"[{sequence % 0},{sequence % 1}]",
    }
    file = CallFile(call_file(tmp_path, **parts, position=np.array([0, 0, 1], np.int32)))
    assert file.rows[file.place(0, 0, 2)][:, 0, 0].tolist() == [0, 6] and file.rows[file.place(1, 0, 1)][0, 0, 0] == 3
    file = CallFile(call_file(tmp_path, **parts, position=np.array([1, 0, 0], np.int32)))
    with pytest.raises(CorruptFile, match="positions 0 to 2 of choice 0 are not all there"):
        file.place(0, 0, 2)


@given(
    st.binary(max_size=300) | st.dictionaries(st.text(), JSONS | FIELDS).map(json.dumps).map(str.encode), st.binary()
)
def test_no_header_raises_anything_else(tmp_path_factory, header, data):
    path = file(tmp_path_factory.getbasetemp(), header, data)
    with suppress(CorruptFile):
        tensors, _ = read_header(path)
        assert 8 + len(header) + sum(tensor.nbytes for tensor in tensors.values()) == path.stat().st_size
    with suppress(CorruptFile):
        CallFile(path)


@given(JSONS.map(json.dumps) | st.text())
def test_no_capture_header_raises_anything_else(text):
    with suppress(BadCapture):
        assert Capture.parse(text).call is not None


@given(JSONS)
def test_no_collect_activations_raises_anything_else(value):
    with suppress(BadCapture, UnknownPoint):
        assert Collect.parse(value).points(POINTS, Points(6))


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(header({"rows": ("F32", (1000, 1000, 1000))}, {}) + b"\0" * 8)
    with pytest.raises(CorruptFile, match="x is not a whole safetensors file"):
        read_header(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(CorruptFile):
        read_header(path)


def test_collect_activations_takes_the_names_that_clients_send():
    asked = Collect.parse({"layers": [3, 1], "hook_points": ["output", "attn.output"], "positions": [-1]})
    assert asked.points(POINTS, Points(6)) == ["layers.3.output", "layers.3.attn", "layers.1.output", "layers.1.attn"]
    assert Collect.parse(True).points(POINTS, Points(6)) == POINTS


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ({"layers": "8"}, BadCapture, r"layers"),
        ({"encoding_format": "hex"}, BadCapture, r"hex"),
        ([1], BadCapture, r"collect_activations"),
        ({"layers": []}, BadCapture, r"no point"),
        ({"layers": [6]}, UnknownPoint, r"layers 0 to 5"),
        ({"hook_points": ["logits"]}, UnknownPoint, r"output, input, attn, mlp, embed.output, final.output"),
    ],
)
def test_a_wrong_collect_activations_says_what_is_accepted(value, error, says):
    with pytest.raises(error, match=says):
        Collect.parse(value).points(POINTS, Points(6))


def test_a_sequence_survives_json():
    sequence = Sequence(1, [1], [2], "stop", 1)
    assert msgspec.json.decode(msgspec.json.encode(sequence), type=Sequence) == sequence
