"""A section with variants is checked against the one that it names, else against the most similar one."""

from typing import Literal

import pytest
from pydantic import TypeAdapter, ValidationError

from gpt.config.fields import Count, section, variants


@section
class Circle:
    name: Literal["circle", "disc"]
    radius: Count


@section
class Box:
    name: Literal["box"]
    width: Count
    height: Count


SHAPES = TypeAdapter(variants(Circle | Box, "name"))


def wrong(values):
    with pytest.raises(ValidationError) as caught:
        SHAPES.validate_python(values)
    return {".".join(map(str, item["loc"])): item["msg"] for item in caught.value.errors()}


def test_a_variant_may_have_several_names():
    assert SHAPES.validate_python({"name": "disc", "radius": 1}) == Circle("disc", 1)
    assert SHAPES.validate_python(Box("box", 1, 2)) == Box("box", 1, 2)


def test_each_key_of_the_named_variant_is_checked_under_its_own_name():
    assert wrong({"name": "box", "width": 0, "height": "tall"}).keys() == {"width", "height"}
    assert wrong({"name": "circle", "width": 1}).keys() == {"width", "radius"}


def test_without_a_valid_name_the_variant_with_the_same_keys_is_checked():
    assert wrong({"name": "bax", "width": 0, "height": 1}) == {
        "name": "it is one of circle, disc, box", "width": "Input should be greater than or equal to 1"
    }  # fmt: skip
    assert wrong({"width": 1, "height": 1}) == {"name": "it is one of circle, disc, box"}
    assert wrong({"name": ["box"], "width": 1, "height": 1}).keys() == {"name"}


def test_what_is_no_section_is_said_to_be_none():
    assert wrong("box").keys() == {""}
