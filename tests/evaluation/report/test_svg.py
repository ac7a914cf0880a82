"""Charts as SVG: where things are drawn is where the numbers say, and what does not fit is marked, not left out."""

import re

import numpy as np
import pytest

from pipeline.gem.evaluation.report import svg


def percents(markup: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf'{name}="([\d.]+)%"', markup)]


def test_a_rail_places_ridge_the_ideal_the_value_and_its_interval():
    markup = svg.rail(0.4, 0.1, 0.7, "gem")
    marks = percents(" ".join(re.findall(r'<line class="mark".*?/>', markup)), "x1")
    place = percents(markup, "cx")[0]
    low, high = (
        percents(re.search(r'<line class="span gem".*?/>', markup)[0], end)[0]
        for end in ("x1", "x2")
    )
    inside = np.array([place, low, high]) - marks[0]
    assert inside / (marks[1] - marks[0]) == pytest.approx([0.4, 0.1, 0.7], abs=1e-3)


@pytest.mark.parametrize(
    ("value", "drawn"),
    [
        (-3.0, 'd="M2 12'),
        (9.0, 'd="M-2 12'),
        (0.5, "<circle"),
        (svg.LOWEST, "<circle"),
        (svg.HIGHEST, "<circle"),
    ],
)
def test_what_lies_beyond_a_rail_is_an_arrow_at_its_end(value, drawn):
    markup = svg.rail(value, value - 0.1, value + 0.1, "floor")
    assert drawn in markup
    assert ("<circle" in markup) != ("<path" in markup)
    assert all(0 <= at <= 100 for name in ("x1", "x2", "cx") for at in percents(markup, name))


def test_a_rail_without_a_value_has_no_marker_and_one_without_an_interval_no_span():
    assert "fill" not in svg.rail(None, None, None, "gem") and "no value" in svg.rail(
        None, None, None, "gem"
    )
    assert "span" not in svg.rail(0.5, None, None, "gem")


def test_baselines_are_ticks_where_they_fit():
    assert svg.rail(0.5, None, None, "gem", [0.2, -7.0]).count('class="tick"') == 1


def dots(markup: str) -> np.ndarray:
    return np.array(
        [[float(part) for part in pair] for pair in re.findall(r"M([\d.]+) ([\d.]+)h0", markup)]
    )


def test_points_lie_on_the_diagonal_where_both_sides_are_equal(rng):
    values = rng.uniform(-2, 2, 50)
    diagonal = re.search(
        r'<line class="ideal" x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"',
        svg.square(values, values, "gem", 2.0, "x"),
    ).groups()
    x1, y1, x2, y2 = map(float, diagonal)
    places = dots(svg.square(values, values, "gem", 2.0, "x"))
    expected = y1 + (places[:, 0] - x1) * (y2 - y1) / (x2 - x1)
    assert np.abs(places[:, 1] - expected).max() < 1.0  # of 200: the grid


def test_equal_places_are_drawn_once_and_points_beyond_the_limit_at_its_edge():
    markup = svg.square(np.array([1.0, 1.0, 5.0]), np.array([1.0, 1.0, 5.0]), "gem", 2.0, "x")
    places = dots(markup)
    assert len(places) == 2
    assert places.max() <= svg.SIDE


def test_latent_points_have_the_colour_of_their_level_and_the_rest_none():
    points = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    markup = svg.latent(points, np.array([0, 1, 2, -1]), 2, "x")
    assert [len(dots(path)) for path in re.findall(r"<path.*?/>", markup)] == [2, 1, 1]
    assert re.findall(r'class="dots (\w+)"', markup) == ["other", "level0", "level1"]


def test_a_latent_space_without_any_spread_is_drawn():
    assert "NaN" not in svg.latent(np.zeros((3, 2)), np.zeros(3, dtype=int), 1, "x").replace(
        "nan", "NaN"
    )


def test_bars_of_a_histogram_are_as_high_as_their_shares_and_cut_ones_say_so():
    markup = svg.histogram([0.1] * 8 + [0.05, 0.15], "gem", "x")
    heights = [float(value) for value in re.findall(r'height="([\d.]+)"/>', markup)]
    assert np.array(heights) / heights[0] == pytest.approx([1] * 8 + [0.5, 1.5], abs=0.01)
    assert "50 %" in svg.histogram([0.5] + [0.5 / 9] * 9, "gem", "x")


def test_stacked_parts_follow_one_another_and_negative_ones_take_no_room():
    markup = svg.stacked([("a", 0.02), ("b", -0.01), ("c", 0.03)], 0.1, "x")
    bars = re.findall(r'x="([\d.]+)%" y="2" width="([\d.]+)%"', markup)
    assert bars == [("0.00", "20.00"), ("20.00", "30.00")]


def test_a_label_cannot_break_the_drawing():
    assert 'aria-label="&lt;a&gt; &quot;b&quot;"' in svg.stacked([("a", 1.0)], 1.0, '<a> "b"')
