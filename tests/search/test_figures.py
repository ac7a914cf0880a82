"""Figures of searches with any outcome; the same trials give the same bytes."""

import hashlib
from pathlib import Path

import pandas as pd
import pytest
from support.searches import LATENT, NO_PRUNER, open_search, run, score, search_config

from pipeline.gem.common.errors import DivergedError
from pipeline.gem.search.figures import comparable_study, draw, draw_slices
from pipeline.gem.search.search import Search

TWO_OBJECTIVES = [
    {"metric": "predictive_log_likelihood", "direction": "maximize"},
    {"metric": "latent_leakage", "direction": "minimize"},
]
CHOICE = {"model.hidden": {"type": "categorical", "choices": [64, 128]}}


def draw_all(search: Search, folder: Path, confirmed: pd.DataFrame | None = None) -> set[str]:
    """Draws every figure. Returns the names of the files."""
    if confirmed is None:
        confirmed = pd.DataFrame()
    draw(folder, search, search.trials_table(), search.importance_table(), confirmed)
    for path in folder.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    return {path.stem for path in folder.iterdir()}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def evaluate_and_prune(trial) -> float:
    for epoch in range(1, 5):
        trial.report(score(trial.values) - epoch, epoch)
    return score(trial.values)


@pytest.mark.slow
def test_a_search_with_pruned_trials_is_drawn(params, tmp_path):
    search = run(open_search(params), 12, evaluate_and_prune)
    assert search.counts()["pruned"]
    confirmed = pd.DataFrame(
        {"trial": [0, 0, 7, 7], "seed": [2, 3] * 2, "predictive_log_likelihood": [1.0, 2, 3, None]}
    )
    names = draw_all(search, tmp_path / "first", confirmed)
    contour = "contour_model.latent.technical_train.kl_weight.technical"
    assert names == {"history", "slices", "importance", "confirmed", contour}
    assert draw_all(search, tmp_path / "second", confirmed) == names
    for name in names:
        assert digest(tmp_path / f"first/{name}.png") == digest(tmp_path / f"second/{name}.png")


def test_pruned_trials_are_visible_in_the_slices(params, tmp_path, monkeypatch):
    search = run(open_search(params), 8, evaluate_and_prune)
    study, name = comparable_study(search)
    draw_slices(search, study, name, tmp_path / "all.png")
    pruned = [trial for trial in search.finished if trial.state.name != "COMPLETE"]
    others = [trial for trial in search.finished if trial.state.name == "COMPLETE"]
    monkeypatch.setattr(Search, "finished", others)
    draw_slices(search, study, name, tmp_path / "complete.png")
    assert pruned and digest(tmp_path / "all.png") != digest(tmp_path / "complete.png")


def test_the_pareto_front_of_each_pair_of_objectives_is_drawn(params, tmp_path):
    config = search_config(objective=TWO_OBJECTIVES, pruner=NO_PRUNER)
    search = run(
        open_search(params, config), 8, lambda trial: [score(trial.values), trial.values[LATENT]]
    )
    names = draw_all(search, tmp_path / "figures")
    assert "pareto_predictive_log_likelihood_latent_leakage" in names


def fail(trial) -> float:
    raise DivergedError("broken")


@pytest.mark.parametrize("space", [None, CHOICE], ids=["numeric", "categorical"])
@pytest.mark.parametrize(
    ("trials", "evaluate"),
    [(0, None), (1, lambda trial: 1.0), (2, lambda trial: 1.0), (2, fail)],
    ids=["none", "one", "equal", "failed"],
)
def test_a_search_with_few_trials_is_drawn(params, tmp_path, space, trials, evaluate):
    config = search_config()
    if space:
        config = search_config(space=space, baseline={"model": {"hidden": 64}})
    search = run(open_search(params, config), trials, evaluate)
    assert {"history", "slices", "importance"} <= draw_all(search, tmp_path / "figures")
