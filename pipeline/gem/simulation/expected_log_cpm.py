"""E[log-CPM] of a negative-binomial count, exact and tabulated.

With Frullani's log(1 + y) = int_0^inf (1 - exp(-y t)) exp(-t) / t dt and the Laplace transform of
the negative binomial, E[exp(-c t)] = (1 + phi m (1 - exp(-t)))^(-1 / phi),

    E[log1p(s c)] = int_0^inf (1 - (1 + phi m (1 - exp(-s t)))^(-1 / phi)) exp(-t) / t dt.

Tables hold it as a function of log fraction (linear on a fine grid) and log library size (Chebyshev
polynomials); they agree with the integral to 1e-4 log-CPM.

N samples, G genes, K polynomials; otherwise the legend of truth.py.
"""

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline

from pipeline.gem.simulation.truth import Truth

_LOG_T_STEP = 0.3  # of the trapezoid rule over log t, which converges as exp(-pi^2 / step)
_COARSE, _FINE = 0.25, 0.02  # steps over log fraction: of exact integrals, of their cubic spline
_MAX_NOISE_SD = 0.3  # largest standard deviation of Normal noise that the exact integrals allow for
_NOISE_REACH = 6  # standard deviations that the quadrature over noise covers
_MARGIN = 1.1  # factor by which tables extend beyond the requested library sizes
# Over log library size: at least, and per unit of its range.
_CHEBYSHEV_NODES, _CHEBYSHEV_DENSITY = 8, 4.0
_NEGLIGIBLE = 2e-6  # log-CPM: polynomials of library size with smaller coefficients are left out

Range = tuple[float, float]


def expected_log_cpm(mean: np.ndarray, dispersion: np.ndarray, total: np.ndarray) -> np.ndarray:
    """E[log1p(1e6 c / total)] for c ~ NegativeBinomial(mean, dispersion), exact to 1e-9.

    The arguments broadcast.
    """
    scale = 1e6 / np.asarray(total, dtype=float)
    mean, dispersion = np.asarray(mean, dtype=float), np.asarray(dispersion, dtype=float)
    first = -21.0 - max(np.log(np.max(scale * mean) + 1e-300), 0.0)
    result = np.zeros(np.broadcast_shapes(mean.shape, dispersion.shape, scale.shape))
    for log_t in np.arange(first, 3.7, _LOG_T_STEP):
        t = np.exp(log_t)
        log_laplace = -np.log1p(-dispersion * mean * np.expm1(-scale * t)) / dispersion
        result += np.exp(-t) * -np.expm1(log_laplace)
    return _LOG_T_STEP * result


@dataclass(frozen=True)
class ExpectationGrid:
    """Exact integrals on a coarse grid of log fraction, as polynomials of log library size."""

    log_fractions: Range  # the range that tables are for
    totals: Range  # the range of library sizes
    grid: np.ndarray  # (points,) log fractions, beyond the range by the reach of the noise
    coefficients: np.ndarray  # (K, points, G) of Chebyshev polynomials

    @classmethod
    def build(
        cls, dispersion: np.ndarray, log_fractions: Range, totals: Range
    ) -> "ExpectationGrid":
        """The grid for genes of these dispersions (G,) and inclusive ranges."""
        (lowest, highest), (low, high) = log_fractions, totals
        margin = _NOISE_REACH * _MAX_NOISE_SD + 3 * _COARSE
        grid = np.arange(lowest - margin, highest + margin + _COARSE, _COARSE)
        angles = np.zeros(1)
        if high > low:
            number = max(_CHEBYSHEV_NODES, int(np.ceil(_CHEBYSHEV_DENSITY * np.log(high / low))))
            angles = (np.arange(number) + 0.5) * np.pi / number
        centre, half_width = (np.log(low) + np.log(high)) / 2, (np.log(high) - np.log(low)) / 2
        depths = np.exp(centre + half_width * np.cos(angles))
        exact = np.stack(
            [expected_log_cpm(np.exp(grid)[:, None] * depth, dispersion, depth) for depth in depths]
        )
        transform = 2 / len(angles) * np.cos(np.outer(np.arange(len(angles)), angles))
        transform[0] /= 2
        coefficients = np.tensordot(transform, exact, axes=1)
        needed = np.flatnonzero(np.abs(coefficients).max(axis=(1, 2)) > _NEGLIGIBLE)[-1] + 1
        return cls(log_fractions, totals, grid, coefficients[:needed])

    def table(self, noise_sd: float = 0.0) -> "ExpectationTable":
        """The table on the fine grid, averaged over Normal noise of this standard deviation on the
        log fraction. ValueError beyond 0.3."""
        if noise_sd > _MAX_NOISE_SD:
            raise ValueError(
                f"noise of standard deviation {noise_sd:.3g} on the log fraction: tables are built"
                f" for at most {_MAX_NOISE_SD}"
            )
        fine = np.arange(self.log_fractions[0], self.log_fractions[1] + _FINE, _FINE)
        nodes, weights = np.zeros(1), np.ones(1)
        if noise_sd:
            nodes, weights = np.polynomial.hermite_e.hermegauss(9)
        # A spline is linear in its values: one matrix interpolates and averages all genes and
        # polynomials.
        spline = CubicSpline(self.grid, np.eye(len(self.grid)))
        onto_fine = sum(
            weight * spline(fine + noise_sd * node)
            for node, weight in zip(nodes, weights / weights.sum(), strict=True)
        )
        polynomials, _, genes = self.coefficients.shape
        values = np.empty((genes, len(fine), polynomials), dtype=np.float32)
        for index, coefficient in enumerate(self.coefficients):
            values[:, :, index] = (onto_fine @ coefficient).T
        log_totals = (np.log(self.totals[0]), np.log(self.totals[1]))
        return ExpectationTable(float(fine[0]), log_totals, values)


