"""SVG charts: coordinates follow from the numbers, and values beyond the axis are marked."""

import re

import numpy as np
import pytest

from pipeline.gem.evaluation.report import svg


def percentages(markup: str, attribute: str) -> list[float]:
    return [float(value) for value in re.findall(rf'{attribute}="([\d.]+)%"', markup)]


def points(markup: str) -> np.ndarray:
    """(N, 2) of a path of dots."""
    return np.array(re.findall(r"M([\d.]+) ([\d.]+)h0", markup), dtype=float)


def test_a_skill_bar_shows_the_value_and_its_interval_between_0_and_1():
    markup = svg.skill_bar(0.4, 0.1, 0.7, "gem")
    marks = re.findall(r'class="mark" x1="([\d.]+)%"', markup)
    interval = re.search(r'class="interval gem" x1="([\d.]+)%" x2="([\d.]+)%"', markup).groups()
    left, right, low, high = map(float, (*marks, *interval))
    positions = np.array([low, *percentages(markup, "cx"), high])
    assert (positions - left) / (right - left) == pytest.approx([0.1, 0.4, 0.7], abs=1e-3)


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (-3.0, 'd="M2 12'),
        (9.0, 'd="M-2 12'),
        (0.5, "<circle"),
        (svg.LOWEST, "<circle"),
        (svg.HIGHEST, "<circle"),
    ],
)
def test_a_value_beyond_a_skill_bar_is_an_arrow_at_its_end(value, shape):
    markup = svg.skill_bar(value, value - 0.1, value + 0.1, "baseline")
    assert shape in markup and ("<circle" in markup) != ("<path" in markup)
    for attribute in ("x1", "x2", "cx"):
        assert all(0 <= x <= 100 for x in percentages(markup, attribute))


def test_a_skill_bar_omits_missing_values_and_ticks_beyond_its_ends():
    empty = svg.skill_bar(None, None, None, "gem")
    assert "fill" not in empty and "no value" in empty
    assert "interval" not in svg.skill_bar(0.5, None, None, "gem")
    assert svg.skill_bar(0.5, None, None, "gem", [0.2, -7.0]).count('class="tick"') == 1


@pytest.mark.parametrize("low", [None, 0.0])
def test_equal_values_lie_on_the_diagonal_of_a_scatter(rng, low):
    values = rng.uniform(-2 if low is None else low, 2, 50)
    markup = svg.scatter(values, values, "gem", 2.0, "x", low)
    ideal = re.search(r'class="ideal" x1="(.+?)" y1="(.+?)" x2="(.+?)" y2="(.+?)"', markup)
    x1, y1, x2, y2 = map(float, ideal.groups())
    x, y = points(markup).T
    assert np.abs(y - (y1 + (x - x1) * (y2 - y1) / (x2 - x1))).max() < 1.0  # the grid


def test_a_scatter_draws_equal_points_once_and_distant_ones_at_the_edge():
    values = np.array([1.0, 1.0, 5.0])
    drawn = points(svg.scatter(values, values, "gem", 2.0, "x"))
    assert len(drawn) == 2 and drawn.max() <= svg.SIDE


def test_a_latent_map_colours_levels_and_mutes_the_rest():
    diagonal = np.arange(4.0)[:, None].repeat(2, axis=1)
    markup = svg.latent_map(diagonal, np.array([0, 1, 2, -1]), 2, "x")
    paths = re.findall(r'class="dots (\w+)" d="(.*?)"', markup)
    assert [(name, len(points(path))) for name, path in paths] == [
        ("other", 2),
        ("level0", 1),
        ("level1", 1),
    ]
    constant = svg.latent_map(np.zeros((3, 2)), np.zeros(3, dtype=int), 1, "x")
    assert "nan" not in constant.lower()


def test_histogram_bars_are_proportional_and_cut_bars_labelled():
    markup = svg.histogram([0.1] * 8 + [0.05, 0.15], "gem", "x")
    heights = np.array(re.findall(r'height="([\d.]+)"/>', markup), dtype=float)
    assert heights / heights[0] == pytest.approx([1] * 8 + [0.5, 1.5], abs=0.01)
    assert "%" not in markup and "50 %" in svg.histogram([0.5] + [0.5 / 9] * 9, "gem", "x")


def test_a_stacked_bar_joins_its_parts_and_omits_negative_ones():
    markup = svg.stacked_bar([("a", 0.02), ("b", -0.01), ("c", 0.03)], 0.1, "x")
    bars = re.findall(r'class="(\w)" x="([\d.]+)%" y="2" width="([\d.]+)%"', markup)
    assert bars == [("a", "0.00", "20.00"), ("c", "20.00", "30.00")]


def test_labels_are_escaped():
    escaped = 'aria-label="&lt;a&gt; &quot;b&quot;"'
    assert escaped in svg.stacked_bar([("a", 1.0)], 1.0, '<a> "b"')
    assert escaped in svg.histogram([0.1] * 10, "gem", '<a> "b"')
    assert escaped in svg.scatter(np.ones(1), np.ones(1), "gem", 1.0, '<a> "b"')
