"""The charts of the report as inline SVG. Equal numbers give equal text.

Colours and line widths are classes in page.css. Bars that fill their column use percentages,
panels a viewBox.
"""

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

SIDE, PADDING = 200, 8  # of a square panel, in units of its viewBox
LOWEST, HIGHEST = -0.5, 1.3  # of a skill bar: values beyond are an arrow at its end
_GRID = 0.8  # points are rounded to this grid, and equal ones drawn once


def skill_bar(
    value: float | None,
    low: float | None,
    high: float | None,
    colour: str,
    ticks: Iterable[float] = (),
) -> str:
    """A predictor between ridge (0) and the ceiling (1), with its interval and small `ticks`."""
    label = "no value" if value is None else f"{value:.2f}, where ridge is 0 and the ceiling 1"
    inside = [x for x in ticks if LOWEST <= x <= HIGHEST]
    return (
        '<svg class="skill-bar" height="24" width="100%" role="img" '
        f'aria-label="{label}"><line class="track" x1="0%" x2="100%" y1="12" y2="12"/>'
        + "".join(_vertical("mark", x, 2, 22) for x in (0, 1))
        + "".join(_vertical("tick", x, 8, 16) for x in inside)
        + _marker(value, low, high, colour)
        + "</svg>"
    )


def skill_bar_scale(ceiling: str) -> str:
    """The header of a column of skill bars."""
    labels = "".join(
        f'<text x="{_percent(x)}" y="12" text-anchor="middle">{escape(text)}</text>'
        for x, text in ((0, "0 ridge"), (1, f"1 {ceiling}"))
    )
    return f'<svg class="skill-bar" height="16" width="100%" aria-hidden="true">{labels}</svg>'


def _marker(value: float | None, low: float | None, high: float | None, colour: str) -> str:
    if value is None:
        return ""
    if value < LOWEST:
        return f'<path class="fill {colour}" d="M2 12L10 7V17Z"/>'
    if value > HIGHEST:
        arrow = f'<path class="fill {colour}" d="M-2 12L-10 7V17Z"/>'
        return f'<svg x="100%" y="0" overflow="visible">{arrow}</svg>'
    dot = f'<circle class="fill {colour}" cx="{_percent(value)}" cy="12" r="5"/>'
    if low is None or high is None:
        return dot
    x1, x2 = _percent(low), _percent(high)
    return f'<line class="interval {colour}" x1="{x1}" x2="{x2}" y1="12" y2="12"/>{dot}'


def _vertical(css_class: str, x: float, y1: int, y2: int) -> str:
    x = _percent(x)
    return f'<line class="{css_class}" x1="{x}" x2="{x}" y1="{y1}" y2="{y2}"/>'


def _percent(value: float) -> str:
    share = (min(max(value, LOWEST), HIGHEST) - LOWEST) / (HIGHEST - LOWEST)
    return f"{100 * share:.2f}%"


def scatter(
    x: np.ndarray, y: np.ndarray, colour: str, limit: float, label: str, low: float | None = None
) -> str:
    """Points (x, y) beside the diagonal, on equal axes from `low` (default: -limit) to limit."""
    low = -limit if low is None else low
    axes = ""
    if low < 0:
        axes = _line((low, 0), (limit, 0), low, limit) + _line((0, low), (0, limit), low, limit)
    diagonal = _line((low, low), (limit, limit), low, limit, "ideal")
    points = f'<path class="dots {colour}" d="{_dots(x, y, low, limit)}"/>'
    bottom, right = SIDE - 2, SIDE - PADDING
    ends = (
        f'<text x="{PADDING}" y="{bottom}">{low:.3g}</text>'
        f'<text x="{right}" y="{bottom}" text-anchor="end">{limit:.3g}</text>'
    )
    return _panel(label, axes + diagonal + points + ends)


def latent_map(points: np.ndarray, level: np.ndarray, levels: int, label: str) -> str:
    """Points (N, 2) coloured by level (N,); below them, muted, those outside 0 to levels - 1."""
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - (low + high) / 2) / max(float((high - low).max()) / 2, 1e-9)
    layers = {"other": (level < 0) | (level >= levels)}
    layers |= {f"level{index}": level == index for index in range(levels)}
    paths = [
        f'<path class="dots {name}" d="{_dots(*scaled[rows].T, -1.05, 1.05)}"/>'
        for name, rows in layers.items()
        if rows.any()
    ]
    return _panel(label, "".join(paths))


