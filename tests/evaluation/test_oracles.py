"""The oracles as predictors, against counts drawn from the truth of the cohort."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.data.expression import log_cpm
from pipeline.gem.evaluation import metrics
from pipeline.gem.evaluation.evaluation_split import PredictedSplit
from pipeline.gem.simulation.generator import Truth, draw_counts, log_fractions


def test_the_omniscient_oracle_is_the_mean_over_new_counts(evaluation, rng):
    split, predictions = evaluation.by_split["test_random"]
    folder = evaluation.cohort.truth_folder
    truth = Truth.load(folder)
    hidden = pd.read_parquet(folder / "samples.parquet").set_index("sample_id")
    hidden = hidden.loc[split.samples["sample_id"]]
    fractions = log_fractions(
        truth, split.samples, hidden["stratum"].to_numpy(), hidden["donor"].to_numpy()
    )
    draws = []
    for _ in range(300):
        counts = draw_counts(fractions, split.totals.astype(float), truth.dispersion, rng)
        draws.append(log_cpm(counts, counts.sum(axis=1)))
    genes = pd.Index(truth.gene_id).get_indexer(evaluation.cohort.genes)
    expected = np.mean(draws, axis=0)[:, genes]
    assert np.abs(predictions["oracle_omniscient"][0].values - expected).mean() < 0.01


@pytest.mark.parametrize("name", ["oracle_metadata", "oracle_reference", "oracle_omniscient"])
def test_transforms_of_the_observed_counts_are_uniform(evaluation, name):
    predictions = [by_name[name][0] for _, by_name in evaluation.by_split.values()]
    pit = np.concatenate([predicted.pit.ravel() for predicted in predictions])
    assert pit.mean() == pytest.approx(0.5, abs=0.02)
    assert pit.std() == pytest.approx(np.sqrt(1 / 12), abs=0.02)


def test_the_true_change_is_zero_for_controls_and_marks_a_fifth_or_more(evaluation):
    split = evaluation.by_split["test_study"][0]
    changed, change = evaluation.predictors.true_change(split)
    assert not change[~split.treated].any() and changed[split.treated].any()
    np.testing.assert_array_equal(changed, np.abs(change) >= np.log(1.2))


def test_a_reference_changes_the_prediction_of_samples_of_new_studies_alone(
    evaluation, monkeypatch
):
    split = evaluation.by_split["test_study"][0]
    oracles = evaluation.predictors.by_name["oracle_reference"].__self__
    whole = oracles.from_reference(split)[0]
    known = np.arange(len(split.samples)) % 2 == 0
    named = pd.Series(np.where(known, "known", "new"), split.samples.index)
    mixed = replace(split, samples=split.samples.assign(study=named))
    monkeypatch.setattr(oracles, "studies", {"known"})
    monkeypatch.setattr(oracles, "_predict", lambda _split, rows, *_: _constant(rows.sum(), 1.0))
    monkeypatch.setattr(oracles, "_latest", (mixed, _constant(len(known), 0.0)))
    result = oracles.from_reference(mixed)[0]
    for name in ("values", "draw", "pit"):
        np.testing.assert_array_equal(getattr(result, name)[:, 0], ~known)
    assert result.uses_study_controls and whole.uses_study_controls
    metadata = evaluation.by_split["test_study"][1]["oracle_metadata"][0]
    assert (whole.values != metadata.values).any(axis=1).mean() > 0.5


def test_calibration_of_a_large_split_is_on_the_same_genes_with_and_without_a_reference(
    evaluation, monkeypatch
):
    monkeypatch.setattr(metrics, "PIT_VALUES", 1)
    monkeypatch.setattr(metrics, "LEAST_PIT_GENES", 4)
    split = evaluation.by_split["test_random"][0]
    oracles = evaluation.predictors.by_name["oracle_reference"].__self__
    monkeypatch.setattr(oracles, "_latest", None)
    known = set(split.samples["study"].unique()[::2])
    monkeypatch.setattr(oracles, "studies", known)
    assert 0 < split.samples["study"].isin(known).sum() < len(split.samples)
    assert oracles.from_reference(split)[0].pit.shape == (len(split.samples), 4)
    assert len(split.pit_genes) == 4 and split.pit_genes[-1] == split.counts.shape[1] - 1


def _constant(samples: int, value: float) -> PredictedSplit:
    return PredictedSplit(*(np.full((samples, 2), value) for _ in range(3)))
