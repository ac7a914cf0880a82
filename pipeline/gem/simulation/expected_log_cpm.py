"""E[log-CPM] of a negative-binomial count, exact and tabulated.

With Frullani's log(1 + y) = int_0^inf (1 - exp(-y t)) exp(-t) / t dt and the Laplace transform of the negative binomial,
E[exp(-c t)] = (1 + phi m (1 - exp(-t)))^(-1 / phi),

    E[log1p(s c)] = int_0^inf (1 - (1 + phi m (1 - exp(-s t)))^(-1 / phi)) exp(-t) / t dt.

Tables hold it as a function of log fraction (linear on a fine grid) and log library size (Chebyshev polynomials); they
agree with the integral to 1e-4 log-CPM.

N samples, G genes, K polynomials; otherwise the legend of simulator.py.
"""

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline

from pipeline.gem.simulation.generator import Truth

_STEP = 0.3  # of the integral over log t: the trapezoid rule converges as exp(-pi^2 / step)
_COARSE, _FINE = (
    0.25,
    0.02,
)  # of the grids over log fraction: exact integrals, then a cubic spline of them
_WIDEST = 0.3  # the exact integrals reach far enough for Normal noise of this standard deviation
_REACH = 6  # standard deviations of it that quadrature looks at
_DEPTH_MARGIN = 1.1  # tables are built for library sizes a little beyond those asked for
_DEPTHS = 8  # Chebyshev nodes over log library size
_NEGLIGIBLE = 2e-6  # log-CPM: polynomials of library size that add less are left out


def expected_log_cpm(mean: np.ndarray, dispersion: np.ndarray, total: np.ndarray) -> np.ndarray:
    """E[log1p(1e6 c / total)] for c ~ NegativeBinomial(mean, dispersion); arguments broadcast. Exact to 1e-9."""
    scale = 1e6 / np.asarray(total, dtype=float)
    mean, dispersion = np.asarray(mean, dtype=float), np.asarray(dispersion, dtype=float)
    first = -21.0 - max(np.log(np.max(scale * mean) + 1e-300), 0.0)
    result = np.zeros(np.broadcast_shapes(mean.shape, dispersion.shape, scale.shape))
    for log_t in np.arange(first, 3.7, _STEP):
        t = np.exp(log_t)
        result += np.exp(-t) * -np.expm1(
            -np.log1p(-dispersion * mean * np.expm1(-scale * t)) / dispersion
        )
    return _STEP * result


@dataclass(frozen=True)
class ExpectationGrid:
    """Exact integrals on a coarse grid of log fraction, as polynomials of log library size: all tables come from these."""

    lowest: float  # the range of log fractions that tables are for
    highest: float
    low: float  # the range of library sizes
    high: float
    grid: np.ndarray  # (points,) beyond the range by what noise may add
    coefficients: np.ndarray  # (K, points, G) of Chebyshev polynomials

    @classmethod
    def build(
        cls, dispersion: np.ndarray, lowest: float, highest: float, low: float, high: float
    ) -> "ExpectationGrid":
        """For log fractions in [lowest, highest] and library sizes in [low, high]."""
        margin = _REACH * _WIDEST + 3 * _COARSE
        grid = np.arange(lowest - margin, highest + margin + _COARSE, _COARSE)
        angles = (np.arange(_DEPTHS) + 0.5) * np.pi / _DEPTHS if high > low else np.zeros(1)
        depths = np.exp(
            (np.log(low) + np.log(high)) / 2 + (np.log(high) - np.log(low)) / 2 * np.cos(angles)
        )
        exact = np.stack(
            [expected_log_cpm(np.exp(grid)[:, None] * depth, dispersion, depth) for depth in depths]
        )
        transform = 2 / len(angles) * np.cos(np.outer(np.arange(len(angles)), angles))
        transform[0] /= 2
        coefficients = np.tensordot(transform, exact, axes=1)
        needed = np.flatnonzero(np.abs(coefficients).max(axis=(1, 2)) > _NEGLIGIBLE)[-1] + 1
        return cls(lowest, highest, low, high, grid, coefficients[:needed])

    def table(self, blur: float = 0.0) -> "ExpectationTable":
        """`blur` is the standard deviation of Normal noise on the log fraction, integrated over. ValueError beyond 0.3."""
        if blur > _WIDEST:
            raise ValueError(
                f"noise of {blur:.3g} on the log fraction: tables are built for at most {_WIDEST}"
            )
        fine = np.arange(self.lowest, self.highest + _FINE, _FINE)
        nodes, weights = (
            np.polynomial.hermite_e.hermegauss(9) if blur else (np.zeros(1), np.ones(1))
        )
        # A spline is linear in its values, so that one matrix interpolates, and blurs, all genes and polynomials.
        spline = CubicSpline(self.grid, np.eye(len(self.grid)))
        onto_fine = sum(
            weight * spline(fine + blur * node)
            for node, weight in zip(nodes, weights / weights.sum(), strict=True)
        )
        polynomials, _, genes = self.coefficients.shape
        values = np.empty((genes, len(fine), polynomials), dtype=np.float32)
        for index, coefficient in enumerate(self.coefficients):
            values[:, :, index] = (onto_fine @ coefficient).T
        return ExpectationTable(float(fine[0]), (np.log(self.low), np.log(self.high)), values)


