"""Quantities with units as tables hold them: "10 uM", "24 hours", "1 day", "55"."""

import math
import re

# Factors to one base unit per dimension: hours, uM, mg/mL, years.
_UNITS = {
    "time": {
        **dict.fromkeys(("second", "s"), 1 / 3600),
        **dict.fromkeys(("minute", "min"), 1 / 60),
        **dict.fromkeys(("hour", "hr", "h"), 1.0),
        **dict.fromkeys(("day", "d"), 24.0),
        "week": 168.0,
    },
    "molarity": {"pm": 1e-6, "nm": 1e-3, "um": 1.0, "mm": 1e3, "m": 1e6},
    "concentration": {"pg/ml": 1e-9, "ng/ml": 1e-6, "ug/ml": 1e-3, "mg/ml": 1.0},
    "age": dict.fromkeys(("year", "yr", "y"), 1.0),
}
_BY_UNIT = {
    unit: (dimension, factor)
    for dimension, units in _UNITS.items()
    for unit, factor in units.items()
}
_PATTERN = re.compile(r"^\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([^\d\s].*?)?\s*$")
_MICRO = str.maketrans("µμ", "uu")  # the micro sign and the Greek letter

DIMENSIONLESS = ""


def parse_quantity(value: object) -> tuple[float, str]:
    """(value in the base unit of its dimension, the dimension; "" for a plain number).

    "1 day" gives (24.0, "time"); "100 nM" gives (0.1, "molarity"); 55 gives (55.0, "").
    ValueError if it is not a finite number with a known unit.
    """
    if type(value) in (int, float) and math.isfinite(value):
        return float(value), DIMENSIONLESS
    match = _PATTERN.match(str(value))
    if not match:
        raise ValueError(f"{cell_repr(value)} is not a number, or a number and a unit")
    number, unit = float(match[1]), (match[2] or "").strip().lower().translate(_MICRO)
    if not math.isfinite(number):
        raise ValueError(f"{cell_repr(value)} is not finite")
    if not unit:
        return number, DIMENSIONLESS
    entry = _BY_UNIT.get(unit) or (_BY_UNIT.get(unit[:-1]) if unit.endswith("s") else None)
    if entry is None:
        raise ValueError(f"{cell_repr(value)} has the unknown unit {match[2]!r}")
    dimension, factor = entry
    return number * factor, dimension


def cell_repr(value: object) -> str:
    """A cell of a table in a message: text in quotes, other values as they print."""
    return repr(value) if isinstance(value, str) else str(value)
