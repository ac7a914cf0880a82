"""Quantities with units: one base unit per dimension, nothing guessed."""

import re

import numpy as np
import pytest

from pipeline.gem.data.units import parse_quantity

QUANTITIES = {
    "time": {
        "24 hours": 24, "24 h": 24, "24hr": 24, " 7  h ": 7, "1 day": 24, "2 days": 48, "0.5 d": 12,
        "1 week": 168, "2 weeks": 336, "90 min": 1.5, "90 minutes": 1.5, "3600 s": 1,
        "3600 seconds": 1, "2 HOURS": 2,
    },
    "molarity": {
        "1 uM": 1, "1000 nM": 1, "1e6 pM": 1, "0.001 mM": 1, "1e-6 M": 1, "1 µM": 1, "1 μM": 1,
        "10UM": 10,
    },
    "concentration": {
        "1 mg/mL": 1, "1000 ug/ml": 1, "1000 µg/mL": 1, "1e6 ng/ml": 1, "1e9 pg/ml": 1,
    },
    "age": {"30 years": 30, "1 year": 1, "30 yr": 30, "30y": 30},
    "": {"55": 55, "-3": -3, "+.5": 0.5, "1.": 1, "1e3": 1000, "  7  ": 7},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value", "dimension"),
    [(text, value, name) for name, texts in QUANTITIES.items() for text, value in texts.items()],
)
def test_a_quantity_is_a_number_in_the_base_unit_of_its_dimension(text, value, dimension):
    assert parse_quantity(text) == (pytest.approx(value, rel=1e-12), dimension)


@pytest.mark.parametrize("kind", [int, float, np.int64, np.int8, np.float32, np.float64, str])
def test_a_plain_number_of_any_type_has_no_dimension(kind):
    assert parse_quantity(kind(55)) == (55.0, "")


@pytest.mark.parametrize("kind", [float, np.float32, np.float64])
def test_a_fraction_of_any_type_is_the_decimal_that_it_prints(kind):
    assert parse_quantity(kind(0.1)) == (0.1, "")


@pytest.mark.parametrize(
    "value",
    ["", " ", "abc", "uM", "10 foo", "10 %", "1,5 h", "1 2", "10-20 h", "1e h", "--1", "1e400",
     "nan", "inf", float("nan"), float("inf"), None, True, [1], "1 h 30 min", "0x10", "1_000",
     "10 / h"],
)  # fmt: skip
def test_other_values_are_errors_with_their_text(value):
    with pytest.raises(ValueError, match=re.escape(repr(value))):
        parse_quantity(value)


def test_an_unknown_unit_is_named():
    with pytest.raises(ValueError, match="unknown unit 'parsec'"):
        parse_quantity("3 parsec")
