"""The figure of a training: likelihood terms, KL and validation scores by epoch."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from pipeline.gem.common.plotting import GROUP_COLOURS, MUTED, STYLE, save_figure


@plt.rc_context(STYLE)
def learning_curves(history: pd.DataFrame, path: Path) -> None:
    """Likelihood terms, KL per group and validation scores over the epochs of the first seed."""
    table = history[history["seed"] == history["seed"].iloc[0]]
    figure, (terms, divergence, validation) = plt.subplots(1, 3, figsize=(13, 3.6))
    ways = {
        "nll_reconstruction": "reconstruction",
        "nll_predictive": "from metadata",
        "nll_reference": "from a reference",
    }
    for name, label in ways.items():
        if f"train/{name}" in table:
            terms.plot(table["epoch"], table[f"train/{name}"], label=label)
    terms.set(title="Negative log-likelihood, training", xlabel="epoch", ylabel="nats per sample")
    terms.legend()
    for group, colour in GROUP_COLOURS.items():
        divergence.plot(table["epoch"], table[f"train/kl_{group}"], color=colour, label=group)
    divergence.set(title="KL(posterior | prior)", xlabel="epoch", ylabel="nats per sample")
    divergence.set_ylim(bottom=0)
    divergence.legend()
    for name, label in {
        "predictive_log_likelihood": "predictive log-likelihood",
        "evidence_lower_bound": "evidence lower bound",
    }.items():
        if f"validation/{name}" in table:
            validation.plot(table["epoch"], table[f"validation/{name}"], label=label)
    if validation.lines:
        best = table.loc[table["validation/predictive_log_likelihood"].idxmax()]
        validation.axvline(
            best["epoch"], color=MUTED, linestyle=":", label=f"chosen: epoch {int(best['epoch'])}"
        )
        # The first epochs are far below and would flatten everything after them.
        values = table["validation/predictive_log_likelihood"]
        spread = values.max() - values.quantile(0.25)
        validation.set_ylim(values.quantile(0.25) - spread, values.max() + 0.3 * spread)
        validation.legend(loc="lower right")
    else:
        validation.text(
            0.5,
            0.5,
            "no validation split",
            ha="center",
            transform=validation.transAxes,
            color=MUTED,
        )
    validation.set(
        title="Validation (comparable across settings)", xlabel="epoch", ylabel="nats per sample"
    )
    figure.tight_layout()
    save_figure(figure, path)