@dataclass(frozen=True)
class ExpectationTable:
    """E[log-CPM] per gene as a function of log fraction and library size."""

    lowest: float  # log fraction
    log_totals: Range  # of log library size
    values: np.ndarray  # (G, grid, K) float32 coefficients of Chebyshev polynomials

    def __call__(self, log_fraction: np.ndarray, totals: np.ndarray) -> np.ndarray:
        """(N, G) float32 expectations for log fractions (N, G) and library sizes (N,)."""
        genes, grid, polynomials = self.values.shape
        position = np.clip((log_fraction - self.lowest) / _FINE, 0, grid - 1.001)
        index = position.astype(np.int64)
        fraction = (position - index).astype(np.float32)
        index += np.arange(genes) * grid
        flat = self.values.reshape(genes * grid, polynomials)
        basis = self._polynomials(totals)[:, :, None]  # (N, K, 1)
        below = (flat.take(index, axis=0) @ basis)[..., 0]
        above = (flat.take(index + 1, axis=0) @ basis)[..., 0]
        return below + fraction * (above - below)

    def _polynomials(self, totals: np.ndarray) -> np.ndarray:
        """(N, K) Chebyshev polynomials of log library size."""
        low, high = self.log_totals
        x = np.zeros(len(totals))
        if high > low:
            x = (2 * np.log(totals) - low - high) / (high - low)
        degree = self.values.shape[2] - 1
        return np.polynomial.chebyshev.chebvander(x, degree).astype(np.float32)


class ExpectationCache:
    """The tables of one truth, built on first use and rebuilt for library sizes out of range."""

    def __init__(self, truth: Truth):
        self.dispersion = truth.dispersion
        # Below a share of 2e-9 the expected log-CPM of a gene is under 0.002. That of a gene that a
        # study does not detect is zero: 1e-5 at the end of a longer table.
        lowest = max(float(truth.baseline.min()) - 6, -20.0)
        self._log_fractions = (-25.0 if truth.undetected_probability is not None else lowest, 0.0)
        self._grid: ExpectationGrid | None = None
        self._tables: dict[float, ExpectationTable] = {}

    def extend_to(self, totals: np.ndarray) -> None:
        """Extends the range of library sizes to cover `totals`; this discards narrower tables."""
        low, high = float(np.min(totals)), float(np.max(totals))
        if self._grid is not None:
            grid_low, grid_high = self._grid.totals
            if grid_low <= low and high <= grid_high:
                return
            low, high = min(low, grid_low * _MARGIN), max(high, grid_high / _MARGIN)
        totals_range = (low / _MARGIN, high * _MARGIN)
        self._grid = ExpectationGrid.build(self.dispersion, self._log_fractions, totals_range)
        self._tables = {}

    def table(self, totals: np.ndarray, noise_sd: float = 0.0) -> ExpectationTable:
        """The table for these library sizes; `noise_sd` as in `ExpectationGrid.table`."""
        self.extend_to(totals)
        if noise_sd not in self._tables:
            self._tables[noise_sd] = self._grid.table(noise_sd)
        return self._tables[noise_sd]
