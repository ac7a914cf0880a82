"""The simple predictors of conditions against plain means over samples."""

import numpy as np
import pandas as pd
import pytest
from support.settings import ROOT

from benchmarks.cohorts.declarations import read_task
from benchmarks.cohorts.rivals import PENALTY, RIVALS, Rivals, rival_predictions
from pipeline.gem.common.config import read_params
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.preparation.prepare import write_cohort

DEFAULTS = read_params(ROOT / "params.yaml")
HELD_OUT = {"donor": "donor 0", "perturbation": "drug A", "perturbation_time": "3 hours"}


@pytest.fixture
def prepared(cohorts, tmp_path) -> Cohort:
    """The tiny cohort without one condition; a tenth of the samples validates."""
    params = read_task("tiny", cohorts, DEFAULTS).params
    zero = ("test_random", "test_control", "perturbation", "study", "combination", "context")
    changes = {f"splits.{name}": 0.0 for name in (*zero, "validation_combination")}
    params = params.override(changes | {"splits.validation": 0.1, "splits.condition": [HELD_OUT]})
    write_cohort(open_source(params.data), params.data, params.splits, tmp_path / "cohort")
    return Cohort(tmp_path / "cohort")


def predictions(cohort: Cohort) -> dict[str, np.ndarray]:
    samples = cohort.rows(["test_condition"])
    assert len(samples) == 2
    return {name: found["it"] for name, found in rival_predictions(cohort, {"it": samples}).items()}


def visible(cohort: Cohort) -> tuple[pd.DataFrame, np.ndarray]:
    splits = [name for name in ("train", "validation") if cohort.has(name)]
    assert len(splits) == 2
    return cohort.rows(splits).reset_index(drop=True), cohort.expression(splits).astype(float)


def test_effects_are_those_of_other_contexts_at_the_same_time(prepared):
    found = predictions(prepared)
    assert set(found) == set(RIVALS)
    samples, expression = visible(prepared)

    def mean(donor: str, drug: str) -> np.ndarray:
        rows = (samples["donor"] == donor) & (samples["perturbation"] == drug)
        return expression[rows & (samples["perturbation_time"] == "3 hours")].mean(axis=0)

    control = mean("donor 0", "control")
    effects = {
        name: mean(name, "drug A") - mean(name, "control") for name in ("donor 1", "donor 2")
    }
    assert found["no_change_at_time"] == pytest.approx(control, abs=1e-5)
    additive = control + (effects["donor 1"] + effects["donor 2"]) / 2
    assert found["additive_at_time"] == pytest.approx(additive, abs=0.02)  # batches weigh equally
    rows = (samples["perturbation"] == "drug A") & (samples["perturbation_time"] == "3 hours")
    assert found["treatment_mean"] == pytest.approx(expression[rows].mean(axis=0), abs=1e-5)

    def profile(donor: str) -> np.ndarray:
        rows = (samples["donor"] == donor) & (samples["perturbation"] == "control")
        return expression[rows].mean(axis=0)

    own = profile("donor 0")
    nearest = max(effects, key=lambda donor: np.corrcoef(own, profile(donor))[0, 1])
    assert found["nearest_at_time"] == pytest.approx(control + effects[nearest], abs=0.02)


@pytest.mark.parametrize("kind", ["multilabel", "categorical"])
def test_the_effects_of_the_labels_of_an_unknown_set_are_summed(cohorts, samples, kind):
    params = read_task("tiny", cohorts, DEFAULTS).params
    data = params.override({"data.covariates.perturbation.perturbation": {"kind": kind}}).data
    rows = samples[samples["batch"] == "batch 0"].reset_index(drop=True)
    effects = {"control": [0.0, 0.0], "drug A": [1.0, 2.0], "drug B": [-3.0, 5.0]}
    base = rows["donor"].map({"donor 0": 2.0, "donor 1": 3.0, "donor 2": 7.0}).to_numpy()
    # Profiles that are not constant over genes have a correlation.
    values = base[:, None] * [1.0, 1.5] + np.stack([effects[n] for n in rows["perturbation"]])
    rivals = Rivals(data, rows, np.ones(len(rows)), values)
    found = rivals.predict(rows.iloc[[2]].assign(perturbation="drug A|drug B", donor="donor 2"))
    control = 7.0 * np.array([1.0, 1.5])
    expected = control + np.array([-2.0, 7.0]) if kind == "multilabel" else control
    for name in ("additive_at_time", "nearest_at_time"):
        np.testing.assert_allclose(found[name], expected)
    assert found["no_change_at_time"] == pytest.approx(control)
    other = rivals.predict(rows.iloc[[2]].assign(perturbation="drug A|drug C", donor="donor 2"))
    np.testing.assert_allclose(other["additive_at_time"], control)


