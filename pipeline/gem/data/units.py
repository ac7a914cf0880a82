"""Quantities with units as tables hold them: "10 uM", "24 hours", "1 day", "55".

A table of our own: a library of units reads "m" as metres and "UM" not at all, and evaluates
expressions.
"""

import re
import unicodedata
from collections.abc import Iterable

# Factors to one base unit per dimension (h, uM, mg/ml, mg/kg, Gy), by the names that params.yaml
# and messages use (`config.Unit`).
UNITS = {
    "time": {
        "s": 1 / 3600,
        "min": 1 / 60,
        "h": 1.0,
        "d": 24.0,
        "week": 168.0,
        "month": 730.5,  # a twelfth of a year
        "year": 8766.0,  # 365.25 days
    },
    "molarity": {"fM": 1e-9, "pM": 1e-6, "nM": 1e-3, "uM": 1.0, "mM": 1e3, "M": 1e6},
    "concentration": {"pg/ml": 1e-9, "ng/ml": 1e-6, "ug/ml": 1e-3, "mg/ml": 1.0},
    "dose by weight": {"ug/kg": 1e-3, "mg/kg": 1.0, "g/kg": 1e3},
    "radiation": {"mGy": 1e-3, "cGy": 1e-2, "Gy": 1.0},
}
# Other spellings. Capitals do not matter: "10UM", "24 H".
_SPELLINGS = {
    "s": "sec secs second seconds",
    "min": "mins minute minutes",
    "h": "hr hrs hour hours",
    "d": "day days",
    "week": "w wk wks weeks",
    "month": "mo mos months",
    "year": "y yr yrs years",
    "fM": "fmol/l",
    "pM": "pmol/l",
    "nM": "nmol/l",
    "uM": "umol/l",
    "mM": "mmol/l",
    "M": "mol/l",
    "pg/ml": "ng/l",
    "ng/ml": "ug/l pg/ul",
    "ug/ml": "mg/l ng/ul",
    "mg/ml": "g/l ug/ul",
}
_WORDS = {"s": "second", "min": "minute", "h": "hour", "d": "day"}
_WORDS |= {word: word for word in ("week", "month", "year")}
_BY_UNIT = {
    spelling.lower(): (dimension, factor)
    for dimension, units in UNITS.items()
    for unit, factor in units.items()
    for spelling in (unit, *_SPELLINGS.get(unit, "").split())
}
_PATTERN = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([^\d\s].*)?")
_LARGEST = 1e100  # squares of larger numbers overflow

DIMENSIONLESS = ""


def parse_quantity(value: object, unit: str | None = None) -> tuple[float, str]:
    """(value in the base unit of its dimension, the dimension; "" for a plain number).

    "1 day" gives (24.0, "time"); "100 nM" gives (0.1, "molarity"); 55 gives (55.0, ""), or
    (55.0, "time") if the `unit` of plain numbers is "h". ValueError if the value is not a finite
    number with a known unit.
    """
    # A float is exact in its shortest text.
    match = _PATTERN.fullmatch(str(value).strip())
    shown = cell_repr(value)
    if not match:
        raise ValueError(f"{shown} is not a number; write a number, or a number and a unit")
    number = float(match[1])
    # NFKC: one spelling of the micro sign.
    written = unicodedata.normalize("NFKC", match[2] or "").replace("μ", "u")
    dimension, factor = _dimension(shown, written, unit)
    if not abs(number * factor) < _LARGEST:
        raise ValueError(f"{shown} is too large; expected less than {_LARGEST:g}")
    return number * factor, dimension


def _dimension(shown: str, written: str, unit: str | None) -> tuple[str, float]:
    """(dimension, factor to its base unit) of a unit as it is written."""
    if not written:
        return _BY_UNIT.get((unit or "").lower(), (DIMENSIONLESS, 1.0))
    if written == "m":
        raise ValueError(f"{shown}: m is ambiguous; write min, month, mM or M (mol/l)")
    if written.startswith(","):
        raise ValueError(f"{shown} has a comma; write 2.5 for a fraction and 1000 for a thousand")
    if written.lower() not in _BY_UNIT:
        known = ", ".join(" ".join(units) for units in UNITS.values())
        raise ValueError(f"{shown} has an unknown unit; write one of {known}")
    return _BY_UNIT[written.lower()]


def plain_quantity(value: object, unit: str | None) -> float | str:
    """The one form of equal quantities: a number if plain or if a `unit` is declared, in that unit;
    else text, "24 hours" for "1 day" and "24h".

    The unit of the text is the one with the fewest digits, of which there are at least one, of a
    day or more at least two.
    """
    number, dimension = parse_quantity(value, unit)
    if dimension == DIMENSIONLESS:
        return number
    # Products with factors differ in their last digits.
    numbers = {u: float(f"{number / factor:.12g}") for u, factor in UNITS[dimension].items()}
    if unit in numbers:
        return numbers[unit]
    long = {u for u, factor in UNITS["time"].items() if factor > 1}
    texts = {u: f"{number:.12g}" for u, number in numbers.items()}
    enough = [u for u in reversed(texts) if abs(numbers[u]) >= (2 if u in long else 1)]
    base = [u for u, factor in UNITS[dimension].items() if factor == 1]  # of zero
    chosen = min(enough or base, key=lambda u: len(texts[u]))  # the largest of equal ones
    plural = "s" if chosen in _WORDS and texts[chosen] != "1" else ""
    return f"{texts[chosen]} {_WORDS.get(chosen, chosen)}{plural}"


def is_ambiguous(value: object, dimensions: Iterable[str]) -> bool:
    """Whether a quantity is in "M" in a column of these dimensions, where it may be meant as
    minutes or months."""
    return "time" in dimensions and re.search(r"[\d.\s]M\s*$", str(value)) is not None


def dimension_name(dimension: str, with_units: bool = False) -> str:
    """For a message: "plain numbers", "time" or, with its units, "time (s min h ...)"."""
    units = f" ({' '.join(UNITS[dimension])})" if with_units and dimension else ""
    return (dimension or "plain numbers") + units


def cell_repr(value: object) -> str:
    """A cell of a table in a message: text in quotes, other values as they print."""
    return repr(value) if isinstance(value, str) else str(value)
