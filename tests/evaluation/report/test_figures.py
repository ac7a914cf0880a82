"""Figures: from tables alone, the same table the same bytes, odd tables drawn all the same."""

import hashlib

import pandas as pd
import pytest

from pipeline.gem.evaluation.report import figures
from pipeline.gem.search import figures as search_figures
from pipeline.gem.training.learning_curves import learning_curves


def digest(path) -> str:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return hashlib.sha256(content).hexdigest()


def scores(**changes) -> pd.DataFrame:
    row = {
        "split": "test_random",
        "metric": "skill",
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "conditions": 3,
        "reason": "",
    }
    return pd.DataFrame(
        [
            row | {"predictor": "ridge"},
            row | {"predictor": "gem"} | changes,
            row | {"predictor": "oracle_metadata", "value": 1.0},
        ]
    )


def test_the_same_table_gives_the_same_bytes_and_another_value_another_figure(tmp_path):
    def draw(name: str, **changes) -> str:
        figures.split_scores(
            scores(**changes), "skill", "share", "higher", tmp_path / name, lowest=-0.5
        )
        return digest(tmp_path / name)

    assert draw("a.png") == draw("b.png")
    assert draw("a.png") != draw("c.png", value=0.55)


@pytest.mark.parametrize(
    "changes",
    [{"value": None, "low": None, "high": None}, {"value": -9.0}, {"low": None, "high": None}],
)
def test_scores_that_are_null_far_below_or_without_interval_are_drawn(tmp_path, changes):
    for name, table in (("odd.png", scores(**changes)), ("plain.png", scores())):
        figures.split_scores(table, "skill", "share", "higher", tmp_path / name, lowest=-0.5)
    assert digest(tmp_path / "odd.png") != digest(tmp_path / "plain.png"), (
        "what is missing or far away must be seen"
    )


def test_a_history_without_validation_is_drawn(tmp_path):
    names = [
        "nll_reconstruction",
        "nll_predictive",
        "kl_technical",
        "kl_biological",
        "kl_perturbation",
    ]
    history = pd.DataFrame(
        {"seed": 1, "epoch": [1, 2]} | {f"train/{name}": [2.0, 1.0] for name in names}
    )
    judged = history.assign(**{"validation/predictive_log_likelihood": [1.0, 2.0]})
    learning_curves(history, tmp_path / "without.png")
    learning_curves(judged, tmp_path / "with.png")
    assert digest(tmp_path / "without.png") != digest(tmp_path / "with.png")


@pytest.mark.parametrize(
    "states", [["complete"], ["complete", "pruned", "failed"], ["pruned", "failed"]]
)
def test_searches_of_any_outcome_are_drawn(tmp_path, states):
    number = len(states)
    columns = {
        "value": [1.0, 2.0, None][:number],
        "wins": [1.0, 0.0, None][:number],
        "model.hidden": [8, 16, 32][:number],
    }
    trials = pd.DataFrame({"trial": range(number), "state": states} | columns)
    search_figures.history(trials, "mse", tmp_path / "history.png")
    search_figures.slices(trials, {"model.hidden": True}, "mse", tmp_path / "slices.png")
    importance = pd.DataFrame(
        {"parameter": ["model.hidden"], "ped_anova": [float("nan")], "fanova": [0.3]}
    )
    search_figures.importance(importance, tmp_path / "importance.png")
    assert (
        len({digest(tmp_path / f"{name}.png") for name in ("history", "slices", "importance")}) == 3
    )


@pytest.mark.parametrize(
    "draw",
    [
        search_figures.slices,
        lambda trials, *rest: search_figures.contours(trials, [("a", "b")], *rest),
    ],
    ids=["slices", "contours"],
)
def test_where_trials_were_pruned_all_are_drawn_by_what_they_beat(tmp_path, draw):
    """Values when they stopped, at different epochs, do not compare."""
    trials = pd.DataFrame(
        {
            "trial": range(5),
            "state": ["complete", *4 * ["pruned"]],
            "value": [5.0, 1.0, 2.0, 3.0, 4.0],
            "wins": [1.0, 0.0, 0.25, 0.5, 0.75],
            "a": [1, 2, 4, 8, 16],
            "b": [4, 1, 3, 2, 5],
        }
    )

    def drawn(name: str, **changes) -> str:
        draw(trials.assign(**changes), {"a": True, "b": False}, "mse", tmp_path / name)
        return digest(tmp_path / name)

    first = drawn("first.png")
    assert first == drawn("values.png", value=[5.0, 9.0, 9.0, 9.0, 9.0])
    assert first != drawn("wins.png", wins=[1.0, 0.75, 0.5, 0.25, 0.0])
    assert first != drawn("complete.png", state="complete")