@dataclass(frozen=True)
class ExpectationTable:
    """E[log-CPM] per gene as a function of log fraction and library size, optionally blurred by Normal noise."""

    lowest: float
    log_depths: tuple[float, float]  # range of log library size
    values: np.ndarray  # (G, grid, K) float32 coefficients of Chebyshev polynomials

    def __call__(self, log_fraction: np.ndarray, totals: np.ndarray) -> np.ndarray:
        """(N, G) float32 expectations for log fractions (N, G) and library sizes (N,)."""
        genes, grid, polynomials = self.values.shape
        position = np.clip((log_fraction - self.lowest) / _FINE, 0, grid - 1.001)
        index = position.astype(np.int64)
        share = (position - index).astype(np.float32)
        index += np.arange(genes) * grid
        flat, basis = (
            self.values.reshape(genes * grid, polynomials),
            self._polynomials(totals)[:, :, None],
        )  # (N, K, 1)
        below = (flat.take(index, axis=0) @ basis)[..., 0]
        above = (flat.take(index + 1, axis=0) @ basis)[..., 0]
        return below + share * (above - below)

    def _polynomials(self, totals: np.ndarray) -> np.ndarray:
        """(N, K) Chebyshev polynomials of log library size."""
        low, high = self.log_depths
        place = (
            (2 * np.log(totals) - low - high) / (high - low)
            if high > low
            else np.zeros(len(totals))
        )
        return np.polynomial.chebyshev.chebvander(place, self.values.shape[2] - 1).astype(
            np.float32
        )


class Tables:
    """The tables of one truth: built when first asked for, again only for library sizes beyond those built for."""

    def __init__(self, truth: Truth):
        self.dispersion = truth.dispersion
        # Below a share of 2e-9 a gene is as good as silent: its expected log-CPM is under 0.002.
        self._lowest = max(float(truth.baseline.min()) - 6, -20.0)
        self._coarse: ExpectationGrid | None = None
        self._built: dict[float, ExpectationTable] = {}

    def cover(self, totals: np.ndarray) -> None:
        """Makes ready for these library sizes."""
        low, high = float(np.min(totals)), float(np.max(totals))
        known = self._coarse
        if known is not None:
            if known.low <= low and high <= known.high:
                return
            low, high = min(low, known.low * _DEPTH_MARGIN), max(high, known.high / _DEPTH_MARGIN)
        self._coarse = ExpectationGrid.build(
            self.dispersion, self._lowest, 0.0, low / _DEPTH_MARGIN, high * _DEPTH_MARGIN
        )
        self._built = {}

    def of(self, totals: np.ndarray, blur: float = 0.0) -> ExpectationTable:
        """The table for these library sizes; `blur` as in Coarse.table."""
        self.cover(totals)
        if blur not in self._built:
            self._built[blur] = self._coarse.table(blur)
        return self._built[blur]
