"""The report's charts as inline SVG: sharp at every size, coloured by the page's own light or dark, the same numbers the same text.

Colours and line widths are classes of the page (page.html.jinja). Charts that stretch use percentages, the others a viewBox.
"""

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

SIDE, PAD = 200, 8  # of a square panel, in its own units
LOWEST, HIGHEST = -0.5, 1.3  # of a rail: what lies beyond is an arrow at its end
_STEP = 0.8  # grid on which points are placed: equal places are drawn once


def rail(
    value: float | None,
    low: float | None,
    high: float | None,
    kind: str,
    others: Iterable[float] = (),
) -> str:
    """A predictor between ridge (0) and the ideal (1), with its interval; `others` are small ticks."""
    lines = "".join(
        f'<line class="mark" x1="{_place(at)}" x2="{_place(at)}" y1="2" y2="22"/>' for at in (0, 1)
    )
    ticks = "".join(
        f'<line class="tick" x1="{_place(at)}" x2="{_place(at)}" y1="8" y2="16"/>'
        for at in others
        if LOWEST <= at <= HIGHEST
    )
    said = "no value" if value is None else f"{value:.2f}, where ridge is 0 and the ceiling 1"
    start = f'<svg class="rail" height="24" width="100%" role="img" aria-label="{said}"><line class="track" x1="0%" x2="100%" y1="12" y2="12"/>'
    return f"{start}{lines}{ticks}{_marker(value, low, high, kind)}</svg>"


def _marker(value: float | None, low: float | None, high: float | None, kind: str) -> str:
    if value is None:
        return ""
    if value < LOWEST:
        return f'<path class="fill {kind}" d="M2 12L10 7V17Z"/>'
    if value > HIGHEST:
        return f'<svg x="100%" y="0" overflow="visible"><path class="fill {kind}" d="M-2 12L-10 7V17Z"/></svg>'
    span = (
        ""
        if low is None or high is None
        else f'<line class="span {kind}" x1="{_place(low)}" x2="{_place(high)}" y1="12" y2="12"/>'
    )
    return f'{span}<circle class="fill {kind}" cx="{_place(value)}" cy="12" r="5"/>'


def _place(value: float) -> str:
    return f"{100 * (min(max(value, LOWEST), HIGHEST) - LOWEST) / (HIGHEST - LOWEST):.2f}%"


def rail_scale(ceiling: str) -> str:
    """The header of a column of rails."""
    texts = "".join(
        f'<text x="{_place(at)}" y="12" text-anchor="middle">{escape(text)}</text>'
        for at, text in ((0, "0 ridge"), (1, f"1 {ceiling}"))
    )
    return f'<svg class="rail" height="16" width="100%" aria-hidden="true">{texts}</svg>'


def square(
    x: np.ndarray, y: np.ndarray, kind: str, limit: float, label: str, origin: bool = True
) -> str:
    """Points (x, y) between -limit (0 without `origin`) and limit on both axes, beside the diagonal."""
    low = -limit if origin else 0.0
    zero = (
        _line((low, 0), (limit, 0), low, limit) + _line((0, low), (0, limit), low, limit)
        if origin
        else ""
    )
    diagonal = _line((low, low), (limit, limit), low, limit, "ideal")
    points = f'<path class="dots {kind}" d="{_dots(x, y, low, limit)}"/>'
    ends = f'<text x="{PAD}" y="{SIDE - 2}">{low:.3g}</text><text x="{SIDE - PAD}" y="{SIDE - 2}" text-anchor="end">{limit:.3g}</text>'
    return _panel(label, zero + diagonal + points + ends)


def latent(points: np.ndarray, level: np.ndarray, levels: int, label: str) -> str:
    """Points (N, 2) in the colours of their levels; the others and the missing are muted, and below."""
    low, high = points.min(axis=0), points.max(axis=0)
    middle, half = (low + high) / 2, max(float((high - low).max()) / 2, 1e-9)
    place = (points - middle) / half
    layers = [
        ("other", (level < 0) | (level >= levels)),
        *((f"level{index}", level == index) for index in range(levels)),
    ]
    return _panel(
        label,
        "".join(
            f'<path class="dots {name}" d="{_dots(*place[rows].T, -1, 1)}"/>'
            for name, rows in layers
            if rows.any()
        ),
    )


def _panel(label: str, content: str) -> str:
    frame = f'<rect class="frame" x="{PAD}" y="{PAD}" width="{SIDE - 2 * PAD}" height="{SIDE - 2 * PAD - 4}"/>'
    return f'<svg class="panel" viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="{escape(label)}">{frame}{content}</svg>'


def _at(x: float, y: float, low: float, high: float) -> tuple[float, float]:
    inner = SIDE - 2 * PAD
    return PAD + inner * (x - low) / (high - low), PAD + (inner - 4) * (
        1 - (y - low) / (high - low)
    )


def _line(
    start: tuple[float, float],
    end: tuple[float, float],
    low: float,
    high: float,
    kind: str = "axis",
) -> str:
    (x1, y1), (x2, y2) = _at(*start, low, high), _at(*end, low, high)
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _dots(x: np.ndarray, y: np.ndarray, low: float, high: float) -> str:
    """A path of round dots, each place once."""
    horizontal, vertical = _at(np.clip(x, low, high), np.clip(y, low, high), low, high)
    places = np.unique(
        np.round(np.stack([horizontal, vertical], axis=1) / _STEP).astype(int), axis=0
    )
    return "".join(
        f"M{_short(column * _STEP)} {_short(row * _STEP)}h0" for column, row in places.tolist()
    )


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def histogram(shares: Sequence[float], kind: str, label: str) -> str:
    """Shares of equal bins beside the uniform one; the axis ends at twice that, and higher bars are cut and marked."""
    width, height = 160, 72
    uniform, step = 1 / len(shares), width / len(shares)
    scale = (height - 4) / (2 * uniform)
    bars = []
    for index, share in enumerate(shares):
        tall = min(share * scale, height - 4)
        bars.append(
            f'<rect class="fill {kind}" x="{index * step + 1:.1f}" y="{height - tall:.1f}" width="{step - 2:.1f}" height="{tall:.1f}"/>'
        )
        if share * scale > height - 4:
            beside, anchor = (
                (index * step + step + 2, "start")
                if index < len(shares) / 2
                else (index * step - 2, "end")
            )
            bars.append(
                f'<text x="{beside:.1f}" y="13" text-anchor="{anchor}">{100 * share:.0f} %</text>'
            )
    level = height - uniform * scale
    line = f'<line class="ideal" x1="0" x2="{width}" y1="{level:.1f}" y2="{level:.1f}"/><line class="axis" x1="0" x2="{width}" y1="{height}" y2="{height}"/>'
    return f'<svg class="histogram" viewBox="0 0 {width} {height + 1}" role="img" aria-label="{escape(label)}">{"".join(bars)}{line}</svg>'


def stacked(parts: Sequence[tuple[str, float]], longest: float, label: str) -> str:
    """(class, value) one after another; `longest` fills the width. What is below zero is left out: it is in the table."""
    place, bars = 0.0, []
    for kind, value in parts:
        if value > 0:
            bars.append(
                f'<rect class="{kind}" x="{100 * place / longest:.2f}%" y="2" width="{100 * value / longest:.2f}%" height="18"/>'
            )
            place += value
    return f'<svg class="stack" width="100%" height="22" role="img" aria-label="{escape(label)}">{"".join(bars)}</svg>'
