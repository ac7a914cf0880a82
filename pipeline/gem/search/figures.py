"""Figures of a search, mostly Optuna's own. The same trials give the same bytes.

Where trials were pruned, the final values do not compare. Slices and contours then show the win
rate of all trials (importance.py), and mark the pruned ones.
"""

import warnings
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import optuna
import pandas as pd
from optuna.trial import TrialState
from optuna.visualization import matplotlib as plots

from pipeline.gem.common.config import GROUPS
from pipeline.gem.common.plotting import COLOURS, GRID, MUTED, STYLE, save_figure
from pipeline.gem.search.importance import study_in_memory, win_rates
from pipeline.gem.search.search import Search
from pipeline.gem.search.search_config import SearchConfig
from pipeline.gem.search.space import CategoricalSpace

_PRUNED = {"marker": "o", "facecolor": "none", "edgecolor": COLOURS["pruned"], "linewidths": 1.5}
_BASELINE = {"color": MUTED, "linestyle": ":", "label": "baseline (trial 0)"}


def draw(
    folder: Path,
    search: Search,
    trials: pd.DataFrame,
    importance: pd.DataFrame,
    confirmed: pd.DataFrame,
) -> None:
    """Writes the figures. The tables are those of Search and Confirmation."""
    config, metric = search.config, search.config.primary.metric
    if len(config.objective) > 1:
        trials = trials.assign(value=trials[metric])
        importance = importance[importance["objective"] == metric]
    with warnings.catch_warnings(), plt.rc_context(STYLE):
        warnings.simplefilter("ignore")  # about few trials
        draw_history(search, trials, folder / "history.png")
        study, name = comparable_study(search)
        draw_slices(search, study, name, folder / "slices.png")
        for pair in contour_pairs(config, importance):
            axis = plots.plot_contour(study, list(pair), target_name=name)
            _save(axis, folder / f"contour_{'_'.join(pair)}.png")
        for pair in combinations(range(len(config.objective)), 2):
            names = "_".join(config.metrics[index] for index in pair)
            draw_pareto_front(search, pair, folder / f"pareto_{names}.png")
        draw_importance(importance, folder / "importance.png")
        if not confirmed.empty:
            draw_confirmation(confirmed, metric, folder / "confirmed.png")


def draw_history(search: Search, trials: pd.DataFrame, path: Path) -> None:
    """The value of every trial in order, and the best so far."""
    multiple = len(search.config.objective) > 1
    axis = plots.plot_optimization_history(
        search.queue.study,
        target=(lambda trial: trial.values[0]) if multiple else None,
        target_name=search.config.primary.metric,
    )
    axis.autoscale(False)  # the last values of pruned trials are often far below
    pruned = trials[trials["state"] == "pruned"]
    if len(pruned):
        axis.scatter(pruned["trial"], pruned["value"], label="pruned (last value)", **_PRUNED)
    for value in trials[trials["trial"] == 0]["value"].dropna():
        axis.axhline(value, **_BASELINE)
    axis.legend()
    _save(axis, path)


def comparable_study(search: Search) -> tuple[optuna.Study, str]:
    """(trials that compare by one value, the name of the value)."""
    objective = search.config.primary
    if search.counts()["pruned"]:
        trials = search.finished
        return study_in_memory(trials, win_rates(trials, objective.maximize)), "win rate"
    trials = search.complete
    values = [trial.values[0] for trial in trials]
    return study_in_memory(trials, values, objective.direction), objective.metric


def draw_slices(search: Search, study: optuna.Study, name: str, path: Path) -> None:
    """The value, or win rate, against each searched key."""
    axes = np.ravel(plots.plot_slice(study, target_name=name))
    axes[0].figure.set_size_inches(2 + 2.8 * len(axes), 4)
    trials = search.finished
    rates = win_rates(trials, search.config.primary.maximize)
    for axis in axes:
        key = axis.get_xlabel()
        axis.xaxis.label.set_fontsize(8)
        for trial, rate in zip(trials, rates, strict=True):
            if trial.state == TrialState.PRUNED and key in trial.params:
                is_category = isinstance(search.config.space[key], CategoricalSpace)
                value = trial.params[key]
                axis.scatter(repr(value) if is_category else value, rate, **_PRUNED)
    if search.counts()["pruned"]:
        axes[0].figure.suptitle("orange: pruned trials")
    _save(axes[0], path)


def contour_pairs(config: SearchConfig, importance: pd.DataFrame) -> list[tuple[str, str]]:
    """Latent size and KL weight of each group if both are searched, otherwise the two most
    important numeric keys. Keys of unknown importance are left out."""
    keys = list(importance.dropna(subset=["ped_anova"])["parameter"])
    groups = [(f"model.latent.{group}", f"train.kl_weight.{group}") for group in GROUPS]
    numeric = [key for key in keys if not isinstance(config.space[key], CategoricalSpace)]
    pairs = [pair for pair in groups if set(pair) <= set(keys)]
    return pairs or [tuple(numeric[:2])] * (len(numeric) > 1)


def draw_pareto_front(search: Search, pair: tuple[int, int], path: Path) -> None:
    """Two objectives of all complete trials. The Pareto front is that of all objectives."""
    first, second = pair
    axis = plots.plot_pareto_front(
        search.queue.study,
        target_names=[search.config.metrics[index] for index in pair],
        targets=lambda trial: (trial.values[first], trial.values[second]),
    )
    _save(axis, path)


def draw_importance(table: pd.DataFrame, path: Path) -> None:
    """Both measures side by side: they can disagree."""
    names, colours = ["ped_anova", "fanova"], [COLOURS["gem"], COLOURS["gem_tuned"]]
    shares = table.set_index("parameter")[names].fillna(0)
    axis = shares.plot.barh(color=colours, figsize=(7, 0.8 + 0.4 * len(table)))
    axis.invert_yaxis()
    axis.set(title="Importance of the searched keys", xlabel="share", ylabel="")
    _save(axis, path)


def draw_confirmation(table: pd.DataFrame, metric: str, path: Path) -> None:
    """The candidates with fresh seeds. A line joins the fits of one seed."""
    wide = table.pivot(index="trial", columns="seed", values=metric)
    wide = wide.loc[table["trial"].unique()]
    wide.index = ["baseline" if trial == 0 else f"trial {trial}" for trial in wide.index]
    axis = wide.plot(style="o-", alpha=0.7, figsize=(7, 3.6))
    axis.set_xticks(range(len(wide)), wide.index)
    axis.set(title="Confirmed with fresh seeds", xlabel="", ylabel=metric)
    _save(axis, path)


def _save(axis: plt.Axes, path: Path) -> None:
    # Optuna's figures use the style ggplot.
    for axes in axis.figure.axes:
        axes.set_facecolor("white")
        axes.grid(color=GRID)
    save_figure(axis.figure, path)
