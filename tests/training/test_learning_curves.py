"""The figure of a training history."""

import pandas as pd
import pytest

from pipeline.gem.training.learning_curves import learning_curves


def test_histories_with_and_without_validation_are_drawn(tmp_path):
    likelihoods = ["nll_reconstruction", "nll_predictive"]
    divergences = ["kl_technical", "kl_biological", "kl_perturbation"]
    terms = {f"train/{name}": [2.0, 1.0] for name in likelihoods + divergences}
    history = pd.DataFrame({"seed": 1, "epoch": [1, 2]} | terms)
    validated = history.assign(**{"validation/predictive_log_likelihood": [1.0, 2.0]})
    figures = []
    for name, table in (("without.png", history), ("with.png", validated)):
        learning_curves(table, tmp_path / name)
        figures.append((tmp_path / name).read_bytes())
    assert all(figure.startswith(b"\x89PNG") for figure in figures)
    assert figures[0] != figures[1]


@pytest.mark.filterwarnings("error")
def test_a_history_of_one_epoch_is_drawn_without_a_warning(tmp_path):
    names = ["nll_reconstruction", "nll_predictive", "kl_technical", "kl_biological"]
    names += ["kl_perturbation"]
    history = pd.DataFrame({f"train/{name}": [2.0] for name in names} | {"seed": 1, "epoch": 1})
    history["validation/predictive_log_likelihood"] = 1.0
    learning_curves(history, tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()
