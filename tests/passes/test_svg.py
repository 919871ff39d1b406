"""Pictures as text: elements that hold whatever they are given, words within their room, axes."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewright.passes import svg


@given(st.text(st.characters(), max_size=40))
def test_any_words_stand_in_an_element_and_in_an_attribute(words: str) -> None:
    told = svg.tag("text", svg.escape(words), name=words)
    found = ET.fromstring(told.encode())
    kept = [(a, b) for a, b in zip(words, found.text or "", strict=True) if b != "\ufffd"]
    assert all(a == b for a, b in kept)
    assert found.get("name") == (found.text or "")
    assert not list(found)


def test_marks_that_turn_or_hide_what_follows_are_shown_as_such() -> None:
    assert svg.escape("a\u202eb\u200bc\x00\ud800 d") == "a\ufffdb\ufffdc\ufffd\ufffd d"


@given(st.text(max_size=60), st.floats(8, 200))
def test_words_fit_their_room(words: str, room: float) -> None:
    found = svg.fit(words, 10, room)
    assert svg.length(found, 10) <= max(room, 10)
    assert found == words or "…" in found


def test_what_is_left_out_stands_before_the_last_part() -> None:
    assert svg.fit("block_sparse_moe.experts.w1", 10, 100) == "block…experts.w1"


@given(st.floats(1e-300, 1e300))
def test_the_logarithm_is_right(value: float) -> None:
    assert svg.log10(value) == pytest.approx(math.log10(value), rel=0, abs=1e-12)


def shown(*values: float) -> list[str]:
    return [tick.label for tick in svg.LogAxis(values, 150, 0).ticks]


def test_ticks_of_a_logarithmic_axis() -> None:
    assert shown(0.3) == ["0.2", "0.5"]
    assert shown(0.5) == ["0.2", "0.5", "1"]
    assert shown(0.012, 1.1) == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]
    assert shown(0.0018, 0.99) == ["0.001", "0.01", "0.1", "1"]
    assert shown(0.00002, 30) == ["1e-5", "0.0001", "0.001", "0.01", "0.1", "1", "10"]
    assert shown(1e-12, 1) == ["1e-12", "1e-10", "1e-8", "1e-6", "0.0001", "0.01", "1"]
    assert len(shown(1e-300, 1e300)) in range(2, 12)


def test_a_logarithmic_axis_holds_its_values() -> None:
    axis = svg.LogAxis([0.02, 0.3], 150, 0)
    assert axis.at(0.01) == pytest.approx(150)
    assert axis.at(0.5) == pytest.approx(0)
    assert axis.at(math.sqrt(0.01 * 0.5)) == pytest.approx(75)


@pytest.mark.parametrize(
    ("ends", "most", "found"),
    [
        ((0, 0), 6, [0]),
        ((5, 8), 6, [5, 6, 7, 8]),
        ((0, 31), 6, [0, 10, 20, 30]),
        ((0, 79), 6, [0, 20, 40, 60]),
        ((3, 17), 6, [5, 10, 15]),
    ],
)
def test_ticks_at_whole_numbers(ends: tuple[int, int], most: int, found: list[int]) -> None:
    assert svg.whole_ticks(*ends, most) == found


def test_figures_are_short() -> None:
    found = [svg.short(value) for value in (0.5, 0.0123, 0.001, 0.00099, 0.00005, 34, 1234)]
    assert found == ["0.5", "0.012", "0.001", "9.9e-4", "5e-5", "34", "1.2e3"]
    assert [svg.number(value) for value in (3, 2.04, -0.04, -1.25)] == ["3", "2", "0", "-1.2"]


def test_a_colour_between_two() -> None:
    assert [svg.blend("#ffffff", "#00573f", share) for share in (0, 0.5, 1)] == ["#ffffff", "#80ab9f", "#00573f"]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_a_linear_axis_holds_its_values_between_ticks(values: list[float]) -> None:
    axis = svg.LinearAxis(values, 200, 10)
    places = [axis.at(value) for value, _ in axis.ticks]
    assert places == sorted(places, reverse=True)
    assert places[0] == pytest.approx(200)
    assert places[-1] == pytest.approx(10)
    assert 2 <= len(places) <= 7
    assert all(10 - 1e-6 <= axis.at(value) <= 200 + 1e-6 for value in values)
    assert len({label for _, label in axis.ticks}) == len(places)