def test_the_ridge_is_that_of_all_samples_with_a_level_of_each_time(prepared):
    found = predictions(prepared)["ridge_levels"]
    samples, expression = visible(prepared)
    test = prepared.rows(["test_condition"])
    hours = {"3 hours": 3.0, "1 day": 24.0, "24 hours": 24.0}
    names = ["batch", "donor", "perturbation", "perturbation_time"]
    number = np.log([hours[text] for text in samples["perturbation_time"]])

    def design(table: pd.DataFrame) -> np.ndarray:
        levels = [
            table[name].to_numpy()[:, None] == np.sort(samples[name].unique()) for name in names
        ]
        own = np.log([hours[text] for text in table["perturbation_time"]])
        scaled = (own - number.mean()) / number.std()
        return np.hstack([*levels, scaled[:, None]]).astype(float)

    inputs = design(samples)
    centre, mean = inputs.mean(axis=0), expression.mean(axis=0)
    normal = (inputs - centre).T @ (inputs - centre) + PENALTY * np.eye(inputs.shape[1])
    weights = np.linalg.solve(normal, (inputs - centre).T @ (expression - mean))
    expected = (mean + (design(test) - centre) @ weights).mean(axis=0)
    assert found == pytest.approx(expected, abs=0.02)  # the scale of the number differs slightly
    assert np.abs(found - mean).max() > 0.5


def test_an_unknown_context_and_treatment_have_the_controls_of_all_contexts(prepared):
    samples = prepared.rows(["test_condition"]).assign(donor="donor 9", perturbation="drug Z")
    found = rival_predictions(prepared, {"it": samples})
    known, expression = visible(prepared)
    control = (known["perturbation"] == "control") & (known["perturbation_time"] == "3 hours")
    expected = expression[control].mean(axis=0)
    assert np.abs(expected - expression.mean(axis=0)).max() > 0.1
    for name in ("no_change_at_time", "treatment_mean", "additive_at_time", "nearest_at_time"):
        assert found[name]["it"] == pytest.approx(expected, abs=1e-4), name


def test_an_unknown_context_has_its_known_effect_beside_the_controls_of_all_contexts(prepared):
    samples = prepared.rows(["test_condition"])
    found = rival_predictions(prepared, {"it": samples, "new": samples.assign(donor="donor 9")})
    effect = found["additive_at_time"]["it"] - found["no_change_at_time"]["it"]
    new = found["additive_at_time"]["new"] - found["no_change_at_time"]["new"]
    assert new == pytest.approx(effect, abs=1e-6)


def test_without_any_control_in_training_the_mean_is_known(prepared):
    samples = prepared.rows(["test_condition"])
    rivals = Rivals.fit(prepared)
    treated = (rivals.rows["perturbation"] != "control").to_numpy()
    rivals = Rivals(
        rivals.data, rivals.rows[treated], rivals.sizes[treated], rivals.values[treated]
    )
    expected = np.average(rivals.values, axis=0, weights=rivals.sizes)
    assert rivals.predict(samples)["no_change_at_time"] == pytest.approx(expected)


def test_without_controls_there_are_no_rivals(prepared):
    prepared.declared = prepared.declared.model_copy(update={"control": None})
    assert rival_predictions(prepared, {}) == {}
