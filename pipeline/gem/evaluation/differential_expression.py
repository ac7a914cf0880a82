"""Differential genes of treated against control samples, and scores of a predicted gene set.

n treated and m control samples, G genes. Expression is log-CPM.
"""

import numpy as np
from scipy.special import ndtri, stdtr
from scipy.stats import false_discovery_control, ttest_ind_from_stats

ROUNDING = 1e-12  # a variance of a mean, or a change, that is rounding and not signal


def differential_genes(
    treated: np.ndarray, control: np.ndarray, fdr: float = 0.05
) -> tuple[np.ndarray, np.ndarray]:
    """((G,) bool significant, (G,) difference of means) of treated (n, G) against control (m, G).

    Welch's t test per gene, Benjamini-Hochberg over genes (J. R. Stat. Soc. B 57, 1995):
    significant if the adjusted p <= `fdr`. A gene constant on both sides has p = 1 if the constants
    are equal, else 0 (Welch's limit). Raises ValueError with fewer than two samples on a side.
    Two are not enough either: a few treated samples whose variance is small by chance look certain.
    Of 1,000 genes without effect, against 20 controls, 44 are called with 2 treated samples, 7 with
    3, 1.7 with 4, 0.3 with 6 and 0.07 with 20.
    """
    if len(treated) < 2 or len(control) < 2:
        raise ValueError(
            f"got {len(treated)} treated and {len(control)} control samples; "
            "expected at least 2 of each: a t test needs both variances"
        )
    treated, control = treated.astype(np.float64), control.astype(np.float64)
    change = treated.mean(axis=0) - control.mean(axis=0)
    constant = (np.ptp(treated, axis=0) == 0) & (np.ptp(control, axis=0) == 0)
    # Means of constants carry rounding; the values themselves do not.
    change[constant] = (treated[0] - control[0])[constant]
    p = np.where(change == 0, 1.0, 0.0)
    p[~constant] = _welch(treated[:, ~constant], control[:, ~constant])
    return false_discovery_control(p) <= fdr, change


def _welch(treated: np.ndarray, control: np.ndarray) -> np.ndarray:
    """(G,) two-sided p of Welch's t.

    From moments: `ttest_ind` on samples warns of every gene that is constant on one side.
    """
    return ttest_ind_from_stats(
        *(treated.mean(axis=0), treated.std(axis=0, ddof=1), len(treated)),
        *(control.mean(axis=0), control.std(axis=0, ddof=1), len(control)),
        equal_var=False,
    ).pvalue


def changed_genes(
    change: np.ndarray,
    deviation: np.ndarray,
    degrees_of_freedom: int,
    share: float,
    fdr: float = 0.05,
) -> np.ndarray:
    """(G,) bool, as `differential_genes`, of changes (n, G) from the means of matched controls.

    `deviation` (G,): the standard deviation of controls, with `degrees_of_freedom`. `share`: the
    variance of the subtracted mean in units of one control's; 1 / m for the same m controls
    throughout, which gives Welch's test: the mean of a few matched controls is uncertain, however
    many others determine their deviation.
    Raises ValueError with fewer than two treated samples, or without a degree of freedom.
    """
    number = len(change)
    if number < 2 or degrees_of_freedom < 1:
        raise ValueError(
            f"got {number} treated samples and {degrees_of_freedom} degrees of freedom "
            "of controls; expected at least 2 and 1"
        )
    mean = change.mean(axis=0, dtype=np.float64)
    of_treated = change.var(axis=0, ddof=1, dtype=np.float64) / number
    of_control = np.square(deviation) * share
    variance = of_treated + of_control
    with np.errstate(divide="ignore", invalid="ignore"):
        # Welch-Satterthwaite.
        degrees = variance**2 / (of_treated**2 / (number - 1) + of_control**2 / degrees_of_freedom)
        statistic = np.abs(mean) / np.sqrt(variance)
        # Tails of t are heavier than the Normal's: with a smaller statistic p is above `fdr`, and
        # its adjusted p even more.
        large, p = statistic > ndtri(1 - fdr / 2), np.ones(len(mean))
        p[large] = 2 * stdtr(degrees[large], -statistic[large])
    constant = variance <= ROUNDING
    p[constant] = np.where(np.abs(mean[constant]) <= ROUNDING, 1.0, 0.0)
    return false_discovery_control(p) <= fdr


def de_direction(
    true_set: np.ndarray, true_change: np.ndarray, predicted_change: np.ndarray
) -> float:
    """Share of the true set (G,) bool whose change (G,) is predicted with the right sign.

    A predicted change of exactly 0 counts half, as by chance; NaN if the set is empty.
    """
    if not true_set.any():
        return float("nan")
    agreement = np.sign(true_change[true_set]) * np.sign(predicted_change[true_set])
    return float(0.5 + agreement.mean(dtype=np.float64) / 2)


def de_jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Genes in both sets over genes in either, of two sets (G,) bool; NaN if both are empty."""
    either = np.count_nonzero(first | second)
    return float(np.count_nonzero(first & second) / either) if either else float("nan")
