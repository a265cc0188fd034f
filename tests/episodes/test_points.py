"""Points: what people write, and what they get for it."""

import pytest

from episodes.errors import BadInput, UnknownPoint
from episodes.points import Points, default_layers, legacy_key, parse_custom

OFFERED = Points(24, {"o_proj": "model.layers.*.self_attn.o_proj.output", "rotary": "model.rotary.output"})


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("8,12,16", [8, 12, 16]),
        ("all", list(range(24))),
        ("8-11", [8, 9, 10, 11]),
        ("::8", [0, 8, 16]),
        ("-2,-1", [22, 23]),
        ("-3:", [21, 22, 23]),
        ("20-23, 0,20", [20, 21, 22, 23, 0]),
        (":2", [0, 1]),
        ("1:9:4", [1, 5]),
    ],
)
def test_layers_are_written_as_people_write_them(text, layers):
    assert OFFERED.parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "x", "1,,2", "24", "-25", "9-8", "5:5", "::0", "1.5", "0-24"])
def test_layers_that_are_none_are_refused_with_what_exists(text):
    with pytest.raises(UnknownPoint, match=r"0 to 23"):
        OFFERED.parse_layers(text)


def test_points_are_named_layer_by_layer_and_the_rest_once():
    hooks = ["output", "embed.output", "mlp.output", "o_proj", "rotary", "output"]
    assert OFFERED.name([-1, 0, 23], hooks) == [
        "layers.23.output", "layers.23.mlp", "layers.23.o_proj", "layers.0.output", "layers.0.mlp", "layers.0.o_proj",
        "embed.output", "rotary",
    ]  # fmt: skip


def test_what_a_model_does_not_have_all_the_same_is_not_offered():
    """The reason is what the worker found; a hook that no layer has is none."""
    wrong = {f"layers.{n}.attn": f"layers.{n}.attn: scaled" for n in range(24)} | {"layers.3.mlp": "layers.3.mlp: odd"}
    points = Points(24, wrong=wrong)
    assert points.hooks == ["output", "input", "mlp", "embed.output", "final.output"] and points.check("layers.4.mlp")
    for ask in (lambda: points.check("layers.3.mlp"), lambda: points.name([3], ["mlp"])):
        with pytest.raises(UnknownPoint, match=r"layers\.3\.mlp: odd"):
            ask()
    with pytest.raises(UnknownPoint, match=r"'attn' does not exist"):
        points.name([3], ["attn"])


@pytest.mark.parametrize("point", ["layers.3.output", "layers.0.o_proj", "rotary", "final.output", "embed.output"])
def test_a_point_of_the_model_is_known(point):
    assert OFFERED.check(point)


@pytest.mark.parametrize(
    "point", ["layers.24.output", "layers.0.rotary", "o_proj", "layers.0.embed", "", "layers.x.mlp"]
)
def test_any_other_is_not(point):
    with pytest.raises(UnknownPoint):
        OFFERED.check(point)


@pytest.mark.parametrize(
    "text",
    [
        "o_proj",
        "o_proj=",
        "output=model.x.output",
        "a=model.x",
        "a=model.*.x.*.output",
        "a b=model.x.output",
        "a=*.output",
    ],
)
def test_a_location_that_is_none_is_refused(text):
    with pytest.raises(BadInput, match=r"name=location"):
        parse_custom(text)


def test_a_location_is_taken_apart():
    assert parse_custom("o=model.layers.*.self_attn.o_proj.input") == ("o", "model.layers.*.self_attn.o_proj.input")


def test_keys_are_the_ones_that_clients_know():
    keys = [legacy_key(p) for p in ("layers.8.output", "layers.8.attn", "final.output")]
    assert keys == ["layer_8_output", "layer_8_attn", "final_output"]
    assert default_layers(2) == [0, 1]


def test_a_compiled_model_offers_only_the_points_that_it_was_started_with():
    settled = Points(6, None, ["layers.1.output", "layers.3.output"])
    assert settled.hooks == ["output"] and settled.layers == [1, 3]
    assert settled.name([3], ["output"]) == ["layers.3.output"]
    with pytest.raises(UnknownPoint, match=r"'layers\.2\.output' is not one of those"):
        settled.name([2], ["output"])
    with pytest.raises(UnknownPoint, match=r"'layers\.1\.input' is not one of those"):
        settled.check("layers.1.input")


def test_more_points_than_anyone_can_want_are_refused_with_their_count():
    with pytest.raises(UnknownPoint, match="800 points: at most 512"):
        Points(400).name(range(400), ["input", "output"])
