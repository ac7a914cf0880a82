"""Quantities with units: one base unit per dimension, nothing guessed."""

import re

import numpy as np
import pytest

from pipeline.gem.data.units import KNOWN_UNITS, parse_quantity


@pytest.mark.parametrize(
    ("text", "value", "dimension"),
    [
        ("24 hours", 24, "time"), ("24 h", 24, "time"), ("24hr", 24, "time"), ("1 day", 24, "time"), ("0.5 d", 12, "time"), ("1 week", 168, "time"),
        ("90 min", 1.5, "time"), ("90 minutes", 1.5, "time"), ("3600 s", 1, "time"), ("3600 seconds", 1, "time"), ("2 days", 48, "time"),
        ("1 uM", 1, "molarity"), ("1000 nM", 1, "molarity"), ("1e6 pM", 1, "molarity"), ("0.001 mM", 1, "molarity"), ("1e-6 M", 1, "molarity"),
        ("1 µM", 1, "molarity"), ("1 μM", 1, "molarity"), ("10UM", 10, "molarity"),
        ("1 mg/mL", 1, "concentration"), ("1000 ug/ml", 1, "concentration"),
        ("1000 µg/mL", 1, "concentration"), ("1e6 ng/ml", 1, "concentration"), ("1e9 pg/ml", 1, "concentration"),
        ("30 years", 30, "age"), ("30 yr", 30, "age"), ("30y", 30, "age"),
        ("55", 55, ""), ("-3", -3, ""), ("+.5", 0.5, ""), ("1.", 1, ""), ("1e3", 1000, ""), ("  7  ", 7, ""), (" 7  h ", 7, "time"),
    ],
)  # fmt: skip
def test_a_quantity_is_a_number_in_the_base_unit_of_its_dimension(text, value, dimension):
    assert parse_quantity(text) == (pytest.approx(value, rel=1e-12), dimension)


@pytest.mark.parametrize(
    "value", [55, 55.0, np.int64(55), np.int8(55), np.float32(55), np.float64(55), "55"]
)
def test_a_plain_number_of_any_type_has_no_dimension(value):
    assert parse_quantity(value) == (55.0, "")


@pytest.mark.parametrize("value", [np.float32(0.1), 0.1, np.float64(0.1)])
def test_a_fraction_of_any_type_is_the_number_that_is_written(value):
    assert parse_quantity(value) == (0.1, "")


@pytest.mark.parametrize(
    "value",
    ["", " ", "abc", "uM", "10 foo", "10 %", "1,5 h", "1 2", "10-20 h", "1e h", "--1", "1e400",
     "nan", "inf", "-inf", float("nan"), float("inf"), None, True, False, [1], "1 h 30 min", "0x10", "1_000", "10 / h"],
)  # fmt: skip
def test_what_is_no_number_with_a_known_unit_is_refused_with_its_text(value):
    with pytest.raises(ValueError, match=re.escape(repr(value))):
        parse_quantity(value)


def test_an_unknown_unit_is_named():
    with pytest.raises(ValueError, match="unknown unit 'parsec'"):
        parse_quantity("3 parsec")


@pytest.mark.parametrize("unit", KNOWN_UNITS)
def test_every_known_unit_is_linear_and_known_in_capitals(unit):
    one, dimension = parse_quantity(f"1 {unit}")
    assert one > 0
    assert parse_quantity(f"2.5 {unit.upper()}") == (pytest.approx(2.5 * one), dimension)
