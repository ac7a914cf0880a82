"""Quantities with units: one base unit per dimension, nothing guessed."""

import re
from typing import get_args

import numpy as np
import pytest

from pipeline.gem.common.config import Unit
from pipeline.gem.data.units import UNITS, parse_quantity, plain_quantity

QUANTITIES = {
    "time": {
        "24 hours": 24, "24 h": 24, "24hr": 24, " 7  h ": 7, "1 day": 24, "2 days": 48, "0.5 d": 12,
        "1 week": 168, "2 weeks": 336, "90 min": 1.5, "90 minutes": 1.5, "3600 s": 1,
        "3600 seconds": 1, "2 HOURS": 2, "8 wk": 1344, "3w": 504, "1 mo": 730.5, "12 months": 8766,
        "1 year": 8766, "30 yr": 262980, "2y": 17532, "1 sec": 1 / 3600, "5 mins": 5 / 60,
    },
    "molarity": {
        "1 uM": 1, "1000 nM": 1, "1e6 pM": 1, "0.001 mM": 1, "1e-6 M": 1, "1 µM": 1, "1 μM": 1,
        "10UM": 10, "10 µmol/L": 10, "1 nmol/l": 1e-3, "1 fM": 1e-9, "1\xa0mM": 1e3,
    },
    "concentration": {
        "1 mg/mL": 1, "1000 ug/ml": 1, "1000 µg/mL": 1, "1e6 ng/ml": 1, "1e9 pg/ml": 1,
        "5 ng/µl": 5e-3, "1 ㎍/㎖": 1e-3, "1 g/l": 1, "3 mg/L": 3e-3,
    },
    "dose by weight": {"10 mg/kg": 10, "5 ug/kg": 5e-3, "1 g/kg": 1e3},
    "radiation": {"2 Gy": 2, "200 cGy": 2, "2000 mGy": 2},
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
    ["30m", "5 m", "5 ｍ", "30 ms", "10 us", "10²", "10² h", "1e100", "1,000 nM", "2,5 uM",
     "24 hpf", "1e99 M", "12.5 dpc", "5-10 uM", "~5 h", "10⁻⁹ M", 10**400,
     "", " ", "abc", "uM", "10 foo", "10 %", "1,5 h", "1 2", "10-20 h", "1e h", "--1", "1e400",
     "nan", "inf", float("nan"), float("inf"), None, True, [1], "1 h 30 min", "0x10", "1_000",
     "10 / h"],
)  # fmt: skip
def test_other_values_are_errors_with_their_text(value):
    with pytest.raises(ValueError, match=re.escape(repr(value))):
        parse_quantity(value)


MESSAGES = {
    "3 parsec": "'3 parsec' has an unknown unit; write one of s min h d week month year, fM pM "
    "nM uM mM M, pg/ml ng/ml ug/ml mg/ml, ug/kg mg/kg g/kg, mGy cGy Gy",
    "30m": "'30m': m is ambiguous; write min, month, mM or M (mol/l)",
    "1,000 nM": "'1,000 nM' has a comma; write 2.5 for a fraction and 1000 for a thousand",
}


@pytest.mark.parametrize("text", MESSAGES)
def test_a_message_says_what_to_write(text):
    with pytest.raises(ValueError, match=re.escape(MESSAGES[text])):
        parse_quantity(text)


def test_params_declare_the_units_of_the_table():
    assert set(get_args(Unit)) == {"any"} | {unit for units in UNITS.values() for unit in units}


@pytest.mark.parametrize("unit", [name for name in get_args(Unit) if name != "any"])
def test_a_plain_number_has_the_declared_unit(unit):
    assert parse_quantity(3, unit) == parse_quantity(f"3 {unit}")
    assert parse_quantity("2 Gy", unit) == (2.0, "radiation")


@pytest.mark.parametrize(
    ("texts", "unit", "cell"),
    [
        (["24 hours", "24h", "1 day", "1440 min", "86400 s", "24\u00a0hrs"], None, "24 hours"),
        (["72 h", "3 days", "3 d"], None, "3 days"),
        (["30 min", "0.5 h", "1800 s"], None, "30 minutes"),
        (["50 h"], None, "50 hours"),
        (["1.5 uM"], None, "1.5 uM"),
        (["-36 h"], None, "-36 hours"),
        (["12.3 years"], None, "12.3 years"),
        (["0.1 uM", "100 nM", "1e5 pM", "100 nmol/l"], None, "100 nM"),
        (["1 µM", "1 μM", "1000 nM", "0.001 mM"], None, "1 uM"),
        (["0 nM", "0 uM"], None, "0 uM"),
        (["24", "24 h", "1 day"], "h", 24.0),
        (["10 uM", "1e4 nM"], "h", "10 uM"),  # another dimension: refused where it is checked
        (["55", 55, "55.0"], None, 55.0),
    ],
)
def test_equal_quantities_have_one_form(texts, unit, cell):
    assert {plain_quantity(text, unit) for text in texts} == {cell}
    assert parse_quantity(cell, unit) == (
        pytest.approx(parse_quantity(texts[0], unit)[0], rel=1e-11),
        parse_quantity(texts[0], unit)[1],
    )


@pytest.mark.parametrize("text", ["6 hours", "24 hours", "3 days", "100 nM", "1 uM", "10 uM"])
def test_the_usual_forms_stay_as_they_are(text):
    assert plain_quantity(text, None) == text
