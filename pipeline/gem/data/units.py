"""Quantities with units as experiments write them: "10 uM", "24 hours", "1 day", "55"."""

import math
import re

# One base unit per dimension: hours, uM, mg/mL, years, plain numbers. The micro sign and the Greek mu read as u.
_UNITS = {
    "time": {
        "second": 1 / 3600,
        "minute": 1 / 60,
        "hour": 1.0,
        "day": 24.0,
        "week": 168.0,
        "s": 1 / 3600,
        "min": 1 / 60,
        "hr": 1.0,
        "h": 1.0,
        "d": 24.0,
    },
    "molarity": {"pm": 1e-6, "nm": 1e-3, "um": 1.0, "mm": 1e3, "m": 1e6},
    "concentration": {"pg/ml": 1e-9, "ng/ml": 1e-6, "ug/ml": 1e-3, "mg/ml": 1.0},
    "age": {"year": 1.0, "yr": 1.0, "y": 1.0},
}
_BY_UNIT = {
    unit: (dimension, factor)
    for dimension, units in _UNITS.items()
    for unit, factor in units.items()
}
_PATTERN = re.compile(r"^\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([^\d\s].*?)?\s*$")

_MICRO = str.maketrans("µμ", "uu")

KNOWN_UNITS = sorted(_BY_UNIT)
DIMENSIONLESS = ""


def parse_quantity(value: object) -> tuple[float, str]:
    """Value in the base unit of its dimension, and the dimension ("" for a plain number).

    "1 day" gives (24.0, "time"); "100 nM" gives (0.1, "molarity"); 55 gives (55.0, "").
    ValueError where it is not a finite number with a known unit.
    """
    if type(value) in (int, float) and math.isfinite(value):
        return float(value), DIMENSIONLESS
    match = _PATTERN.match(str(value))
    if not match:
        raise ValueError(f"{shown(value)} is not a number, or a number and a unit")
    number, unit = float(match[1]), (match[2] or "").strip().lower().translate(_MICRO)
    if not math.isfinite(number):
        raise ValueError(f"{shown(value)} is not finite")
    if not unit:
        return number, DIMENSIONLESS
    found = _BY_UNIT.get(unit) or (_BY_UNIT.get(unit[:-1]) if unit.endswith("s") else None)
    if found is None:
        raise ValueError(f"{shown(value)} has the unknown unit {match[2]!r}")
    dimension, factor = found
    return number * factor, dimension


def shown(value: object) -> str:
    """A cell of a table as a message shows it: text in quotes, everything else plainly."""
    return repr(value) if isinstance(value, str) else str(value)
