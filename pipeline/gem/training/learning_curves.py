"""The figure of a training: likelihood terms, KL and validation scores by epoch."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from pipeline.gem.common.plotting import GROUP_COLOURS, MUTED, STYLE, save_figure

LIKELIHOOD_TERMS = {
    "train/nll_reconstruction": "reconstruction",
    "train/nll_predictive": "from metadata",
    "train/nll_reference": "from a reference",
}
SCORE = "validation/predictive_log_likelihood"
SCORES = {
    SCORE: "predictive log-likelihood",
    "validation/evidence_lower_bound": "evidence lower bound",
}


@plt.rc_context(STYLE)
def learning_curves(history: pd.DataFrame, path: Path) -> None:
    """Draws the epochs of the first seed of a history.csv."""
    table = history[history["seed"] == history["seed"].iloc[0]]
    figure, (terms, divergence, validation) = plt.subplots(1, 3, figsize=(13, 3.6))
    _plot_columns(terms, table, LIKELIHOOD_TERMS)
    terms.set_title("Negative log-likelihood, training")
    terms.legend()
    for group, colour in GROUP_COLOURS.items():
        divergence.plot(table["epoch"], table[f"train/kl_{group}"], color=colour, label=group)
    divergence.set_title("KL(posterior | prior)")
    divergence.set_ylim(bottom=0)
    divergence.legend()
    _plot_columns(validation, table, SCORES)
    validation.set_title("Validation (comparable across settings)")
    if validation.lines:
        _mark_best(validation, table)
    else:
        transform = validation.transAxes
        validation.text(
            0.5, 0.5, "no validation split", ha="center", transform=transform, color=MUTED
        )
    for axes in (terms, divergence, validation):
        axes.set(xlabel="epoch", ylabel="nats per sample")
    figure.tight_layout()
    save_figure(figure, path)


def _plot_columns(axes: plt.Axes, table: pd.DataFrame, labels: dict[str, str]) -> None:
    for column, label in labels.items():
        if column in table:
            axes.plot(table["epoch"], table[column], label=label)


def _mark_best(axes: plt.Axes, table: pd.DataFrame) -> None:
    scores = table[SCORE]
    best = int(table.loc[scores.idxmax(), "epoch"])
    axes.axvline(best, color=MUTED, linestyle=":", label=f"best: epoch {best}")
    # The first epochs are far below and would flatten everything after them.
    lower = scores.quantile(0.25)
    if spread := scores.max() - lower:  # none in a single epoch
        axes.set_ylim(lower - spread, scores.max() + 0.3 * spread)
    axes.legend(loc="lower right")