def slice_chart(x: np.ndarray, y: np.ndarray, ends: tuple[str, str], label: str) -> str:
    """Points (x, y), both from 0 to 1, the first one highlighted; `ends` name the ends of x."""
    known = np.isfinite(x) & np.isfinite(y)
    layers = {"baseline": known.copy(), "gem": known.copy()}
    layers["baseline"][0], layers["gem"][1:] = False, False
    paths = "".join(
        f'<path class="dots {name}" d="{_dots(x[rows], y[rows], -0.06, 1.06)}"/>'
        for name, rows in layers.items()
        if rows.any()
    )
    bottom, right = SIDE - 2, SIDE - PADDING
    texts = (
        f'<text x="{PADDING}" y="{bottom}">{escape(ends[0])}</text>'
        f'<text x="{right}" y="{bottom}" text-anchor="end">{escape(ends[1])}</text>'
    )
    return _panel(label, paths + texts)


def _panel(label: str, content: str) -> str:
    width, height = SIDE - 2 * PADDING, SIDE - 2 * PADDING - 4
    return (
        f'<svg class="panel" viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="{escape(label)}">'
        f'<rect class="frame" x="{PADDING}" y="{PADDING}" width="{width}" height="{height}"/>'
        f"{content}</svg>"
    )


def _position(x: float, y: float, low: float, high: float) -> tuple[float, float]:
    """Data coordinates as units of the viewBox."""
    width, height = SIDE - 2 * PADDING, SIDE - 2 * PADDING - 4
    right, up = (x - low) / (high - low), (y - low) / (high - low)
    return PADDING + width * right, PADDING + height * (1 - up)


def _line(
    start: tuple[float, float],
    end: tuple[float, float],
    low: float,
    high: float,
    css_class: str = "axis",
) -> str:
    (x1, y1), (x2, y2) = _position(*start, low, high), _position(*end, low, high)
    return f'<line class="{css_class}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _dots(x: np.ndarray, y: np.ndarray, low: float, high: float) -> str:
    """A path of round dots on the grid. Points beyond the limits lie at the edge."""
    positions = _position(np.clip(x, low, high), np.clip(y, low, high), low, high)
    cells = np.unique(np.round(np.stack(positions, axis=1) / _GRID).astype(int), axis=0)
    return "".join(f"M{_short(x * _GRID)} {_short(y * _GRID)}h0" for x, y in cells.tolist())


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def histogram(shares: Sequence[float], colour: str, label: str) -> str:
    """Shares of equal bins and the uniform share, dashed, at half the height. Higher bars are cut
    and labelled."""
    width, height, top = 160, 72, 68
    step, scale = width / len(shares), top * len(shares) / 2
    bars = []
    for index, share in enumerate(shares):
        x, tall = index * step, min(share * scale, top)
        bars.append(
            f'<rect class="fill {colour}" x="{x + 1:.1f}" y="{height - tall:.1f}" '
            f'width="{step - 2:.1f}" height="{tall:.1f}"/>'
        )
        if share * scale > top:
            left = index < len(shares) / 2
            beside, anchor = (x + step + 2, "start") if left else (x - 2, "end")
            text = f"{100 * share:.0f} %"
            bars.append(f'<text x="{beside:.1f}" y="13" text-anchor="{anchor}">{text}</text>')
    uniform = height - scale / len(shares)
    return (
        f'<svg class="histogram" viewBox="0 0 {width} {height + 1}" role="img" '
        f'aria-label="{escape(label)}">{"".join(bars)}'
        f'<line class="ideal" x1="0" x2="{width}" y1="{uniform:.1f}" y2="{uniform:.1f}"/>'
        f'<line class="axis" x1="0" x2="{width}" y1="{height}" y2="{height}"/></svg>'
    )


def stacked_bar(parts: Sequence[tuple[str, float]], longest: float, label: str) -> str:
    """(CSS class, value) side by side; `longest` fills the width. Omits values below zero."""
    left, bars = 0.0, []
    for css_class, value in parts:
        if value > 0:
            x, width = 100 * left / longest, 100 * value / longest
            bars.append(
                f'<rect class="{css_class}" x="{x:.2f}%" y="2" width="{width:.2f}%" height="18"/>'
            )
            left += value
    return (
        '<svg class="stacked-bar" width="100%" height="22" role="img" '
        f'aria-label="{escape(label)}">{"".join(bars)}</svg>'
    )
